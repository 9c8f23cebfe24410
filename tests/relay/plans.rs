//! What a statement costs does not grow with what is retained: not at its first execution, not at its tenth, with
//! statistics or without.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use crate::support::{Outbox, RunningRelay, SOON, Statement, generic_plan, nodes, outside, statements};
use aftercommit::operator;
use aftercommit::reconciler::{Mode, OutboxComparison, Runner, Scope};
use aftercommit::relay::RelayConfig;
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, Postgres, PostgresOptions};
use serde_json::Value;
use sqlx::{Connection, PgConnection};

/// Rows in each table that grows.
const ROWS: u64 = 200_000;

/// Fills each table that grows with what is over and done with.
const FILL: &str = "
    insert into aftercommit.outbox (event_id, type, key, payload)
    select gen_random_uuid(), 'old', 'k' || n % 1000, '{}' from generate_series(1, 200000) as n;
    insert into aftercommit.parked (outbox_id, event_id, type, key, code, reason, state, sequence)
    select id, event_id, type, key, 10077, 'too large', 'published', id from aftercommit.outbox where id <= 50000;
    insert into aftercommit.repair (outbox_id, event_id, key, state, published_at, sequence)
    select id, event_id, key, 'published', now(), id from aftercommit.outbox where id > 150000;
    insert into aftercommit.inbox (subscriber, event_id, stream_seq, sequence)
    select 's' || id % 4, event_id, id, id from aftercommit.outbox;
    insert into aftercommit.dead_letter (subscriber, event_id, type, version, key, source, time, headers, payload,
                                         content_type, stream, stream_seq, attempts, reason, first_failed_at)
    select 's' || id % 20, event_id, type, 1, key, '/s', now(), '{}', '{}', 'application/json', 'S', id, 1, 'no', now()
      from aftercommit.outbox where id <= 50000;
    insert into aftercommit.attempt (subscriber, event_id, attempts, last_error)
    select 's1', event_id, 1, 'no' from aftercommit.outbox where id <= 100;
    insert into aftercommit.finding (name, kind, item, event_id, outbox_id, first_run, last_run, state, settled_at)
    select 'outbox', 'missing_from_stream', event_id::text, event_id, id, 1, 1, 'repaired', now()
      from aftercommit.outbox where id <= 50000;
    insert into aftercommit.reconcile_run (name, cause, mode, scope, holder, alive_until, ended_at, result)
    select 'r' || n % 5, 'scheduled', 'report', 'new', 'me', now(), now(), case when n % 10 < 5 then 'failed' else 'ok' end
      from generate_series(1, 50000) as n;";

/// Files whose statements run once in the life of a process, or in no process of ours.
const ONCE: [&str; 10] = [
    "audit.rs",
    "capture.rs",
    "database.rs",
    "doctor.rs",
    "explain.rs",
    "function.rs",
    "migrate.rs",
    "subscriber.rs",
    "testing.rs",
    "upkeep.rs",
];

/// Statements that read more than what is new, and why that is right: the beginning of each.
const READS_ALL: &[(&str, &str)] = &[
    ("insert into aftercommit.running", "one row, with its values in the text"),
    (
        "select id, subscriber, event_id, type, version, key, source, time, sequence, content_type,",
        "an operator's look at one dead letter",
    ),
    ("update aftercommit.parked set state = 'released', sequence = null", "when a stream has lost its end"),
    ("select subscriber, count(*) from aftercommit.dead_letter", "what `aftercommit status` counts"),
    ("with failing as (select subscriber, count(*)", "the same"),
    ("select (select count(*) from (select from aftercommit.attempt", "a count of what waits, up to a limit"),
    ("with selection (events, key, key_prefix, type)", "what is to be forgotten, by keys: they have no index"),
    ("select name, kind, count(*) from aftercommit.finding", "a count of what is open"),
    ("select * from ( select id, name, kind, item,", "an operator's list of findings"),
];

async fn settings(log: bool) -> Postgres {
    let mut settings = vec![("autovacuum".to_string(), "off".to_string())];
    if log {
        for (name, value) in [
            ("shared_preload_libraries", "auto_explain"),
            ("auto_explain.log_min_duration", "0"),
            ("auto_explain.log_analyze", "on"),
            ("auto_explain.log_timing", "off"),
            ("auto_explain.log_nested_statements", "on"),
            ("auto_explain.log_format", "json"),
        ] {
            settings.push((name.into(), value.into()));
        }
    }
    Postgres::start(PostgresOptions { fsync: false, settings }).await.unwrap()
}

fn on_one_line(sql: &str) -> String {
    sql.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Whether a node reads a whole table of those that grow with what is over. An index on a part of a table holds what is
/// open.
fn reads_all(node: &Value, limited: bool, partial: &HashSet<String>) -> bool {
    let grows = ["outbox", "parked", "repair", "inbox", "dead_letter", "finding", "reconcile_run", "audit"];
    if !node["Relation Name"].as_str().is_some_and(|name| grows.contains(&name)) {
        return false;
    }
    match node["Node Type"].as_str().unwrap_or("") {
        "Seq Scan" => true,
        kind if kind.starts_with("Index") => {
            let of_a_part = node["Index Name"].as_str().is_some_and(|name| partial.contains(name));
            node["Index Cond"].is_null() && !limited && !of_a_part
        }
        _ => false,
    }
}

#[test]
fn all_statements_are_where_the_next_test_looks() {
    assert_eq!(outside(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_statement_that_runs_again_and_again_reads_a_whole_table() {
    let postgres = settings(false).await;
    let url = postgres.create_database().await.unwrap();
    operator::migrate(&aftercommit::config::PostgresConfig::new(url.clone())).await.unwrap();
    let mut connection = PgConnection::connect(&url).await.unwrap();
    sqlx::raw_sql(FILL).execute(&mut connection).await.unwrap();
    let listed: Vec<Statement> =
        statements().into_iter().filter(|statement| !ONCE.contains(&statement.file.as_str())).collect();
    assert!(listed.len() > 100, "{} statements found in the source", listed.len());
    let partial: Vec<String> =
        sqlx::query_scalar("select indexrelid::regclass::text from pg_index where indpred is not null")
            .fetch_all(&mut connection)
            .await
            .unwrap();
    let partial: HashSet<String> =
        partial.into_iter().map(|name| name.rsplit('.').next().unwrap().to_string()).collect();
    let (mut wrong, mut used) = (Vec::new(), HashSet::new());
    for statistics in [false, true] {
        if statistics {
            sqlx::raw_sql("analyze").execute(&mut connection).await.unwrap();
        }
        for Statement { file, sql, formatted } in &listed {
            let text = on_one_line(sql);
            let exempt = READS_ALL.iter().find(|(beginning, _)| text.starts_with(beginning));
            used.extend(exempt.map(|(beginning, _)| *beginning));
            if exempt.is_some() {
                continue;
            }
            if *formatted {
                wrong.push(format!("{file}: made at run time, so that it is not looked at: {text}"));
                continue;
            }
            let plan = match generic_plan(&mut connection, sql).await {
                Ok(plan) => plan,
                Err(error) => {
                    wrong.push(format!("{file}: {error}: {text}"));
                    continue;
                }
            };
            for (node, limited) in nodes(&plan) {
                if reads_all(node, limited, &partial) {
                    let (kind, table) = (&node["Node Type"], &node["Relation Name"]);
                    wrong.push(format!("{file}, statistics {statistics}: {kind} of {table}: {text}"));
                }
            }
        }
    }
    let unused: Vec<_> = READS_ALL.iter().filter(|(beginning, _)| !used.contains(beginning)).collect();
    assert!(wrong.is_empty() && unused.is_empty(), "{}\nnot there any more: {unused:?}", wrong.join("\n"));
}

/// The plans in a server's log from a place on: statement and plan.
fn plans(postgres: &Postgres, from: u64) -> Vec<(String, Value)> {
    let log = std::fs::read(postgres.log()).unwrap();
    let log = String::from_utf8_lossy(&log[usize::try_from(from).unwrap()..]).into_owned();
    let mut found = Vec::new();
    let mut lines = log.lines().peekable();
    while let Some(line) = lines.next() {
        if !line.ends_with("plan:") {
            continue;
        }
        let mut json = String::new();
        while let Some(line) = lines.next_if(|line| line.starts_with('\t')) {
            json.push_str(line);
        }
        let Ok(value) = serde_json::from_str::<Value>(&json) else { continue };
        found.push((on_one_line(value["Query Text"].as_str().unwrap()), value["Plan"].clone()));
    }
    found
}

fn length(postgres: &Postgres) -> u64 {
    std::fs::metadata(postgres.log()).unwrap().len()
}

/// Rows that a plan has read from tables and indexes.
fn rows_read(plan: &Value) -> u64 {
    let read = |(node, _): (&Value, bool)| {
        let number = |name: &str| node[name].as_f64().unwrap_or(0.0);
        let scans =
            node["Node Type"].as_str().is_some_and(|kind| kind.ends_with("Scan")) && node.get("Plans").is_none();
        let removed = number("Rows Removed by Filter") + number("Rows Removed by Index Recheck");
        let of_table = !node["Relation Name"].is_null();
        if scans && of_table { ((number("Actual Rows") + removed) * number("Actual Loops")) as u64 } else { 0 }
    };
    nodes(plan).into_iter().map(read).sum()
}

/// An outbox with so many rows that are all settled, as if they had gone into this stream.
async fn retained(postgres: &Postgres) -> Outbox {
    let outbox = Outbox::new(postgres.create_database().await.unwrap(), Nats::shared().await.unwrap().url()).await;
    let fill = format!(
        "insert into aftercommit.outbox (event_id, type, key, payload)
         select gen_random_uuid(), 'old', 'k' || n % 1000, '{{}}' from generate_series(1, {ROWS}) as n;
         insert into aftercommit.relay_log (seq, epoch, settled, settled_id, settled_xid, system_identifier)
         select 1, 0, pg_current_snapshot(), {ROWS}, pg_snapshot_xmax(pg_current_snapshot()), system_identifier
           from pg_control_system();
         insert into aftercommit.reconciler (name, full_sweep_at, position)
         select 'outbox', now(), jsonb_build_object('stream', '{}', 'sweep', null, 'new', jsonb_build_object(
                    'seq', seq, 'snapshot', settled::text, 'id', settled_id, 'xid', settled_xid::text::bigint,
                    'floor', 0, 'sequence', 0))
           from aftercommit.relay_log where seq = 1",
        outbox.naming.stream
    );
    for statement in fill.split(';') {
        sqlx::raw_sql(sqlx::AssertSqlSafe(statement.to_string())).execute(&outbox.pool).await.unwrap();
    }
    outbox
}

async fn stored(outbox: &Outbox, messages: u64) {
    eventually(SOON, "the events are published", async || outbox.stored().await >= messages).await.unwrap();
}

/// Statements that have read more than a few pages, or a whole table in order, and how often.
fn greedy(plans: &[(String, Value)], most: u64) -> BTreeMap<String, (u64, usize)> {
    let mut found = BTreeMap::new();
    for (sql, plan) in plans {
        let whole =
            nodes(plan).iter().any(|(node, _)| node["Node Type"] == "Seq Scan" && node["Relation Name"] == "outbox");
        let read = rows_read(plan);
        if sql.contains("aftercommit.") && (whole || read > most) {
            let entry: &mut (u64, usize) = found.entry(sql.clone()).or_default();
            *entry = (entry.0.max(read), entry.1 + 1);
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn relay_and_reconciler_read_no_more_when_much_is_retained() {
    let postgres = settings(true).await;
    let outbox = retained(&postgres).await;
    let from = length(&postgres);
    let config = RelayConfig { prune_interval: Duration::from_millis(100), ..outbox.relay_config() };
    let relay = RunningRelay::start(config);
    let leg = OutboxComparison::new(outbox.nats.clone(), outbox.naming.clone());
    let runner = Runner::new(outbox.postgres.clone()).comparison(leg);
    for statistics in [false, true] {
        if statistics {
            sqlx::raw_sql("analyze").execute(&outbox.pool).await.unwrap();
        }
        let before = outbox.stored().await;
        for n in 1..=12 {
            let mut held = outbox.pool.begin().await.unwrap();
            sqlx::query("select aftercommit.publish('held', '{}')").execute(&mut *held).await.unwrap();
            outbox.publish("new", "{}", Some("a")).await;
            stored(&outbox, before + 2 * n - 1).await;
            held.commit().await.unwrap();
            stored(&outbox, before + 2 * n).await;
            outbox.settled().await;
            let summary = runner.run_now("outbox", Scope::New, Mode::Report).await.unwrap();
            assert_eq!(summary.found, 0, "{summary}");
        }
    }
    let plans = plans(&postgres, from);
    relay.stop().await.unwrap();
    let mut times: BTreeMap<&str, usize> = BTreeMap::new();
    for part in
        ["with ended as materialized", "with durable as materialized", "with looked as materialized", "with entry as"]
    {
        times.insert(part, plans.iter().filter(|(sql, _)| sql.starts_with(part)).count());
    }
    assert!(times.values().all(|times| *times >= 10), "each of these was to run ten times and more: {times:?}");
    let greedy = greedy(&plans, 15_000);
    assert!(greedy.is_empty(), "rows read and how often: {greedy:#?}");
}

/// Sixty transactions of two hundred rows come to light at once.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_come_to_light_late_are_read_once() {
    const TRANSACTIONS: u64 = 60;
    const EACH: u64 = 200;
    let postgres = settings(true).await;
    let outbox = retained(&postgres).await;
    let relay = outbox.relay();
    let pool = sqlx::postgres::PgPoolOptions::new().max_connections(70).connect(&outbox.postgres.url).await.unwrap();
    let mut held = Vec::new();
    for _ in 0..TRANSACTIONS {
        held.push(pool.begin().await.unwrap());
    }
    for _ in 0..10 {
        for tx in &mut held {
            sqlx::query("select aftercommit.publish('held', '{}') from generate_series(1, $1)")
                .bind(EACH as i32 / 10)
                .execute(&mut **tx)
                .await
                .unwrap();
        }
    }
    outbox.publish("new", "{}", None).await;
    stored(&outbox, 1).await;
    outbox.settled().await;
    let from = length(&postgres);
    let last = held.len() - 1;
    // All of them before the relay looks again, as far as that can be.
    for tx in held.drain(..last) {
        tx.commit().await.unwrap();
    }
    held.pop().unwrap().commit().await.unwrap();
    stored(&outbox, TRANSACTIONS * EACH + 1).await;
    let plans = plans(&postgres, from);
    relay.stop().await.unwrap();
    let read: u64 = plans
        .iter()
        .filter(|(sql, _)| sql.contains("unnest($1::text[]::xid8[], $2"))
        .map(|(_, plan)| rows_read(plan))
        .sum();
    let most = TRANSACTIONS * EACH * 6 / 5;
    assert!((TRANSACTIONS * EACH..most).contains(&read), "{read} index entries for {} rows", TRANSACTIONS * EACH);
}

/// Two hundred transactions were running when the last mark was taken, and wrote nothing here.
#[tokio::test(flavor = "multi_thread")]
async fn transactions_that_came_to_nothing_are_looked_for_once() {
    const TRANSACTIONS: usize = 190;
    let postgres =
        Postgres::start(PostgresOptions { fsync: false, settings: vec![("max_connections".into(), "260".into())] })
            .await
            .unwrap();
    let outbox = Outbox::new(postgres.create_database().await.unwrap(), Nats::shared().await.unwrap().url()).await;
    let relay = outbox.relay();
    let mut held = Vec::new();
    for _ in 0..TRANSACTIONS {
        let mut connection = PgConnection::connect(&outbox.postgres.url).await.unwrap();
        sqlx::raw_sql("begin; select pg_current_xact_id()").execute(&mut connection).await.unwrap();
        held.push(connection);
    }
    outbox.publish("new", "{}", None).await;
    stored(&outbox, 1).await;
    outbox.settled().await;
    drop(held);
    let scans = async |index: &str| -> i64 {
        sqlx::query_scalar("select pg_stat_get_numscans(('aftercommit.' || $1)::regclass)::bigint")
            .bind(index)
            .fetch_one(&outbox.pool)
            .await
            .unwrap()
    };
    // Statistics come about a second late.
    let (before, looks) = (scans("outbox_xid_id").await, scans("outbox_pkey").await);
    eventually(SOON, "the relay looks a hundred times", async || scans("outbox_pkey").await > looks + 100)
        .await
        .unwrap();
    let (after, looked) = (scans("outbox_xid_id").await, scans("outbox_pkey").await);
    relay.stop().await.unwrap();
    // A sample of the backlog probes them, too, now and then.
    let (probes, looks) = (after - before, looked - looks);
    let most = 8 * TRANSACTIONS as i64 + 2 * looks;
    assert!(probes < most, "{probes} probes in {looks} looks");
}
