//! The trace context of the publisher, for the headers `traceparent` and `tracestate`.

use std::sync::OnceLock;

/// The W3C trace context of the publisher: the name of its header.
pub const TRACEPARENT: &str = "traceparent";
/// What vendors of tracing add to it: the name of its header.
pub const TRACESTATE: &str = "tracestate";

/// The most bytes of a `tracestate` that is passed on: what W3C Trace Context, section 3.3.1.5, wants at least.
const MAX_TRACESTATE_BYTES: usize = 512;

/// A W3C trace context: in which span something happens, or was published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceContext {
    /// The trace, the span in it and the flags, as in the header `traceparent`.
    pub traceparent: String,
    /// What vendors add, as in the header `tracestate`. Defaults to none.
    pub tracestate: Option<String>,
}

impl From<String> for TraceContext {
    fn from(traceparent: String) -> Self {
        Self { traceparent, tracestate: None }
    }
}

impl TraceContext {
    /// Whether the trace is recorded where it began.
    pub fn is_sampled(&self) -> bool {
        let flags = self.traceparent.rsplit('-').next().unwrap_or_default();
        u8::from_str_radix(flags, 16).is_ok_and(|flags| flags & 1 == 1)
    }
}

type Source = Box<dyn Fn() -> Option<TraceContext> + Send + Sync>;

static SOURCE: OnceLock<Source> = OnceLock::new();

/// Tells, once per process, where the W3C `traceparent` of the current span comes from. From then on every event that
/// is published within a span carries it, and a subscriber's spans can join the publisher's trace. The function gives the
/// `traceparent` alone, or a [`TraceContext`] with the `tracestate`, too.
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
pub fn set_traceparent_source<C: Into<TraceContext>>(source: impl Fn() -> Option<C> + Send + Sync + 'static) {
    if SOURCE.set(Box::new(move || source().map(Into::into))).is_err() {
        tracing::warn!("the source of traceparent is set already; this one is not used");
    }
}

/// The context to publish with, as far as it can stand in headers.
pub(crate) fn current_context() -> Option<TraceContext> {
    let TraceContext { traceparent, tracestate } = SOURCE.get()?()?;
    if !is_traceparent(&traceparent) {
        tracing::debug!("the source of traceparent gave something else; it is left out");
        return None;
    }
    Some(TraceContext { traceparent, tracestate: tracestate.filter(|state| is_tracestate(state)) })
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

/// Whether a text can be a `tracestate`: printable ASCII, not too long, and nothing that a header's value cannot have.
fn is_tracestate(text: &str) -> bool {
    let printable = text.bytes().all(|b| (b' '..=b'~').contains(&b));
    !text.is_empty() && text.len() <= MAX_TRACESTATE_BYTES && printable && text.trim() == text
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

    #[test]
    fn a_tracestate_fits_into_a_header() {
        assert!(is_tracestate("rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"));
        for bad in ["", " a=b", "a=b\r\nNats-Rollup: all", "a=\u{e4}", &"x".repeat(513)] {
            assert!(!is_tracestate(bad), "{bad}");
        }
    }

    #[test]
    fn the_flags_say_whether_a_trace_is_recorded() {
        let sampled = |flags| {
            TraceContext::from(format!("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-{flags}")).is_sampled()
        };
        assert_eq!(["00", "01", "02", "03", "xx"].map(sampled), [false, true, false, true, false]);
    }
}
