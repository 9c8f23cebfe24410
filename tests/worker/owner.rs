//! G1: a consumer feeds the inbox of one database. Whoever else takes the same name is told so, before anything is lost.

use crate::support::{Number, Record, RunningWorker, SOON, Work};
use aftercommit::testing::eventually;
use aftercommit::worker::Subscriber;

fn numbers() -> Subscriber {
    Subscriber::new("shared").on::<Number>(Record::good())
}

async fn stamp(work: &Work) -> String {
    work.consumer("shared").await.cached_info().config.metadata["aftercommit.owner"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_databases_do_not_share_a_consumer() {
    let (first, types) = (Work::shared().await, ["a", "b", "c"]);
    let worker = first.run(numbers()).await;
    let second = Work::beside(&first.outbox).await;
    let before = stamp(&first).await;
    let error = second.worker_with(numbers()).provision().await.unwrap_err().to_string();
    assert!(error.contains("feeds the inbox of database ") && error.contains("--adopt"), "{error}");
    assert_eq!(stamp(&first).await, before, "nothing is changed");

    // A worker that is started all the same says what is wrong, and takes nothing.
    let thief = RunningWorker::start(second.worker_with(numbers()));
    eventually(SOON, "it says why it waits", async || {
        format!("{:?}", thief.report()).contains("each would lack what the other gets")
    })
    .await
    .unwrap();
    first.send_many(&types, 20).await;
    first.wait_for(60).await;
    first.assert_in_order(&types, 20).await;
    assert_eq!(second.count().await, 0);
    thief.stop().await;
    worker.stop().await;
}

/// As when a dump was restored into a new database: who says so takes the consumer over, and the worker of the other database
/// notices it although its connections hold.
#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_is_taken_over_by_another_database_that_says_so() {
    let first = Work::shared().await;
    let worker = first.run(numbers()).await;
    first.send_many(&["a"], 10).await;
    first.wait_for(10).await;
    let second = Work::beside(&first.outbox).await;
    let changes = second.worker_with(numbers()).adopt().provision().await.unwrap();
    assert!(changes.len() == 1 && changes[0].contains("whose it is: database "), "{changes:?}");
    eventually(SOON, "the first one lets it go", async || {
        format!("{:?}", worker.report()).contains("each would lack what the other gets")
    })
    .await
    .unwrap();
    let successor = RunningWorker::start(second.worker_with(numbers()));
    for n in 11..=20 {
        first.send("a", n).await;
    }
    second.wait_for(10).await;
    assert_eq!(first.count().await, 10);
    assert_eq!(second.worker_with(numbers()).provision().await.unwrap(), [""; 0], "it stays so");
    successor.stop().await;
    worker.stop().await;
}

/// Two services in one database have a subscriber of the same name, with other types.
#[tokio::test(flavor = "multi_thread")]
async fn a_namesake_does_not_narrow_a_consumer() {
    let work = Work::shared().await;
    work.worker_with(numbers()).provision().await.unwrap();
    let other = || Subscriber::sql("shared", "apply", ["other.type"]).unwrap();
    let error = work.worker_with(other()).provision().await.unwrap_err().to_string();
    assert!(error.contains("test.number, which this subscriber does not want") && error.contains("--adopt"), "{error}");
    // More types are no loss to anybody.
    let both = || Subscriber::sql("shared", "apply", ["test.number", "other.type"]).unwrap();
    assert_eq!(work.worker_with(both()).provision().await.unwrap().len(), 1);
    let all = || Subscriber::sql("shared", "apply", ["*"]).unwrap();
    assert_eq!(work.worker_with(all()).provision().await.unwrap().len(), 1);
    // It shall have one of them no more.
    assert!(work.worker_with(other()).provision().await.is_err());
    assert_eq!(work.worker_with(other()).adopt().provision().await.unwrap().len(), 1);
}
