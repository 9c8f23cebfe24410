//! The span in which a handler runs: it carries the event's identity and continues its publisher's trace.

use std::sync::OnceLock;
use std::time::Instant;

use tracing::Span;

use aftercommit_core::envelope::Envelope;
use aftercommit_core::trace::{self, Calls, Consumer, TraceContext};
use aftercommit_outbox::is_traceparent;

use super::handler::HandlerError;
use super::route::Try;
use super::transaction_error::describe;

type SetParent = Box<dyn Fn(&Span, &str) + Send + Sync>;

static SET_PARENT: OnceLock<SetParent> = OnceLock::new();

/// Tells, once per process, how a handler's span becomes a child of the span in which its event was published. It is
/// called for each run of an event that carries a W3C `traceparent`, before the span is entered; publishers write one
/// with [`set_traceparent_source`](aftercommit_outbox::set_traceparent_source).
///
/// It is a function, because which tracing library a service uses, and in which version, is the service's choice.
///
/// With `tracing-opentelemetry`:
///
/// ```
/// use std::collections::HashMap;
///
/// use opentelemetry::propagation::TextMapPropagator;
/// use opentelemetry_sdk::propagation::TraceContextPropagator;
/// use tracing_opentelemetry::OpenTelemetrySpanExt;
///
/// aftercommit::worker::set_span_parent(|span, traceparent| {
///     let headers = HashMap::from([("traceparent".to_string(), traceparent.to_string())]);
///     let publisher = TraceContextPropagator::new().extract(&headers);
///     // It fails when no OpenTelemetry layer looks at the span, and then there is nothing to do.
///     let _ = span.set_parent(publisher);
/// });
/// ```
///
/// Only the first call counts; a later one logs a warning.
pub fn set_span_parent(set: impl Fn(&Span, &str) + Send + Sync + 'static) {
    if SET_PARENT.set(Box::new(set)).is_err() {
        tracing::warn!("a function that sets the parents of spans is set already; this one is not used");
    }
}

/// The span for the run of one event.
///
/// Its level is error, so that it is there for whatever the handler logs, however quiet the log is.
pub(super) fn of_event(consumer: Consumer<'_>, event: &Envelope, this: Try) -> Span {
    let traceparent = event.traceparent().filter(|text| is_traceparent(text));
    let span = tracing::error_span!(
        parent: None,
        "handle",
        subscriber = consumer.subscriber,
        event_id = %event.id,
        event_type = event.event_type,
        attempt = this.attempt,
        delivery_count = this.delivery_count,
        // Found with the publisher's lines, also where no spans are exported.
        trace_id = traceparent.and_then(|text| text.split('-').nth(1)),
    );
    if let Some(tracing) = trace::tracing() {
        tracing.handles(&span, consumer, event);
    }
    if let (Some(set), Some(traceparent)) = (SET_PARENT.get(), traceparent) {
        set(&span, traceparent);
    }
    span
}

/// The span for a call that gets several events at once, which come from as many traces.
pub(super) fn of_batch(consumer: Consumer<'_>, events: &[&Envelope]) -> Span {
    let subscriber = consumer.subscriber;
    let span = tracing::error_span!(parent: None, "handle_batch", subscriber, events = events.len());
    if let Some(tracing) = trace::tracing() {
        tracing.handles_many(&span, consumer, events);
    }
    span.in_scope(|| {
        for event in events {
            tracing::debug!(event_id = %event.id, event_type = event.event_type, "event of the batch");
        }
    });
    span
}

/// The calls of an SQL function for some events in one statement, which publishes in the context of each.
pub(super) struct FunctionCalls {
    pub(super) contexts: Vec<Option<TraceContext>>,
    open: Option<Box<dyn Calls>>,
}

impl FunctionCalls {
    /// Of these events, within a span: a single one has it for its own.
    pub(super) fn of(span: &Span, consumer: Consumer<'_>, events: &[&Envelope]) -> Self {
        match (trace::tracing(), events) {
            (None, _) => Self { contexts: Vec::new(), open: None },
            (Some(tracing), [_]) => Self { contexts: vec![tracing.context_of(span)], open: None },
            (Some(tracing), many) => {
                let open = tracing.calls(consumer, many);
                Self { contexts: open.contexts(), open: Some(open) }
            }
        }
    }

    pub(super) fn end(self, result: &Result<(), HandlerError>) {
        if let Some(open) = self.open {
            open.end(result.as_ref().err().and_then(failure));
        }
    }
}

/// How a run failed; a snooze is no failure.
fn failure(error: &HandlerError) -> Option<&'static str> {
    match error {
        HandlerError::Retry { .. } => Some("retry"),
        HandlerError::Reject { .. } => Some("reject"),
        HandlerError::Unavailable { .. } => Some("unavailable"),
        HandlerError::Snooze(_) => None,
    }
}

/// Runs within a span; tells start and end. What comes of a failure is told by whoever decides about it.
pub(super) async fn told(run: impl Future<Output = Result<(), HandlerError>>) -> Result<(), HandlerError> {
    let started = Instant::now();
    tracing::debug!("handler starts");
    let result = run.await;
    let failure = result.as_ref().err().and_then(failure);
    let outcome = if result.is_ok() { "ok" } else { failure.unwrap_or("snooze") };
    if let (Some(tracing), Some(outcome)) = (trace::tracing(), failure) {
        tracing.failed(&Span::current(), outcome);
    }
    let latency_ms = started.elapsed().as_millis();
    match &result {
        Ok(()) => tracing::debug!(outcome, latency_ms, "handler ended"),
        Err(error) => tracing::debug!(outcome, latency_ms, error = describe(error), "handler ended"),
    }
    result
}
