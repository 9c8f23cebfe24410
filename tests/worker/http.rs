//! Subscribers that post their events to an HTTP endpoint: what is sent, and what each answer does.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::support::{
    Authority, Directory, Endpoint, Received, Reply, RunningWorker, SOON, Work, WorkerProcess, free_address,
};
use aftercommit::testing::eventually;
use aftercommit::worker::{Subscriber, read_file};

const SOON_AGAIN: &str = "backoff = { first = \"50ms\", max = \"100ms\" }\n";

/// The subscribers of a file with this content.
fn subscriber(toml: &str) -> Subscriber {
    let files = Directory::new();
    read_file(&files.write("worker.toml", toml)).unwrap_or_else(|error| panic!("{}", error.report())).remove(0)
}

/// Events that are done, by outcome.
async fn done(work: &Work, outcome: &str) -> i64 {
    let count = "select count(*) from aftercommit.inbox where subscriber = 'webhook' and outcome = $1";
    sqlx::query_scalar(count).bind(outcome).fetch_one(&work.outbox.pool).await.unwrap()
}

async fn wait_for(work: &Work, endpoint: Option<&Endpoint>, handled: i64, dead: i64) {
    let mut last = (0, 0);
    let waited = eventually(SOON, "the events are done", async || {
        last = (done(work, "handled").await, done(work, "dead").await);
        last == (handled, dead)
    })
    .await;
    assert!(waited.is_ok(), "{last:?} instead of {handled} and {dead}: {:?}", endpoint.map(Endpoint::received));
}

fn times(received: &[Received]) -> BTreeMap<i64, usize> {
    received.iter().fold(BTreeMap::new(), |mut times, request| {
        *times.entry(request.number()).or_default() += 1;
        times
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn both_content_modes_are_byte_exact() {
    let work = Work::shared().await;
    let endpoint = Endpoint::start(|_, _| Reply::Status(204)).await;
    let mut event = work.envelope(Some("Straße 1 %\"\u{1f980}"), 1);
    event.version = 3;
    event.sequence = 42;
    event.time = "2026-11-20T10:11:12.123456Z".parse().unwrap();
    event.payload = "{ \"n\": 1,\n  \"cents\": 12345678901234567890.10 }".into();
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    event.headers = [("traceparent", trace), ("X-Tenant", "a b"), ("Authorization", "forged"), ("Id", "forged")]
        .map(|(name, value)| (name.to_string(), value.to_string()))
        .into();
    let toml = endpoint.toml("") + "headers = { Authorization = \"env:AFTERCOMMIT_TEST_TOKEN\", X-Fixed = \"yes\" }\n";
    work.put(&event).await;
    let mut command = work.command(&toml);
    let worker = WorkerProcess(command.env("AFTERCOMMIT_TEST_TOKEN", "Bearer t0ken").spawn().unwrap());
    wait_for(&work, Some(&endpoint), 1, 0).await;
    assert_eq!(worker.stop(), Some(0));

    let request = endpoint.received().remove(0);
    assert_eq!(request.line, "POST /events HTTP/1.1");
    assert_eq!(request.body, event.payload);
    let id = event.id.to_string();
    let expected = [
        ("authorization", "Bearer t0ken"),
        ("ce-authorization", "forged"),
        ("ce-dataversion", "3"),
        ("ce-id", &id),
        ("ce-partitionkey", "Stra%C3%9Fe%201%20%25%22%F0%9F%A6%80"),
        ("ce-sequence", "42"),
        ("ce-source", "/test"),
        ("ce-specversion", "1.0"),
        ("ce-time", "2026-11-20T10:11:12.123456Z"),
        ("ce-traceparent", trace),
        ("ce-type", "test.number"),
        ("ce-xtenant", "a%20b"),
        ("content-length", &event.payload.len().to_string()),
        ("content-type", "application/json"),
        ("host", &endpoint.address),
        ("idempotency-key", &id),
        ("traceparent", trace),
        ("user-agent", concat!("aftercommit-worker/", env!("CARGO_PKG_VERSION"))),
        ("x-fixed", "yes"),
    ];
    let expected: BTreeMap<_, _> = expected.map(|(name, value)| (name.to_string(), value.to_string())).into();
    assert_eq!(request.headers, expected);

    let structured = endpoint.toml("").replace("webhook", "structured") + "mode = \"structured\"\n";
    let worker = work.run(subscriber(&structured)).await;
    eventually(SOON, "it comes again", async || endpoint.received().len() == 2).await.unwrap();
    worker.stop().await;
    let request = endpoint.received().remove(1);
    assert_eq!(String::from_utf8(request.body).unwrap(), event.to_json());
    assert_eq!(request.headers["content-type"], "application/cloudevents+json; charset=utf-8");
    assert_eq!((&request.headers["idempotency-key"], &request.headers["traceparent"]), (&id, &trace.to_string()));
    assert!(request.headers.keys().all(|name| !name.starts_with("ce-")), "{:?}", request.headers);
}

/// The first request of each event gets the answer that its number names, the others 200.
#[tokio::test(flavor = "multi_thread")]
async fn each_class_of_answers_has_its_consequence() {
    let work = Work::shared().await;
    let endpoint = Endpoint::start(|request, before| match before {
        0 => Reply::With(request.number() as u16, "location: /elsewhere\r\n".into()),
        _ => Reply::Status(200),
    })
    .await;
    let statuses = [200, 201, 299, 301, 308, 400, 401, 404, 408, 422, 429, 500, 502, 503, 504, 599];
    let worker = work.run(subscriber(&endpoint.toml(SOON_AGAIN))).await;
    for status in statuses {
        work.send(&status.to_string(), status).await;
    }
    wait_for(&work, Some(&endpoint), 14, 2).await;
    let received = endpoint.received();
    let once = [200, 201, 299, 400, 422];
    let expected = statuses.map(|status| (status, if once.contains(&status) { 1 } else { 2 }));
    assert_eq!(times(&received), expected.into());
    assert!(received.iter().all(|request| request.line == "POST /events HTTP/1.1"), "redirects are not followed");
    let mut letters = work.dead_letters().await;
    letters.sort();
    let reason = |status: &str| format!("http://{} answered {status}", endpoint.address);
    let expected = [(400, "400 Bad Request"), (422, "422 Unprocessable Entity")];
    assert_eq!(letters, expected.map(|(status, text)| (status, 1, reason(text))));
    worker.stop().await;
}

/// One attempt is all there is: whatever counted would make a dead letter.
#[tokio::test(flavor = "multi_thread")]
async fn an_overloaded_endpoint_costs_no_attempt_and_says_when_to_retry() {
    let work = Work::shared().await;
    let endpoint = Endpoint::start(|request, before| match (request.number(), before) {
        (_, 3..) => Reply::Status(200),
        (1, 0) => Reply::With(503, "retry-after: 2\r\n".into()),
        (2, 0) => {
            let date = chrono::Utc::now() + Duration::from_secs(4);
            Reply::With(429, format!("retry-after: {}\r\n", date.format("%a, %d %b %Y %H:%M:%S GMT")))
        }
        (3, _) => Reply::Status(502),
        (4, _) => Reply::Status(504),
        (5, _) => Reply::Cut,
        // A wrong login, path or proxy: every event would get that.
        (6, 0) => Reply::Status(401),
        (6, 1) => Reply::Status(403),
        (6, _) => Reply::Status(407),
        (7, _) => Reply::Status(404),
        _ => Reply::Status(503),
    })
    .await;
    let worker = work.run(subscriber(&endpoint.toml(&format!("max_attempts = 1\n{SOON_AGAIN}")))).await;
    for n in 1..=7 {
        work.send(&n.to_string(), n).await;
    }
    wait_for(&work, Some(&endpoint), 7, 0).await;
    let received = endpoint.received();
    assert_eq!(times(&received), (1..=7).map(|n| (n, 4)).collect());
    let pause = |n: i64| {
        let at: Vec<Instant> =
            received.iter().filter(|request| request.number() == n).map(|request| request.at).collect();
        at[1] - at[0]
    };
    assert!(pause(1) >= Duration::from_secs(2), "{:?}", pause(1));
    assert!(pause(2) >= Duration::from_secs(2), "{:?}", pause(2));
    assert!(pause(3) < Duration::from_secs(2), "{:?}", pause(3));
    assert_eq!(work.attempts().await, Vec::<i32>::new());
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_endpoint_costs_attempts_and_holds_up_no_other_key() {
    let work = Work::shared().await;
    let endpoint = Endpoint::start(|request, before| match (request.number(), before) {
        (1, 0) | (2, _) => Reply::Hang,
        _ => Reply::Status(200),
    })
    .await;
    let toml = endpoint.toml(&format!("max_attempts = 2\n{SOON_AGAIN}")) + "timeout = \"500ms\"\n";
    let worker = work.run(subscriber(&toml)).await;
    for n in 1..=3 {
        work.send(&n.to_string(), n).await;
    }
    wait_for(&work, Some(&endpoint), 2, 1).await;
    assert_eq!(times(&endpoint.received()), [(1, 2), (2, 2), (3, 1)].into());
    let reason = format!("http://{} did not answer within 500ms", endpoint.address);
    assert_eq!(work.dead_letters().await, [(2, 2, reason)]);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_is_away_is_waited_for_and_named() {
    let work = Work::shared().await;
    let address = free_address();
    let toml = format!(
        "[[subscriber]]\nname = \"webhook\"\ntypes = [\"*\"]\nmax_attempts = 1\n\
         http = {{ url = \"http://{address}/events\" }}\n"
    );
    let worker = work.worker_with(subscriber(&toml)).unhealthy_after(Duration::from_secs(1));
    worker.provision().await.unwrap();
    let monitor = worker.monitor();
    let worker = RunningWorker::start(worker);
    work.send_many(&["a", "b", "c"], 5).await;
    let mut health = String::new();
    eventually(SOON, "the cause is named", async || {
        let Some(report) = monitor.report().subscribers.pop() else { return false };
        health = report.health.clone();
        !report.healthy && health.contains(&format!("http://{address} cannot be reached"))
    })
    .await
    .unwrap_or_else(|error| panic!("{error}: {health}"));
    let endpoint = Endpoint::on(&address, None, |_, _| Reply::Status(200)).await;
    wait_for(&work, Some(&endpoint), 15, 0).await;
    assert_eq!(endpoint.received().len(), 15, "each came once");
    eventually(SOON, "it is well again", async || monitor.report().healthy).await.unwrap();
    worker.stop().await;
}

/// Keys are serial, different keys side by side, as many as `concurrency` says; and the inbox row is committed behind the
/// answer.
#[tokio::test(flavor = "multi_thread")]
async fn keys_are_serial_and_concurrency_is_kept() {
    let work = Work::shared().await;
    let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let counted = (Arc::clone(&running), Arc::clone(&most));
    let endpoint = Endpoint::start(move |_, _| {
        let (running, most) = counted.clone();
        most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(90)).await;
            running.fetch_sub(1, Ordering::SeqCst);
        });
        Reply::Slow(Duration::from_millis(100))
    })
    .await;
    let keys = ["a", "b", "c", "d", "e", "f"];
    work.send_many(&keys, 4).await;
    let worker = work.run(subscriber(&endpoint.toml("concurrency = 3"))).await;
    eventually(SOON, "the first ones are there", async || endpoint.received().len() >= 3).await.unwrap();
    assert_eq!(done(&work, "handled").await, 0, "nothing is answered, so nothing is committed");
    wait_for(&work, Some(&endpoint), 24, 0).await;
    assert_eq!(most.load(Ordering::SeqCst), 3);
    for key in keys {
        let of_key = |request: &&Received| request.headers["ce-partitionkey"] == key;
        let numbers: Vec<i64> = endpoint.received().iter().filter(of_key).map(Received::number).collect();
        assert_eq!(numbers, [1, 2, 3, 4], "key {key}");
    }
    worker.stop().await;
}

/// It dies between request and answer: the successor sends the event again, under the same id.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_answered_is_sent_again_by_the_successor() {
    let work = Work::shared().await;
    let endpoint = Endpoint::start(|_, before| if before == 0 { Reply::Hang } else { Reply::Status(200) }).await;
    let worker = work.run(subscriber(&endpoint.toml(""))).await;
    work.send("a", 1).await;
    eventually(SOON, "it is sent", async || endpoint.received().len() == 1).await.unwrap();
    drop(worker);
    let worker = work.run(subscriber(&endpoint.toml(""))).await;
    wait_for(&work, Some(&endpoint), 1, 0).await;
    let received = endpoint.received();
    assert_eq!(received.len(), 2);
    assert_eq!(received[0].headers["idempotency-key"], received[1].headers["idempotency-key"]);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_with_an_own_authority_and_a_client_certificate() {
    let work = Work::shared().await;
    let (authority, files) = (Authority::new(), Directory::new());
    let endpoint = Endpoint::on("127.0.0.1:0", Some(Endpoint::tls(&authority)), |_, _| Reply::Status(200)).await;
    let (certificate, key) = authority.issue("worker");
    let path = |name: &str, text: &str| format!("\"{}\"", files.write(name, text).display());
    let (certificate, key) = (path("worker.crt", &certificate), path("worker.key", &key));
    let toml = |ca: &Authority| {
        endpoint.toml("max_attempts = 1\n").replace("http://", "https://")
            + &format!("ca = {}\ncert = {certificate}\nkey = {key}\n", path("ca.crt", &ca.certificate))
    };
    work.send("a", 1).await;
    // An endpoint that nobody vouches for is as good as none.
    let worker = work.worker_with(subscriber(&toml(&Authority::new())));
    worker.provision().await.unwrap();
    let monitor = worker.monitor();
    let worker = RunningWorker::start(worker);
    eventually(SOON, "the certificate is refused", async || {
        monitor.report().subscribers.iter().any(|report| report.state.contains("certificate"))
    })
    .await
    .unwrap_or_else(|error| panic!("{error}: {:?}", monitor.report()));
    worker.stop().await;
    assert_eq!((endpoint.received().len(), done(&work, "dead").await), (0, 0));

    let worker = work.run(subscriber(&toml(&authority))).await;
    wait_for(&work, Some(&endpoint), 1, 0).await;
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_at_the_start_is_named_and_no_secret_is_shown() {
    let work = Work::shared().await;
    let endpoint = Endpoint::start(|_, before| Reply::Status(if before == 0 { 500 } else { 422 })).await;
    let toml = endpoint.toml(SOON_AGAIN) + "headers = { Authorization = \"env:AFTERCOMMIT_TEST_TOKEN\" }\n";
    let output = work.command(&toml).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("webhook") && said.contains("authorization") && said.contains("AFTERCOMMIT_TEST_TOKEN"));

    let nowhere = endpoint.toml("").replace("http://", "https://") + "ca = \"/nowhere/ca.crt\"\n";
    let output = work.command(&nowhere).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("/nowhere/ca.crt"), "{said}");

    let mut event = work.envelope(Some("canary-key"), 1);
    event.payload = "{\"n\":1,\"text\":\"canary-payload\"}".into();
    let files = Directory::new();
    let log = files.path().join("log");
    let mut command = work.command(&toml.replace("/events", "/events?token=canary-query"));
    command.env("AFTERCOMMIT_TEST_TOKEN", "Bearer canary-token").env("RUST_LOG", "trace");
    command.stderr(std::fs::File::create(&log).unwrap());
    let worker = WorkerProcess(command.spawn().unwrap());
    work.put(&event).await;
    wait_for(&work, Some(&endpoint), 0, 1).await;
    assert_eq!(endpoint.received()[0].headers["authorization"], "Bearer canary-token");
    assert_eq!(worker.stop(), Some(0));
    let said = std::fs::read_to_string(log).unwrap();
    assert!(said.contains(" TRACE ") && said.contains("422"), "the log is talkative");
    for secret in ["canary-token", "canary-payload", "canary-query"] {
        assert_eq!(said.lines().find(|line| line.contains(secret)), None);
    }
}
