//! The smallest whole thing: an event, the repository that publishes it beside the change that it tells of, and the
//! subscriber that handles it once.
//!
//! `cargo run --features testing --example ping -- all` shows how it behaves, on servers that it starts for itself.

#[path = "ping/behaviours.rs"]
pub(crate) mod behaviours;

use std::process::ExitCode;

use aftercommit::outbox::Publisher;
use aftercommit::worker::{Delivery, Handler, HandlerError, Subscriber};
use aftercommit::{Event, EventId, outbox};
use serde::{Deserialize, Serialize};
use sqlx::PgTransaction;

/// What subscribers learn: a fact, in the past tense, with all that they need to know of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PingEvent {
    /// Which host was pinged.
    pub host: String,
    /// How many times by then.
    pub n: i64,
    /// What the ping says.
    pub message: String,
}

impl Event for PingEvent {
    const TYPE: &'static str = "ping.sent";

    // The pings of one host reach each subscriber in the order of their commits.
    fn key(&self) -> Option<String> {
        Some(format!("host-{}", self.host))
    }
}

/// The publisher's table. It borrows the caller's transaction, so it cannot commit the change without the event, nor
/// publish the event after the commit.
pub struct PingRepository;

impl PingRepository {
    /// In the publisher's database.
    pub const TABLE: &str = "create table host (name text primary key, pings bigint not null)";

    /// Counts a ping and publishes it; both happen when the caller commits, or neither.
    pub async fn send(tx: &mut PgTransaction<'_>, host: &str, message: &str) -> Result<EventId, Error> {
        // Locks the row of the host, and with it the place in the log of the host's next event.
        let n = sqlx::query_scalar(
            "insert into host as h values ($1, 1) on conflict (name) do update set pings = h.pings + 1 returning pings",
        )
        .bind(host)
        .fetch_one(&mut **tx)
        .await?;
        Ok(outbox::publish(tx, &PingEvent { host: host.into(), n, message: message.into() }).await?)
    }

    /// What it publishes, for the check that somebody subscribes to it.
    pub fn publisher() -> Publisher {
        Publisher::new("PingRepository").publishes::<PingEvent>()
    }
}

/// The subscriber's handler. What it writes commits together with the inbox row of the event, so it takes effect once.
pub struct Pong;

impl Pong {
    /// In the subscriber's database.
    pub const TABLE: &str = "create table pong (
        id bigint generated always as identity, event_id uuid, host text, n bigint, message text)";

    /// The durable name is the JetStream consumer's name and the key of the inbox.
    pub fn subscriber(name: &str) -> Subscriber {
        Subscriber::new(name).on::<PingEvent>(Self)
    }
}

impl Handler<PingEvent> for Pong {
    async fn handle(&self, tx: &mut PgTransaction<'_>, ping: &Delivery<PingEvent>) -> Result<(), HandlerError> {
        let PingEvent { host, n, message } = &ping.event;
        sqlx::query("insert into pong (event_id, host, n, message) values ($1, $2, $3, $4)")
            .bind(ping.id.as_uuid())
            .bind(host)
            .bind(n)
            .bind(message)
            .execute(&mut **tx)
            .await?;
        Ok(())
    }
}

/// Any error.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main]
async fn main() -> ExitCode {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    if wanted == [behaviours::SEND_AND_DIE] {
        return behaviours::send_and_die().await;
    }
    behaviours::show(&wanted).await
}
