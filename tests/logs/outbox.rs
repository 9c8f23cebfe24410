//! What publishing leaves for tracing: the span's `traceparent` in the headers, and one line per event.

use crate::log::{Log, OTHER_SOURCE, traceparent};
use crate::support::Database;
use aftercommit::outbox::{self, RawEvent};
use aftercommit::{Event, EventId};
use opentelemetry::trace::TraceContextExt;
use serde::{Deserialize, Serialize};
use sqlx::PgPool;
use tracing::{Instrument, debug_span};
use tracing_opentelemetry::OpenTelemetrySpanExt;

#[derive(Serialize, Deserialize)]
struct Placed {
    secret: String,
}

impl Event for Placed {
    const TYPE: &'static str = "order.placed";

    fn key(&self) -> Option<String> {
        Some("key-secret".into())
    }
}

fn placed() -> Placed {
    Placed { secret: "payload-secret".into() }
}

async fn publish(pool: &PgPool, event: RawEvent) -> EventId {
    let mut tx = pool.begin().await.unwrap();
    let id = outbox::publish_raw(&mut tx, event).await.unwrap();
    tx.commit().await.unwrap();
    id
}

async fn header(pool: &PgPool, id: EventId) -> Option<String> {
    sqlx::query_scalar("select headers ->> 'traceparent' from aftercommit.outbox where event_id = $1")
        .bind(id.as_uuid())
        .fetch_one(pool)
        .await
        .unwrap()
}

#[tokio::test]
async fn the_span_of_tracing_opentelemetry_goes_into_the_headers() {
    Log::start();
    let database = Database::migrated().await;
    let pool = database.pool().await;
    let span = debug_span!("place an order");
    let (expected, id) = async {
        let mut tx = pool.begin().await.unwrap();
        let ids = outbox::publish_all(&mut tx, &[placed(), placed()]).await.unwrap();
        tx.commit().await.unwrap();
        assert_eq!(header(&pool, ids[0]).await, header(&pool, ids[1]).await);
        (traceparent().unwrap(), ids[0])
    }
    .instrument(span.clone())
    .await;
    assert_eq!(header(&pool, id).await, Some(expected.clone()));
    assert!(expected.contains(&span.context().span().span_context().trace_id().to_string()), "{expected}");

    let outside = publish(&pool, RawEvent::of(&placed()).unwrap()).await;
    assert_eq!(header(&pool, outside).await, None);
}

#[tokio::test]
async fn the_callers_own_traceparent_stays() {
    Log::start();
    let database = Database::migrated().await;
    let pool = database.pool().await;
    for name in ["traceparent", "Traceparent"] {
        let event = RawEvent::new("a", "text/plain", "").header(name, "mine");
        let id = publish(&pool, event).instrument(debug_span!("relayed by hand")).await;
        let headers: serde_json::Value =
            sqlx::query_scalar("select headers from aftercommit.outbox where event_id = $1")
                .bind(id.as_uuid())
                .fetch_one(&pool)
                .await
                .unwrap();
        assert_eq!(headers, serde_json::json!({ name: "mine" }));
    }
}

#[tokio::test]
async fn tracing_never_makes_a_publish_fail() {
    Log::start();
    let database = Database::migrated().await;
    let pool = database.pool().await;
    OTHER_SOURCE.set(Some("00-not a traceparent\r\nNats-Rollup: all"));
    let id = publish(&pool, RawEvent::of(&placed()).unwrap()).await;
    assert_eq!(header(&pool, id).await, None);

    // Headers that are full have no room for it.
    OTHER_SOURCE.set(Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"));
    let id = publish(&pool, RawEvent::new("a", "text/plain", "").header("h", "x".repeat(16_300))).await;
    assert_eq!(header(&pool, id).await.as_deref(), Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"));
    let id = publish(&pool, RawEvent::new("a", "text/plain", "").header("h", "x".repeat(16_310))).await;
    assert_eq!(header(&pool, id).await, None);
    OTHER_SOURCE.set(None);
}

#[tokio::test]
async fn every_event_leaves_one_line_without_its_payload() {
    let log = Log::start();
    let database = Database::migrated().await;
    let pool = database.pool().await;
    let id = publish(&pool, RawEvent::of(&placed()).unwrap().header("tenant", "header-secret")).await;
    let lines = log.lines(&id.to_string());
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("DEBUG") && lines[0].contains("event_type=\"order.placed\""), "{lines:?}");
    assert!(!lines[0].contains("secret"), "{lines:?}");
}
