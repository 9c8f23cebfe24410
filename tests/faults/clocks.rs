//! Clocks that jump by days while events flow, each by itself. Leases and schedules go by the database's clock alone, so
//! nobody else's matters; and what the database wrote before its clock went back holds nobody up.

use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use aftercommit::reconciler::Outcome;
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, Postgres, PostgresOptions};
use chrono::{DateTime, TimeDelta, Utc};
use sqlx::PgPool;

use super::live::{Live, Watch, start};
use super::support::{Directory, SOON, Scenario, Writers};

/// How long nobody may lead after the leader is gone: a lease of 3 or 4 seconds, twice as long when the clock went back
/// by less than that, and time for a busy machine.
const TAKEN_OVER: Duration = Duration::from_secs(15);

/// Where packages put the library that shows a process another time.
fn faketime() -> Option<PathBuf> {
    let mut places = vec![PathBuf::from("/usr/lib"), PathBuf::from("/usr/lib64"), PathBuf::from("/usr/local/lib")];
    places.extend(std::fs::read_dir("/usr/lib").into_iter().flatten().flatten().map(|entry| entry.path()));
    let found = places.into_iter().map(|place| place.join("faketime/libfaketimeMT.so.1")).find(|file| file.is_file());
    if found.is_none() {
        println!("SKIPPED: clocks are set with libfaketime: Debian, Ubuntu: apt-get install faketime");
    }
    found
}

/// A process's clock.
struct Clock {
    faketime: PathBuf,
    file: PathBuf,
}

impl Clock {
    fn new(faketime: &Path, files: &Directory, name: &str, days: i32) -> Self {
        let clock = Self { faketime: faketime.into(), file: files.path().join(name) };
        clock.set(days);
        clock
    }

    /// So many days from the true time.
    fn set(&self, days: i32) {
        // At once or not at all: somebody may be reading it.
        let new = self.file.with_extension("new");
        std::fs::write(&new, format!("{days:+}d\n")).unwrap();
        std::fs::rename(new, &self.file).unwrap();
    }

    /// The time since the start of the machine stays as it is.
    fn give(&self, mut command: Command) -> Command {
        command
            .env("LD_PRELOAD", &self.faketime)
            .env("FAKETIME_TIMESTAMP_FILE", &self.file)
            .env("FAKETIME_NO_CACHE", "1")
            .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
            .env("FAKETIME_DONT_RESET", "1")
            .env("NO_FAKE_STAT", "1");
        command
    }
}

/// A PostgreSQL with a clock of its own.
struct Database {
    server: Child,
    postgres: Postgres,
}

impl Database {
    async fn new(clock: &Clock) -> Self {
        let mut postgres = Postgres::start(PostgresOptions { fsync: false, settings: Vec::new() }).await.unwrap();
        postgres.stop().await.unwrap();
        let (data, url) = (postgres.data_directory(), postgres.url("postgres"));
        let owner = std::fs::metadata(&data).unwrap();
        let port = url.rsplit(':').next().unwrap().split('/').next().unwrap();
        let log = std::fs::File::create(postgres.log()).unwrap();
        let mut command = clock.give(Command::new(Postgres::program("postgres").unwrap()));
        command.arg("-D").arg(&data).args(["-p", port]).current_dir(&data).env("LC_ALL", "C");
        command.uid(owner.uid()).gid(owner.gid());
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let server = command.spawn().unwrap();
        let database = Self { server, postgres };
        eventually(SOON, "PostgreSQL answers", async || PgPool::connect(&url).await.is_ok()).await.unwrap();
        database
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        // An immediate shutdown leaves no process behind.
        _ = Command::new("kill").args(["-QUIT", &self.server.id().to_string()]).status();
        _ = self.server.wait();
    }
}

/// Waits until every reconciler of a database has had a run from now on.
async fn reconciled(pool: &PgPool) {
    let began: i64 = sqlx::query_scalar("select max(id) from aftercommit.reconcile_run").fetch_one(pool).await.unwrap();
    let missing = "select count(*) from aftercommit.reconciler r where not exists (
                        select from aftercommit.reconcile_run run
                         where run.name = r.name and run.id > $1 and run.result = 'ok')";
    eventually(SOON, "all reconcilers run", async || {
        sqlx::query_scalar::<_, i64>(missing).bind(began).fetch_one(pool).await.unwrap() == 0
    })
    .await
    .unwrap();
}

/// The days that separate the database's clock from the true time.
async fn ahead(pool: &PgPool) -> i32 {
    let now: DateTime<Utc> = sqlx::query_scalar("select clock_timestamp()").fetch_one(pool).await.unwrap();
    let hours = (now - Utc::now()).num_minutes() as f64 / 60.0;
    (hours / 24.0).round() as i32
}

/// Lets a tenth of all attempts fail, so that events are waiting for their next one all the time.
const FLAKY: &str = "
    create sequence tries;
    alter function see(jsonb) rename to see_surely;
    create function see(event jsonb) returns void language plpgsql as $$
        begin
            perform see_surely(event);
            if nextval('tries') % 10 = 0 then raise exception 'bad luck'; end if;
        end $$";

#[tokio::test(flavor = "multi_thread")]
async fn clocks_that_jump_by_days_lose_nothing_and_hold_nobody_up() {
    let Some(faketime) = faketime() else { return };
    let files = Directory::new();
    let clock = |name: &str, days| Clock::new(&faketime, &files, name, days);
    let (publishers, subscribers) = (clock("publishers", 0), clock("subscribers", 0));
    let (first, second) = tokio::join!(Database::new(&publishers), Database::new(&subscribers));
    let (outbox, books) =
        (first.postgres.create_database().await.unwrap(), second.postgres.create_database().await.unwrap());
    let live = Live::new(outbox, books, Nats::shared().await.unwrap().url()).await;
    let clocks = ["relay-0", "relay-1", "worker-0", "worker-1"].map(|name| (name, clock(name, 100)));
    sqlx::raw_sql(FLAKY).execute(&live.books).await.unwrap();
    let process = |(name, clock): &(&str, Clock)| {
        let mut command = clock.give(if name.starts_with("relay") { live.relay(name) } else { live.worker(name) });
        // What is not missing must not be repaired either.
        command.env("AFTERCOMMIT_RECONCILE_EVERY", "1s").env("AFTERCOMMIT_RECONCILE_REPAIR", "true");
        start(command)
    };
    let processes: Vec<_> = clocks.iter().map(process).collect();
    let watched = [(&live.outbox.pool, "relay"), (&live.books, "subscriber:books")];
    let watches = watched.map(|(pool, lease)| Watch::over(pool, lease));
    let writers = Writers::start(&live.outbox.pool, 1, 6).await;
    live.goes_on(&writers, 50).await;

    // Their own clocks say nothing to relays and workers, in whose logs they show.
    let date = (Utc::now() + TimeDelta::days(100)).format("%Y-%m-%dT").to_string();
    for (name, _) in &clocks {
        assert!(live.log(name).contains(&date), "{name} has the clock that it was given: {}", live.log(name));
    }
    let before = (live.leads(true).await, live.leads(false).await);
    for (name, clock) in &clocks {
        for days in [10, -10, 0] {
            clock.set(days);
            live.goes_on(&writers, 20).await;
            assert_eq!((live.leads(true).await, live.leads(false).await), before, "{name} {days:+} days");
        }
    }
    let ahead_of_time = "select count(*) from aftercommit.reconciler
                          where greatest(reconciled_up_to, last_success_at) > clock_timestamp() + interval '1 hour'";
    for pool in [&live.outbox.pool, &live.books] {
        reconciled(pool).await;
        assert_eq!(sqlx::query_scalar::<_, i64>(ahead_of_time).fetch_one(pool).await.unwrap(), 0);
    }
    // The databases' clocks may change who leads, and what is settled may grow too old for the outbox.
    for (pool, clock) in [(&live.outbox.pool, &publishers), (&live.books, &subscribers)] {
        for days in [10, -10, 0] {
            clock.set(days);
            assert_eq!(ahead(pool).await, days, "the clock is set");
            let jumped = Instant::now();
            writers.more(20).await;
            live.handled(TAKEN_OVER).await;
            reconciled(pool).await;
            println!("{days:+} days: everything is handled and reconciled after {:?}", jumped.elapsed());
        }
    }
    writers.stop().await;
    let events = live.assert_whole().await;
    for watch in watches {
        watch.stop().await;
    }
    println!("{events} events, leaders now {:?} {:?}", live.leads(true).await, live.leads(false).await);
    drop(processes);
}

/// A leader that dies in the moment in which the database's clock goes back leaves a lease that ends in ten days.
#[tokio::test(flavor = "multi_thread")]
async fn a_lease_from_the_future_is_taken_over() {
    let postgres = Postgres::shared().await.unwrap();
    let (outbox, books) = (postgres.create_database().await.unwrap(), postgres.create_database().await.unwrap());
    let live = Live::new(outbox, books, Nats::shared().await.unwrap().url()).await;
    for (pool, lease) in [(&live.outbox.pool, "relay"), (&live.books, "subscriber:books")] {
        sqlx::query(
            "insert into aftercommit.lease (name, holder, epoch, expires_at)
             values ($1, 'the dead one', 7, clock_timestamp() + interval '10 days')",
        )
        .bind(lease)
        .execute(pool)
        .await
        .unwrap();
    }
    let _processes = [start(live.relay("relay")), start(live.worker("worker"))];
    let writers = live.write().await;
    writers.more(20).await;
    writers.stop().await;
    live.handled(TAKEN_OVER).await;
    live.assert_whole().await;
    assert_eq!([live.leads(true).await.unwrap().1, live.leads(false).await.unwrap().1], [8, 8], "the epoch goes on");
}

/// The lease of a leader that lives is not taken by one that merely looks at it.
#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_is_held_stays_where_it_is() {
    let postgres = Postgres::shared().await.unwrap();
    let (outbox, books) = (postgres.create_database().await.unwrap(), postgres.create_database().await.unwrap());
    let live = Live::new(outbox, books, Nats::shared().await.unwrap().url()).await;
    let _processes = ["relay-0", "relay-1"].map(|name| start(live.relay(name)));
    let _workers = ["worker-0", "worker-1"].map(|name| start(live.worker(name)));
    let writers = live.write().await;
    live.goes_on(&writers, 20).await;
    let before = (live.leads(true).await, live.leads(false).await);
    for pool in [&live.outbox.pool, &live.books] {
        // For longer than it would last by itself.
        let ends = "select max(expires_at) from aftercommit.lease";
        let end: DateTime<Utc> = sqlx::query_scalar(ends).fetch_one(pool).await.unwrap();
        eventually(SOON, "the lease is renewed", async || {
            sqlx::query_scalar::<_, DateTime<Utc>>(ends).fetch_one(pool).await.unwrap() > end + TimeDelta::seconds(5)
        })
        .await
        .unwrap();
    }
    live.goes_on(&writers, 20).await;
    assert_eq!((live.leads(true).await, live.leads(false).await), before);
    writers.stop().await;
}

/// What reconcilers wrote before the database's clock went back by ten days: a run whose process died, a success, a retry.
#[tokio::test(flavor = "multi_thread")]
async fn reconcilers_do_not_wait_for_a_clock_that_went_back() {
    let scenario = Scenario::start().await;
    scenario.write(20).await;
    scenario.caught_up().await;
    let runs = async |what: &str| {
        eventually(SOON, what, async || {
            scenario.outbox_runner().run_if_due("outbox").await.unwrap().outcome == Outcome::Ran
        })
        .await
        .unwrap();
    };
    for (what, then) in [
        (
            "a dead run",
            "insert into aftercommit.reconcile_run (name, cause, mode, scope, holder, alive_until)
             values ('outbox', 'scheduled', 'report', 'new', 'the dead one', clock_timestamp() + interval '10 days')",
        ),
        ("a success", "update aftercommit.reconciler set last_success_at = clock_timestamp() + interval '10 days'"),
        (
            "a retry",
            "update aftercommit.reconciler
                set last_success_at = null, failures = 3, retry_at = clock_timestamp() + interval '10 days'",
        ),
    ] {
        sqlx::raw_sql("insert into aftercommit.reconciler (name) values ('outbox') on conflict do nothing")
            .execute(&scenario.outbox.pool)
            .await
            .unwrap();
        sqlx::raw_sql(then).execute(&scenario.outbox.pool).await.unwrap();
        runs(what).await;
    }
}

/// What was missing in the stream is told to the subscribers' reconcilers in the order in which that was found, also when
/// the clock goes back in between.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_missing_is_told_although_the_clock_went_back() {
    let mut scenario = Scenario::start().await;
    scenario.write(20).await;
    scenario.caught_up().await;
    let pool = scenario.outbox.pool.clone();
    let mut latest: Option<DateTime<Utc>> = None;
    for _ in 0..2 {
        scenario.stop_worker().await;
        scenario.write(10).await;
        scenario.published().await;
        let last = scenario.stream().await.cached_info().state.last_sequence;
        scenario.delete([last - 1, last - 3]).await;
        scenario.reconcile_outbox().await;
        let found: Vec<DateTime<Utc>> =
            sqlx::query_scalar("select queued_at from aftercommit.repair order by outbox_id desc limit 2")
                .fetch_all(&pool)
                .await
                .unwrap();
        assert_eq!(found.len(), 2);
        assert!(found.iter().all(|at| latest.is_none_or(|latest| *at > latest)), "{found:?} behind {latest:?}");
        let future = "update aftercommit.repair set queued_at = queued_at + interval '10 days'
                       where queued_at < clock_timestamp() + interval '1 day'";
        sqlx::raw_sql(future).execute(&pool).await.unwrap();
        latest = sqlx::query_scalar("select max(queued_at) from aftercommit.repair").fetch_one(&pool).await.unwrap();
        scenario.start_worker();
        scenario.handled().await;
        tokio::time::timeout(SOON, scenario.reconcile_books()).await.expect("the reconciler comes to an end");
    }
}

/// Where the clock of the outbox's database is ahead of that of NATS, all of the stream seems to be older than the outbox.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_missing_where_the_outbox_is_ahead_of_its_stream() {
    let scenario = Scenario::start().await;
    let ahead =
        "alter table aftercommit.outbox alter column created_at set default clock_timestamp() + interval '10 days'";
    sqlx::raw_sql(ahead).execute(&scenario.outbox.pool).await.unwrap();
    scenario.write(20).await;
    scenario.caught_up().await;
    let messages = scenario.outbox.stored().await;
    let summary = scenario.reconcile_outbox().await;
    assert_eq!((summary.found, summary.repaired), (0, 0), "{summary}");
    assert_eq!(scenario.outbox.stored().await, messages);
}
