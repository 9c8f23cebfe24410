//! The trace context of the publisher, for the header `traceparent`.

use std::sync::OnceLock;

use crate::envelope::is_traceparent;

type Source = Box<dyn Fn() -> Option<String> + Send + Sync>;

static SOURCE: OnceLock<Source> = OnceLock::new();

/// Tells, once per process, where the W3C `traceparent` of the current span comes from. From then on every event that
/// is published within a span carries it, and a subscriber's spans can join the publisher's trace.
///
/// It is a function, because which tracing library a service uses, and in which version, is the service's choice. A
/// result that is no `traceparent` is left out: tracing never makes a publish fail.
///
/// With `tracing-opentelemetry`:
///
/// ```
/// use opentelemetry::trace::TraceContextExt;
/// use tracing_opentelemetry::OpenTelemetrySpanExt;
///
/// aftercommit::outbox::set_traceparent_source(|| {
///     let context = tracing::Span::current().context();
///     let span = context.span().span_context().clone();
///     span.is_valid()
///         .then(|| format!("00-{}-{}-{:02x}", span.trace_id(), span.span_id(), span.trace_flags().to_u8()))
/// });
/// ```
///
/// Only the first call counts; a later one logs a warning.
pub fn set_traceparent_source(source: impl Fn() -> Option<String> + Send + Sync + 'static) {
    if SOURCE.set(Box::new(source)).is_err() {
        tracing::warn!("the source of traceparent is set already; this one is not used");
    }
}

pub(super) fn current_traceparent() -> Option<String> {
    let traceparent = SOURCE.get()?()?;
    if is_traceparent(&traceparent) {
        return Some(traceparent);
    }
    tracing::debug!("the source of traceparent gave something else; it is left out");
    None
}
