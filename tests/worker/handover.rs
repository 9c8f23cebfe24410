//! G5: an instance that stops hands over at once and lets finish what runs. Meanwhile its successor works on everything else,
//! and nothing runs twice or out of order. Instances whose database is slow do not take the lease from each other.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::support::{Number, Record, RunningWorker, SOON, Work, WorkerProcess};
use aftercommit::backoff::Backoff;
use aftercommit::testing::eventually;
use aftercommit::worker::{Delivery, Handler, HandlerError, Subscriber};
use sqlx::PgTransaction;
use tokio::sync::watch;

const SLOW: [&str; 4] = ["slow-1", "slow-2", "slow-3", "slow-4"];
const QUICK: [&str; 3] = ["a", "b", "c"];

/// Handles the first events of the slow keys when it is told to, and the others at once.
struct Gated {
    open: watch::Receiver<bool>,
    runs: Arc<AtomicUsize>,
    fails: bool,
    record: Record,
}

impl Handler<Number> for Gated {
    async fn handle(&self, tx: &mut PgTransaction<'_>, delivery: &Delivery<Number>) -> Result<(), HandlerError> {
        self.record.handle(tx, delivery).await?;
        if delivery.event.n == 1 && delivery.key.as_deref().is_some_and(|key| key.starts_with("slow")) {
            self.runs.fetch_add(1, Ordering::SeqCst);
            self.open.clone().wait_for(|open| *open).await?;
            if self.fails {
                return Err(HandlerError::retry("as told"));
            }
        }
        Ok(())
    }
}

/// Two instances of a subscriber, of which the first is active and in the middle of one event in each of its executors.
struct Handover {
    work: Work,
    first: Option<RunningWorker>,
    second: RunningWorker,
    /// Lets the handlers of the first one end.
    open: watch::Sender<bool>,
    /// How often the slow events have begun to run.
    runs: Arc<AtomicUsize>,
    _always_open: watch::Sender<bool>,
}

impl Handover {
    async fn begin(fails: bool) -> Self {
        let work = Work::shared().await;
        let runs = Arc::<AtomicUsize>::default();
        let (open, closed) = watch::channel(false);
        let (always_open, at_once) = watch::channel(true);
        let subscriber = |open, fails| {
            let handler = Gated { open, runs: Arc::clone(&runs), fails, record: Record::good() };
            Subscriber::new("handover")
                .on::<Number>(handler)
                .concurrency(SLOW.len())
                .max_attempts(1)
                .ack_wait(Duration::from_secs(5))
        };
        let first = work.run(subscriber(closed, fails)).await;
        let held = "select exists (select from aftercommit.lease where name = 'subscriber:handover')";
        let leads = async || sqlx::query_scalar::<_, bool>(held).fetch_one(&work.outbox.pool).await.unwrap();
        eventually(SOON, "the first one is active", leads).await.unwrap();
        let second = RunningWorker::start(work.worker_with(subscriber(at_once, false)));
        work.send_many(&SLOW, 1).await;
        eventually(SOON, "all executors are busy", async || runs.load(Ordering::SeqCst) == SLOW.len()).await.unwrap();
        work.send_many(&QUICK, 20).await;
        for key in SLOW {
            work.send(key, 2).await;
        }
        Self { work, first: Some(first), second, open, runs, _always_open: always_open }
    }

    /// Stops the first instance, and waits until the second one has done all that it can.
    async fn hand_over(&self, stopping: &mut std::pin::Pin<&mut impl Future<Output = ()>>) {
        let began = Instant::now();
        tokio::select! {
            () = stopping.as_mut() => panic!("it ended before its handlers did"),
            () = self.work.wait_for(20 * QUICK.len() as i64) => {}
        }
        assert!(began.elapsed() < Duration::from_secs(5), "the other keys stood for {:?}", began.elapsed());
        self.work.assert_in_order(&QUICK, 20).await;
        assert_eq!(self.runs.load(Ordering::SeqCst), SLOW.len(), "nothing runs at both");
    }

    /// Everything is done once and in order, and no attempt was counted.
    async fn is_complete(&self) {
        self.work.wait_for(20 * QUICK.len() as i64 + 2 * SLOW.len() as i64).await;
        self.work.wait_until_acked("handover").await;
        self.work.assert_in_order(&QUICK, 20).await;
        self.work.assert_in_order(&SLOW, 2).await;
        self.work.assert_nothing_failed().await;
    }
}

/// Lets the handlers of the first instance end behind the handover. Each slow event has begun that often in the end.
async fn completes_behind_the_handover(fails: bool, runs: usize) {
    let mut handover = Handover::begin(fails).await;
    let first = handover.first.take().unwrap();
    let mut stopping = std::pin::pin!(first.stop());
    handover.hand_over(&mut stopping).await;
    handover.open.send_replace(true);
    stopping.await;
    handover.is_complete().await;
    assert_eq!(handover.runs.load(Ordering::SeqCst), runs * SLOW.len());
    handover.second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successor_works_while_its_predecessors_slow_handlers_end() {
    completes_behind_the_handover(false, 1).await;
}

/// What fails at an instance that has handed over is its successor's to decide: it runs once here and once there.
#[tokio::test(flavor = "multi_thread")]
async fn what_fails_behind_a_handover_costs_no_attempt() {
    completes_behind_the_handover(true, 2).await;
}

/// As when whoever stops it loses patience.
#[tokio::test(flavor = "multi_thread")]
async fn a_kill_behind_a_handover_puts_no_event_under_suspicion() {
    let mut handover = Handover::begin(false).await;
    let first = handover.first.take().unwrap();
    {
        let mut stopping = std::pin::pin!(first.stop());
        handover.hand_over(&mut stopping).await;
    }
    handover.is_complete().await;
    // Nor does the one after the next blame anything for what was left behind.
    let third =
        RunningWorker::start(handover.work.worker_with(Subscriber::new("handover").on::<Number>(Record::good())));
    handover.second.stop().await;
    handover.work.send(QUICK[0], 21).await;
    handover.work.wait_for(20 * QUICK.len() as i64 + 2 * SLOW.len() as i64 + 1).await;
    handover.work.assert_nothing_failed().await;
    let left: i64 = sqlx::query_scalar("select count(*) from aftercommit.running where lane < 0 or events <> '{}'")
        .fetch_one(&handover.work.outbox.pool)
        .await
        .unwrap();
    assert_eq!(left, 0, "markers stay behind");
    third.stop().await;
}

/// The database goes on with a statement whose client is gone, for some seconds. To the successor that looks like an instance
/// that lets its handlers finish.
#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_dies_while_its_statement_runs_counts_as_a_crash() {
    let work = Work::shared().await;
    sqlx::raw_sql(
        "create table slow ();
         create function apply(event jsonb) returns void language plpgsql as $$
         begin
            if exists (select from slow) then perform pg_sleep(20); end if;
            raise exception 'not this one';
         end $$;
         insert into slow default values",
    )
    .execute(&work.outbox.pool)
    .await
    .unwrap();
    let toml = "[[subscriber]]\nname = 'orphan'\ntypes = ['test.number']\nsql = { function = 'apply' }\nbackoff = { first = '1m' }\n";
    let backoff = Backoff { first: SOON, max: SOON };
    let subscriber = || Subscriber::sql("orphan", "apply", ["test.number"]).unwrap().backoff(backoff);
    work.worker_with(subscriber()).provision().await.unwrap();
    work.send("a", 1).await;
    let first = WorkerProcess(work.command(toml).spawn().unwrap());
    let sleeps =
        "select exists (select from pg_stat_activity where datname = current_database() and wait_event = 'PgSleep')";
    let asleep = async || sqlx::query_scalar::<_, bool>(sleeps).fetch_one(&work.outbox.pool).await.unwrap();
    eventually(SOON, "it runs", asleep).await.unwrap();
    first.kill();
    sqlx::raw_sql("truncate slow").execute(&work.outbox.pool).await.unwrap();
    work.expire_leases().await;
    let second = RunningWorker::start(work.worker_with(subscriber()));
    let record = "select (crashes, attempts) = (1, 1) from aftercommit.attempt";
    let counted = async || {
        sqlx::query_scalar::<_, bool>(record).fetch_optional(&work.outbox.pool).await.unwrap().unwrap_or_default()
    };
    eventually(SOON, "a crash and an attempt are on record", counted).await.unwrap();
    second.stop().await;
}

/// The statements about the lease take longer than the lease lasts.
#[tokio::test(flavor = "multi_thread")]
async fn live_instances_keep_the_lease_although_statements_are_slow() {
    let work = Work::shared().await;
    sqlx::raw_sql(
        "create function slow() returns trigger language plpgsql as 'begin perform pg_sleep(4.5); return new; end';
         create trigger slow before update on aftercommit.lease for each row execute function slow();",
    )
    .execute(&work.outbox.pool)
    .await
    .unwrap();
    let subscriber = || Subscriber::new("steady").on::<Number>(Record::good());
    let first = work.run(subscriber()).await;
    let second = RunningWorker::start(work.worker_with(subscriber()));
    let epoch = async || -> i64 {
        sqlx::query_scalar("select coalesce(max(epoch), 0) from aftercommit.lease where name = 'subscriber:steady'")
            .fetch_one(&work.outbox.pool)
            .await
            .unwrap()
    };
    // Each finds out for itself how slow the statements are. Then the lease stays where it is.
    let (mut last, mut since) = (epoch().await, Instant::now());
    eventually(Duration::from_secs(90), "the lease stays with one instance", async || {
        let now = epoch().await;
        if now != last {
            (last, since) = (now, Instant::now());
        }
        last > 0 && since.elapsed() > Duration::from_secs(14)
    })
    .await
    .unwrap();
    assert!(last <= 4, "it has changed hands {last} times");
    work.send_many(&QUICK, 2).await;
    work.wait_for(2 * QUICK.len() as i64).await;
    work.assert_in_order(&QUICK, 2).await;
    sqlx::raw_sql("drop trigger slow on aftercommit.lease").execute(&work.outbox.pool).await.unwrap();
    first.stop().await;
    second.stop().await;
}
