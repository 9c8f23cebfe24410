//! The trace context of the publisher, for the header `traceparent`.

use std::sync::OnceLock;

/// The W3C trace context of the publisher: the name of its header.
pub const TRACEPARENT: &str = "traceparent";

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

pub(crate) fn current_traceparent() -> Option<String> {
    let traceparent = SOURCE.get()?()?;
    if is_traceparent(&traceparent) {
        return Some(traceparent);
    }
    tracing::debug!("the source of traceparent gave something else; it is left out");
    None
}

/// Whether a text is a `traceparent` of version 00 of W3C Trace Context, section 3.2: `00-<32 hex>-<16 hex>-<2 hex>`, in
/// lower case, with neither id zero.
pub fn is_traceparent(text: &str) -> bool {
    let hex = |part: &str, length| {
        part.len() == length && part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    let id = |part: &str, length| hex(part, length) && part.bytes().any(|b| b != b'0');
    let mut parts = text.split('-');
    let mut next = || parts.next().unwrap_or_default();
    next() == "00" && id(next(), 32) && id(next(), 16) && hex(next(), 2) && parts.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_w3c_trace_context_is_taken() {
        assert!(is_traceparent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"));
        for bad in [
            "",
            "00",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b716920333-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\nNats-Rollup: all",
        ] {
            assert!(!is_traceparent(bad), "{bad}");
        }
    }
}
