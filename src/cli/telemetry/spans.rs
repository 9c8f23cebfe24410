//! The spans of relay and worker, named as OpenTelemetry's conventions for messaging do.

use std::str::FromStr;
use std::time::SystemTime;

use opentelemetry::trace::{
    Span as _, SpanBuilder, SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags, TraceId, TraceState,
    Tracer,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::trace::SdkTracer;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use aftercommit_core::envelope::Envelope;
use aftercommit_core::trace::{Calls, Consumer, Published, TraceContext, Tracing};

/// The most traces that a span of several events is linked with; OpenTelemetry's own limit.
const LINKS: usize = 128;

/// The context that the caller runs in, as headers have it.
pub(super) fn current() -> Option<TraceContext> {
    Context::map_current(|context| written(context.span().span_context()))
}

fn written(span: &SpanContext) -> Option<TraceContext> {
    span.is_valid().then(|| TraceContext {
        traceparent: format!("00-{}-{}-{:02x}", span.trace_id(), span.span_id(), span.trace_flags().to_u8() & 1),
        tracestate: Some(span.trace_state().header()).filter(|state| !state.is_empty()),
    })
}

/// The context that headers have, as a parent. OpenTelemetry's own propagator does the same by way of a map of headers, for
/// each event. A `tracestate` that cannot be read is left out.
fn read(context: &TraceContext) -> SpanContext {
    let mut parts = context.traceparent.split('-').skip(1);
    let mut next = || parts.next().unwrap_or_default();
    let (trace, span) = (TraceId::from_hex(next()), SpanId::from_hex(next()));
    let state = context.tracestate.as_deref().and_then(|state| TraceState::from_str(state).ok()).unwrap_or_default();
    let flags = if context.is_sampled() { TraceFlags::SAMPLED } else { TraceFlags::default() };
    let (trace, span) = (trace.unwrap_or(TraceId::INVALID), span.unwrap_or(SpanId::INVALID));
    SpanContext::new(trace, span, flags, true, state)
}

fn parent(context: &TraceContext) -> Context {
    Context::new().with_remote_span_context(read(context))
}

/// Gives the worker's spans the names and the kind that the conventions have for them; in the log they stay short.
#[derive(Debug, Clone)]
pub(super) struct Renamed(pub(super) SdkTracer);

impl Tracer for Renamed {
    type Span = opentelemetry_sdk::trace::Span;

    fn build_with_context(&self, mut builder: SpanBuilder, parent: &Context) -> Self::Span {
        let value = |name: &str| {
            let mut attributes = builder.attributes.iter().flatten();
            attributes
                .find(|attribute| attribute.key.as_str() == name)
                .map_or_else(String::new, |found| found.value.to_string())
        };
        let (name, kind) = match &*builder.name {
            "handle" => (format!("process {}", value("event_type")), SpanKind::Consumer),
            "handle_batch" => ("process batch".into(), SpanKind::Consumer),
            "command" => (format!("aftercommit {}", value("command")), SpanKind::Internal),
            _ => return self.0.build_with_context(builder, parent),
        };
        builder.name = name.into();
        builder.span_kind = Some(kind);
        self.0.build_with_context(builder, parent)
    }
}

/// Makes spans.
pub(super) struct Spans(pub(super) SdkTracer);

/// What every span about messages has.
fn attributes(operation: &'static str, kind: &'static str, stream: &str) -> Vec<KeyValue> {
    vec![
        KeyValue::new("messaging.system", "nats"),
        KeyValue::new("messaging.operation.name", operation),
        KeyValue::new("messaging.operation.type", kind),
        KeyValue::new("messaging.destination.name", stream.to_string()),
    ]
}

/// What a span about one event has.
fn of_event(consumer: Consumer<'_>, event: &Envelope) -> Vec<KeyValue> {
    let mut all = attributes("process", "process", consumer.stream);
    all.extend([
        KeyValue::new("messaging.consumer.group.name", consumer.subscriber.to_string()),
        KeyValue::new("messaging.message.id", event.id.to_string()),
        KeyValue::new("cloudevents.event_id", event.id.to_string()),
        KeyValue::new("cloudevents.event_type", event.event_type.clone()),
        KeyValue::new("cloudevents.event_source", event.source.clone()),
    ]);
    all
}

impl Tracing for Spans {
    fn current(&self) -> Option<TraceContext> {
        current()
    }

    fn context_of(&self, span: &Span) -> Option<TraceContext> {
        written(span.context().span().span_context())
    }

    fn published(&self, event: &Published<'_>) {
        let end = SystemTime::now();
        let mut attributes = attributes("publish", "send", event.stream);
        attributes.extend([
            KeyValue::new("messaging.message.id", event.event_id.to_string()),
            KeyValue::new("messaging.message.body.size", i64::try_from(event.bytes).unwrap_or(i64::MAX)),
            KeyValue::new("cloudevents.event_id", event.event_id.to_string()),
            KeyValue::new("cloudevents.event_type", event.event_type.to_string()),
            KeyValue::new("aftercommit.outbox_id", event.outbox_id),
        ]);
        let builder = SpanBuilder::from_name(format!("publish {}", event.event_type))
            .with_kind(SpanKind::Producer)
            .with_start_time(end.checked_sub(event.took).unwrap_or(end))
            .with_attributes(attributes);
        let mut span = self.0.build_with_context(builder, &parent(event.context));
        span.end_with_timestamp(end);
    }

    fn handles(&self, span: &Span, consumer: Consumer<'_>, event: &Envelope) {
        if let Some(context) = event.trace_context() {
            // It fails when the log is so quiet that there is no span.
            _ = span.set_parent(parent(&context));
        }
        let begun = span.context();
        // Whether it is recorded is decided, and most are not.
        if begun.span().is_recording() {
            begun.span().set_attributes(of_event(consumer, event));
        }
    }

    fn handles_many(&self, span: &Span, consumer: Consumer<'_>, events: &[&Envelope]) {
        let begun = span.context();
        if !begun.span().is_recording() {
            return;
        }
        let count = i64::try_from(events.len()).unwrap_or(i64::MAX);
        let mut all = attributes("process", "process", consumer.stream);
        all.push(KeyValue::new("messaging.consumer.group.name", consumer.subscriber.to_string()));
        all.push(KeyValue::new("messaging.batch.message_count", count));
        begun.span().set_attributes(all);
        let recorded = events.iter().filter_map(|event| event.trace_context().filter(TraceContext::is_sampled));
        for context in recorded.take(LINKS) {
            begun.span().add_link(read(&context), Vec::new());
        }
    }

    fn calls(&self, consumer: Consumer<'_>, events: &[&Envelope]) -> Box<dyn Calls> {
        let call = |event: &&Envelope| {
            let context = event.trace_context().filter(TraceContext::is_sampled)?;
            let builder = SpanBuilder::from_name(format!("process {}", event.event_type))
                .with_kind(SpanKind::Consumer)
                .with_attributes(of_event(consumer, event));
            Some(self.0.build_with_context(builder, &parent(&context)))
        };
        Box::new(OpenCalls(events.iter().map(call).collect()))
    }

    fn failed(&self, span: &Span, outcome: &'static str) {
        let context = span.context();
        context.span().set_attribute(KeyValue::new("error.type", outcome));
        context.span().set_status(Status::error(outcome));
    }
}

/// The calls of one statement.
struct OpenCalls(Vec<Option<opentelemetry_sdk::trace::Span>>);

impl Calls for OpenCalls {
    fn contexts(&self) -> Vec<Option<TraceContext>> {
        self.0.iter().map(|span| written(span.as_ref()?.span_context())).collect()
    }

    fn end(self: Box<Self>, failed: Option<&'static str>) {
        for mut span in self.0.into_iter().flatten() {
            if let Some(outcome) = failed {
                span.set_attribute(KeyValue::new("error.type", outcome));
                span.set_status(Status::error(outcome));
            }
            span.end();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_is_written_as_it_was_read() {
        for (flags, state) in [("01", Some("rojo=00f067aa0ba902b7,congo=t61rcWkgMzE")), ("00", None)] {
            let traceparent = format!("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-{flags}");
            let context = TraceContext { traceparent, tracestate: state.map(String::from) };
            let span = read(&context);
            assert!(span.is_remote() && span.is_sampled() == context.is_sampled());
            assert_eq!(written(&span), Some(context));
        }
        let unreadable = TraceContext {
            traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into(),
            tracestate: Some("no state".into()),
        };
        assert_eq!(written(&read(&unreadable)).map(|context| context.tracestate), Some(None));
        assert_eq!(written(&read(&TraceContext::from("nothing".to_string()))), None);
    }
}
