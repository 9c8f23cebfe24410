//! What a million settled events cost that are still there (beside figure 5).

use std::collections::HashMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::bench::Bench;
use crate::child::Child;
use crate::counts::{Counts, Place};
use crate::figure::{Goal, Row, Series};
use crate::held::{RATE, at, latencies, write};
use crate::scratch::Scratch;
use aftercommit_core::error::Error;
use aftercommit_core::postgres;

/// Settled events.
const ROWS: u64 = 1_000_000;

/// From commit to stream beside a million events that are retained, and with an empty outbox: the same relay, started anew
/// for each span.
pub(crate) async fn retained(bench: &Bench) -> Result<Vec<Row>, Error> {
    let rows = bench.size(ROWS, 10_000);
    let length = bench.size(Duration::from_secs(10), Duration::from_secs(1));
    bench.say(&format!("retained events: writing {rows} events"));
    let mut counts = Counts::default();
    let [full, empty] = bench
        .scratch(&bench.config.nats, async |full| {
            full.fill(rows).await?;
            let mut session = postgres::connect(&full.postgres, "aftercommit-bench").await?;
            crate::postgres::settle(&mut session).await?;
            bench
                .scratch(&bench.config.nats, async |empty| {
                    let arms = ["a million retained", "an empty outbox"];
                    bench
                        .rounds("retained events", arms, async |arm| {
                            let scratch = if arm == 0 { full } else { empty };
                            let (latencies, counted) = span(scratch, length).await?;
                            counts.add(counted);
                            Ok(latencies)
                        })
                        .await
                })
                .await
        })
        .await?;
    let series = |arm: &str, spans: &[Vec<f64>], share: f64| {
        Series::new(arm, "ms", spans.iter().filter_map(|span| at(span, share)).collect())
    };
    let row = Row::ratio(
        5,
        "p50 from commit to stream with a million retained events ÷ with an empty outbox",
        Some(Goal::AtMost(1.2)),
        series("p50 with them", &full, 0.5),
        series("p50 without", &empty, 0.5),
    );
    let row = row.beside(series("p99 with them", &full, 0.99)).beside(series("p99 without", &empty, 0.99));
    Ok(vec![row.counted(counts).note(format!("{RATE} events/s in spans of {length:?}"))])
}

/// Commits events at a steady pace while a relay runs; returns how long each took, sorted.
async fn span(scratch: &Scratch, length: Duration) -> Result<(Vec<f64>, Counts), Error> {
    let mut relay = Child::start("aftercommit-relay", &[], scratch)?;
    let mut session = postgres::connect(&scratch.postgres, "aftercommit-bench").await?;
    let before = scratch.stream.extent().await?.last;
    let warm = write(&mut session, length / 5).await?;
    relay.until_stored(before + warm.len() as u64, scratch).await?;
    let committed = write(&mut session, length).await?;
    relay.until_stored(before + (warm.len() + committed.len()) as u64, scratch).await?;
    relay.kill().await?;
    let of: HashMap<Uuid, DateTime<Utc>> = committed.iter().copied().collect();
    let (mut stored, mut places) = (HashMap::new(), Vec::new());
    for arrival in scratch.arrived().await? {
        let event_id = arrival.event.id.as_uuid();
        if of.contains_key(&event_id) {
            stored.insert(event_id, arrival.stored);
            places.push(Place { event_id, outbox_id: arrival.event.sequence, key: arrival.event.key });
        }
    }
    let ids: Vec<Uuid> = committed.iter().map(|(id, _)| *id).collect();
    Ok((latencies(&committed, &stored), Counts::compare(&ids, &places)))
}
