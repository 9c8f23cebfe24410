//! An outage that only one event has is a poison: G6, G9. It becomes a dead letter that names what it did, and what is
//! no event's doing costs no attempt.

use std::time::Duration;

use crate::support::{Number, Record, SOON, Work};
use aftercommit::backoff::Backoff;
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, Postgres, PostgresOptions};
use aftercommit::worker::{Delivery, Handler, HandlerError, Subscriber};
use sqlx::{AssertSqlSafe, PgTransaction};

const GOOD: [&str; 6] = ["a", "b", "c", "d", "e", "f"];
const EACH: i64 = 20;
const QUICK: Backoff = Backoff { first: Duration::from_millis(5), max: Duration::from_millis(50) };

/// Writes the effect, and for the second event of the key `bad` runs this statement.
struct Bad(&'static str);

impl Handler<Number> for Bad {
    async fn handle(&self, tx: &mut PgTransaction<'_>, delivery: &Delivery<Number>) -> Result<(), HandlerError> {
        Record::good().handle(tx, delivery).await?;
        if delivery.key.as_deref() == Some("bad") && delivery.event.n == 2 {
            sqlx::raw_sql(self.0).execute(&mut **tx).await?;
        }
        Ok(())
    }
}

fn subscriber(statement: &'static str) -> Subscriber {
    let subscriber = Subscriber::new("doubt").on::<Number>(Bad(statement)).concurrency(4).max_batch(10);
    subscriber.max_attempts(3).backoff(QUICK).time_limit(Duration::from_secs(5))
}

/// Good events and, among the first of them, three of the key `bad`.
async fn send(work: &Work) {
    for n in 1..=EACH {
        for key in GOOD {
            work.send(key, n).await;
        }
        if n <= 3 {
            work.send("bad", n).await;
        }
    }
}

async fn dead(work: &Work) -> (i64, i32, String) {
    let letters = async || !work.dead_letters().await.is_empty();
    eventually(SOON, "the dead letter", letters).await.unwrap();
    work.wait_for(GOOD.len() as i64 * EACH + 2).await;
    work.wait_until_acked("doubt").await;
    work.assert_in_order(&GOOD, EACH).await;
    assert_eq!(work.numbers("bad").await, [1, 3]);
    assert_eq!(suspects(work).await, 0, "nothing stays on record");
    let mut letters = work.dead_letters().await;
    assert_eq!(letters.len(), 1, "{letters:?}");
    letters.remove(0)
}

/// What becomes of an event that does this, among good ones.
async fn dies_of(statement: &'static str) -> (i64, i32, String) {
    let work = Work::shared().await;
    send(&work).await;
    let worker = work.run(subscriber(statement)).await;
    let dead = dead(&work).await;
    worker.stop().await;
    dead
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_ends_its_session_becomes_a_dead_letter() {
    let (n, attempts, reason) = dies_of("select pg_terminate_backend(pg_backend_pid())").await;
    assert_eq!((n, attempts), (2, 3), "{reason}");
    assert!(reason.starts_with("its database session was lost 4 times while this event ran: "), "{reason}");
    assert!(reason.contains("administrator command"), "{reason}");
}

#[tokio::test(flavor = "multi_thread")]
async fn so_does_one_whose_errors_look_like_an_outage() {
    for code in ["53400", "53200", "58P01", "26000", "25006", "42P05", "08006", "57P01"] {
        let work = Work::shared().await;
        send(&work).await;
        let raise = format!("do $$ begin raise exception 'as told' using errcode = '{code}'; end $$");
        let worker = work.run(subscriber(raise.leak())).await;
        let (n, attempts, reason) = dead(&work).await;
        worker.stop().await;
        assert_eq!((n, attempts), (2, 3), "{code}: {reason}");
        assert!(reason.starts_with("as told"), "{code}: {reason}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_that_is_not_free_in_time_costs_no_attempt() {
    let work = Work::shared().await;
    sqlx::raw_sql("create table locked (n int)").execute(&work.outbox.pool).await.unwrap();
    let mut blocker = work.outbox.pool.begin().await.unwrap();
    sqlx::raw_sql("lock table locked").execute(&mut *blocker).await.unwrap();
    work.send("bad", 2).await;
    let waits = "set local lock_timeout = '20ms'; select count(*) from locked";
    let worker = work.run(subscriber(waits).max_attempts(1)).await;
    let refused = async || std::fs::read_to_string(Postgres::shared().await.unwrap().log()).unwrap();
    eventually(SOON, "it waited in vain", async || refused().await.contains("lock timeout")).await.unwrap();
    blocker.rollback().await.unwrap();
    work.wait_for(1).await;
    work.wait_until_acked("doubt").await;
    work.assert_nothing_failed().await;
    worker.stop().await;
}

/// Binds more parameters than the protocol has room for.
struct Greedy;

impl Handler<Number> for Greedy {
    async fn handle(&self, tx: &mut PgTransaction<'_>, delivery: &Delivery<Number>) -> Result<(), HandlerError> {
        Record::good().handle(tx, delivery).await?;
        if delivery.key.as_deref() == Some("bad") && delivery.event.n == 2 {
            let parameters: Vec<String> = (1..=70_000).map(|n| format!("${n}")).collect();
            let statement = format!("select 1 where 1 in ({})", parameters.join(", "));
            let query = (0..70_000).fold(sqlx::query(AssertSqlSafe(statement)), |query, n| query.bind(n));
            query.execute(&mut **tx).await?;
        }
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn so_does_one_that_asks_the_driver_for_what_it_cannot_do() {
    let work = Work::shared().await;
    send(&work).await;
    let greedy = Subscriber::new("doubt").on::<Number>(Greedy).max_attempts(3).backoff(QUICK);
    let worker = work.run(greedy).await;
    let (n, attempts, reason) = dead(&work).await;
    worker.stop().await;
    assert_eq!((n, attempts), (2, 3), "{reason}");
}

/// The process of the session is killed, as by the OOM killer, and PostgreSQL starts all sessions anew.
#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_crashes_the_server_becomes_a_dead_letter() {
    let postgres = Postgres::start(PostgresOptions { fsync: false, ..PostgresOptions::default() }).await.unwrap();
    let work = Work::on(postgres.create_database().await.unwrap(), Nats::shared().await.unwrap().url()).await;
    send(&work).await;
    let kill = "create temp table pid (line text);
                do $$ begin execute format('copy pid from program ''kill -9 %s''', pg_backend_pid()); end $$";
    let worker = work.run(subscriber(kill)).await;
    // Each crash ends the test's own sessions, too.
    let mut letters = Vec::new();
    let gave_up = eventually(SOON, "the dead letter", async || {
        let query = "select attempts, reason from aftercommit.dead_letter";
        let found = sqlx::query_as::<_, (i32, String)>(query).fetch_all(&work.outbox.pool).await;
        letters = found.unwrap_or_default();
        !letters.is_empty()
    });
    gave_up.await.unwrap();
    let (n, attempts, reason) = dead(&work).await;
    worker.stop().await;
    assert_eq!((n, attempts), (2, 0), "{reason}");
    assert_eq!(reason, "the database crashed 4 times while this event ran");
}

/// A handler that waits for a lock in its second statement, or that no cancelling ends.
#[tokio::test(flavor = "multi_thread")]
async fn an_event_over_its_time_limit_fails_and_holds_up_nobody() {
    for hang in [
        "select pg_sleep(0.7); select pg_sleep(60)",
        "do $$ declare i int; begin
            for i in 1..30 loop
                begin perform pg_sleep(0.5); exception when query_canceled then null; end;
            end loop;
        end $$",
    ] {
        let work = Work::shared().await;
        send(&work).await;
        let worker = work.run(subscriber(hang).max_attempts(2).time_limit(Duration::from_secs(1))).await;
        let (n, attempts, reason) = dead(&work).await;
        worker.stop().await;
        assert_eq!((n, attempts), (2, 2), "{reason}");
        assert!(reason.contains("time limit") || reason.contains("statement timeout"), "{reason}");
    }
}

/// Panics where nobody expects it: when it is dropped.
struct Drops;

impl Drop for Drops {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            panic!("as told");
        }
    }
}

struct PanicsLate;

impl Handler<Number> for PanicsLate {
    async fn handle(&self, tx: &mut PgTransaction<'_>, delivery: &Delivery<Number>) -> Result<(), HandlerError> {
        Record::good().handle(tx, delivery).await?;
        if delivery.key.as_deref() == Some("bad") && delivery.event.n == 2 {
            let _drops = Drops;
            std::future::pending::<()>().await;
        }
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_of_what_a_handler_leaves_behind_is_its_failure() {
    let work = Work::shared().await;
    send(&work).await;
    let late = Subscriber::new("doubt").on::<Number>(PanicsLate).max_attempts(2).backoff(QUICK);
    let worker = work.run(late.time_limit(Duration::from_secs(1))).await;
    let (n, attempts, reason) = dead(&work).await;
    worker.stop().await;
    assert_eq!((n, attempts), (2, 2), "{reason}");
    assert!(reason.contains("the handler panicked: as told"), "{reason}");
}

/// A sleep of the server, in one batch with others: none of them has to wait for several time limits.
#[tokio::test(flavor = "multi_thread")]
async fn a_hanging_function_is_found_within_two_time_limits() {
    let work = Work::shared().await;
    work.create_apply("if event ->> 'partitionkey' = 'bad' then perform pg_sleep(60); end if;").await;
    let keys: Vec<String> = (0..60).map(|n| format!("k{n}")).collect();
    for (n, key) in keys.iter().enumerate() {
        work.send(key, 1).await;
        if n == 30 {
            work.send("bad", 1).await;
        }
    }
    let limit = Duration::from_secs(2);
    let function = Subscriber::sql("doubt", "apply", ["*"]).unwrap().concurrency(1).max_attempts(1);
    let started = std::time::Instant::now();
    let worker = work.run(function.time_limit(limit)).await;
    work.wait_for(60).await;
    eventually(SOON, "the dead letter", async || work.dead_letters().await.len() == 1).await.unwrap();
    assert!(started.elapsed() < limit * 4, "{:?}", started.elapsed());
    worker.stop().await;
}

async fn suspects(work: &Work) -> i64 {
    sqlx::query_scalar("select count(*) from aftercommit.attempt").fetch_one(&work.outbox.pool).await.unwrap()
}

/// The server ends every session while events run.
#[tokio::test(flavor = "multi_thread")]
async fn sessions_that_somebody_else_ends_cost_no_attempt() {
    let work = Work::shared().await;
    let slowly = |_: &Delivery<Number>| crate::support::Act::Sleep(Duration::from_millis(20));
    work.send_many(&GOOD, EACH).await;
    let strict = Subscriber::new("doubt").on::<Number>(Record::new(slowly)).max_attempts(1).max_batch(5);
    let worker = work.run(strict).await;
    for round in 1..=3 {
        work.wait_for(round * 20).await;
        // What was under suspicion has shown that it is healthy.
        eventually(SOON, "nobody is suspected", async || suspects(&work).await == 0).await.unwrap();
        let all = "select count(pg_terminate_backend(pid)) from pg_stat_activity
                    where datname = current_database() and application_name = 'aftercommit-worker'";
        let ends_some = async || sqlx::query_scalar::<_, i64>(all).fetch_one(&work.outbox.pool).await.unwrap() > 0;
        eventually(SOON, "sessions end", ends_some).await.unwrap();
    }
    work.wait_for(GOOD.len() as i64 * EACH).await;
    work.wait_until_acked("doubt").await;
    work.assert_in_order(&GOOD, EACH).await;
    work.assert_nothing_failed().await;
    worker.stop().await;
}
