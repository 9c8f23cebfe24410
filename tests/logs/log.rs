//! The log of this process, and tracing as a service would set it up.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::sync::{Mutex, Once};

use aftercommit::{outbox, worker};
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{TraceContextExt, TracerProvider};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;

static TEXT: Mutex<Vec<u8>> = Mutex::new(Vec::new());

thread_local! {
    /// Instead of the span's, in the thread of one test.
    pub static OTHER_SOURCE: RefCell<Option<&'static str>> = const { RefCell::new(None) };
}

/// Everything that is logged by this process, once a test has asked for it.
#[derive(Clone, Copy)]
pub struct Log(());

impl Log {
    pub fn start() -> Self {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            let tracer = SdkTracerProvider::builder().build().tracer("test");
            let subscriber = tracing_subscriber::registry()
                .with(EnvFilter::new("debug"))
                .with(tracing_opentelemetry::layer().with_tracer(tracer))
                .with(tracing_subscriber::fmt::layer().with_ansi(false).with_writer(|| Self(())));
            tracing::subscriber::set_global_default(subscriber).unwrap();
            outbox::set_traceparent_source(traceparent);
            worker::set_span_parent(|span, traceparent| {
                let headers = HashMap::from([("traceparent".to_string(), traceparent.to_string())]);
                span.set_parent(TraceContextPropagator::new().extract(&headers)).unwrap();
            });
        });
        Self(())
    }

    /// The lines with this in them.
    pub fn lines(self, part: &str) -> Vec<String> {
        let text = String::from_utf8(TEXT.lock().unwrap().clone()).unwrap();
        text.lines().filter(|line| line.contains(part)).map(String::from).collect()
    }
}

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        TEXT.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The trace context that this code runs in.
pub fn traceparent() -> Option<String> {
    if let Some(other) = OTHER_SOURCE.with(|other| *other.borrow()) {
        return Some(other.into());
    }
    let context = Span::current().context();
    let span = context.span().span_context().clone();
    span.is_valid().then(|| format!("00-{}-{}-{:02x}", span.trace_id(), span.span_id(), span.trace_flags().to_u8()))
}
