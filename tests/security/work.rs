//! With the shipped roles and permissions, each process does all of its work.

use aftercommit::testing::eventually;
use aftercommit::{Event, outbox};
use sqlx::PgPool;

use crate::stage::{SUBSCRIBER, Stage, started, succeeded};
use crate::support::{Number, Outbox, SOON, free_address, get, metric};

/// What programs and servers say when a right is missing.
const REFUSALS: [&str; 4] = ["permission denied", "Permissions Violation", "row-level security", "lacks a grant"];

async fn effects(outbox: &Outbox) -> i64 {
    sqlx::query_scalar("select count(*) from effect").fetch_one(&outbox.pool).await.unwrap()
}

async fn wait_for(outbox: &Outbox, number: i64) {
    eventually(SOON, &format!("{number} effects"), async || effects(outbox).await >= number).await.unwrap();
}

/// Publishes as the service's role: in Rust, and with SQL.
async fn publish(stage: &Stage, numbers: std::ops::RangeInclusive<i64>) {
    let service = PgPool::connect(&stage.url_of("publisher")).await.unwrap();
    for n in numbers {
        let number = Number { key: Some("a".into()), n };
        let mut tx = service.begin().await.unwrap();
        if n % 2 == 0 {
            outbox::publish(&mut tx, &number).await.unwrap();
        } else {
            sqlx::query("select aftercommit.publish($1, $2, $3)")
                .bind(Number::TYPE)
                .bind(serde_json::to_value(&number).unwrap())
                .bind(number.key())
                .execute(&mut *tx)
                .await
                .unwrap();
        }
        tx.commit().await.unwrap();
    }
}

/// That nobody was refused anything, neither by PostgreSQL nor by NATS.
fn assert_nothing_refused(stage: &Stage, programs: &[&str]) {
    let logs = programs.iter().map(|name| stage.log(name)).chain([stage.nats.log()]);
    for log in logs {
        let text = std::fs::read_to_string(&log).unwrap();
        let refused: Vec<&str> = text
            .lines()
            .filter(|line| REFUSALS.iter().any(|words| line.contains(words)) || line.contains("Violation"))
            .collect();
        assert!(refused.is_empty(), "{}: {refused:#?}", log.display());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_process_works_with_the_shipped_rights() {
    every_process_works(&Stage::provisioned().await).await;
}

/// All processes, all operators' commands, with what they meet: retries, dead letters, losses, a standby, pruning.
pub async fn every_process_works(stage: &Stage) {
    let outbox = stage.outbox().await;
    let toml = stage.toml();
    let every = ["--reconcile-every", "1s", "--reconcile-repair"];
    let mut relay = stage.command("aftercommit-relay", "leader", "relay");
    relay.args(every).env("AFTERCOMMIT_RETENTION_DAYS", "1");
    let _relay = started(relay, &stage.log("relay"));
    let mut worker = stage.command("aftercommit-worker", "active", SUBSCRIBER);
    let address = free_address();
    worker.args(["--config", &toml, "--http", &address]).args(every);
    let worker = started(worker, &stage.log("worker"));

    // Handled, failed once, dead, and behind it.
    publish(stage, 1..=6).await;
    wait_for(&outbox, 5).await;
    let letters = "aftercommit_worker_dead_letters{subscriber=\"receipts\"}";
    eventually(SOON, "it counts the dead letter", async || {
        metric(&get(&address, "/metrics").await.unwrap_or_default().1, letters) == Some(1.0)
    })
    .await
    .unwrap();
    operators_work(stage, &outbox).await;

    // Missing in the stream: the outbox's reconciler finds it, and the relay publishes it anew.
    let stored = outbox.stored().await;
    let stream = outbox.js().await.get_stream("EVENTS").await.unwrap();
    stream.delete_message(5).await.unwrap();
    let leg = |login, user, leg| {
        let arguments = ["reconcile", "--comparison", leg, "--config", &toml, "--full", "--repair"];
        let arguments =
            if leg == "outbox" { &["reconcile", "--comparison", leg, "--full", "--repair"] } else { &arguments[..] };
        succeeded(&stage.run("aftercommit", login, user, arguments));
    };
    leg("outbox_reconciler", "outbox_reconciler", "outbox");
    eventually(SOON, "it is published again", async || outbox.stored().await == stored).await.unwrap();
    // Acked and not in the inbox: the subscriber's reconcilers send it back.
    let before = effects(&outbox).await;
    stage.database.execute("delete from aftercommit.inbox where stream_seq in (1, 4)").await;
    leg("inbox_reconciler", "receipts_reconciler", "consumer");
    leg("inbox_reconciler", "receipts_reconciler", "inbox");
    wait_for(&outbox, before + 2).await;
    // Both comparisons have run beside their processes, too.
    eventually(SOON, "all reconcilers have run by themselves", async || {
        let names: i64 = sqlx::query_scalar(
            "select count(distinct name) from aftercommit.reconcile_run where cause = 'scheduled' and result = 'ok'",
        )
        .fetch_one(&outbox.pool)
        .await
        .unwrap();
        names == 3
    })
    .await
    .unwrap();

    // A standby takes over from the dead, and a relay prunes.
    worker.kill();
    let mut worker = stage.command("aftercommit-worker", "worker", SUBSCRIBER);
    worker.args(["--config", &toml]);
    let _worker = started(worker, &stage.log("standby"));
    let before = effects(&outbox).await;
    stage.database.execute("update aftercommit.outbox set created_at = now() - interval '2 days' where id < 3").await;
    publish(stage, 7..=8).await;
    wait_for(&outbox, before + 2).await;
    assert_nothing_refused(stage, &["relay", "worker", "standby"]);
}

/// All that the operator's tool does.
async fn operators_work(stage: &Stage, outbox: &Outbox) {
    let event: String =
        sqlx::query_scalar("select event_id::text from aftercommit.dead_letter").fetch_one(&outbox.pool).await.unwrap();
    let look = |arguments: &[&str]| {
        let text = succeeded(&stage.run("aftercommit", "reader", "operator", arguments));
        assert!(
            !REFUSALS.iter().any(|words| text.contains(words)) && !text.contains("unknown:"),
            "{arguments:?}: {text}"
        );
        text
    };
    for arguments in [
        &["status"][..],
        &["explain", &event, "--payload"],
        &["peek", "--subscriber", SUBSCRIBER],
        &["audit"],
        &["parked", "list"],
        &["dead", "list"],
        &["dead", "list", "--group"],
        &["dead", "show", "1", "--payload"],
        &["dead", "retry", "--all", "--dry-run"],
        &["findings", "--all"],
        &["runs"],
        &["capture", "list"],
        &["capture", "check"],
    ] {
        look(arguments);
    }
    let act = |arguments: &[&str]| {
        let refused = stage.run("aftercommit", "reader", "operator", arguments);
        let error = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && error.contains("lacks a grant"), "{arguments:?}: {error}");
        succeeded(&stage.run("aftercommit", "operator", "operator", arguments))
    };
    act(&["worker", "pause", "--subscriber", SUBSCRIBER]);
    act(&["worker", "resume", "--subscriber", SUBSCRIBER]);
    act(&["relay", "pause"]);
    act(&["relay", "resume"]);
    act(&["dead", "edit", "1", "--header", "a=b"]);
    act(&["dead", "retry", "1"]);
    eventually(SOON, "it is dead again", async || {
        let letters: Vec<i64> =
            sqlx::query_scalar("select id from aftercommit.dead_letter").fetch_all(&outbox.pool).await.unwrap();
        letters == [2]
    })
    .await
    .unwrap();
    act(&["dead", "discard", "2"]);
    let before = effects(outbox).await;
    act(&["replay", "--subscriber", SUBSCRIBER, "--type", Number::TYPE, "--again", "--yes"]);
    wait_for(outbox, before + 5).await;
    stage
        .database
        .execute(
            "insert into aftercommit.parked (outbox_id, event_id, type, code, reason)
             values (1000000, '019aa1c2-7c1f-7b2e-9d55-0d3c5a7e9b11', 'a', 1, 'no'), (1000001, '019aa1c2-7c1f-7b2e-9d55-0d3c5a7e9b12', 'a', 1, 'no')",
        )
        .await;
    act(&["parked", "release", "019aa1c2-7c1f-7b2e-9d55-0d3c5a7e9b11"]);
    act(&["parked", "discard", "019aa1c2-7c1f-7b2e-9d55-0d3c5a7e9b12"]);
    stage.database.execute("delete from aftercommit.parked").await;
    assert!(look(&["audit"]).lines().count() >= 9);
    // What the relay needs, seen with its own eyes.
    let doctor = stage.run("aftercommit", "relay", "operator", &["doctor"]);
    let report = String::from_utf8_lossy(&doctor.stdout);
    let fine =
        |name: &str| report.lines().any(|line| line.starts_with("OK") && line.split_whitespace().nth(1) == Some(name));
    assert!(fine("grants") && fine("stream") && fine("schema"), "{report}");
}
