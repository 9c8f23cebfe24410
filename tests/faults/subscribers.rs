//! Subscribers of every kind. Each writes down what it sees, in the transaction of the event.

use std::time::Duration;

use aftercommit::backoff::Backoff;
use aftercommit::worker::{BatchError, BatchHandler, Delivery, FailurePolicy, Handler, HandlerError, Subscriber};
use sqlx::PgTransaction;

use super::history::Act;
use super::publishers::Changed;

/// Those that run in the worker that is written here.
pub const NAMES: [&str; 3] = ["block", "skip", "batch"];
/// The one that the program runs as its file says.
pub const SQL: &str = "books";
/// All, and whether failed events of it come behind later ones of their key.
pub const ALL: [(&str, bool); 4] = [("block", false), ("skip", true), ("batch", false), (SQL, false)];

/// What they write, and the function of the one that is written in SQL.
pub const TABLES: &str = "
    create table effect (id bigint generated always as identity, subscriber text not null, event_id uuid not null,
                         key text, version bigint, digest text not null, at timestamptz not null default clock_timestamp());
    create function book(event jsonb) returns void language sql as $$
        insert into effect (subscriber, event_id, key, version, digest)
        values ('books', (event ->> 'id')::uuid, event ->> 'partitionkey', (event -> 'data' ->> 'version')::bigint,
                encode(sha256(convert_to(event -> 'data' ->> 'body', 'UTF8')), 'hex')) $$";

/// The file of the program.
pub const FILE: &str = "
    [[subscriber]]
    name = 'books'
    sql.function = 'book'
    types = ['key.changed']
    concurrency = 3
    ack_wait = '1s'
    max_crashes = 1000
    time_limit = '5s'
    ";

#[derive(Clone, Copy)]
struct Note(&'static str);

impl Note {
    async fn write(self, tx: &mut PgTransaction<'_>, delivery: &Delivery<Changed>) -> Result<(), HandlerError> {
        // Headers must have come with the payload to which they belong.
        sqlx::query(
            "insert into effect (subscriber, event_id, key, version, digest)
             select $1, $2, $3, $4, case when digest = $6 then digest else 'another header' end
               from encode(sha256(convert_to($5, 'UTF8')), 'hex') as digest",
        )
        .bind(self.0)
        .bind(delivery.id.as_uuid())
        .bind(&delivery.key)
        .bind(delivery.event.version)
        .bind(&delivery.event.body)
        .bind(delivery.headers.get("digest").map_or("", String::as_str))
        .execute(&mut **tx)
        .await?;
        match delivery.event.fate.get(self.0) {
            Some(Act::Flaky) if delivery.attempt <= 2 => return Err(HandlerError::retry("bad luck")),
            Some(Act::Panic) if delivery.attempt <= 1 => panic!("worse luck"),
            Some(Act::Slow) => tokio::time::sleep(Duration::from_millis(1500)).await,
            Some(Act::Snooze) if uuid::Uuid::now_v7().as_bytes()[15].is_multiple_of(2) => {
                return Err(HandlerError::snooze(Duration::from_millis(20)));
            }
            Some(Act::Poison) => return Err(HandlerError::retry("it is poison")),
            Some(Act::Reject) => return Err(HandlerError::reject("it is refused")),
            _ => {}
        }
        Ok(())
    }
}

impl Handler<Changed> for Note {
    async fn handle(&self, tx: &mut PgTransaction<'_>, delivery: &Delivery<Changed>) -> Result<(), HandlerError> {
        self.write(tx, delivery).await
    }
}

impl BatchHandler<Changed> for Note {
    async fn handle(&self, tx: &mut PgTransaction<'_>, deliveries: &[Delivery<Changed>]) -> Result<(), BatchError> {
        for (n, delivery) in deliveries.iter().enumerate() {
            self.write(tx, delivery).await.map_err(|error| BatchError::at(n, error))?;
        }
        Ok(())
    }
}

pub fn all() -> Vec<Subscriber> {
    let backoff = Backoff { first: Duration::from_millis(10), max: Duration::from_millis(100) };
    [
        Subscriber::new("block").on::<Changed>(Note("block")).concurrency(4),
        Subscriber::new("skip").on::<Changed>(Note("skip")).failure_policy(FailurePolicy::Skip).max_batch(5),
        Subscriber::new("batch").on_batch::<Changed>(Note("batch")).debounce(Duration::from_millis(100)).max_batch(20),
    ]
    .into_iter()
    .map(|subscriber| {
        // Processes are killed here whatever runs, so nothing is to be given up for that.
        let subscriber = subscriber.max_attempts(5).max_crashes(1000).backoff(backoff);
        subscriber.ack_wait(Duration::from_secs(1)).time_limit(Duration::from_secs(5))
    })
    .collect()
}
