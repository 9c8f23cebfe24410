//! How long it takes from a commit until a handler has the event (figure 6).

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::try_join_all;
use sqlx::PgTransaction;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use crate::bench::{Bench, ended, wait_until};
use crate::child::Child;
use crate::counts::{Counts, Place};
use crate::event::Measured;
use crate::figure::{Goal, Row, Series};
use crate::jetstream::delivery as bench_pull;
use crate::postgres::publish::Service;
use crate::postgres::work as bench_work;
use aftercommit_core::error::Error;
use aftercommit_core::jetstream::publisher::Messages;
use aftercommit_core::{jetstream, postgres};
use aftercommit_worker::{Delivery, Handler, HandlerError, Subscriber, Worker};

/// Connections that publish.
const PUBLISHERS: u64 = 8;
const RATES: [u64; 2] = [200, 2000];
/// How long to wait for the last event of a run.
const DEADLINE: Duration = Duration::from_mins(1);

/// What the handler saw since it was last asked.
#[derive(Default)]
struct Seen(Mutex<Vec<(Instant, Place)>>);

impl Seen {
    fn note(&self, delivery: &Delivery<Measured>) {
        let now = Instant::now();
        let (event_id, outbox_id, key) = (delivery.id.as_uuid(), delivery.sequence, delivery.key.clone());
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((now, Place { event_id, outbox_id, key }));
    }

    fn len(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn take(&self) -> Vec<(Instant, Place)> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A handler that does nothing but note the time.
struct Note(Arc<Seen>);

impl Handler<Measured> for Note {
    async fn handle(&self, _tx: &mut PgTransaction<'_>, delivery: &Delivery<Measured>) -> Result<(), HandlerError> {
        self.0.note(delivery);
        Ok(())
    }
}

/// In milliseconds.
#[derive(Debug, Clone, Copy)]
struct Taken {
    p50: f64,
    p99: f64,
}

impl Taken {
    fn of(mut times: Vec<f64>) -> Self {
        times.sort_by(f64::total_cmp);
        let at = |share: usize| times.get((times.len() * share / 100).min(times.len().saturating_sub(1)));
        let at = |share| at(share).copied().unwrap_or(f64::NAN);
        Self { p50: at(50), p99: at(99) }
    }
}

/// Figure 6, at two rates, with the floor and what a durable commit takes beside it.
pub(crate) async fn latency(bench: &Bench) -> Result<Vec<Row>, Error> {
    let mut counts = [Counts::default(); 2];
    let measured = bench.scratch(&bench.config.nats, async |scratch| {
        let seen = Arc::new(Seen::default());
        let worker = Worker::new(scratch.postgres.clone(), scratch.nats.clone(), scratch.naming.clone());
        let worker = worker.subscriber(Subscriber::new("latency").on::<Measured>(Note(Arc::clone(&seen))));
        worker.provision().await?;
        let stop = CancellationToken::new();
        let working = AbortOnDropHandle::new(tokio::spawn(worker.run(stop.clone())));
        let mut relay = Child::start("aftercommit-relay", &[], scratch)?;
        let mut services = Vec::new();
        for _ in 0..PUBLISHERS {
            services.push(Service::connect(&scratch.postgres).await?);
        }
        // Until everything is connected and leads.
        load(&mut services, &seen, &mut relay, 10, 1).await?;
        let arms = ["200 events/s", "2,000 events/s", "floor", "durable commit"];
        let rounds = bench.rounds("latency", arms, async |arm| match RATES.get(arm) {
            Some(rate) => {
                let events = bench.size(rate * 3, rate / 10);
                let (taken, counted) = load(&mut services, &seen, &mut relay, *rate, events).await?;
                counts[arm].add(counted);
                Ok(taken)
            }
            None => floor(bench, arm == 2).await,
        });
        let rounds = Box::pin(rounds).await?;
        stop.cancel();
        ended(working.await)?;
        relay.kill().await?;
        Ok(rounds)
    });
    let [slow, fast, floor, commit] = Box::pin(measured).await?;
    let p50 = |arm: &[Taken]| arm.iter().map(|taken| taken.p50).collect::<Vec<f64>>();
    let mut rows = Vec::new();
    for ((arm, counts), rate) in [&slow, &fast].into_iter().zip(counts).zip(["200", "2,000"]) {
        let row = Row::ratio(
            6,
            &format!("commit to handled at {rate} events/s, p50 ÷ floor"),
            Some(Goal::AtMost(2.0)),
            Series::new("p50", "ms", p50(arm)),
            Series::new("empty poll and publish to deliver", "ms", p50(&floor)),
        );
        rows.push(row.beside(Series::new("one durable commit", "ms", p50(&commit))).counted(counts));
        let p99 = Series::new("p99", "ms", arm.iter().map(|taken| taken.p99).collect());
        let name = format!("commit to handled at {rate} events/s, p99");
        rows.push(Row::absolute(6, &name, Some(Goal::AtMost(5.0)), p99).counted(counts));
    }
    Ok(rows)
}

/// Commits so many events at a steady rate, waits until all are handled, and tells how long each took.
async fn load(
    services: &mut [Service],
    seen: &Seen,
    relay: &mut Child,
    rate: u64,
    events: u64,
) -> Result<(Taken, Counts), Error> {
    let (next, started) = (AtomicU64::new(0), tokio::time::Instant::now());
    let publishing = services.iter_mut().enumerate().map(async |(service, connection)| {
        let mut committed: Vec<(Uuid, Instant)> = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= events {
                return Ok::<_, Error>(committed);
            }
            tokio::time::sleep_until(started + Duration::from_secs_f64(number as f64 / rate as f64)).await;
            // One publisher at a time has a key, so its events have an order.
            let key = format!("{service}-{}", number % 16);
            let id = connection.publish(&Measured::new(number, key)).await?;
            committed.push((id.as_uuid(), Instant::now()));
        }
    });
    let committed = try_join_all(publishing).await?.concat();
    wait_until("every event is handled", DEADLINE, async || {
        relay.check()?;
        Ok(seen.len() >= committed.len())
    })
    .await?;
    let seen = seen.take();
    let commits: HashMap<Uuid, Instant> = committed.iter().copied().collect();
    let times = seen.iter().filter_map(|(handled, place)| {
        Some(handled.saturating_duration_since(*commits.get(&place.event_id)?).as_secs_f64() * 1e3)
    });
    let times = times.collect();
    let ids: Vec<Uuid> = committed.into_iter().map(|(id, _)| id).collect();
    let places: Vec<Place> = seen.into_iter().map(|(_, place)| place).collect();
    Ok((Taken::of(times), Counts::compare(&ids, &places)))
}

/// An empty poll, and a message from publishing to delivery: what no relay that polls can do without. Or, for
/// comparison, a commit that waits for the disk.
async fn floor(bench: &Bench, poll_and_deliver: bool) -> Result<Taken, Error> {
    let samples = bench.size(500, 20);
    let measured = bench.scratch(&bench.config.nats, async |scratch| {
        let mut session = postgres::connect(&scratch.postgres, "aftercommit-bench").await?;
        bench_work::create_effects(&mut session).await?;
        scratch.fill(samples).await?;
        let mut times = Vec::new();
        for _ in 0..samples {
            let started = Instant::now();
            match poll_and_deliver {
                true => bench_work::empty_poll(&mut session).await?,
                false => bench_work::durable_commit(&mut session).await?,
            }
            times.push(started.elapsed().as_secs_f64() * 1e3);
        }
        let queries = Taken::of(times);
        if !poll_and_deliver {
            return Ok(queries);
        }
        let events = crate::postgres::envelopes(&mut session, samples, &scratch.naming.source).await?;
        let mut make = Messages::new(scratch.naming.prefix.clone());
        let messages = events.iter().map(|event| make.message(event));
        let publisher = jetstream::connect(&scratch.nats, "aftercommit-bench", "_INBOX").await?;
        let subscriber = jetstream::connect(&scratch.nats, "aftercommit-bench", "_INBOX").await?;
        let stream = &scratch.naming.stream;
        let delivered = bench_pull::publish_to_deliver(&publisher, &subscriber, stream, messages).await?;
        let delivered = Taken::of(delivered.iter().map(|took| took.as_secs_f64() * 1e3).collect());
        Ok(Taken { p50: queries.p50 + delivered.p50, p99: queries.p99 + delivered.p99 })
    });
    Box::pin(measured).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_the_sorted_times() {
        let taken = Taken::of((1..=200).rev().map(f64::from).collect());
        assert_eq!((taken.p50, taken.p99), (101.0, 199.0));
        assert!(Taken::of(Vec::new()).p50.is_nan());
    }
}
