//! How fast a worker handles a backlog (figures 9 and 10).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use sqlx::PgTransaction;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::bench::{Bench, ended, wait_until};
use crate::counts::{Counts, Place};
use crate::event::Measured;
use crate::figure::{Goal, Row, Series};
use crate::jetstream::delivery::{self as bench_pull, Puller};
use crate::postgres::work::{self as bench_work, Effect};
use crate::scratch::Scratch;
use aftercommit_core::config::PostgresConfig;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::jetstream;
use aftercommit_core::postgres;
use aftercommit_core::postgres::session::Session;
use aftercommit_relay::{Relay, RelayConfig};
use aftercommit_worker::{BatchError, BatchHandler, Delivery, Handler, HandlerError, Subscriber, Worker};

/// As a subscriber has them by default.
const CONCURRENCY: usize = 8;
const MAX_BATCH: usize = 100;
/// How long a run of an arm may take.
const DEADLINE: Duration = Duration::from_mins(5);

/// Writes a row for the event.
struct OneRow;

impl Handler<Measured> for OneRow {
    async fn handle(&self, tx: &mut PgTransaction<'_>, delivery: &Delivery<Measured>) -> Result<(), HandlerError> {
        bench_work::insert_effect(tx, delivery.id.as_uuid(), delivery.sequence, delivery.key.as_deref()).await?;
        Ok(())
    }
}

/// Writes the rows of several events in one statement.
struct ManyRows;

impl BatchHandler<Measured> for ManyRows {
    async fn handle(&self, tx: &mut PgTransaction<'_>, events: &[Delivery<Measured>]) -> Result<(), BatchError> {
        let effect = |event: &Delivery<Measured>| (event.id.as_uuid(), event.sequence, event.key.clone());
        bench_work::insert_effects(tx, &events.iter().map(effect).collect::<Vec<Effect>>()).await?;
        Ok(())
    }
}

/// Figure 9: a handler with one statement per event, and beside it one with a statement per batch.
pub(crate) async fn inbox(bench: &Bench) -> Result<Vec<Row>, Error> {
    let events = bench.events().div_ceil(4);
    let mut rows = Vec::new();
    for (at_once, name, goal) in [
        (false, "worker with inbox ÷ the same handler without, one-row handler", Some(Goal::AtLeast(0.6))),
        (true, "the same with a batch handler: one statement per batch", None),
    ] {
        let mut counts = Counts::default();
        let measured = bench.scratch(&bench.config.nats, async |scratch| {
            let mut session = prepare(scratch, events).await?;
            let rounds = bench.rounds("inbox", ["worker", "without inbox"], async |arm| {
                bench_work::clear_effects(&mut session).await?;
                if arm == 0 {
                    let subscriber = Subscriber::new(durable());
                    let subscriber = match at_once {
                        true => subscriber.on_batch::<Measured>(ManyRows),
                        false => subscriber.on::<Measured>(OneRow),
                    };
                    work(scratch, &mut session, subscriber, events).await?;
                } else {
                    without_inbox(scratch, events, at_once).await?;
                }
                // Without keys' order, which only the worker keeps.
                counts.add(effects(scratch, &mut session, arm == 0).await?);
                rate(&mut session).await
            });
            Box::pin(rounds).await
        });
        let [with, without] = Box::pin(measured).await?;
        let (with, without) =
            (Series::new("worker", "events/s", with), Series::new("without inbox", "events/s", without));
        rows.push(Row::ratio(9, name, goal, with, without).counted(counts));
    }
    Ok(rows)
}

/// Figure 10: a handler that is an SQL function, with many events in a transaction and with one.
pub(crate) async fn function(bench: &Bench) -> Result<Vec<Row>, Error> {
    let mut counts = Counts::default();
    let (many, few) = (bench.events().div_ceil(4), bench.events().div_ceil(40));
    let batched = bench.scratch(&bench.config.nats, async |of_many| {
        let single = bench.scratch(&bench.config.nats, async |of_few| {
            let mut sessions = [prepare(of_many, many).await?, prepare(of_few, few).await?];
            let rounds = bench.rounds("SQL function", ["batches", "single events"], async |arm| {
                let (scratch, events, batch) = [(of_many, many, MAX_BATCH), (of_few, few, 1)][arm];
                let session = &mut sessions[arm];
                bench_work::clear_effects(session).await?;
                let subscriber = Subscriber::sql(durable(), "bench_apply", ["*"])?.max_batch(batch);
                work(scratch, session, subscriber, events).await?;
                counts.add(effects(scratch, session, true).await?);
                rate(session).await
            });
            Box::pin(rounds).await
        });
        Box::pin(single).await
    });
    let [batched, single] = Box::pin(batched).await?;
    let row = Row::ratio(
        10,
        "worker with an SQL function ÷ with a transaction per event",
        Some(Goal::AtLeast(10.0)),
        Series::new("up to 100 events per transaction", "events/s", batched),
        Series::new("a transaction per event", "events/s", single),
    );
    Ok(vec![row.counted(counts)])
}

/// A stream with so many events, and the handlers' table.
async fn prepare(scratch: &Scratch, events: u64) -> Result<Session, Error> {
    scratch.fill(events).await?;
    let config = RelayConfig::new(scratch.postgres.clone(), scratch.nats.clone(), scratch.naming.clone());
    Relay::new(RelayConfig { once: true, ..config }).run(CancellationToken::new()).await?;
    let mut session = postgres::connect(&scratch.postgres, "aftercommit-bench").await?;
    bench_work::create_effects(&mut session).await?;
    Ok(session)
}

/// A subscriber's name that was never used.
fn durable() -> String {
    format!("bench-{}", uuid::Uuid::now_v7().simple())
}

/// Lets a worker handle the whole stream.
async fn work(scratch: &Scratch, session: &mut Session, subscriber: Subscriber, events: u64) -> Result<(), Error> {
    let worker = Worker::new(scratch.postgres.clone(), scratch.nats.clone(), scratch.naming.clone());
    let worker = worker.subscriber(subscriber.concurrency(CONCURRENCY));
    worker.provision().await?;
    let stop = CancellationToken::new();
    let mut working = AbortOnDropHandle::new(tokio::spawn(worker.run(stop.clone())));
    let handled = wait_until("every event is handled", DEADLINE, async || {
        if working.is_finished() {
            return Err(Error::new(ErrorKind::Integrity, "the worker ended"));
        }
        Ok(bench_work::written(session).await? >= events && bench_work::effects_span(session).await?.0 >= events)
    });
    handled.await?;
    stop.cancel();
    ended((&mut working).await)
}

/// The control: as many lanes with as large batches, and the same handler.
async fn without_inbox(scratch: &Scratch, events: u64, at_once: bool) -> Result<(), Error> {
    let connection = jetstream::connect(&scratch.nats, "aftercommit-bench", "_INBOX").await?;
    let pullers = bench_pull::pullers(&connection, &scratch.naming.stream, &durable(), CONCURRENCY, MAX_BATCH).await?;
    let handled = Arc::new(AtomicU64::new(0));
    let mut lanes = JoinSet::new();
    for puller in pullers {
        lanes.spawn(lane(scratch.postgres.clone(), puller, Arc::clone(&handled), events, at_once));
    }
    while let Some(lane) = lanes.join_next().await {
        ended(lane)?;
    }
    Ok(())
}

async fn lane(
    postgres: PostgresConfig,
    mut puller: Puller,
    handled: Arc<AtomicU64>,
    events: u64,
    at_once: bool,
) -> Result<(), Error> {
    let mut session = postgres::connect(&postgres, "aftercommit-bench").await?;
    while handled.load(Ordering::Relaxed) < events {
        let Some(delivered) = puller.next(Duration::from_millis(50)).await? else { continue };
        let batch = delivered.events()?;
        for event in &batch {
            let _: Measured = serde_json::from_slice(&event.payload)
                .map_err(|error| Error::with_source(ErrorKind::Integrity, "an event cannot be read", error))?;
        }
        bench_work::handle_without_inbox(&mut session, &batch, at_once).await?;
        delivered.ack().await?;
        handled.fetch_add(batch.len() as u64, Ordering::Relaxed);
    }
    Ok(())
}

/// Events per second from the first row that a handler wrote to the last one.
async fn rate(session: &mut Session) -> Result<f64, Error> {
    let (events, seconds) = bench_work::effects_span(session).await?;
    Ok(events.saturating_sub(1) as f64 / seconds)
}

/// What took effect, compared with what was committed; the order only if it is promised.
async fn effects(scratch: &Scratch, session: &mut Session, in_order: bool) -> Result<Counts, Error> {
    let mut outbox = postgres::connect(&scratch.postgres, "aftercommit-bench").await?;
    let committed = crate::postgres::event_ids(&mut outbox, u64::MAX).await?;
    let effects = bench_work::effects(session).await?.into_iter();
    let place = |(event_id, outbox_id, key): Effect| Place { event_id, outbox_id, key: key.filter(|_| in_order) };
    Ok(Counts::compare(&committed, &effects.map(place).collect::<Vec<_>>()))
}
