//! What a worker keeps in memory.

use std::time::Duration;

use futures_util::{FutureExt, StreamExt};

use crate::support::{Act, Number, Record, Work};
use aftercommit::worker::Subscriber;

/// What is let go must be asked for again, one request each.
#[tokio::test(flavor = "multi_thread")]
async fn events_that_wait_for_a_moment_stay_in_memory() {
    let work = Work::shared().await;
    // Twenty of one key in front of each of the other: one executor has plenty to do, the second one something now and then.
    for n in 1..=60 {
        for hot in (n - 1) * 20 + 1..=n * 20 {
            work.send("hot", hot).await;
        }
        work.send("rare", n).await;
    }
    let subject = format!("$JS.ACK.{}.quick.>", work.outbox.naming.stream);
    let client = async_nats::connect(&work.outbox.nats.url).await.unwrap();
    let mut answers = client.subscribe(subject).await.unwrap();
    client.flush().await.unwrap();
    // 500 of them fit into the memory of this subscriber.
    let subscriber = Subscriber::new("quick")
        .on::<Number>(Record::new(|_| Act::Sleep(Duration::from_millis(1))))
        .concurrency(2)
        .max_batch(20);
    let worker = work.run(subscriber).await;
    work.wait_for(1260).await;
    work.wait_until_acked("quick").await;
    worker.stop().await;
    work.assert_in_order(&["hot"], 1200).await;
    work.assert_in_order(&["rare"], 60).await;
    let mut let_go = 0;
    while let Some(Some(answer)) = answers.next().now_or_never() {
        let_go += usize::from(answer.payload.starts_with(b"-NAK"));
    }
    assert!(let_go < 50, "{let_go} were let go");
}
