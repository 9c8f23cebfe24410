//! Subscribers are independent of each other, known by their names, and see nothing but their own event.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::Duration;

use crate::support::{Act, Number, Record, RunningWorker, SOON, Work, WorkerProcess};
use aftercommit::EventId;
use aftercommit::testing::eventually;
use aftercommit::worker::{Delivery, Handler, HandlerError, Subscriber};
use sqlx::PgTransaction;

/// Of two subscribers of one type one fails for good; the other one and the events of the same transaction go on.
#[tokio::test(flavor = "multi_thread")]
async fn a_failing_subscriber_stops_neither_the_others_nor_other_events() {
    let work = Work::shared().await;
    let failing = Record::new(|number| match number.event.n {
        2 => Act::Fail(HandlerError::retry("not this one")),
        _ => Act::Sleep(Duration::ZERO),
    });
    let worker = work
        .worker_with(Subscriber::new("failing").on::<Number>(failing).max_attempts(2))
        .subscriber(Subscriber::new("good").on::<Number>(Record::good()));
    worker.provision().await.unwrap();
    let worker = RunningWorker::start(worker);
    let _relay = work.outbox.relay();
    let mut tx = work.outbox.pool.begin().await.unwrap();
    for n in 1..=3 {
        aftercommit::outbox::publish(&mut tx, &Number { key: None, n }).await.unwrap();
    }
    tx.commit().await.unwrap();

    work.wait_for(5).await;
    eventually(SOON, "the failing event is given up", async || work.dead_letters().await.len() == 1).await.unwrap();
    let outcomes: Vec<(String, String, i64)> =
        sqlx::query_as("select subscriber, outcome, count(*) from aftercommit.inbox group by 1, 2 order by 1, 2")
            .fetch_all(&work.outbox.pool)
            .await
            .unwrap();
    let expected = [("failing", "dead", 1), ("failing", "handled", 2), ("good", "handled", 3)];
    assert_eq!(outcomes, expected.map(|(subscriber, outcome, n)| (subscriber.into(), outcome.into(), n)));
    worker.stop().await;
}

/// Whatever handles the events: the name is the identity.
#[tokio::test(flavor = "multi_thread")]
async fn another_handler_goes_on_where_the_first_one_ended() {
    struct Renamed;
    impl Handler<Number> for Renamed {
        async fn handle(&self, tx: &mut PgTransaction<'_>, number: &Delivery<Number>) -> Result<(), HandlerError> {
            sqlx::query("insert into effect (key, n, attempt) values ('renamed', $1, 1)")
                .bind(number.event.n)
                .execute(&mut **tx)
                .await?;
            Ok(())
        }
    }
    let work = Work::shared().await;
    let worker = work.run(Subscriber::new("durable").on::<Number>(Record::good())).await;
    work.send_many(&["a"], 3).await;
    work.wait_for(3).await;
    work.wait_until_acked("durable").await;
    worker.stop().await;
    work.send("a", 4).await;
    let worker = work.run(Subscriber::new("durable").on::<Number>(Renamed)).await;
    work.wait_for(4).await;
    work.wait_until_acked("durable").await;
    assert_eq!(work.numbers("renamed").await, [4]);
    worker.stop().await;
}

/// Each run of a handler sees the id, key and attempt of its own event, also behind one that failed, in one transaction
/// with others, and in a retry.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_one_event_leaks_into_the_next_run() {
    let work = Work::shared().await;
    let mut ids: Vec<(i64, EventId)> = Vec::new();
    for n in 1..=50 {
        let envelope = work.envelope(Some(if n % 2 == 0 { "even" } else { "odd" }), n);
        ids.push((n, envelope.id));
        work.put(&envelope).await;
    }
    let act = |number: &Delivery<Number>| match number.event.n % 7 {
        0 if number.attempt == 1 => Act::Fail(HandlerError::retry_after(Duration::ZERO, "once")),
        _ => Act::Succeed,
    };
    let worker = work.run(Subscriber::new("leaks").on::<Number>(Record::new(act)).concurrency(3)).await;
    work.wait_for(50).await;
    let seen: Vec<(i64, sqlx::types::Uuid, String, i32)> =
        sqlx::query_as("select n, event_id, key, attempt from effect order by n")
            .fetch_all(&work.outbox.pool)
            .await
            .unwrap();
    for ((n, id, key, attempt), (expected, expected_id)) in seen.into_iter().zip(ids) {
        assert_eq!((n, EventId::from(id)), (expected, expected_id));
        assert_eq!(key, if n % 2 == 0 { "even" } else { "odd" });
        assert_eq!(attempt, if n % 7 == 0 { 2 } else { 1 }, "number {n}");
    }
    worker.stop().await;
}

/// A worker does not begin on a consumer that delivers something else than its subscriber needs.
#[tokio::test(flavor = "multi_thread")]
async fn a_drifted_consumer_is_named_and_used_once_corrected() {
    let work = Work::shared().await;
    work.create_apply("").await;
    let subscriber = |event_type| Subscriber::sql("drifted", "apply", [event_type]).unwrap();
    let mut command =
        work.command("[[subscriber]]\nname = \"drifted\"\ntypes = [\"test.number\"]\nsql = { function = \"apply\" }\n");
    work.worker_with(subscriber("other.type")).adopt().provision().await.unwrap();
    work.send_many(&["a"], 3).await;
    let mut process = WorkerProcess(command.stderr(Stdio::piped()).spawn().unwrap());
    // The process dies with a failed test, and with it the reading ends.
    let mut lines = BufReader::new(process.0.stderr.take().unwrap()).lines().map_while(Result::ok);
    let told =
        tokio::task::spawn_blocking(move || lines.find(|line| line.contains("is not as this subscriber needs it")));
    let told = tokio::time::timeout(SOON, told).await.unwrap().unwrap().unwrap();
    for part in ["ERROR", "drifted", "other.type", "test.number", "aftercommit provision"] {
        assert!(told.contains(part), "no {part} in {told}");
    }
    assert_eq!(work.count().await, 0);

    work.worker_with(subscriber("test.number")).adopt().provision().await.unwrap();
    work.wait_for(3).await;
    assert_eq!(process.stop(), Some(0));
}
