//! What is asked and told about spans: by relay and worker, of the tracing library that the binaries export them with.
//!
//! Relay and worker know no such library, and without one they do nothing of this. A service that runs them itself has the
//! functions `set_span_parent` of the worker and `set_traceparent_source` of the outbox instead.

use std::sync::OnceLock;
use std::time::Duration;

use tracing::Span;
use uuid::Uuid;

use crate::envelope::Envelope;

pub use aftercommit_outbox::TraceContext;

static TRACING: OnceLock<Box<dyn Tracing>> = OnceLock::new();

/// An event that is in the stream now, and whose publisher's trace is recorded.
#[derive(Debug)]
pub struct Published<'e> {
    /// In which span it was published.
    pub context: &'e TraceContext,
    /// The event.
    pub event_id: Uuid,
    /// Its type.
    pub event_type: &'e str,
    /// Its place in the outbox.
    pub outbox_id: i64,
    /// The stream.
    pub stream: &'e str,
    /// How long ago it was handed to the connection; zero when that is not known.
    pub took: Duration,
    /// The payload's size.
    pub bytes: usize,
}

/// Who handles events.
#[derive(Debug, Clone, Copy)]
pub struct Consumer<'e> {
    /// The subscriber.
    pub subscriber: &'e str,
    /// The stream that the events are from.
    pub stream: &'e str,
}

/// A tracing library, as far as it is needed here.
pub trait Tracing: Send + Sync {
    /// The context of the span in which the caller runs.
    fn current(&self) -> Option<TraceContext>;
    /// The context of a span, which is begun by that.
    fn context_of(&self, span: &Span) -> Option<TraceContext>;
    /// An event was stored. Called only for those whose publisher's trace is recorded.
    fn published(&self, event: &Published<'_>);
    /// This new span is the run of one event: a child of the span in which that was published.
    fn handles(&self, span: &Span, consumer: Consumer<'_>, event: &Envelope);
    /// This new span is one run of several events, which come from as many traces: it is linked with those that are recorded.
    fn handles_many(&self, span: &Span, consumer: Consumer<'_>, events: &[&Envelope]);
    /// One statement runs an SQL function for each of these events: a span for each whose publisher's trace is recorded.
    fn calls(&self, consumer: Consumer<'_>, events: &[&Envelope]) -> Box<dyn Calls>;
    /// The run that this span stands for has failed in this way. What failed is not told: it may hold what events hold.
    fn failed(&self, span: &Span, outcome: &'static str);
}

/// The open spans of the calls of one statement.
pub trait Calls: Send {
    /// The context of each call; none for those without a span.
    fn contexts(&self) -> Vec<Option<TraceContext>>;
    /// The statement has ended; with an outcome when it failed.
    fn end(self: Box<Self>, failed: Option<&'static str>);
}

/// Has spans exported from now on. Only the first call counts.
pub fn set_tracing(tracing: impl Tracing + 'static) {
    _ = TRACING.set(Box::new(tracing));
}

/// The library that exports spans; none when nobody does.
pub fn tracing() -> Option<&'static dyn Tracing> {
    TRACING.get().map(|tracing| &**tracing)
}
