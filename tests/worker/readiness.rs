//! G9: what is not ready is waited for, and is no failure of an event.

use crate::support::{Act, Number, Record, RunningWorker, SOON, Work};
use aftercommit::Event;
use aftercommit::testing::eventually;
use aftercommit::worker::{Delivery, Handler, HandlerError, Subscriber};
use serde::{Deserialize, Serialize};
use sqlx::PgTransaction;

async fn says(worker: &RunningWorker, words: &str) {
    eventually(SOON, "it says what it waits for", async || worker.report().subscribers[0].health.contains(words))
        .await
        .unwrap_or_else(|error| panic!("{error}: {words}: {:?}", worker.report()));
}

async fn run(work: &Work, sql: &str) {
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql.to_string())).execute(&work.outbox.pool).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_function_that_cannot_be_called_is_waited_for() {
    let work = Work::shared().await;
    run(&work, "create procedure apply(event jsonb) language sql as 'select 1'").await;
    let subscriber = Subscriber::sql("late", "apply", ["test.number"]).unwrap().max_attempts(1).max_batch(4);
    let worker = work.run(subscriber).await;
    for n in 1..=20 {
        work.send(&format!("key-{n}"), 1).await;
    }
    says(&worker, "is a procedure").await;
    run(&work, "drop procedure apply").await;
    says(&worker, "does not exist").await;
    work.create_apply("").await;
    work.wait_for(20).await;
    // In the middle, too.
    run(&work, "alter function apply(jsonb) rename to gone").await;
    for n in 21..=40 {
        work.send(&format!("key-{n}"), 1).await;
    }
    says(&worker, "does not exist").await;
    run(&work, "alter function gone(jsonb) rename to apply").await;
    work.wait_for(40).await;
    work.assert_nothing_failed().await;
    worker.stop().await;
}

/// What a later version of the service publishes.
#[derive(Serialize, Deserialize)]
struct Letter {
    text: String,
}

impl Event for Letter {
    const TYPE: &'static str = "test.letter";
}

struct Note;

impl Handler<Letter> for Note {
    async fn handle(&self, tx: &mut PgTransaction<'_>, _: &Delivery<Letter>) -> Result<(), HandlerError> {
        sqlx::query("insert into effect (key, n, attempt) values ('letter', 1, 1)").execute(&mut **tx).await?;
        Ok(())
    }
}

fn older() -> Subscriber {
    Subscriber::new("grown").on::<Number>(Record::new(|_: &Delivery<Number>| Act::Succeed)).max_attempts(1)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_of_an_unknown_type_waits_for_a_newer_instance() {
    let work = Work::shared().await;
    let active = work.run(older()).await;
    work.send("a", 1).await;
    work.wait_for(1).await;
    // The next version is provisioned, and stands by.
    let newer = work.worker_with(older().on::<Letter>(Note));
    newer.provision().await.unwrap();
    let newer = RunningWorker::start(newer);
    let mut letter = work.envelope(None, 1);
    letter.event_type = Letter::TYPE.into();
    letter.payload = br#"{"text": "new"}"#.to_vec().into();
    work.put(&letter).await;
    eventually(SOON, "it waits", async || active.report().subscribers[0].held == 1).await.unwrap();
    work.send("a", 2).await;
    work.wait_for(2).await;
    assert_eq!(work.dead_letters().await, []);
    active.stop().await;
    work.wait_for(3).await;
    assert_eq!(work.numbers("letter").await, [1]);
    work.wait_until_acked("grown").await;
    assert_eq!(work.dead_letters().await, []);
    newer.stop().await;
}
