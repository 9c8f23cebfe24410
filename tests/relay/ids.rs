//! G1, G3 whatever becomes of the sequence that hands out the outbox's ids: nothing is lost, nothing is published twice,
//! and what would put a key's events out of order is refused by name.

use std::collections::HashMap;

use crate::support::{Outbox, RunningRelay, SOON, Scenario, raise_transaction_ids};
use aftercommit::operator;
use aftercommit::operator::doctor::{DoctorConfig, Severity, doctor};
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, Postgres, PostgresOptions};
use sqlx::{AssertSqlSafe, Connection, PgConnection};

async fn outbox() -> Outbox {
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    Outbox::new(database, Nats::shared().await.unwrap().url()).await
}

async fn run(outbox: &Outbox, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql.to_string())).execute(&outbox.pool).await.unwrap();
}

async fn events(outbox: &Outbox, count: i32) {
    sqlx::query("select aftercommit.publish('a', '{}') from generate_series(1, $1)")
        .bind(count)
        .execute(&outbox.pool)
        .await
        .unwrap();
}

/// What is committed is in the stream, each event once; what was truncated since may be there, too.
async fn each_once(outbox: &Outbox) {
    let committed = outbox.committed().await;
    let mut times: HashMap<String, usize> = HashMap::new();
    eventually(SOON, "every committed event is in the stream", async || {
        times.clear();
        for message in outbox.messages().await {
            *times.entry(message.headers["ce-id"].clone()).or_default() += 1;
        }
        committed.iter().all(|id| times.contains_key(id))
    })
    .await
    .unwrap_or_else(|error| panic!("{error}: {} of {}", times.len(), committed.len()));
    assert!(times.values().all(|times| *times == 1), "{times:?}");
}

async fn states(outbox: &Outbox) -> i64 {
    sqlx::query_scalar("select max(seq) from aftercommit.relay_log").fetch_one(&outbox.pool).await.unwrap()
}

/// The sequence stands where it has to.
async fn caught_up(outbox: &Outbox) {
    eventually(SOON, "the sequence is set forward", async || {
        sqlx::query_scalar(
            "select last_value >= (select max(id) from aftercommit.outbox)
                and last_value >= (select settled_id from aftercommit.relay_log order by seq desc limit 1)
               from aftercommit.outbox_id_seq",
        )
        .fetch_one(&outbox.pool)
        .await
        .unwrap()
    })
    .await
    .unwrap();
}

async fn ids_check(outbox: &Outbox) -> (Severity, String) {
    let config = DoctorConfig::new(outbox.postgres.clone(), outbox.nats.clone(), outbox.naming.clone());
    let report = doctor(&config).await.unwrap();
    let check = report.checks.iter().find(|check| check.name == "ids").unwrap();
    (check.status, check.finding.clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sequence_with_a_cache_is_refused_and_migrate_corrects_it() {
    let outbox = outbox().await;
    let relay = outbox.relay();
    events(&outbox, 5).await;
    each_once(&outbox).await;
    run(&outbox, "alter sequence aftercommit.outbox_id_seq cache 50").await;
    let mut sessions = Vec::new();
    for _ in 0..4 {
        sessions.push(PgConnection::connect(&outbox.postgres.url).await.unwrap());
    }
    for _ in 0..5 {
        for session in &mut sessions {
            sqlx::query("select aftercommit.publish('a', '{}')").execute(session).await.unwrap();
        }
    }
    eventually(SOON, "the relay says why it does not lead", async || {
        let report = serde_json::to_string(&relay.monitor.report()).unwrap();
        report.contains("CACHE 50") && report.contains("aftercommit migrate")
    })
    .await
    .unwrap();
    let (status, finding) = ids_check(&outbox).await;
    assert!(status == Severity::Fail && finding.contains("CACHE 50"), "{finding}");
    let refused = RunningRelay::start(outbox.relay_config()).ended().await.unwrap_err();
    assert!(refused.to_string().contains("CACHE 50"), "{refused}");

    assert_eq!(operator::correct_ids(&outbox.postgres).await.unwrap().len(), 1);
    assert_eq!(operator::correct_ids(&outbox.postgres).await.unwrap(), Vec::<String>::new());
    let highest: i64 =
        sqlx::query_scalar("select max(id) from aftercommit.outbox").fetch_one(&outbox.pool).await.unwrap();
    for session in &mut sessions {
        sqlx::query("select aftercommit.publish('later', '{}')").execute(session).await.unwrap();
    }
    let lowest: i64 = sqlx::query_scalar("select min(id) from aftercommit.outbox where type = 'later'")
        .fetch_one(&outbox.pool)
        .await
        .unwrap();
    assert!(lowest > highest, "{lowest}: ids that sessions had taken in advance are forgotten");
    each_once(&outbox).await;
    assert_eq!(ids_check(&outbox).await.0, Severity::Ok);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_increment_other_than_one_is_refused_by_name() {
    for (setting, name) in [("increment 2", "INCREMENT 2"), ("increment -1", "INCREMENT -1"), ("cycle", "CYCLE")] {
        let outbox = outbox().await;
        events(&outbox, 3).await;
        run(&outbox, &format!("alter sequence aftercommit.outbox_id_seq {setting}")).await;
        let refused = outbox.relay().ended().await.unwrap_err();
        assert!(refused.to_string().contains(name), "{refused}");
        operator::correct_ids(&outbox.postgres).await.unwrap();
        let _relay = outbox.relay();
        events(&outbox, 3).await;
        outbox.assert_complete().await;
    }
}

/// What sets the sequence back.
const SET_BACK: [&str; 3] = [
    "truncate aftercommit.outbox restart identity",
    "delete from aftercommit.outbox; select setval('aftercommit.outbox_id_seq', 1)",
    // What pg_restore --data-only of an older dump does.
    "create table older as select * from aftercommit.outbox where id <= 40;
     truncate aftercommit.outbox;
     insert into aftercommit.outbox overriding system value select * from older;
     select setval('aftercommit.outbox_id_seq', 40)",
];

#[tokio::test(flavor = "multi_thread")]
async fn a_sequence_that_was_set_back_beside_a_relay_loses_nothing() {
    for tampering in SET_BACK {
        let outbox = outbox().await;
        let relay = outbox.relay();
        events(&outbox, 100).await;
        outbox.assert_complete().await;
        outbox.settled().await;
        run(&outbox, tampering).await;
        for _ in 0..20 {
            events(&outbox, 5).await;
        }
        each_once(&outbox).await;
        caught_up(&outbox).await;
        events(&outbox, 5).await;
        each_once(&outbox).await;
        relay.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sequence_that_was_set_back_while_no_relay_ran_loses_nothing() {
    for tampering in SET_BACK {
        let outbox = outbox().await;
        let relay = outbox.relay_process();
        events(&outbox, 100).await;
        outbox.assert_complete().await;
        outbox.settled().await;
        outbox.kill(relay).await;
        run(&outbox, tampering).await;
        events(&outbox, 30).await;
        let (status, finding) = ids_check(&outbox).await;
        assert!(status == Severity::Fail && finding.contains("behind"), "{finding}");
        // The leader that has found them dies before it has published them all.
        outbox.dies_at("relay-acknowledged:10").await;
        events(&outbox, 30).await;
        let relay = outbox.relay();
        each_once(&outbox).await;
        caught_up(&outbox).await;
        relay.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_above_the_sequence_goes_out_and_the_log_comes_to_rest() {
    let outbox = outbox().await;
    let relay = outbox.relay();
    events(&outbox, 5).await;
    outbox.assert_complete().await;
    outbox.settled().await;
    run(
        &outbox,
        "insert into aftercommit.outbox (id, event_id, type, payload) overriding system value
         select id, gen_random_uuid(), 'by.hand', '{}' from generate_series(6, 5000, 1000) as id",
    )
    .await;
    outbox.assert_complete().await;
    caught_up(&outbox).await;
    outbox.settled().await;
    let before = states(&outbox).await;
    events(&outbox, 5).await;
    outbox.assert_complete().await;
    outbox.settled().await;
    let written = states(&outbox).await - before;
    assert!(written <= 4, "{written} states for one transaction");
    relay.stop().await.unwrap();
}

/// As after a switch-over to a logical replica: rows up to some id, and a sequence that never moved.
#[tokio::test(flavor = "multi_thread")]
async fn migrate_sets_a_sequence_forward_that_is_behind_the_rows() {
    let outbox = outbox().await;
    run(
        &outbox,
        "insert into aftercommit.outbox (id, event_id, type, payload) overriding system value
         select id, gen_random_uuid(), 'copied', '{}' from generate_series(1, 50) as id",
    )
    .await;
    assert!(
        sqlx::query("select aftercommit.publish('a', '{}')").execute(&outbox.pool).await.is_err(),
        "a duplicate key"
    );
    let done = operator::correct_ids(&outbox.postgres).await.unwrap().join("");
    assert!(done.contains("50"), "{done}");
    events(&outbox, 3).await;
    let _relay = outbox.relay();
    outbox.assert_complete().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sequence_set_far_ahead_is_taken_as_it_is() {
    let outbox = outbox().await;
    let relay = outbox.relay();
    events(&outbox, 5).await;
    outbox.assert_complete().await;
    outbox.settled().await;
    let before = states(&outbox).await;
    run(&outbox, "select setval('aftercommit.outbox_id_seq', 1000000000000)").await;
    events(&outbox, 5).await;
    outbox.assert_complete().await;
    outbox.settled().await;
    assert!(states(&outbox).await - before < 10, "no window for each million ids");
    relay.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_window_reaches_over_a_million_ids_at_most() {
    let outbox = outbox().await;
    for last_id in [0, 999_900, 1_000_100, 3_000_000, 900_000_000] {
        if last_id > 0 {
            run(&outbox, &format!("select setval('aftercommit.outbox_id_seq', {last_id})")).await;
        }
        events(&outbox, 20).await;
    }
    let relay = outbox.relay();
    outbox.assert_complete().await;
    outbox.settled().await;
    relay.stop().await.unwrap();
    let windows: Vec<(i64, bool)> = sqlx::query_as(
        "select max(target_id), bool_or(cut) from aftercommit.relay_log where target is not null
          group by target_id order by target_id",
    )
    .fetch_all(&outbox.pool)
    .await
    .unwrap();
    let expected = [(1_000_000, true), (2_000_100, true), (4_000_000, true), (900_000_020, false)];
    assert_eq!(windows, expected, "from the first new row of each");
}

/// A row that no window holds: it says that it was written by a transaction which the marks count as handled.
#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_finds_and_repairs_what_the_relays_marks_hide() {
    let scenario = Scenario::start().await;
    scenario.write(20).await;
    scenario.caught_up().await;
    let pool = &scenario.outbox.pool;
    let passed: Vec<i64> = sqlx::query_scalar("select nextval('aftercommit.outbox_id_seq') from generate_series(1, 3)")
        .fetch_all(pool)
        .await
        .unwrap();
    scenario.write(20).await;
    scenario.caught_up().await;
    sqlx::query(
        "insert into aftercommit.outbox (xid, id, event_id, type, payload) overriding system value
         select '3', id, gen_random_uuid(), 'hidden', '{}' from unnest($1::bigint[]) as id",
    )
    .bind(&passed)
    .execute(pool)
    .await
    .unwrap();
    scenario.write(20).await;
    scenario.published().await;
    let summary = scenario.reconcile_outbox().await;
    let hidden: i64 = sqlx::query_scalar("select count(*) from aftercommit.outbox where type = 'hidden'")
        .fetch_one(pool)
        .await
        .unwrap();
    let left: i64 = sqlx::query_scalar(
        "select count(*) from aftercommit.repair r join aftercommit.outbox o on o.id = r.outbox_id
          where o.type = 'hidden' and r.state = 'published'",
    )
    .fetch_one(pool)
    .await
    .unwrap();
    assert!(hidden == 3 && left == hidden, "{left} of {hidden} repaired: {summary}");
    scenario.caught_up().await;
    scenario.nothing_is_left().await;
}

/// A cluster from which another can take its rows.
async fn logical(epoch: u32) -> Postgres {
    let settings = vec![("wal_level".to_string(), "logical".to_string())];
    let mut postgres = Postgres::start(PostgresOptions { fsync: false, settings }).await.unwrap();
    if epoch > 0 {
        raise_transaction_ids(&mut postgres, epoch).await;
    }
    postgres
}

/// As in a move to a new cluster, whose transaction numbers are far behind those of the old one.
#[tokio::test(flavor = "multi_thread")]
async fn an_outbox_that_logical_replication_has_filled_goes_out_in_order() {
    let source = logical(3).await;
    let old = Outbox::new(source.create_database().await.unwrap(), Nats::shared().await.unwrap().url()).await;
    let outbox = outbox().await;
    run(&old, "create publication p for table aftercommit.outbox").await;
    let name = format!("s_{}", std::process::id());
    let url = &old.postgres.url;
    run(&outbox, &format!("create subscription {name} connection '{url}' publication p")).await;
    for n in 1..=9 {
        old.publish(&format!("old.{n}"), "{}", Some("k1")).await;
    }
    eventually(SOON, "the rows are there", async || outbox.committed().await.len() == 9).await.unwrap();
    let refused = outbox.relay().ended().await.unwrap_err();
    assert!(refused.to_string().contains(&name) && refused.to_string().contains("drop subscription"), "{refused}");
    let (status, finding) = ids_check(&outbox).await;
    assert!(status == Severity::Fail && finding.contains("does not lead"), "{finding}");

    run(&outbox, &format!("drop subscription {name}")).await;
    assert_eq!(operator::correct_ids(&outbox.postgres).await.unwrap().len(), 1);
    outbox.publish("new", "{}", Some("k1")).await;
    let relay = outbox.relay();
    outbox.assert_complete().await;
    let types: Vec<String> =
        outbox.messages().await.into_iter().map(|message| message.headers["ce-type"].clone()).collect();
    assert_eq!(types, ["old.1", "old.2", "old.3", "old.4", "old.5", "old.6", "old.7", "old.8", "old.9", "new"]);
    outbox.settled().await;
    relay.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_that_are_used_up_are_refused_by_name() {
    let outbox = outbox().await;
    events(&outbox, 3).await;
    run(&outbox, "select setval('aftercommit.outbox_id_seq', 9223372036854775800)").await;
    let refused = outbox.relay().ended().await.unwrap_err();
    assert!(refused.to_string().contains("9223372036854775800"), "{refused}");
    assert_eq!(ids_check(&outbox).await.0, Severity::Fail);
    run(&outbox, "select setval('aftercommit.outbox_id_seq', 3)").await;
    let relay = outbox.relay();
    events(&outbox, 3).await;
    outbox.assert_complete().await;
    relay.stop().await.unwrap();
}
