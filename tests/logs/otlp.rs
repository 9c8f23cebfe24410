//! What the programs export by OTLP: one trace from the publisher to the last handler, the metrics of their port, their log.
//! And that no collector, however bad, is in the way of an event.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, Postgres};
use sqlx::AssertSqlSafe;

use crate::collector::{Collector, FoundSpan, STOPPED, exports_to};
use crate::support::{Authority, Directory, Endpoint, Outbox, RelayProcess, Reply, SOON, Work, WorkerProcess};
use crate::support::{free_address, get, reaches};

const PRODUCER: i32 = 4;
const CONSUMER: i32 = 5;
const ERROR: i32 = 2;

/// A subscriber that runs the SQL function `apply`.
const APPLY: &str = "[[subscriber]]\nname = \"apply\"\ntypes = [\"test.number\"]\nsql = { function = \"apply\" }\n";

fn traceparent(span: &FoundSpan) -> String {
    format!("00-{}-{}-01", span.trace, span.id)
}

/// A relay that exports to the collector.
fn relay(outbox: &Outbox, collector: &Collector) -> RelayProcess {
    RelayProcess(collector.listens_to(&mut outbox.relay_command()).spawn().unwrap())
}

/// A worker that exports to the collector.
fn worker(work: &Work, toml: &str, collector: &Collector) -> WorkerProcess {
    WorkerProcess(collector.listens_to(&mut work.command(toml)).spawn().unwrap())
}

/// Publishes a number with the operator's tool; returns its id.
fn publish(outbox: &Outbox, collector: &Collector, payload: &str) -> String {
    let mut command = outbox.operator_command(&["publish", "test.number", "--payload", payload, "--key", "a"]);
    let output = collector.listens_to(&mut command).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_string()
}

/// Five processes and two services: publisher, relay, a worker whose SQL function publishes, a worker with an endpoint.
#[tokio::test(flavor = "multi_thread")]
async fn one_trace_from_the_publisher_to_the_second_handler() {
    let collector = Collector::start().await;
    let work = Work::shared().await;
    work.create_apply("perform aftercommit.publish('test.other', '{\"n\": 2}');").await;
    let endpoint = Endpoint::start(|_, _| Reply::Status(204)).await;
    let _relay = relay(&work.outbox, &collector);
    let _first = worker(&work, APPLY, &collector);
    let toml = endpoint.toml("").replace("test.number", "test.other");
    let _second = worker(&work, &toml, &collector);
    let id = publish(&work.outbox, &collector, "{\"key\": \"a\", \"n\": 1}");

    let root = collector.span("of the publisher", |span| span.name == "aftercommit publish").await;
    assert_eq!((root.service.as_str(), root.parent.as_str()), ("aftercommit", ""));
    let child = |name: &'static str, service: &'static str, parent: &FoundSpan| {
        let (trace, parent) = (parent.trace.clone(), parent.id.clone());
        move |span: &FoundSpan| {
            span.name == name && span.service == service && span.trace == trace && span.parent == parent
        }
    };
    let sent = collector.span("to the stream", child("publish test.number", "aftercommit-relay", &root)).await;
    let handled = collector.span("of the function", child("process test.number", "aftercommit-worker", &root)).await;
    for span in [&sent, &handled] {
        let attribute = |name: &str| span.attributes.get(name).map(String::as_str);
        assert_eq!(attribute("messaging.system"), Some("nats"), "{span:#?}");
        assert_eq!(attribute("messaging.destination.name"), Some(work.outbox.naming.stream.as_str()));
        assert_eq!(attribute("messaging.message.id"), Some(id.as_str()));
        assert_eq!(attribute("cloudevents.event_type"), Some("test.number"));
    }
    assert_eq!((sent.kind, sent.attributes["messaging.operation.type"].as_str()), (PRODUCER, "send"));
    assert_eq!((handled.kind, handled.attributes["messaging.operation.type"].as_str()), (CONSUMER, "process"));
    assert_eq!(handled.attributes["messaging.consumer.group.name"], "apply");
    assert_eq!((handled.status, &handled.events), (0, &vec![]), "log lines are logs, not events of spans");
    collector.span("the function's own", child("publish test.other", "aftercommit-relay", &handled)).await;
    let second = child("process test.other", "aftercommit-worker", &handled);
    let second = collector.span("of the endpoint", second).await;
    let request = endpoint.received().remove(0);
    assert_eq!(request.headers["traceparent"], traceparent(&second), "the endpoint goes on from its handler's span");
}

/// Also of events that an SQL function gets in one statement.
#[tokio::test(flavor = "multi_thread")]
async fn each_event_of_a_batch_goes_on_with_its_own_trace() {
    let collector = Collector::start().await;
    let work = Work::shared().await;
    work.create_apply("perform aftercommit.publish('test.other', jsonb_build_object('n', event -> 'data' -> 'n'));")
        .await;
    let trace = |n: i64| format!("{n:032x}");
    // Every fourth without a trace, every fourth in one that is not recorded.
    let query = "select aftercommit.publish('test.number', jsonb_build_object('n', n), null,
                     case n % 4 when 0 then '{}'::jsonb else jsonb_build_object('traceparent',
                         format('00-%s-00f067aa0ba902b7-%s', lpad(to_hex(n), 32, '0'), case n % 4 when 1 then '00' else '01' end),
                         'tracestate', 'congo=' || n) end)
                   from generate_series(1, 100) as n";
    sqlx::query(query).execute(&work.outbox.pool).await.unwrap();
    let _relay = relay(&work.outbox, &collector);
    work.outbox.settled().await;
    let _worker = worker(&work, &format!("{APPLY}concurrency = 1\n"), &collector);
    work.wait_for(100).await;

    let headers: Vec<(i64, Option<String>, Option<String>)> = sqlx::query_as(
        "select (aftercommit.payload_json(payload) ->> 'n')::bigint, headers ->> 'traceparent', headers ->> 'tracestate'
           from aftercommit.outbox where type = 'test.other'",
    )
    .fetch_all(&work.outbox.pool)
    .await
    .unwrap();
    assert_eq!(headers.len(), 100);
    for (n, traceparent, state) in headers {
        if n % 4 < 2 {
            // Those of a recorded batch must not reach the others. Alone in their transaction they have a span.
            assert!(
                traceparent.is_none_or(|context| !context.contains(&trace(n + 1)) && !context.contains(&trace(n - 1)))
            );
            continue;
        }
        let context = traceparent.unwrap();
        assert!(context.contains(&trace(n)) && context.ends_with("-01"), "{n}: {context}");
        assert_eq!(state, Some(format!("congo={n}")));
        let id = context.split('-').nth(2).unwrap().to_string();
        let span = collector.span("of the call", |span| span.id == id).await;
        assert_eq!((span.parent.as_str(), span.kind), ("00f067aa0ba902b7", CONSUMER));
    }
    let batches: Vec<_> = collector.spans().into_iter().filter(|span| span.name == "process batch").collect();
    assert!(
        batches.iter().any(|batch| batch.links.contains(&trace(2)) || batch.links.contains(&trace(3))),
        "{batches:#?}"
    );
}

/// The names of what a port serves, without those of a histogram's parts.
fn served(metrics: &str) -> Vec<String> {
    let of_type = metrics.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let mut names: Vec<String> = of_type.map(|line| line.split(' ').next().unwrap().to_string()).collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_exported_as_the_port_serves_them() {
    let collector = Collector::start().await;
    let work = Work::shared().await;
    work.create_apply("").await;
    let (relay_port, worker_port) = (free_address(), free_address());
    let mut command = work.outbox.relay_command();
    let relay = collector.listens_to(&mut command).args(["--http", &relay_port]).spawn().unwrap();
    let relay = RelayProcess(relay);
    let mut command = work.command(APPLY);
    let worker = WorkerProcess(collector.listens_to(&mut command).args(["--http", &worker_port]).spawn().unwrap());
    for n in 0..20 {
        work.outbox.written("a", n).await;
    }
    work.wait_for(20).await;
    let stream = &work.outbox.naming.stream;
    reaches(&relay_port, &format!("aftercommit_relay_published_total{{stream=\"{stream}\"}}"), |n| n == 20.0).await;
    reaches(&worker_port, "aftercommit_worker_events_total{subscriber=\"apply\",outcome=\"ok\"}", |n| n == 20.0).await;
    for (port, service, histogram) in [
        (&relay_port, "aftercommit-relay", "aftercommit_relay_latency_seconds"),
        (&worker_port, "aftercommit-worker", "aftercommit_worker_latency_seconds"),
    ] {
        let mut last = (Vec::new(), Vec::new());
        let same = eventually(SOON, "the same metrics", async || {
            let served = served(&get(port, "/metrics").await.unwrap().1);
            let exported: Vec<String> = collector.metrics(service).into_keys().collect();
            last = (served, exported);
            last.0 == last.1
        });
        assert!(same.await.is_ok(), "{last:#?}");
        let count = || collector.metrics(service)[histogram].counts.values().sum::<u64>();
        eventually(SOON, "all of them are counted", async || count() == 20).await.unwrap();
        let text = get(port, "/metrics").await.unwrap().1;
        let found = &collector.metrics(service)[histogram];
        let bounds = text.lines().filter(|line| line.starts_with(&format!("{histogram}_bucket")));
        let bounds = bounds.filter_map(|line| line.split("le=\"").nth(1)?.split('"').next()?.parse::<f64>().ok());
        let bounds: Vec<f64> = bounds.filter(|bound| bound.is_finite()).collect();
        assert_eq!(found.bounds, bounds, "{histogram}");
    }
    // What came after the last export goes out when they stop.
    relay.signal("-TERM");
    let mut relay = relay;
    assert!(relay.wait().success());
    assert_eq!(worker.stop(), Some(0));
    let relay = collector.metrics("aftercommit-relay");
    let published = &relay["aftercommit_relay_published_total"].values;
    assert_eq!(published.values().copied().collect::<Vec<_>>(), [20.0], "{published:?}");
    let worker = collector.metrics("aftercommit-worker");
    assert_eq!(worker["aftercommit_worker_events_total"].values["outcome=\"ok\",subscriber=\"apply\""], 20.0);
}

/// The lines of a file with this in them.
fn lines(path: &Path, part: &str) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().filter(|line| line.contains(part)).map(String::from).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn log_lines_have_the_event_and_the_trace_that_they_are_about() {
    let collector = Collector::start().await;
    let files = Directory::new();
    let path = files.path().join("worker.log");
    let work = Work::shared().await;
    work.create_apply("if event -> 'data' ->> 'n' = '7' then raise exception 'no sevens'; end if;").await;
    let toml = format!("{APPLY}max_attempts = 1\n");
    let mut command = work.command(&toml);
    command.args(["--log-format", "json"]).env("RUST_LOG", "aftercommit=debug,info");
    command.env("RUST_LOG", "debug,async_nats=warn,sqlx=warn").stderr(std::fs::File::create(&path).unwrap());
    let worker = WorkerProcess(collector.listens_to(&mut command).spawn().unwrap());
    let _relay = relay(&work.outbox, &collector);
    let id = publish(&work.outbox, &collector, "{\"key\": \"a\", \"n\": 7}");
    let run = collector.span("of the run", |span| span.name == "process test.number").await;
    assert_eq!((run.status, run.attributes["error.type"].as_str()), (ERROR, "retry"));

    let about = |message: &str| {
        let found = collector
            .logs()
            .into_iter()
            .find(|log| log.message == message && log.attributes.get("event_id") == Some(&id));
        found.map(|log| (log.service, log.severity, log.trace, log.span))
    };
    eventually(SOON, "the lines of the run", async || about("handler ended").is_some()).await.unwrap();
    let expected = ("aftercommit-worker".to_string(), "DEBUG".to_string(), run.trace.clone(), run.id.clone());
    assert_eq!(about("handler ended"), Some(expected));
    eventually(SOON, "the line about the letter", async || about("event became a dead letter").is_some())
        .await
        .unwrap();
    assert_eq!(worker.stop(), Some(0));
    let line = lines(&path, "handler ended").remove(0);
    let line: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!((line["trace_id"].as_str(), line["span_id"].as_str()), (Some(&*run.trace), Some(&*run.id)), "{line}");
    assert_eq!(line["span"]["event_id"].as_str(), Some(&*id), "{line}");
    assert!(lines(&path, "stopping").iter().all(|line| !line.contains("trace_id")));
}

/// Without an export, the publisher's trace is in the log all the same.
#[tokio::test(flavor = "multi_thread")]
async fn json_lines_have_the_publishers_trace_without_any_export() {
    let files = Directory::new();
    let path = files.path().join("worker.log");
    let work = Work::shared().await;
    work.create_apply("").await;
    let mut command = work.command(APPLY);
    command.args(["--log-format", "json"]).env("RUST_LOG", "debug,async_nats=warn,sqlx=warn");
    let _worker = WorkerProcess(command.stderr(std::fs::File::create(&path).unwrap()).spawn().unwrap());
    let mut event = work.envelope(Some("a"), 1);
    let trace = "0af7651916cd43dd8448eb211c80319c";
    event.headers.insert("traceparent".into(), format!("00-{trace}-b7ad6b7169203331-01"));
    work.put(&event).await;
    eventually(SOON, "the handler's line", async || !lines(&path, "handler ended").is_empty()).await.unwrap();
    let line: serde_json::Value = serde_json::from_str(&lines(&path, "handler ended").remove(0)).unwrap();
    assert_eq!((line["trace_id"].as_str(), line["span_id"].as_str()), (Some(trace), None), "{line}");
}

/// Payloads, headers, passwords, what PostgreSQL quotes in errors, and what the collector wants to see.
#[tokio::test(flavor = "multi_thread")]
async fn no_secret_is_exported_nor_logged() {
    let collector = Collector::start().await;
    let files = Directory::new();
    let headers = files.write("headers", "authorization=Bearer%20canary-otlp-header\nx-tenant=canary-tenant\n");
    let log = files.path().join("log");
    let file = || std::fs::OpenOptions::new().create(true).append(true).open(&log).unwrap();
    let work = Work::shared().await;
    // An error whose detail has the payload.
    sqlx::raw_sql("create table once (text text unique)").execute(&work.outbox.pool).await.unwrap();
    work.create_apply("insert into once select event -> 'data' ->> 'text' from generate_series(1, 2);").await;
    let talks = |command: &mut Command| {
        collector.listens_to(command).env("RUST_LOG", "trace").env("OTEL_EXPORTER_OTLP_HEADERS_FILE", &headers);
        command.stderr(file()).spawn().unwrap()
    };
    let mut relay = RelayProcess(talks(&mut work.outbox.relay_command()));
    let worker = WorkerProcess(talks(
        &mut work.command(&format!("{APPLY}max_attempts = 2\nbackoff = {{ first = \"20ms\" }}\n")),
    ));
    let query = "select aftercommit.publish('test.number', '{\"n\": 1, \"text\": \"canary-payload\"}', 'a',
                     '{\"x-tenant\": \"canary-header\", \"traceparent\": \"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\"}')";
    sqlx::query(query).execute(&work.outbox.pool).await.unwrap();
    collector.span("that failed", |span| span.status == ERROR).await;
    eventually(SOON, "a dead letter", async || !work.dead_letters().await.is_empty()).await.unwrap();
    relay.signal("-TERM");
    relay.wait();
    worker.stop();
    let targets: BTreeSet<String> = collector.logs().into_iter().map(|log| log.target).collect();
    assert!(targets.iter().any(|target| target.starts_with("async_nats")), "not all that can be said: {targets:?}");
    assert!(!targets.iter().any(|target| target.starts_with("hyper")), "exports are logged: {targets:?}");
    let requests = collector.0.received();
    assert!(requests.iter().all(|request| request.headers["authorization"] == "Bearer canary-otlp-header"));
    for (what, text) in [("the export", collector.text()), ("the log", std::fs::read_to_string(&log).unwrap())] {
        let found = text.find("canary").map(|at| text[at.saturating_sub(200)..].chars().take(400).collect::<String>());
        assert_eq!(found, None, "{what}");
    }
}

/// A collector that is away, one that hangs, one that refuses: events flow, the log stays quiet, the stop is soon.
#[tokio::test(flavor = "multi_thread")]
async fn no_collector_is_in_the_way_of_events() {
    let hanging = Collector::answering(|_| Reply::Hang).await;
    let refusing = Collector::answering(|_| Reply::Status(503)).await;
    let cutting = Collector::answering(|_| Reply::Cut).await;
    let away = format!("http://{}", free_address());
    let files = Directory::new();
    for (what, url) in
        [("away", away), ("hanging", hanging.url()), ("refusing", refusing.url()), ("cutting", cutting.url())]
    {
        let work = Work::shared().await;
        work.create_apply("").await;
        let (relay_log, worker_log) =
            (files.path().join(format!("{what}-relay")), files.path().join(format!("{what}-worker")));
        let port = free_address();
        let start = |command: &mut Command, log: &Path| {
            let command = exports_to(command, &url).env("OTEL_EXPORTER_OTLP_TIMEOUT", "1000").env("RUST_LOG", "info");
            command.env("OTEL_BSP_MAX_QUEUE_SIZE", "50").stderr(std::fs::File::create(log).unwrap()).spawn().unwrap()
        };
        let mut relay = RelayProcess(start(&mut work.outbox.relay_command(), &relay_log));
        let worker = start(work.command(APPLY).args(["--http", &port]), &worker_log);
        let worker = WorkerProcess(worker);
        for n in 0..300 {
            work.outbox.written(&format!("key-{}", n % 7), n).await;
        }
        work.wait_for(300).await;
        // Each run is a trace of its own, and 50 may wait.
        reaches(&port, "aftercommit_telemetry_lost_total{signal=\"traces\"}", |lost| lost > 0.0).await;
        assert!(!lines(&worker_log, "telemetry is lost").is_empty(), "{what}");
        let begun = Instant::now();
        relay.signal("-TERM");
        assert!(relay.ends(STOPPED).await.success(), "{what}");
        assert_eq!(worker.stop(), Some(0), "{what}");
        assert!(begun.elapsed() < 2 * STOPPED, "{what}: {:?}", begun.elapsed());
        for log in [&relay_log, &worker_log] {
            let told = lines(log, "telemetry is lost");
            assert!(told.len() <= 3, "{what}: one line for each signal at most: {told:#?}");
        }
    }
}

/// SIGKILL in the middle of everything: what was exported is there, and the next one goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_program_loses_telemetry_and_no_event() {
    let collector = Collector::start().await;
    let work = Work::shared().await;
    work.create_apply("").await;
    for round in 0..3 {
        let mut relay = relay(&work.outbox, &collector);
        let worker = worker(&work, APPLY, &collector);
        publish(&work.outbox, &collector, &format!("{{\"key\": \"a\", \"n\": {round}}}"));
        work.wait_for(round + 1).await;
        relay.kill();
        worker.kill();
        work.outbox.expire_leases().await;
    }
    let roots = collector.spans().into_iter().filter(|span| span.name == "aftercommit publish").count();
    assert_eq!(roots, 3);
}

/// A collector behind TLS, with an authority of its own, that wants to see a certificate.
#[tokio::test(flavor = "multi_thread")]
async fn telemetry_goes_over_tls_with_a_certificate() {
    let authority = Authority::new();
    let files = Directory::new();
    let (certificate, key) = authority.issue("client");
    let ca = files.write("ca.pem", &authority.certificate);
    let (certificate, key) = (files.write("client.pem", certificate), files.write("client.key", key));
    let endpoint = Endpoint::on("127.0.0.1:0", Some(Endpoint::tls(&authority)), |_, _| Reply::Status(200)).await;
    let collector = Collector(endpoint);
    let work = Work::shared().await;
    let mut command = work.outbox.operator_command(&["publish", "test.number", "--payload", "{\"n\": 1}"]);
    exports_to(&mut command, &format!("https://{}", collector.0.address.replace("127.0.0.1", "localhost")))
        .env("OTEL_EXPORTER_OTLP_CERTIFICATE", ca)
        .env("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", certificate)
        .env("OTEL_EXPORTER_OTLP_CLIENT_KEY", key);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    collector.span("over TLS", |span| span.name == "aftercommit publish").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_cannot_be_used_are_refused_by_name() {
    let outbox = Outbox::new(
        Postgres::shared().await.unwrap().create_database().await.unwrap(),
        Nats::shared().await.unwrap().url(),
    )
    .await;
    for (name, value) in [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "hunter2"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/nowhere/ca.pem"),
        ("OTEL_TRACES_SAMPLER", "sometimes"),
    ] {
        let mut command = outbox.relay_command();
        exports_to(&mut command, "http://127.0.0.1:4318").env(name, value).stderr(Stdio::piped());
        let output = command.output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && told.contains(name) && !told.contains("hunter2"), "{told}");
    }
}

/// Nothing is exported without an endpoint, and what is sampled out is not, either; its context goes on all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_trace_that_is_not_sampled_is_passed_on_and_not_exported() {
    let collector = Collector::start().await;
    let work = Work::shared().await;
    work.create_apply("perform aftercommit.publish('test.other', '{}');").await;
    let _relay = relay(&work.outbox, &collector);
    let mut command = work.command(APPLY);
    let command = collector.listens_to(&mut command).env("OTEL_TRACES_SAMPLER", "always_off");
    let worker = WorkerProcess(command.spawn().unwrap());
    let mut publish = work.outbox.operator_command(&["publish", "test.number", "--payload", "{\"n\": 1}"]);
    let publish = collector
        .listens_to(&mut publish)
        .env("OTEL_TRACES_SAMPLER", "traceidratio")
        .env("OTEL_TRACES_SAMPLER_ARG", "0");
    assert!(publish.output().unwrap().status.success());
    work.wait_for(1).await;
    work.outbox.settled().await;
    assert_eq!(worker.stop(), Some(0));
    let parents: Vec<String> =
        sqlx::query_scalar(AssertSqlSafe("select headers ->> 'traceparent' from aftercommit.outbox order by id"))
            .fetch_all(&work.outbox.pool)
            .await
            .unwrap();
    let trace = |at: usize| parents[at].split('-').nth(1).unwrap().to_string();
    assert_eq!((trace(0), parents.iter().all(|context| context.ends_with("-00"))), (trace(1), true), "{parents:?}");
    assert_eq!(collector.spans().len(), 0);
    assert!(!collector.logs().is_empty() || collector.metrics("aftercommit-worker").len() > 5);
}
