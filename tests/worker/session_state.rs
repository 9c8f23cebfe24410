//! What a handler makes of its session and its transaction reaches no other event: G4. What is acked is durable: G1.

use std::time::Duration;

use crate::support::{Number, Record, SOON, Work};
use aftercommit::backoff::Backoff;
use aftercommit::testing::eventually;
use aftercommit::worker::{Delivery, Handler, HandlerError, Subscriber};
use sqlx::PgTransaction;

const KEYS: [&str; 5] = ["a", "b", "c", "d", "e"];
const QUICK: Backoff = Backoff { first: Duration::from_millis(5), max: Duration::from_millis(50) };

/// Writes the effect, and for every fifth number of a key runs this besides.
struct Leaves(&'static str);

impl Handler<Number> for Leaves {
    async fn handle(&self, tx: &mut PgTransaction<'_>, delivery: &Delivery<Number>) -> Result<(), HandlerError> {
        Record::good().handle(tx, delivery).await?;
        if delivery.event.n % 5 == 0 {
            sqlx::raw_sql(self.0).execute(&mut **tx).await?;
        }
        Ok(())
    }
}

fn leaves(name: &str, statement: &'static str) -> Subscriber {
    let subscriber = Subscriber::new(name).on::<Number>(Leaves(statement)).concurrency(2).max_batch(20);
    subscriber.max_attempts(1).time_limit(Duration::from_secs(10))
}

/// Another `effect` and a role that may do nothing but write effects.
async fn trap(work: &Work) {
    sqlx::raw_sql(
        "create schema trap; create table trap.effect (like public.effect);
         do $$ begin create role session_state_app; exception when others then null; end $$;
         grant all on effect to session_state_app",
    )
    .execute(&work.outbox.pool)
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_event_makes_of_its_session_reaches_no_other() {
    for statement in [
        "select set_config('search_path', 'trap', false)",
        "set local search_path = trap",
        "create temp table effect (like public.effect)",
        "set role session_state_app",
        "set local role session_state_app",
        "set session_replication_role = replica",
        "set timezone = 'Asia/Tokyo'; set app.tenant = 'bad'; select pg_advisory_lock(7)",
        "set session authorization session_state_app",
        "listen everything; declare c cursor with hold for select 1; set statement_timeout = '1ms'",
    ] {
        let work = Work::shared().await;
        trap(&work).await;
        work.send_many(&KEYS, 20).await;
        let worker = work.run(leaves("leaves", statement)).await;
        work.wait_for(100).await;
        work.wait_until_acked("leaves").await;
        worker.stop().await;
        work.assert_in_order(&KEYS, 20).await;
        work.assert_nothing_failed().await;
        assert_eq!(work.count().await, 100, "{statement}");
    }
}

/// One subscriber leaves a search path and a lock in each session, the other one works beside it in the same process.
#[tokio::test(flavor = "multi_thread")]
async fn nor_any_other_subscribers_events() {
    let work = Work::shared().await;
    trap(&work).await;
    sqlx::raw_sql("create table other (n bigint, path text)").execute(&work.outbox.pool).await.unwrap();
    let function = "create function other(event jsonb) returns void language sql as $$
        insert into public.other select (event -> 'data' ->> 'n')::bigint, current_setting('search_path') $$";
    sqlx::raw_sql(function).execute(&work.outbox.pool).await.unwrap();
    let leaves = leaves("leaves", "select set_config('search_path', 'trap, public', false), pg_advisory_lock(7)");
    let worker = work.worker_with(leaves).subscriber(Subscriber::sql("other", "other", ["*"]).unwrap());
    worker.provision().await.unwrap();
    let worker = crate::support::RunningWorker::start(worker);
    for n in 1..=20 {
        work.send("a", n).await;
        let done = async || {
            let seen: i64 = sqlx::query_scalar("select (select count(*) from other) + (select count(*) from effect)")
                .fetch_one(&work.outbox.pool)
                .await
                .unwrap();
            seen == 2 * n
        };
        eventually(SOON, "both have handled it", done).await.unwrap();
    }
    worker.stop().await;
    let paths: Vec<String> =
        sqlx::query_scalar("select distinct path from other").fetch_all(&work.outbox.pool).await.unwrap();
    assert_eq!(paths, ["\"$user\", public"]);
    work.assert_in_order(&["a"], 20).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_commits_the_workers_transaction_fails_by_name() {
    for commit in ["commit", "/* in between */ COMMIT AND CHAIN", "select 1; end"] {
        let work = Work::shared().await;
        work.send_many(&KEYS, 5).await;
        let worker = work.run(leaves("leaves", commit).backoff(QUICK)).await;
        eventually(SOON, "the dead letters", async || work.dead_letters().await.len() == 5).await.unwrap();
        work.wait_until_acked("leaves").await;
        worker.stop().await;
        for (n, _, reason) in work.dead_letters().await {
            assert_eq!((n, reason.as_str()), (5, "the handler committed the worker's transaction"), "{commit}");
        }
        work.assert_in_order(&KEYS, 4).await;
        assert_eq!(work.count().await, 20, "{commit}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn constraints_may_be_checked_early() {
    let work = Work::shared().await;
    work.send_many(&KEYS, 5).await;
    let worker = work.run(leaves("leaves", "set constraints all immediate")).await;
    work.wait_for(25).await;
    work.wait_until_acked("leaves").await;
    worker.stop().await;
    work.assert_in_order(&KEYS, 5).await;
    work.assert_nothing_failed().await;
}

/// What the setting is when the transaction commits.
#[tokio::test(flavor = "multi_thread")]
async fn an_event_is_durable_before_its_ack_whatever_the_database_has_set() {
    let work = Work::shared().await;
    sqlx::raw_sql(
        "create table seen (value text);
         create function see() returns trigger language plpgsql as $$
         begin insert into seen values (current_setting('synchronous_commit')); return null; end $$;
         create constraint trigger see after insert on effect deferrable initially deferred
            for each row execute function see();
         do $$ begin execute format('alter database %I set synchronous_commit = off', current_database()); end $$",
    )
    .execute(&work.outbox.pool)
    .await
    .unwrap();
    work.send_many(&KEYS, 5).await;
    let worker = work.run(leaves("durable", "set local synchronous_commit = local")).await;
    work.wait_for(25).await;
    worker.stop().await;
    let seen: Vec<String> =
        sqlx::query_scalar("select distinct value from seen").fetch_all(&work.outbox.pool).await.unwrap();
    assert_eq!(seen, ["on"]);
}
