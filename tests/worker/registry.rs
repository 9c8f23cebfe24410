//! Subscribers of several modules, queues and streams in one worker.

use std::process::Command;

use crate::support::{Act, Number, Outbox, Record, RunningWorker, Work};
use aftercommit::backoff::Backoff;
use aftercommit::outbox::Publisher;
use aftercommit::testing::coverage::Coverage;
use aftercommit::testing::servers::{Nats, Postgres};
use aftercommit::testing::unique_name;
use aftercommit::worker::{FailedModule, HandlerError, Queues, Registry, Subscriber, Worker, read_file};
use aftercommit::{ErrorKind, Event};
use async_nats::jetstream;
use tokio_util::sync::CancellationToken;

fn good(name: &str) -> Subscriber {
    Subscriber::new(name).on::<Number>(Record::good())
}

/// How many messages the consumer has handed out.
async fn delivered(context: &jetstream::Context, stream: &str, subscriber: &str) -> u64 {
    let consumer: jetstream::consumer::PullConsumer =
        context.get_consumer_from_stream(subscriber, stream).await.unwrap();
    consumer.cached_info().delivered.stream_sequence
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_module_does_not_stop_the_others() {
    let work = Work::shared().await;
    let registry = || {
        Registry::new()
            .module("billing", Err::<Vec<Subscriber>, _>("there is no account"))
            .module("receipts", vec![good("receipts")])
    };
    let failed = registry().failed_modules().to_vec();
    assert!(matches!(&failed[..], [FailedModule { name, .. }] if name == "billing"), "{failed:?}");
    let Outbox { postgres, nats, naming, .. } = &work.outbox;
    let worker = || Worker::new(postgres.clone(), nats.clone(), naming.clone());
    assert_eq!(worker().registry(registry()).provision().await.unwrap().len(), 1);
    let running = RunningWorker::start(worker().registry(registry()));
    work.send_many(&["a"], 3).await;
    work.wait_for(3).await;
    running.stop().await;

    let error = worker().registry(registry().strict()).run(CancellationToken::new()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains("billing") && error.to_string().contains("no account"), "{error}");
}

/// A worker that serves one queue leaves the events of the others to a worker that serves the rest.
#[tokio::test(flavor = "multi_thread")]
async fn each_worker_serves_its_queues() {
    let work = Work::shared().await;
    let worker = |queues| work.worker_with(good("light")).subscriber(good("heavy").queue("heavy")).queues(queues);
    let heavy = || vec!["heavy".to_string()];
    assert_eq!(worker(Queues::Only(heavy())).provision().await.unwrap().len(), 2, "all are provisioned");
    work.send_many(&["a", "b"], 10).await;
    let one = RunningWorker::start(worker(Queues::Only(heavy())));
    work.wait_for(20).await;
    work.wait_until_acked("heavy").await;
    let stream = &work.outbox.naming.stream;
    assert_eq!(delivered(&work.context, stream, "light").await, 0);
    one.stop().await;
    assert_eq!(work.count().await, 20);

    let rest = RunningWorker::start(worker(Queues::Except(heavy())));
    work.wait_for(40).await;
    work.send_many(&["c"], 5).await;
    work.wait_for(45).await;
    work.wait_until_acked("light").await;
    assert_eq!(delivered(&work.context, stream, "heavy").await, 20);
    rest.stop().await;
    let all = RunningWorker::start(worker(Queues::All));
    work.wait_for(50).await;
    all.stop().await;
    assert_eq!(work.count().await, 50);
}

const FILE: &str = r#"
[[subscriber]]
name = "light"
types = ["*"]
sql = { function = "public.apply" }

[[subscriber]]
name = "heavy"
queue = "heavy"
types = ["*"]
sql = { function = "public.apply" }
"#;

/// The program's exit status and what it said.
fn end(command: &mut Command) -> (Option<i32>, String) {
    let output = command.output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_program_serves_its_queues_and_refuses_unknown_ones() {
    let work = Work::shared().await;
    work.create_apply("").await;
    for (arguments, named) in [
        (&["--queue", "hevy"][..], "\"hevy\"; there are: default, heavy"),
        (&["--except-queue", "hevy"], "\"hevy\"; there are: default, heavy"),
        (&["--except-queue", "heavy,default"], "no subscriber matches"),
        (&["--queue", "heavy", "--except-queue", "default"], "both set"),
    ] {
        let (status, said) = end(work.command(FILE).args(arguments));
        assert_eq!(status, Some(2), "{arguments:?}: {said}");
        assert!(said.contains(named), "{arguments:?}: {said}");
    }
    let mut child =
        crate::support::WorkerProcess(work.command(FILE).env("AFTERCOMMIT_QUEUES", "heavy").spawn().unwrap());
    work.send_many(&["a"], 5).await;
    work.wait_for(5).await;
    work.wait_until_acked("heavy").await;
    assert_eq!(delivered(&work.context, &work.outbox.naming.stream, "light").await, 0);
    assert!(child.0.try_wait().unwrap().is_none());
    assert_eq!(child.stop(), Some(0));
    assert_eq!(work.count().await, 5);
}

/// Two services with an outbox, a relay and a stream each, and one worker for subscribers of both.
#[tokio::test(flavor = "multi_thread")]
async fn one_worker_serves_events_of_several_services() {
    let work = Work::shared().await;
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let orders = Outbox::new(database, Nats::shared().await.unwrap().url()).await;
    let refuse = |number: &aftercommit::worker::Delivery<Number>| match number.event.n {
        3 => Act::Fail(HandlerError::reject("three is not for us")),
        _ => Act::Succeed,
    };
    let own = Subscriber::new("own").on::<Number>(Record::new(refuse)).backoff(Backoff::RECONNECT);
    let foreign = Subscriber::new("foreign")
        .on::<Number>(Record::new(refuse))
        .stream(&orders.naming.stream)
        .prefix(orders.naming.prefix.clone());
    let worker = work.worker_with(own).subscriber(foreign);
    let changes = worker.provision().await.unwrap();
    assert!(changes[0].contains(&work.outbox.naming.stream), "{changes:?}");
    assert!(changes[1].contains(&orders.naming.stream), "{changes:?}");
    let relays = (work.outbox.relay(), orders.relay());
    let worker = RunningWorker::start(worker);
    for n in 1..=20 {
        for (outbox, key) in [(&work.outbox, "own"), (&orders, "orders")] {
            let event = serde_json::json!({ "key": key, "n": n }).to_string();
            outbox.publish(Number::TYPE, &event, Some(key)).await;
        }
    }
    work.wait_for(38).await;
    let expected: Vec<i64> = (1..=20).filter(|n| *n != 3).collect();
    assert_eq!(work.numbers("own").await, expected);
    assert_eq!(work.numbers("orders").await, expected);
    let letters: Vec<(String, String)> =
        sqlx::query_as("select subscriber, stream from aftercommit.dead_letter order by subscriber")
            .fetch_all(&work.outbox.pool)
            .await
            .unwrap();
    let named = |name: &str, outbox: &Outbox| (name.to_string(), outbox.naming.stream.clone());
    assert_eq!(letters, [named("foreign", &orders), named("own", &work.outbox)]);
    worker.stop().await;
    drop(relays);
}

#[test]
fn the_coverage_check_reads_a_worker_toml() {
    let path = std::env::temp_dir().join(format!("{}.toml", unique_name("coverage")));
    std::fs::write(&path, FILE.replacen("[\"*\"]", "[\"order.placed\"]", 1).replace("[\"*\"]", "[\"order.paid\"]"))
        .unwrap();
    let coverage = || Coverage::new().subscribers(read_file(&path).unwrap());
    let placed = || Publisher::new("orders").publishes_type("order.placed").unwrap();
    coverage().publishers([placed().publishes_type("order.paid").unwrap()]).check().unwrap();
    let error = coverage().publishers([placed()]).check().unwrap_err().to_string();
    assert!(error.contains("order.paid (heavy)") && !error.contains("order.placed"), "{error}");
    assert!(placed().publishes_type("order.>").is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_stream_is_named_and_the_rest_is_provisioned() {
    let work = Work::shared().await;
    let file = format!("{FILE}stream = \"NOWHERE\"\nprefix = \"nowhere\"\n");
    let path = std::env::temp_dir().join(format!("{}-missing.toml", work.outbox.naming.stream));
    std::fs::write(&path, file.replace("name = \"heavy\"", "name = \"first\"")).unwrap();
    // The one whose stream is missing comes first.
    let subscribers = read_file(&path).unwrap().into_iter().rev().collect::<Vec<_>>();
    let Outbox { postgres, nats, naming, .. } = &work.outbox;
    let worker = Worker::new(postgres.clone(), nats.clone(), naming.clone()).registry(subscribers);
    let error = worker.provision().await.unwrap_err().to_string();
    assert!(error.contains("consumer first of stream NOWHERE") && error.contains("does not exist"), "{error}");
    assert_eq!(delivered(&work.context, &naming.stream, "light").await, 0, "it is there");
}
