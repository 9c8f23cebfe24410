//! What it costs a service that its changes are captured (figure 14).

use std::time::Instant;

use crate::bench::Bench;
use crate::figure::{Goal, Row, Series};
use crate::postgres::capture::{Service, TABLES};
use aftercommit_core::error::Error;

/// Figure 14: a statement with many rows, and transactions with one.
pub(crate) async fn capture(bench: &Bench) -> Result<Vec<Row>, Error> {
    let (rows, transactions) = (bench.size(100_000, 1000), bench.size(8000, 80));
    let measured = bench.scratch(&bench.config.nats, async |scratch| {
        let mut service = Service::connect(&scratch.postgres).await?;
        service.create(rows).await?;
        let arms = ["captured", "events alone", "made before", "trigger by hand", "without events"];
        let large = bench.rounds("capture, a large statement", arms, async |arm| {
            service.rest().await?;
            let started = Instant::now();
            match arm {
                0 => service.update_all("captured").await?,
                1 => service.insert_all().await?,
                2 => service.copy_all().await?,
                3 => service.update_all("by_hand").await?,
                _ => service.update_all("bare").await?,
            }
            let took = started.elapsed();
            service.expect(if arm == 4 { 0 } else { rows }).await?;
            Ok(took.as_secs_f64())
        });
        let large = Box::pin(large).await?;
        let small = bench.rounds("capture, small transactions", TABLES, async |arm| {
            service.rest().await?;
            let started = Instant::now();
            for transaction in 0..transactions {
                service.update_one(TABLES[arm], transaction * 7919 % rows + 1).await?;
            }
            let took = started.elapsed();
            service.expect(if TABLES[arm] == "bare" { 0 } else { transactions }).await?;
            Ok(took.as_secs_f64() * 1000.0 / transactions as f64)
        });
        Ok((large, Box::pin(small).await?))
    });
    let (large, small) = Box::pin(measured).await?;
    let [captured, events, copied, by_hand, bare] = large;
    let name = "an UPDATE of 100,000 captured rows ÷ INSERT … SELECT of the same events";
    let large = Row::ratio(
        14,
        name,
        Some(Goal::AtMost(2.0)),
        Series::new("captured", "s", captured),
        Series::new("the events alone", "s", events),
    )
    .beside(Series::new("events that were made before", "s", copied))
    .beside(Series::new("with a row trigger written by hand", "s", by_hand))
    .beside(Series::new("without events", "s", bare));
    let [captured, by_hand, published, bare] = small;
    let small = Row::ratio(
        14,
        "a transaction that changes one captured row ÷ with a trigger written by hand",
        Some(Goal::AtMost(1.3)),
        Series::new("captured", "ms", captured),
        Series::new("a trigger with an INSERT", "ms", by_hand),
    )
    .beside(Series::new("a trigger with aftercommit.publish()", "ms", published))
    .beside(Series::new("without events", "ms", bare));
    Ok(vec![large, small])
}
