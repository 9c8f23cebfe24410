//! Everything works through PgBouncer in transaction mode, also through one that knows no prepared statements.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::support::{Database, Number, Outbox, RelayProcess, SOON, Work, Writers};
use aftercommit::config::{NatsConfig, PostgresConfig};
use aftercommit::operator;
use aftercommit::operator::dead::Filter;
use aftercommit::operator::explain::ExplainConfig;
use aftercommit::outbox::{self, PublishErrorKind, RawEvent};
use aftercommit::reconciler::{Drift, ItemError, Reconciler, Runner};
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, PgBouncer, Postgres, PostgresOptions};
use aftercommit::worker::{Delivery, Handler, HandlerError, Subscriber};
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection, PgConnection, PgTransaction, Row};
use tokio_util::sync::CancellationToken;

async fn bouncer(pool_size: u32, settings: &[(&str, &str)]) -> PgBouncer {
    PgBouncer::start(Postgres::shared().await.unwrap(), pool_size, settings).await.unwrap()
}

/// The same database, behind PgBouncer.
fn behind(bouncer: &PgBouncer, direct: &PostgresConfig) -> PostgresConfig {
    let (_, database) = direct.url.rsplit_once('/').unwrap();
    PostgresConfig { pooled: true, ..PostgresConfig::new(bouncer.url(database)) }
}

/// A connection such as a service behind PgBouncer makes.
async fn connect(config: &PostgresConfig) -> PgConnection {
    config.url.parse::<PgConnectOptions>().unwrap().extra_float_digits(None).connect().await.unwrap()
}

/// Looks into as many of the server's sessions at the same time as PgBouncer has.
async fn assert_nothing_is_left(config: &PostgresConfig, sessions: usize) {
    let mut connections = Vec::new();
    let mut seen = BTreeMap::new();
    for _ in 0..sessions {
        let mut connection = connect(config).await;
        sqlx::raw_sql("begin").execute(&mut connection).await.unwrap();
        let row = sqlx::raw_sql(
            "select pg_backend_pid(), (select count(*) from pg_prepared_statements),
                    (select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid())",
        )
        .fetch_one(&mut connection)
        .await
        .unwrap();
        seen.insert(row.get::<i32, _>(0), (row.get::<i64, _>(1), row.get::<i64, _>(2)));
        connections.push(connection);
    }
    assert_eq!(seen.len(), sessions);
    assert!(seen.values().all(|left| *left == (0, 0)), "prepared statements and locks by session: {seen:?}");
}

/// Two relays and a worker share three sessions of the server. The relay that leads is killed again and again, the
/// worker once.
#[tokio::test(flavor = "multi_thread")]
async fn relays_and_worker_lose_nothing_and_keep_order() {
    let bouncer = bouncer(3, &[]).await;
    let mut work = Work::shared().await;
    work.outbox.postgres = behind(&bouncer, &work.outbox.postgres);
    sqlx::raw_sql(
        "create type answer as (said text);
         create function apply(event jsonb) returns answer language plpgsql as $$
         begin
            if event ->> 'type' = 'poison' then raise exception 'this one never works'; end if;
            insert into effect (event_id, key, n, attempt)
            values ((event ->> 'id')::uuid, event ->> 'partitionkey', coalesce((event -> 'data' ->> 'version')::bigint, 0), 1);
            return row('done'::text)::answer;
         end $$",
    )
    .execute(&work.outbox.pool)
    .await
    .unwrap();
    let file =
        "[[subscriber]]\nname = \"sql\"\ntypes = [\"*\"]\nmax_attempts = 1\nsql = { function = \"public.apply\" }\n";
    let mut worker = work.process(file);
    let mut relays = [work.outbox.relay_process(), work.outbox.relay_process()];
    let writers = Writers::start(&work.outbox.pool, 8, 10).await;
    for round in 0..4 {
        let before = work.outbox.stored().await;
        writers.more(150).await;
        eventually(SOON, "a relay publishes", async || work.outbox.stored().await > before).await.unwrap();
        let leader = leader(&work.outbox, &relays).await;
        relays[leader].kill();
        work.outbox.expire_leases().await;
        relays[leader] = work.outbox.relay_process();
        if round == 1 {
            work.wait_for(1).await;
            worker.kill();
            worker = work.process(file);
        }
    }
    work.outbox.publish("poison", "{}", None).await;
    writers.stop().await;
    let messages = work.outbox.assert_complete().await;
    work.wait_for(messages.len() as i64 - 1).await;
    work.wait_until_acked("sql").await;
    assert_eq!(work.count().await, messages.len() as i64 - 1);
    assert_eq!(work.dead_letters().await.len(), 1);
    let mut versions: BTreeMap<String, i64> = BTreeMap::new();
    for key in messages.iter().filter_map(|message| message.headers.get("ce-partitionkey")) {
        *versions.entry(key.clone()).or_default() += 1;
    }
    assert_eq!(versions.len(), 10);
    for (key, count) in versions {
        work.assert_in_order(&[&key], count).await;
    }
    assert_nothing_is_left(&work.outbox.postgres, 3).await;
    assert_eq!(worker.stop(), Some(0));
}

async fn leader(outbox: &Outbox, relays: &[RelayProcess]) -> usize {
    let mut leader = None;
    eventually(SOON, "one of the relays leads", async || {
        let holder: String = sqlx::query_scalar("select holder from aftercommit.lease where name = 'relay'")
            .fetch_one(&outbox.pool)
            .await
            .unwrap();
        leader = relays.iter().position(|relay| holder.contains(&format!(":{}:", relay.id())));
        leader.is_some()
    })
    .await
    .unwrap();
    leader.unwrap()
}

/// A row that is visible and not yet on disk must not get into the stream, also when the durability barrier is no
/// statement by itself, but a transaction.
#[tokio::test(flavor = "multi_thread")]
async fn no_event_is_in_the_stream_whose_row_is_gone() {
    let settings = [("synchronous_commit", "off"), ("wal_writer_delay", "10s")];
    let settings = settings.map(|(name, value)| (name.to_string(), value.to_string())).to_vec();
    let mut postgres = Postgres::start(PostgresOptions { settings, ..Default::default() }).await.unwrap();
    let bouncer = PgBouncer::start(&postgres, 3, &[("server_login_retry", "1")]).await.unwrap();
    let direct = postgres.create_database().await.unwrap();
    let mut outbox = Outbox::new(direct, Nats::shared().await.unwrap().url()).await;
    outbox.postgres = behind(&bouncer, &outbox.postgres);
    let relay = outbox.relay();
    for round in 0..5 {
        let before = outbox.stored().await;
        for n in 0..20 {
            outbox.publish("async.commit", &format!("{{\"n\": {}}}", round * 100 + n), None).await;
        }
        eventually(SOON, "the relay publishes", async || outbox.stored().await > before).await.unwrap();
        postgres.kill().await.unwrap();
        postgres.restart().await.unwrap();
        eventually(SOON, "the database answers", async || sqlx::query("select 1").execute(&outbox.pool).await.is_ok())
            .await
            .unwrap();
        outbox.assert_complete().await;
    }
    relay.stop().await.unwrap();
}

/// Each use is a connection of its own, and all of them meet in two sessions.
#[tokio::test(flavor = "multi_thread")]
async fn the_operators_tool_works() {
    let bouncer = bouncer(2, &[]).await;
    let database = Database::empty().await;
    let config = behind(&bouncer, &database.config);
    let (one, other) = tokio::join!(operator::migrate(&config), operator::migrate(&config));
    let (one, other) = (one.unwrap(), other.unwrap());
    assert!(one.is_empty() != other.is_empty(), "{one:?} {other:?}");
    assert_eq!(operator::migrate(&config).await.unwrap(), Vec::<String>::new());
    // The same as straight to the server.
    assert_eq!(operator::migrate(&database.config).await.unwrap(), Vec::<String>::new());

    let nats = NatsConfig { url: Nats::shared().await.unwrap().url(), ..NatsConfig::default() };
    for n in 1..=3 {
        let event = || RawEvent::new("a", "text/plain", "x");
        let (one, other) = tokio::join!(operator::publish(&config, event()), operator::publish(&config, event()));
        let event_id = one.unwrap();
        other.unwrap();
        let status = operator::status::status(&config, &nats, &Default::default()).await.unwrap();
        assert_eq!(status.backlog.events, 2 * n);
        let pause = async |reason| operator::relay::pause(&config, "test", reason).await.unwrap();
        assert_eq!(pause(Some("for a test")).await, operator::Pausing::Paused);
        assert_eq!(pause(None).await, operator::Pausing::Unchanged);
        assert!(operator::relay::resume(&config, "test").await.unwrap());
        assert_eq!(operator::relay::parked(&config, 10).await.unwrap(), []);
        assert!(operator::relay::release(&config, "test", event_id).await.is_err());
        let all = Filter { all: true, ..Filter::default() };
        assert_eq!(operator::dead::list(&config, &all, 10).await.unwrap(), []);
        assert_eq!(operator::dead::retry(&config, "test", &all).await.unwrap(), [0; 0]);
        assert_eq!(operator::dead::discard(&config, "test", &all).await.unwrap(), [0; 0]);
        let asked = ExplainConfig::new(config.clone(), nats.clone(), Default::default());
        assert_eq!(operator::explain::explain(&asked, event_id).await.unwrap().outbox.unwrap().state, "waiting");
    }
    assert_nothing_is_left(&config, 2).await;
}

/// Services say that PgBouncer stands in between; until then the error tells them how.
#[tokio::test(flavor = "multi_thread")]
async fn services_publish_once_they_have_said_so() {
    let bouncer = bouncer(1, &[]).await;
    let database = Database::migrated().await;
    let config = behind(&bouncer, &database.config);
    let mut one = connect(&config).await;
    let mut other = connect(&config).await;
    let event = || RawEvent::new("a", "text/plain", "x");
    let mut tx = one.begin().await.unwrap();
    outbox::publish_raw(&mut tx, event()).await.unwrap();
    tx.commit().await.unwrap();
    let mut tx = other.begin().await.unwrap();
    let error = outbox::publish_raw(&mut tx, event()).await.unwrap_err();
    assert_eq!(error.kind(), PublishErrorKind::Database);
    assert!(error.to_string().contains("outbox::set_pooled"), "{error}");
    tx.rollback().await.unwrap();

    outbox::set_pooled(true);
    for _ in 0..3 {
        for connection in [&mut one, &mut other] {
            let mut tx = connection.begin().await.unwrap();
            outbox::publish_raw(&mut tx, event()).await.unwrap();
            outbox::publish_all(&mut tx, &two_numbers()).await.unwrap();
            tx.commit().await.unwrap();
        }
    }
    let written: i64 =
        sqlx::query_scalar("select count(*) from aftercommit.outbox").fetch_one(&database.pool().await).await.unwrap();
    assert_eq!(written, 1 + 6 * 3);
}

fn two_numbers() -> [Number; 2] {
    [1, 2].map(|n| Number { key: None, n })
}

/// Whoever forgets the setting is told its name, whatever it is that fails first.
#[tokio::test(flavor = "multi_thread")]
async fn errors_name_the_setting() {
    let database = Database::migrated().await;
    let forgotten = |bouncer: &PgBouncer| PostgresConfig { pooled: false, ..behind(bouncer, &database.config) };
    // What PgBouncer ignores instead of refusing it, the session does not have.
    for ignored in ["", "extra_float_digits", "extra_float_digits, options"] {
        let settings = [("ignore_startup_parameters", ignored)];
        let bouncer = bouncer(1, if ignored.is_empty() { &[] } else { &settings }).await;
        let error = operator::relay::resume(&forgotten(&bouncer), "test").await.unwrap_err().report();
        assert!(error.contains("AFTERCOMMIT_PGBOUNCER"), "{ignored}: {error}");
        operator::relay::resume(&behind(&bouncer, &database.config), "test").await.unwrap();
    }
}

/// A handler whose queries keep their names waits, with the reason, until that is put right: no event is to blame.
#[tokio::test(flavor = "multi_thread")]
async fn a_handler_with_named_statements_costs_no_attempt() {
    let bouncer = bouncer(1, &[]).await;
    let mut work = Work::shared().await;
    work.outbox.postgres = behind(&bouncer, &work.outbox.postgres);
    // Somebody else has used the first name.
    let mut other = connect(&work.outbox.postgres).await;
    let mut tx = other.begin().await.unwrap();
    sqlx::query("select 1").execute(&mut *tx).await.unwrap();
    tx.commit().await.unwrap();
    let runs = Arc::new(AtomicU32::new(0));
    let handler = Named(runs.clone());
    let worker = work.run(Subscriber::new("named").max_attempts(1).on::<Number>(handler)).await;
    work.send("a", 1).await;
    eventually(SOON, "it is refused and tried again", async || runs.load(Ordering::Relaxed) > 1).await.unwrap();
    // What was in the way goes, as it would when the server's session ends.
    sqlx::raw_sql("deallocate all").execute(&mut other).await.unwrap();
    work.wait_for(1).await;
    work.wait_until_acked("named").await;
    assert_eq!(work.dead_letters().await, []);
    assert_eq!(work.attempts().await, Vec::<i32>::new());
    worker.stop().await;
}

/// Counts its runs, and writes with a named statement.
struct Named(Arc<AtomicU32>);

impl Handler<Number> for Named {
    async fn handle(&self, tx: &mut PgTransaction<'_>, delivery: &Delivery<Number>) -> Result<(), HandlerError> {
        self.0.fetch_add(1, Ordering::Relaxed);
        sqlx::query("insert into effect (n) values ($1)").bind(delivery.event.n).execute(&mut **tx).await?;
        Ok(())
    }
}

/// Sets every number to its place, with statements that leave nothing behind.
#[derive(Clone)]
struct Places;

impl Reconciler for Places {
    fn name(&self) -> &str {
        "places"
    }

    fn interval(&self) -> Duration {
        Duration::from_secs(1)
    }

    fn page_size(&self) -> i64 {
        7
    }

    async fn page(
        &self,
        tx: &mut PgTransaction<'_>,
        after: Option<&str>,
        limit: i64,
    ) -> Result<Vec<String>, ItemError> {
        let sql = "select key from place where $1 is null or key > $1 order by key limit $2";
        Ok(sqlx::query_scalar(sql).bind(after).bind(limit).persistent(false).fetch_all(&mut **tx).await?)
    }

    async fn reconcile(&self, tx: &mut PgTransaction<'_>, key: &str) -> Result<Drift, ItemError> {
        let sql = "update place set n = key::int where key = $1 and n <> key::int";
        Ok(Drift::of(sqlx::query(sql).bind(key).persistent(false).execute(&mut **tx).await?.rows_affected()))
    }
}

/// Three runners share two sessions of the server.
#[tokio::test(flavor = "multi_thread")]
async fn reconcilers_run_once_per_interval_and_leave_nothing_behind() {
    let bouncer = bouncer(2, &[]).await;
    let database = Database::migrated().await;
    database
        .execute("create table place as select lpad(n::text, 3, '0') as key, -1 as n from generate_series(1, 100) n")
        .await;
    let config = behind(&bouncer, &database.config);
    let stop = CancellationToken::new();
    let runners: Vec<_> =
        (0..3).map(|_| tokio::spawn(Runner::new(config.clone()).reconciler(Places).run(stop.clone()))).collect();
    let pool = database.pool().await;
    let runs = "select count(*) from aftercommit.reconcile_run where result = 'ok'";
    let three = async || sqlx::query_scalar::<_, i64>(runs).fetch_one(&pool).await.is_ok_and(|runs| runs >= 3);
    eventually(SOON, "three runs", three).await.unwrap();
    stop.cancel();
    for runner in runners {
        runner.await.unwrap().unwrap();
    }
    let wrong = "select (select count(*) from place where n <> key::int)
                      + (select count(*) from aftercommit.reconcile_run where result <> 'ok' and result <> 'stopped')";
    assert_eq!(sqlx::query_scalar::<_, i64>(wrong).fetch_one(&pool).await.unwrap(), 0);
    assert_nothing_is_left(&config, 2).await;
}
