//! G5 at the operator: whoever has only `aftercommit status`, `doctor` and `explain` finds what is wrong within two commands,
//! and what to do about it.

use std::process::Output;
use std::time::Duration;

use crate::support::{
    Act, Database, Endpoint, Number, Outbox, Record, Reply, Roles, RunningWorker, SOON, Work, succeeded,
};
use aftercommit::config::PostgresConfig;
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, Postgres};
use aftercommit::worker::{HandlerError, Subscriber, Worker};
use async_nats::jetstream::consumer::pull;
use async_nats::jetstream::stream::{Config, DiscardPolicy};

fn text(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Waits until the command says all of these words.
async fn says(outbox: &Outbox, arguments: &[&str], words: &[&str]) -> String {
    let mut said = String::new();
    let waited = eventually(SOON, "it is said", async || {
        said = text(&outbox.operator(arguments));
        words.iter().all(|word| said.contains(word))
    })
    .await;
    assert!(waited.is_ok(), "{arguments:?} does not say all of {words:?}:\n{said}");
    said
}

/// That something is wrong is seen from the exit status too.
fn is_found_by_check(outbox: &Outbox) {
    assert_eq!(outbox.operator(&["status", "--check"]).status.code(), Some(1));
}

fn mails(record: Record) -> Subscriber {
    Subscriber::new("mails").on::<Number>(record)
}

#[tokio::test(flavor = "multi_thread")]
async fn all_is_well() {
    let work = Work::shared().await;
    let outbox = &work.outbox;
    let relay = outbox.relay();
    let worker = work.run(mails(Record::good())).await;
    outbox.written("a", 1).await;
    work.wait_for(1).await;
    let said = says(outbox, &["status"], &["OK: everything flows", "leads since", "1 message", " since "]).await;
    assert!(!said.contains('\u{1b}'), "no colours where there is no terminal: {said}");
    assert_eq!(outbox.operator(&["status", "--check"]).status.code(), Some(0));
    says(outbox, &["doctor"], &["1 of 1 subscribers have an active worker here, and nothing is stuck"]).await;
    worker.stop().await;
    relay.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_worker() {
    let work = Work::shared().await;
    let outbox = &work.outbox;
    let _relay = outbox.relay();
    let worker = work.run(mails(Record::good())).await;
    outbox.written("a", 1).await;
    work.wait_for(1).await;
    says(outbox, &["status"], &["OK: everything flows"]).await;
    worker.stop().await;
    let event = outbox.written("a", 2).await;
    says(
        outbox,
        &["status"],
        &["STUCK subscriber mails: no worker serves it; 1 event waits", "start aftercommit-worker"],
    )
    .await;
    is_found_by_check(outbox);
    says(outbox, &["doctor"], &["FAIL  workers", "subscriber mails: no worker serves it"]).await;
    says(outbox, &["explain", &event], &["mails   waiting: not delivered yet", "no worker is active for it"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscriber_is_paused() {
    let work = Work::shared().await;
    let outbox = &work.outbox;
    let _relay = outbox.relay();
    let _worker = work.run(mails(Record::good())).await;
    outbox.written("a", 1).await;
    work.wait_for(1).await;
    let pause = ["worker", "pause", "--subscriber", "mails", "--reason", "the mail server moves"];
    succeeded(outbox.operator(&pause));
    says(outbox, &["status", "--json"], &["\"state\": \"paused by jane"]).await;
    let event = outbox.written("a", 2).await;
    let resume = "`aftercommit worker resume --subscriber mails`";
    says(
        outbox,
        &["status"],
        &["subscriber mails: paused since", "by jane (the mail server moves)", "1 event waits", resume],
    )
    .await;
    is_found_by_check(outbox);
    says(outbox, &["doctor"], &["WARN  paused", "by jane", resume]).await;
    says(outbox, &["explain", &event], &["the subscriber is paused"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_parked() {
    let outbox = Work::shared().await.outbox;
    let _relay = outbox.relay();
    outbox.publish("first", "{}", None).await;
    outbox.assert_complete().await;
    change_stream(&outbox, |config| config.max_message_size = 4096).await;
    outbox.publish("large", &format!("\"{}\"", "x".repeat(10_000)), Some("k")).await;
    outbox.publish("behind", "{}", Some("k")).await;
    let parked = "1 event parked for ";
    says(
        &outbox,
        &["status"],
        &["STUCK relay:", parked, "1 later event of their keys behind", "aftercommit parked list"],
    )
    .await;
    is_found_by_check(&outbox);
    says(&outbox, &["doctor"], &["WARN  parked", "2 events parked"]).await;
    let behind: String = sqlx::query_scalar("select event_id::text from aftercommit.outbox where type = 'behind'")
        .fetch_one(&outbox.pool)
        .await
        .unwrap();
    says(
        &outbox,
        &["explain", &behind],
        &["outbox  parked, see `aftercommit parked list`: waits behind an earlier event of its key"],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_answers_503() {
    let work = Work::shared().await;
    let outbox = &work.outbox;
    let endpoint = Endpoint::start(|_, _| Reply::Status(503)).await;
    let _relay = outbox.relay();
    let _worker = work.process(&endpoint.toml(""));
    let event = outbox.written("a", 1).await;
    let status = ["STUCK subscriber webhook: its worker cannot work", "503", "1 event waits"];
    says(outbox, &["status"], &status).await;
    is_found_by_check(outbox);
    says(outbox, &["doctor"], &["FAIL  workers", "503"]).await;
    says(outbox, &["explain", &event], &["webhook  unavailable: ", "503 Service Unavailable; next try at"]).await;
    says(outbox, &["peek", "--subscriber", "webhook"], &["no progress: its worker cannot work", "unavailable", "503"])
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_is_poison() {
    let work = Work::shared().await;
    let outbox = &work.outbox;
    let _relay = outbox.relay();
    let poison = Record::new(|delivery| match delivery.event.n {
        1 => Act::Fail(HandlerError::retry_after(Duration::from_secs(1), std::io::Error::other("no such printer"))),
        _ => Act::Succeed,
    });
    let _worker = work.run(mails(poison).max_attempts(1000)).await;
    let (event, behind) = (outbox.written("a", 1).await, outbox.written("a", 2).await);
    let words = ["LOOK  subscriber mails: 1 event fails: attempt ", " of 1000 failed at ", "no such printer", &event];
    says(outbox, &["status"], &words).await;
    is_found_by_check(outbox);
    says(outbox, &["doctor"], &["WARN  failing", "no such printer"]).await;
    says(outbox, &["explain", &event], &["attempt 1 of 1000 failed: no such printer", "attempt 2 of 1000 failed"])
        .await;
    says(outbox, &["explain", &behind], &[&format!("waits behind event {event} of its key")]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stream_is_full() {
    let outbox = Work::shared().await.outbox;
    let _relay = outbox.relay();
    change_stream(&outbox, |config| (config.max_messages, config.discard) = (2, DiscardPolicy::New)).await;
    for n in 1..=4 {
        outbox.written("a", n).await;
    }
    let status = ["STUCK relay: 2 events to publish", "although a relay leads", "maximum messages exceeded"];
    says(&outbox, &["status"], &status).await;
    is_found_by_check(&outbox);
    says(&outbox, &["doctor"], &["FAIL  backlog", "maximum messages exceeded"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_is_somebody_elses() {
    let work = Work::shared().await;
    let outbox = &work.outbox;
    let _relay = outbox.relay();
    let _worker = work.run(mails(Record::good())).await;
    let stream = outbox.js().await.get_stream(&outbox.naming.stream).await.unwrap();
    let tail = pull::Config { durable_name: Some("tail".into()), ..pull::Config::default() };
    stream.create_consumer(tail).await.unwrap();
    // As one that `nats stream view` leaves behind when it is interrupted.
    let pager = pull::Config {
        durable_name: Some("stream_pager_1".into()),
        description: Some("JSM Stream Pager".into()),
        filter_subject: ">".into(),
        inactive_threshold: Duration::from_hours(1),
        memory_storage: true,
        num_replicas: 1,
        ..pull::Config::default()
    };
    stream.create_consumer(pager).await.unwrap();
    let reader = pull::Config {
        name: Some("reader".into()),
        inactive_threshold: Duration::from_hours(1),
        ..pull::Config::default()
    };
    stream.create_consumer(reader).await.unwrap();
    outbox.written("a", 1).await;
    work.wait_for(1).await;
    let status = [
        "OK: everything flows",
        "tail (durable, 1 message not delivered): no subscriber of aftercommit",
        "stream_pager_1 (durable, 1 message not delivered): no subscriber of aftercommit",
        "reader (temporary, 1 message not delivered): no subscriber of aftercommit",
    ];
    let said = says(outbox, &["status"], &status).await;
    let lines = ["\ntail ", "\nstream_pager_1 ", "\nreader "];
    assert!(lines.iter().all(|line| !said.contains(line)), "it is no subscriber: {said}");
    let words = "no subscriber of aftercommit reads from reader, stream_pager_1, tail";
    let said = says(outbox, &["doctor"], &[words, "tail", "`aftercommit provision` did not make it"]).await;
    // Only what is made to stay could be a subscriber's.
    assert_eq!(said.matches("stream_pager_1").count(), 1, "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grant_is_missing() {
    let work = Work::shared().await;
    let outbox = &work.outbox;
    let _relay = outbox.relay();
    let database = Database { config: outbox.postgres.clone() };
    let roles = Roles::of(&database);
    let login = roles.login(&database, "worker", &["worker"]).await;
    database.execute(&format!("grant insert on effect to {login}; grant usage on schema public to {login}")).await;
    database.execute(&format!("revoke insert on aftercommit.inbox from {}worker", roles.0)).await;
    work.worker_with(mails(Record::good())).provision().await.unwrap();
    let limited = PostgresConfig::new(database.url_of(&login));
    let worker = Worker::new(limited.clone(), outbox.nats.clone(), outbox.naming.clone());
    let _worker = RunningWorker::start(worker.subscriber(mails(Record::good())));
    outbox.written("a", 1).await;
    let denied = "permission denied for table inbox";
    says(outbox, &["status"], &["STUCK subscriber mails: its worker cannot work", denied]).await;
    is_found_by_check(outbox);
    let doctor = text(
        &outbox.operator_command(&["doctor", "--role", "worker"]).env("DATABASE_URL", &limited.url).output().unwrap(),
    );
    let remedy = format!("-> grant insert on aftercommit.inbox to {login};");
    assert!(doctor.contains("FAIL  grants") && doctor.contains(&remedy), "{doctor}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_key_is_slow() {
    let work = Work::shared().await;
    let outbox = &work.outbox;
    let _relay = outbox.relay();
    let slow = Record::new(|delivery| match delivery.key.as_deref() {
        Some("slow") => Act::Sleep(Duration::from_mins(5)),
        _ => Act::Succeed,
    });
    let _worker = work.run(mails(slow).time_limit(Duration::from_mins(10)).max_batch(1)).await;
    let (first, second) = (outbox.written("slow", 1).await, outbox.written("slow", 2).await);
    outbox.written("fast", 1).await;
    work.wait_for(1).await;
    let running = format!("event {first} of key slow has been running for");
    says(outbox, &["status"], &["LOOK  subscriber mails:", &running, "2 events wait"]).await;
    is_found_by_check(outbox);
    says(outbox, &["doctor"], &["WARN  pending", &running]).await;
    says(outbox, &["explain", &first], &["running: runs for"]).await;
    says(outbox, &["explain", &second], &[&format!("waits behind event {first} of its key")]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_relay_leads() {
    let outbox = Work::shared().await.outbox;
    let event = outbox.written("a", 1).await;
    says(&outbox, &["status"], &["STUCK relay: no relay has ever led this outbox: 1 event to publish"]).await;
    let relay = outbox.relay();
    outbox.assert_complete().await;
    outbox.settled().await;
    relay.stop().await.unwrap();
    assert!(text(&outbox.operator(&["explain", &event])).contains("published"));
    let event = outbox.written("a", 2).await;
    says(&outbox, &["status"], &["STUCK relay: no relay leads: 1 event to publish", "start aftercommit-relay"]).await;
    is_found_by_check(&outbox);
    says(&outbox, &["doctor"], &["WARN  relay", "no relay leads"]).await;
    says(&outbox, &["explain", &event], &["not published yet; no relay leads at present"]).await;
}

/// What is not known is not shown as nothing.
#[tokio::test(flavor = "multi_thread")]
async fn nats_is_away() {
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let mut work = Work::on(database, Nats::shared().await.unwrap().url()).await;
    let worker = work.run(mails(Record::good())).await;
    work.send("a", 1).await;
    work.wait_for(1).await;
    worker.stop().await;
    work.outbox.nats.url = "nats://127.0.0.1:9".into();
    says(&work.outbox, &["status"], &["STUCK stream: ", "cannot connect to NATS", "\nstream       ?  "]).await;
    let status = text(&work.outbox.operator(&["status", "--json"]));
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    let mails = &status["subscribers"]["mails"];
    for name in ["has_consumer", "pending", "in_flight", "redelivered", "oldest_seconds"] {
        assert!(mails[name].is_null() && mails.get(name).is_some(), "{name}: {mails}");
    }
    assert_eq!((&mails["failing"], &status["other_consumers"]), (&0.into(), &serde_json::Value::Null));
}

async fn change_stream(outbox: &Outbox, change: impl FnOnce(&mut Config)) {
    let js = outbox.js().await;
    let mut config = js.get_stream(&outbox.naming.stream).await.unwrap().cached_info().config.clone();
    change(&mut config);
    js.update_stream(config).await.unwrap();
}
