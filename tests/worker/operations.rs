//! G5 at the worker: what an operator sees of it over HTTP and NATS, in good times and in bad ones.

use std::fs;
use std::process::Stdio;

use crate::support::{SOON, Work, WorkerProcess, answers, free_address, get};
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres};
use aftercommit::testing::{eventually, unique_name};
use async_nats::service::{Info, PingResponse, Stats};
use serde_json::Value;

/// Writes the number, and fails as the payload says it.
const APPLY: &str = "create function apply(event jsonb) returns void language plpgsql as $$
    begin
        if event -> 'data' ->> 'key' = 'bad' then raise exception 'no'; end if;
        if event -> 'data' ->> 'key' = 'slow' then perform pg_sleep(3); end if;
        insert into effect (event_id, key, n) values ((event ->> 'id')::uuid, event -> 'data' ->> 'key', (event -> 'data' ->> 'n')::bigint);
    end $$";

const TOML: &str = "[[subscriber]]\nname = \"receipts\"\ntypes = [\"test.number\"]\nsql = { function = \"apply\" }\n\
                    max_batch = 1\nbackoff = { first = \"1h\", max = \"1h\" }\n";

async fn work_on(database: &Postgres, nats: String) -> Work {
    let work = Work::on(database.create_database().await.unwrap(), nats).await;
    sqlx::raw_sql(APPLY).execute(&work.outbox.pool).await.unwrap();
    work
}

async fn shared() -> Work {
    work_on(Postgres::shared().await.unwrap(), Nats::shared().await.unwrap().url()).await
}

/// The worker's program with HTTP, impatient.
fn start(work: &Work, toml: &str) -> (WorkerProcess, String) {
    let address = free_address();
    let mut command = work.command(toml);
    let child = command.args(["--http", &address, "--unhealthy-after", "1s"]).spawn().unwrap();
    (WorkerProcess(child), address)
}

/// Waits until a metric of the subscriber has a value as it is wanted.
async fn reaches(address: &str, name: &str, wanted: impl Fn(f64) -> bool) {
    let name = match name.split_once('{') {
        Some((name, labels)) => format!("{name}{{subscriber=\"receipts\",{labels}"),
        None => format!("{name}{{subscriber=\"receipts\"}}"),
    };
    crate::support::reaches(address, &name, wanted).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_is_ready_and_counts_what_it_does() {
    let work = shared().await;
    let (_worker, address) = start(&work, TOML);
    answers(&address, "/readyz", 200, "receipts: leading").await;
    let twice = work.envelope(Some("a"), 1);
    for event in [&twice, &twice, &work.envelope(Some("a"), 2), &work.envelope(Some("bad"), 1)] {
        work.put(event).await;
    }
    work.send("bad", 2).await;
    reaches(&address, "aftercommit_worker_events_total{outcome=\"ok\"}", |events| events == 2.0).await;
    reaches(&address, "aftercommit_worker_events_total{outcome=\"duplicate\"}", |events| events == 1.0).await;
    reaches(&address, "aftercommit_worker_events_total{outcome=\"retry\"}", |events| events == 1.0).await;
    reaches(&address, "aftercommit_worker_events_total{outcome=\"dead\"}", |events| events == 0.0).await;
    reaches(&address, "aftercommit_worker_handler_seconds_count", |calls| calls == 3.0).await;
    reaches(&address, "aftercommit_worker_batch_events_count", |batches| batches == 3.0).await;
    reaches(&address, "aftercommit_worker_latency_seconds_count", |events| events == 2.0).await;
    reaches(&address, "aftercommit_worker_pending", |events| events == 0.0).await;
    // The failing one and the one behind it.
    reaches(&address, "aftercommit_worker_in_flight", |events| events == 2.0).await;
    reaches(&address, "aftercommit_worker_held", |events| events == 1.0).await;
    reaches(&address, "aftercommit_worker_failing", |events| events == 1.0).await;
    reaches(&address, "aftercommit_worker_dead_letters", |events| events == 0.0).await;
    reaches(&address, "aftercommit_worker_redrive", |events| events == 0.0).await;
    reaches(&address, "aftercommit_worker_active", |active| active == 1.0).await;
    reaches(&address, "aftercommit_worker_epoch", |epoch| epoch == 1.0).await;
    reaches(&address, "aftercommit_worker_paused", |paused| paused == 0.0).await;
    reaches(&address, "aftercommit_worker_seconds_since_progress", |seconds| seconds < 5.0).await;
    // What waits for its next attempt is no reason for an alarm.
    answers(&address, "/healthz", 200, "receipts: leading").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_counted() {
    let work = shared().await;
    let (_worker, address) = start(&work, &(TOML.to_string() + "max_attempts = 1\n"));
    work.send("bad", 1).await;
    reaches(&address, "aftercommit_worker_events_total{outcome=\"dead\"}", |events| events == 1.0).await;
    reaches(&address, "aftercommit_worker_dead_letters", |events| events == 1.0).await;
    answers(&address, "/healthz", 200, "receipts: leading").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_is_healthy_and_takes_over() {
    let work = shared().await;
    let (active, first) = start(&work, TOML);
    answers(&first, "/readyz", 200, "leading").await;
    let (_standby, second) = start(&work, TOML);
    answers(&second, "/readyz", 200, "standing by").await;
    answers(&second, "/healthz", 200, "standing by").await;
    reaches(&second, "aftercommit_worker_active", |active| active == 0.0).await;
    active.kill();
    answers(&second, "/healthz", 200, "leading").await;
    reaches(&second, "aftercommit_worker_epoch", |epoch| epoch == 2.0).await;
}

/// The time limit is longer than the patience: a handler that runs is not stuck.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_handler_is_not_called_stuck() {
    let work = shared().await;
    let (_worker, address) = start(&work, TOML);
    answers(&address, "/readyz", 200, "leading").await;
    work.send("slow", 1).await;
    let mut answers = Vec::new();
    eventually(SOON, "the slow handler is done", async || {
        answers.extend(get(&address, "/healthz").await);
        work.count().await == 1
    })
    .await
    .unwrap();
    assert!(answers.len() > 3 && answers.iter().all(|(status, _)| *status == 200), "{answers:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_of_nats_is_named_and_passes() {
    let mut nats = Nats::start(NatsOptions::default()).await.unwrap();
    let work = work_on(Postgres::shared().await.unwrap(), nats.url()).await;
    let (_worker, address) = start(&work, TOML);
    answers(&address, "/readyz", 200, "leading").await;
    nats.kill().await.unwrap();
    answers(&address, "/readyz", 503, "not connected to NATS").await;
    answers(&address, "/healthz", 503, "the backlog is unknown").await;
    reaches(&address, "aftercommit_worker_pending", f64::is_nan).await;
    nats.restart().await.unwrap();
    answers(&address, "/healthz", 200, "leading").await;
    answers(&address, "/readyz", 200, "leading").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_of_the_database_is_named_and_passes() {
    let mut postgres = Postgres::start(Default::default()).await.unwrap();
    let work = work_on(&postgres, Nats::shared().await.unwrap().url()).await;
    let (_worker, address) = start(&work, TOML);
    answers(&address, "/readyz", 200, "working").await;
    postgres.kill().await.unwrap();
    work.send("a", 1).await;
    answers(&address, "/readyz", 503, "receipts: leading").await;
    // Whatever it was about to do when that happened.
    answers(&address, "/healthz", 503, "error communicating with database").await;
    reaches(&address, "aftercommit_worker_dead_letters", f64::is_nan).await;
    postgres.restart().await.unwrap();
    answers(&address, "/healthz", 200, "leading").await;
    work.wait_for(1).await;
    reaches(&address, "aftercommit_worker_dead_letters", |letters| letters == 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_is_named() {
    let work = shared().await;
    let two = format!("{TOML}\n{}", TOML.replace("receipts", "reports").replace("\"apply\"", "\"report\""));
    let (_worker, address) = start(&work, &two);
    answers(&address, "/healthz", 503, "reports: no progress").await;
    answers(&address, "/healthz", 503, "the function report(jsonb) does not exist").await;
    let (_, body) = get(&address, "/healthz").await.unwrap();
    assert!(body.starts_with("reports: ") && body.contains("\nreceipts: leading"), "{body}");

    work.context.delete_consumer_from_stream("receipts", &work.outbox.naming.stream).await.unwrap();
    answers(&address, "/healthz", 503, "does not exist: run `aftercommit provision").await;
}

/// The first answer to a question, as JSON.
async fn ask(client: &async_nats::Client, subject: String) -> Vec<u8> {
    let mut answer = None;
    eventually(SOON, &format!("somebody answers {subject}"), async || {
        answer = client.request(subject.clone(), "".into()).await.ok();
        answer.is_some()
    })
    .await
    .unwrap();
    answer.unwrap().payload.to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_are_found_and_asked_over_nats() {
    let nats = Nats::start(NatsOptions::default()).await.unwrap();
    let work = work_on(Postgres::shared().await.unwrap(), nats.url()).await;
    let worker = work.process(TOML);
    work.send("a", 1).await;
    work.wait_for(1).await;
    let client = async_nats::connect(&work.outbox.nats.url).await.unwrap();

    let ping: PingResponse = serde_json::from_slice(&ask(&client, "$SRV.PING".into()).await).unwrap();
    assert_eq!(ping.name, "aftercommit-worker");
    assert_eq!(
        (&ping.metadata["stream"], ping.metadata["subscribers"].as_str()),
        (&work.outbox.naming.stream, "receipts")
    );
    let info: Info = serde_json::from_slice(&ask(&client, "$SRV.INFO.aftercommit-worker".into()).await).unwrap();
    let subject = &info.endpoints[0].subject;
    assert_eq!(*subject, format!("aftercommit.worker.{}.status", work.outbox.naming.stream));

    let mut status = Value::Null;
    eventually(SOON, "the status tells of the event", async || {
        status = serde_json::from_slice(&ask(&client, subject.clone()).await).unwrap();
        status["subscribers"][0]["settled"] == 1 && status["subscribers"][0]["in_flight"] == 0
    })
    .await
    .unwrap_or_else(|error| panic!("{error}: {status}"));
    let subscriber = &status["subscribers"][0];
    assert_eq!(
        (&subscriber["name"], &subscriber["active"], &subscriber["epoch"]),
        (&"receipts".into(), &true.into(), &1.into())
    );
    assert_eq!(status["healthy"], true);

    let by_id = format!("$SRV.STATS.aftercommit-worker.{}", ping.id);
    let stats: Stats = serde_json::from_slice(&ask(&client, by_id).await).unwrap();
    assert_eq!(stats.endpoints[0].data.as_ref().unwrap()["subscribers"][0]["settled"], 1);
    assert_eq!(worker.stop(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_permissions_of_a_service_there_is_one_warning() {
    let config = "no_auth_user: admin
    authorization { users: [
        { user: admin, password: admin },
        { user: worker, password: worker, permissions: {
            publish: [ \"$JS.API.CONSUMER.INFO.*.receipts\", \"$JS.API.CONSUMER.MSG.NEXT.*.receipts\",
                       \"$JS.API.STREAM.MSG.GET.*\", \"$JS.ACK.*.receipts.>\" ],
            subscribe: [ \"_INBOX_worker.>\" ]
        } }
    ] }";
    let nats = Nats::start(NatsOptions { config: config.into(), ..Default::default() }).await.unwrap();
    let work = work_on(Postgres::shared().await.unwrap(), nats.url()).await;
    let log = std::env::temp_dir().join(unique_name("aftercommit-log"));
    let mut command = work.command(TOML);
    command.env("NATS_USER", "worker").env("NATS_PASSWORD", "worker").env("RUST_LOG", "info,async_nats=warn");
    command.stdout(Stdio::null()).stderr(fs::File::create(&log).unwrap());
    let worker = WorkerProcess(command.spawn().unwrap());
    work.send("a", 1).await;
    work.wait_for(1).await;
    work.wait_until_acked("receipts").await;
    let said = || fs::read_to_string(&log).unwrap();
    eventually(SOON, "the worker warns", async || said().contains("micro service")).await.unwrap();
    assert_eq!(worker.stop(), Some(0));
    let said = said();
    fs::remove_file(&log).unwrap();
    assert_eq!(said.matches("Permissions Violation").count(), 1, "{said}");
}
