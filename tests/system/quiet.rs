//! Quiet, then one event: whatever the way to PostgreSQL and its settings did to connections that rested, it is there within
//! a second. And settings of a server, a database or a role that change what statements mean.

use std::time::{Duration, Instant};

use crate::support::{Number, Outbox, Proxy, Record, RunningRelay, SOON, Work};
use aftercommit::config::{NatsConfig, PostgresConfig};
use aftercommit::operator;
use aftercommit::reconciler::{Drift, ItemError, Mode, Outcome, Reconciler, Runner, Scope};
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, Postgres};
use aftercommit::worker::Subscriber;
use sqlx::{AssertSqlSafe, PgTransaction};

/// Longer than a connection may rest.
const QUIET: Duration = Duration::from_secs(4);
const REST: Duration = Duration::from_secs(3);
/// An event that comes after quiet.
const PROMPT: Duration = Duration::from_secs(1);

/// The URL with a way in between that can be disturbed.
async fn proxied(url: &str) -> (Proxy, String) {
    let server = url.split("//").nth(1).unwrap().split('/').next().unwrap().rsplit('@').next().unwrap();
    let proxy = Proxy::to(server).await;
    let url = url.replace(server, &proxy.address);
    (proxy, url)
}

/// A database with settings that nobody asked us about.
async fn database_with(settings: &[&str]) -> String {
    let url = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let (_, name) = url.rsplit_once('/').unwrap();
    let pool = sqlx::PgPool::connect(&url).await.unwrap();
    for setting in settings {
        sqlx::raw_sql(AssertSqlSafe(format!("alter database {name} set {setting}"))).execute(&pool).await.unwrap();
    }
    pool.close().await;
    url
}

async fn outbox(database: String) -> Outbox {
    Outbox::new(database, Nats::shared().await.unwrap().url()).await
}

async fn epoch(outbox: &Outbox, lease: &str) -> i64 {
    sqlx::query_scalar("select epoch from aftercommit.lease where name = $1")
        .bind(lease)
        .fetch_one(&outbox.pool)
        .await
        .unwrap()
}

/// Three times quiet, then one event; the median of the times until it is stored, and the longest.
async fn times_after_quiet(outbox: &Outbox) -> (Duration, Duration) {
    let mut times = Vec::new();
    for _ in 0..3 {
        tokio::time::sleep(QUIET).await;
        let (before, begun) = (outbox.stored().await, Instant::now());
        outbox.publish("after.quiet", "{}", None).await;
        eventually(SOON, "it is stored", async || outbox.stored().await > before).await.unwrap();
        times.push(begun.elapsed());
    }
    times.sort();
    (times[1], times[2])
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_event_after_quiet_is_prompt_behind_a_proxy() {
    let outbox = outbox(Postgres::shared().await.unwrap().create_database().await.unwrap()).await;
    let mut config = outbox.relay_config();
    let (proxy, url) = proxied(&config.postgres.url).await;
    config.postgres.url = url;
    let relay = RunningRelay::start(config);
    outbox.publish("before", "{}", None).await;
    outbox.settled().await;
    let leading = epoch(&outbox, "relay").await;
    proxy.forget_after(REST);
    let (median, longest) = times_after_quiet(&outbox).await;
    assert!(median < PROMPT && longest < 3 * PROMPT, "{median:?}, {longest:?}");
    assert!(proxy.rested() >= 3, "the reader's connection was forgotten each time, {} in all", proxy.rested());
    assert_eq!(epoch(&outbox, "relay").await, leading, "the leadership did not start over");
    // The sampler's connection rests for longer.
    for _ in 0..30 {
        assert_eq!(relay.monitor.report().parked, Some(0), "it knows what waits");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    relay.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_is_prompt_after_quiet_behind_a_forgetful_proxy() {
    let mut work = Work::shared().await;
    let (proxy, url) = proxied(&work.outbox.postgres.url).await;
    work.outbox.postgres.url = url;
    let worker = work.run(Subscriber::new("quiet").on::<Number>(Record::good())).await;
    work.send("a", 1).await;
    work.wait_for(1).await;
    let serving = epoch(&work.outbox, "subscriber:quiet").await;
    proxy.forget_after(REST);
    let mut times = Vec::new();
    for n in 2..=4 {
        tokio::time::sleep(QUIET).await;
        let begun = Instant::now();
        work.send("a", n).await;
        eventually(SOON, "it has its effect", async || work.count().await == n).await.unwrap();
        times.push(begun.elapsed());
    }
    times.sort();
    assert!(times[1] < PROMPT && times[2] < 3 * PROMPT, "{times:?}");
    assert!(proxy.rested() >= 3, "{}", proxy.rested());
    assert_eq!(epoch(&work.outbox, "subscriber:quiet").await, serving);
    work.assert_nothing_failed().await;
    worker.stop().await;
}

/// Finds nothing to do.
#[derive(Clone)]
struct Idle;

impl Reconciler for Idle {
    fn name(&self) -> &str {
        "idle"
    }

    fn interval(&self) -> Duration {
        Duration::from_secs(1)
    }

    async fn page(&self, _: &mut PgTransaction<'_>, after: Option<&str>, _: i64) -> Result<Vec<String>, ItemError> {
        Ok(if after.is_none() { vec!["item".into()] } else { vec![] })
    }

    async fn reconcile(&self, _: &mut PgTransaction<'_>, _: &str) -> Result<Drift, ItemError> {
        Ok(Drift::of(0))
    }
}

/// Settings under which relay, worker and reconcilers lost their connections or their transactions.
#[tokio::test(flavor = "multi_thread")]
async fn settings_of_the_database_disturb_nobody() {
    let settings = [
        "idle_session_timeout = '1s'",
        "default_transaction_isolation = serializable",
        "idle_in_transaction_session_timeout = '1s'",
        "statement_timeout = '3s'",
        "lock_timeout = '1s'",
        "plan_cache_mode = force_generic_plan",
        "datestyle = 'SQL, DMY'",
        "intervalstyle = sql_standard",
        "timezone = 'Asia/Kathmandu'",
        "standard_conforming_strings = off",
        "transform_null_equals = on",
        "row_security = off",
        "extra_float_digits = -15",
        "bytea_output = escape",
        "search_path = nowhere, public",
    ];
    let database = database_with(&settings).await;
    let mut work = Work::on(database.clone(), Nats::shared().await.unwrap().url()).await;
    work.outbox.postgres = PostgresConfig::new(database);
    let relay = work.outbox.relay();
    let subscriber = Subscriber::new("undisturbed").on::<Number>(Record::good());
    let worker = work.run(subscriber).await;
    let writers: Vec<_> = (0..4)
        .map(|writer| {
            let pool = work.outbox.pool.clone();
            tokio::spawn(async move {
                for n in 0..50_i64 {
                    let mut tx = pool.begin().await.unwrap();
                    let event = Number { key: Some(format!("key-{writer}")), n };
                    aftercommit::outbox::publish(&mut tx, &event).await.unwrap();
                    tx.commit().await.unwrap();
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    let mut health = String::new();
    let handled = eventually(SOON, "the effects", async || {
        health.clone_from(&worker.report().subscribers[0].health);
        work.count().await >= 200
    });
    handled.await.unwrap_or_else(|error| panic!("{error}: {health}"));
    let (leading, serving) = (epoch(&work.outbox, "relay").await, epoch(&work.outbox, "subscriber:undisturbed").await);
    assert_eq!((leading, serving), (1, 1));
    let (median, longest) = times_after_quiet(&work.outbox).await;
    assert!(median < PROMPT && longest < 3 * PROMPT, "{median:?}, {longest:?}");
    assert_eq!(epoch(&work.outbox, "relay").await, leading, "the leadership did not start over");
    assert_eq!(epoch(&work.outbox, "subscriber:undisturbed").await, serving);
    work.assert_nothing_failed().await;
    let runner = Runner::new(work.outbox.postgres.clone()).reconciler(Idle);
    for _ in 0..3 {
        let summary = runner.run_now("idle", Scope::Full, Mode::Repair).await.unwrap();
        assert_eq!(summary.outcome, Outcome::Ran, "{summary:?}");
    }
    worker.stop().await;
    relay.stop().await.unwrap();
}

/// Every time in every table is one that no calendar of ours has. Nothing panics, and the event goes out.
#[tokio::test(flavor = "multi_thread")]
async fn no_time_that_a_table_can_hold_stops_anybody() {
    let nats = NatsConfig { url: Nats::shared().await.unwrap().url(), ..NatsConfig::default() };
    for time in ["infinity", "-infinity", "4713-01-01 00:00:00+00 BC", "294276-12-31 00:00:00+00"] {
        let outbox = outbox(Postgres::shared().await.unwrap().create_database().await.unwrap()).await;
        outbox.publish("test.number", "{}", Some("a")).await;
        let event: uuid::Uuid =
            sqlx::query_scalar("select event_id from aftercommit.outbox").fetch_one(&outbox.pool).await.unwrap();
        let refused = sqlx::query("update aftercommit.outbox set created_at = $1::text::timestamptz")
            .bind(time)
            .execute(&outbox.pool)
            .await
            .unwrap_err();
        assert!(refused.to_string().contains("outbox_created_at_can_be_told"), "{refused}");
        // As it may be in a database that was there before.
        let spoiled = format!(
            "alter table aftercommit.outbox drop constraint outbox_created_at_can_be_told;
             insert into aftercommit.pause (name, reason) values ('subscriber:a', 'a test');
             insert into aftercommit.audit (who, action) values ('a', 'a test');
             insert into aftercommit.inbox (subscriber, event_id, stream_seq) values ('a', '{event}', 1);
             insert into aftercommit.attempt (subscriber, event_id, attempts, last_error) values ('b', '{event}', 1, 'x');
             insert into aftercommit.dead_letter (subscriber, event_id, type, version, source, time, headers, payload,
                content_type, stream, stream_seq, attempts, reason, first_failed_at)
             values ('c', '{event}', 'a', 1, '/', now(), '{{}}', '', 'a', 'S', 1, 1, 'x', now());
             insert into aftercommit.redrive (subscriber, event_id, type, version, source, time, headers, payload,
                content_type, stream, stream_seq, requested_by)
             values ('d', '{event}', 'a', 1, '/', now(), '{{}}', '', 'a', 'S', 1, 'x');
             insert into aftercommit.reconciler (name, last_attempt_at, last_success_at, retry_at, reconciled_up_to, full_sweep_at)
             values ('idle', now(), now(), now(), now(), now());
             insert into aftercommit.reconcile_run (name, cause, mode, scope, holder, alive_until, ended_at, result)
             values ('idle', 'demand', 'report', 'new', 'x', now(), now(), 'ok');
             insert into aftercommit.finding (name, kind, item, first_run, last_run, settled_at)
             values ('idle', 'x', 'x', 1, 1, now());
             do $$
             declare
                c record;
             begin
                for c in select table_name, column_name from information_schema.columns
                          where table_schema = 'aftercommit' and data_type = 'timestamp with time zone'
                            and table_name not in ('events', 'migrations', 'lease')
                loop
                    execute format('update aftercommit.%I set %I = %L where %I is not null',
                                   c.table_name, c.column_name, '{time}', c.column_name);
                end loop;
             end $$;"
        );
        sqlx::raw_sql(AssertSqlSafe(spoiled)).execute(&outbox.pool).await.unwrap();
        let relay = outbox.relay();
        eventually(SOON, "it is stored", async || outbox.stored().await == 1).await.unwrap();
        for arguments in [
            &["status"][..],
            &["explain", &event.to_string()],
            &["audit"],
            &["findings", "--all"],
            &["runs"],
            &["dead", "list"],
            &["dead", "list", "--group"],
            &["dead", "show", "1"],
            &["parked", "list"],
            &["doctor"],
        ] {
            let output = std::process::Command::new(env!("CARGO_BIN_EXE_aftercommit"))
                .args(arguments)
                .env("DATABASE_URL", &outbox.postgres.url)
                .env("NATS_URL", &nats.url)
                .env("AFTERCOMMIT_STREAM", &outbox.naming.stream)
                .env("AFTERCOMMIT_SUBJECT_PREFIX", outbox.naming.prefix.to_string())
                .output()
                .unwrap();
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(!error.contains("panicked") && !error.contains("[22008]"), "{time} {arguments:?}: {error}");
            assert!(output.status.success() || arguments == ["doctor"], "{time} {arguments:?}: {error}");
        }
        let runner = Runner::new(outbox.postgres.clone()).reconciler(Idle);
        let summary = runner.run_now("idle", Scope::Full, Mode::Repair).await.unwrap();
        assert_eq!(summary.outcome, Outcome::Ran, "{time}: {summary:?}");
        assert!(operator::status::status(&outbox.postgres, &nats, &outbox.naming).await.is_ok());
        relay.stop().await.unwrap();
    }
}
