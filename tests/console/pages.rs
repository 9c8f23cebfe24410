//! What pages show, and what they never do.

use std::time::Duration;

use aftercommit::EventId;
use aftercommit::console::Role;
use aftercommit::testing::eventually;
use aftercommit::worker::HandlerError;
use sqlx::types::Uuid;

use super::browser::{Site, through_a_proxy};
use crate::support::{Act, Record, SOON, Work};

const SCRIPT: &str = "<script>alert('xss')</script>";
const CANARY: &str = "canary-4711";

/// A subscriber that gives up on every event, with texts that would do harm.
async fn with_dead_letters() -> (Work, EventId) {
    let work = Work::shared().await;
    let record = Record::new(|_| Act::Fail(HandlerError::reject(SCRIPT)));
    let _worker = work.run(aftercommit::worker::Subscriber::new("mails").on(record)).await;
    work.outbox
        .publish(
            "test.number",
            &format!("{{\"key\": \"{SCRIPT}\", \"n\": 1, \"more\": \"{CANARY} {SCRIPT}\"}}"),
            Some(SCRIPT),
        )
        .await;
    let relay = work.outbox.relay();
    work.outbox.assert_complete().await;
    let mut found = None;
    let dead = eventually(SOON, "the event is a dead letter", async || {
        found = sqlx::query_scalar::<_, Uuid>("select event_id from aftercommit.dead_letter")
            .fetch_optional(&work.outbox.pool)
            .await
            .unwrap();
        found.is_some()
    });
    dead.await.unwrap();
    relay.stop().await.unwrap();
    (work, found.unwrap().into())
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_of_others_stay_texts_and_viewers_see_no_payload() {
    let (work, event) = with_dead_letters().await;
    let site = Site::start(&work.outbox, through_a_proxy()).await;
    let letter: i64 =
        sqlx::query_scalar("select id from aftercommit.dead_letter").fetch_one(&work.outbox.pool).await.unwrap();
    let paths = [
        "/".into(),
        "/events".into(),
        format!("/events?q=key:%22{}%22", SCRIPT.bytes().map(|byte| format!("%{byte:02x}")).collect::<String>()),
        format!("/events?q={event}"),
        format!("/events/{event}"),
        "/subscribers/mails".into(),
        "/dead?by=groups".into(),
        "/dead?by=letters".into(),
        format!("/dead/{letter}"),
        "/parked".into(),
        "/reconcile".into(),
        "/jobs".into(),
        "/audit".into(),
        "/doctor".into(),
    ];
    let (mut shown, mut escaped) = (0, 0);
    for path in &paths {
        let api = format!("/api/v1{}", if path == "/" { "/overview" } else { path });
        for role in [Role::Viewer, Role::Reader] {
            let (page, twin) = (site.see(role, path).await, site.see(role, &api).await);
            assert_eq!((page.status, twin.status), (200, 200), "{path}: {} {}", page.body, twin.body);
            assert_eq!(page.header("content-type"), Some("text/html; charset=utf-8"));
            assert_eq!(twin.header("content-type"), Some("application/json"));
            assert!(!page.body.contains("<script>"), "{path}");
            escaped += page.body.matches("&lt;script&gt;").count();
            let payload = page.body.contains(CANARY) || twin.body.contains(CANARY);
            assert!(!payload || role == Role::Reader, "{path} shows a payload to a viewer");
            shown += usize::from(payload);
        }
    }
    assert!(shown >= 2 && escaped >= 10, "{shown} {escaped}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_overview_tells_what_status_tells() {
    let (work, _) = with_dead_letters().await;
    let site = Site::start(&work.outbox, through_a_proxy()).await;
    let page = site.see(Role::Viewer, "/").await.body;
    assert!(page.contains("to look at") || page.contains("stuck"), "{page}");
    assert!(page.contains("href=\"/subscribers/mails\"") && page.contains("/dead?q=subscriber:mails"), "{page}");
    let twin: serde_json::Value = serde_json::from_str(&site.see(Role::Viewer, "/api/v1/overview").await.body).unwrap();
    let told = work.outbox.operator(&["status", "--json"]);
    let told: serde_json::Value = serde_json::from_slice(&told.stdout).unwrap();
    assert_eq!(twin["status"]["subscribers"]["mails"]["dead_letters"], told["subscribers"]["mails"]["dead_letters"]);
    assert_eq!(twin["status"]["stream"]["messages"], told["stream"]["messages"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_search_goes_back_row_by_row_and_says_how_far() {
    let work = Work::shared().await;
    for n in 0..60 {
        work.outbox
            .publish(if n % 2 == 0 { "order.placed" } else { "order.paid" }, "{}", Some(&format!("order-{}", n % 3)))
            .await;
    }
    let site = Site::start(&work.outbox, through_a_proxy()).await;
    let found = async |q: &str| {
        let body = site.see(Role::Viewer, &format!("/api/v1/events?{q}")).await.body;
        serde_json::from_str::<serde_json::Value>(&body).unwrap()
    };
    let first = found("").await;
    assert_eq!(first["events"].as_array().unwrap().len(), 50);
    let older = found(&format!("before={}", first["before"])).await;
    assert_eq!((older["events"].as_array().unwrap().len(), &older["before"]), (10, &serde_json::Value::Null));
    assert_eq!(found("q=type:order.paid+key:order-1").await["events"].as_array().unwrap().len(), 10);
    assert_eq!(found("q=type:order.*+key:order-1").await["events"].as_array().unwrap().len(), 20);
    assert_eq!(found("q=until:1h").await["events"].as_array().unwrap().len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn live_sends_only_what_has_changed() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let work = Work::shared().await;
    let site = Site::start(&work.outbox, through_a_proxy()).await;
    let mut stream = tokio::net::TcpStream::connect(site.address).await.unwrap();
    let request = format!(
        "GET /live HTTP/1.1\r\nHost: {}\r\nx-forwarded-user: jane\r\nx-forwarded-groups: viewer\r\n\r\n",
        site.address
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut heard = String::new();
    let mut hear = async |stop: &dyn Fn(&str) -> bool| {
        let mut bytes = vec![0; 65_536];
        while !stop(&heard) {
            let read = tokio::time::timeout(Duration::from_secs(20), stream.read(&mut bytes)).await.unwrap().unwrap();
            heard += &String::from_utf8_lossy(&bytes[..read]);
        }
        heard.clone()
    };
    hear(&|heard| heard.contains("\"id\":\"subscribers\"")).await;
    work.outbox.publish("order.placed", "{}", None).await;
    let heard = hear(&|heard| heard.matches("\"id\":\"tiles\"").count() > 1).await;
    assert_eq!(heard.matches("\"id\":\"subscribers\"").count(), 1, "{heard}");
}
