//! A handler's span: it continues the publisher's trace, and makes all that the handler logs joinable on the event's id.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use crate::log::{Log, traceparent};
use crate::support::{Number, SOON, Work};
use aftercommit::testing::eventually;
use aftercommit::worker::{Delivery, Handler, HandlerError, Subscriber};
use aftercommit::{Event, EventId, outbox};
use sqlx::PgTransaction;
use tracing::Instrument;

/// The trace that a `traceparent` belongs to.
fn trace(traceparent: &str) -> String {
    traceparent.split('-').nth(1).unwrap().to_string()
}

/// An event and the trace context that its handler was in.
type Run = (EventId, Option<String>);

/// Logs, remembers its own trace context, fails as it is told.
#[derive(Clone, Default)]
struct Traced(Arc<Mutex<Vec<Run>>>);

impl Handler<Number> for Traced {
    async fn handle(&self, _: &mut PgTransaction<'_>, delivery: &Delivery<Number>) -> Result<(), HandlerError> {
        assert_eq!(delivery.event_type(), Number::TYPE);
        tracing::error!(n = delivery.event.n, "handler at work");
        tokio::task::yield_now().await;
        tracing::error!(n = delivery.event.n, "handler at work after a pause");
        self.0.lock().unwrap().push((delivery.id, traceparent()));
        match (delivery.event.n, delivery.attempt) {
            (13, 1) => Err(HandlerError::retry("bad luck")),
            _ => Ok(()),
        }
    }
}

impl Traced {
    fn runs(&self) -> Vec<Run> {
        self.0.lock().unwrap().clone()
    }

    async fn wait_for(&self, runs: usize) {
        eventually(SOON, "the handler's runs", async || self.runs().len() >= runs).await.unwrap();
    }
}

async fn publish(work: &Work, n: i64) -> (EventId, Option<String>) {
    let mut tx = work.outbox.pool.begin().await.unwrap();
    let id = outbox::publish(&mut tx, &Number { key: Some("key-secret".into()), n }).await.unwrap();
    tx.commit().await.unwrap();
    (id, traceparent())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_handler_continues_the_publishers_trace() {
    Log::start();
    let work = Work::shared().await;
    let traced = Traced::default();
    let _relay = work.outbox.relay();
    let running = work.run(Subscriber::new("traced").on::<Number>(traced.clone())).await;
    let mut published = Vec::new();
    for n in 0..5 {
        published.push(publish(&work, n).instrument(tracing::error_span!("place an order")).await);
    }
    // Published outside of any span.
    let (alone, none) = publish(&work, 5).await;
    assert_eq!(none, None);
    traced.wait_for(6).await;
    running.stop().await;
    let handled: HashMap<EventId, String> =
        traced.runs().into_iter().map(|(id, context)| (id, context.unwrap())).collect();
    let mut traces = Vec::new();
    for (id, context) in published {
        let (published, handled) = (context.unwrap(), &handled[&id]);
        assert_eq!(trace(handled), trace(&published));
        assert_ne!(*handled, published, "a span of its own");
        traces.push(trace(handled));
    }
    assert!(!traces.contains(&trace(&handled[&alone])), "a trace of its own");
    traces.sort();
    traces.dedup();
    assert_eq!(traces.len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_that_go_to_a_function_together_are_named_in_one_span() {
    let log = Log::start();
    let work = Work::shared().await;
    // Slow enough that the events behind the first one wait and then go together.
    work.create_apply("perform pg_sleep(0.05);").await;
    let events: Vec<_> = (0..6).map(|n| work.envelope(Some("key-secret"), n)).collect();
    for event in &events {
        work.put(event).await;
    }
    let subscriber = Subscriber::sql("batch", "public.apply", [Number::TYPE]).unwrap().concurrency(1);
    let running = work.run(subscriber).await;
    work.wait_for(6).await;
    running.stop().await;
    for event in &events {
        let lines = log.lines(&event.id.to_string());
        let alone = |line: &String| line.contains("handle{subscriber=\"batch\"");
        let batch =
            |line: &String| line.contains("event of the batch") && line.contains("handle_batch{subscriber=\"batch\"");
        assert!(!lines.is_empty() && lines.iter().all(|line| alone(line) || batch(line)), "{lines:?}");
    }
    let batches = log.lines("handle_batch{subscriber=\"batch\" events=");
    assert!(
        batches.iter().any(|line| line.contains("handler ended") && line.contains("outcome=\"ok\"")),
        "{batches:?}"
    );
}

/// Also when several events share a transaction, and the one before has failed.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_handler_logs_carries_its_events_id_and_no_other() {
    let log = Log::start();
    let work = Work::shared().await;
    let traced = Traced::default();
    let events: Vec<_> = (10..20).map(|n| work.envelope(Some("key-secret"), n)).collect();
    for event in &events {
        work.put(event).await;
    }
    let subscriber = Subscriber::new("logged").on::<Number>(traced.clone()).concurrency(1);
    let subscriber = subscriber.backoff(aftercommit::backoff::Backoff::RECONNECT);
    let running = work.run(subscriber).await;
    work.wait_until_acked("logged").await;
    running.stop().await;

    for (n, event) in (10..20).zip(&events) {
        let about = |line: &String| line.contains(&format!("event_id={}", event.id));
        let at_work: Vec<_> = log.lines("handler at work").into_iter().filter(about).collect();
        assert!(at_work.len() >= 2, "{n}: {at_work:?}");
        for line in &at_work {
            assert!(line.contains(&format!("n={n}")), "{line}");
            assert_eq!(line.matches("event_id=").count(), 1, "{line}");
            for part in
                ["handle{", "subscriber=\"logged\"", "event_type=\"test.number\"", "attempt=", "delivery_count="]
            {
                assert!(line.contains(part), "{part}: {line}");
            }
        }
        let ended: Vec<_> = log.lines("handler ended").into_iter().filter(about).collect();
        assert!(ended.iter().any(|line| line.contains("DEBUG") && line.contains("outcome=\"ok\"")), "{n}: {ended:?}");
        assert!(ended.iter().all(|line| line.contains("latency_ms=")), "{ended:?}");
    }
    let failed = log.lines("event failed");
    let failed: Vec<_> = failed.iter().filter(|line| line.contains(&events[3].id.to_string())).collect();
    assert_eq!(failed.len(), 1, "{failed:?}");
    for part in ["WARN", "attempt=1", "delivery_count=", "latency_ms=", "error=\"bad luck\""] {
        assert!(failed[0].contains(part), "{part}: {failed:?}");
    }
    assert_eq!(log.lines("secret"), Vec::<String>::new());
}
