//! The smallest whole thing: an event and the repository that publishes it beside the change that it tells of.
//!
//! `DATABASE_URL=postgres://… cargo run --example ping -- "hello"`

use std::error::Error;

use aftercommit::config::PostgresConfig;
use aftercommit::{Event, EventId, admin, outbox};
use serde::{Deserialize, Serialize};
use sqlx::{PgPool, PgTransaction};

/// What subscribers learn: a fact, in the past tense, with all that they need to know of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PingEvent {
    /// The row that was added.
    pub ping: i64,
    /// What it says.
    pub message: String,
}

impl Event for PingEvent {
    const TYPE: &'static str = "ping.sent";

    fn key(&self) -> Option<String> {
        Some(format!("ping-{}", self.ping))
    }
}

/// The table of pings. It borrows the caller's transaction, so it cannot commit the change without the event, nor
/// publish the event after the commit.
pub struct PingRepository;

impl PingRepository {
    /// Where the pings are.
    pub const TABLE: &str =
        "create table if not exists ping (id bigint generated always as identity primary key, message text not null)";

    /// Adds a ping and publishes it; both happen when the caller commits, or neither.
    pub async fn send(tx: &mut PgTransaction<'_>, message: &str) -> Result<EventId, Box<dyn Error + Send + Sync>> {
        let ping = sqlx::query_scalar("insert into ping (message) values ($1) returning id")
            .bind(message)
            .fetch_one(&mut **tx)
            .await?;
        Ok(outbox::publish(tx, &PingEvent { ping, message: message.into() }).await?)
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let url = std::env::var("DATABASE_URL")?;
    let message = std::env::args().nth(1).unwrap_or_else(|| "hello".into());
    admin::migrate(&PostgresConfig { url: url.clone() }).await?;

    let pool = PgPool::connect(&url).await?;
    let mut tx = pool.begin().await?;
    sqlx::query(PingRepository::TABLE).execute(&mut *tx).await?;
    let id = PingRepository::send(&mut tx, &message).await?;
    tx.commit().await?;
    println!("sent {id}");
    Ok(())
}
