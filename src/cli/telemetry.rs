//! Traces, metrics and logs by OTLP, as the environment variables of OpenTelemetry say.
//!
//! Nothing of it may hold up the work of a role: what is to be exported waits in queues of bounded size and is dropped when they
//! are full, and the exporters have threads of their own.

mod client;
mod instruments;
mod queue;
mod settings;
mod spans;

use std::sync::{Arc, OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use opentelemetry::KeyValue;
use opentelemetry::metrics::{Meter, MeterProvider};
use opentelemetry::trace::{TraceContextExt, TracerProvider};
use opentelemetry_appender_tracing::layer::{OpenTelemetryTracingBridge, TracingSpanAttributes};
use opentelemetry_otlp::{LogExporter, MetricExporter, Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::logs::{BatchConfigBuilder as LogBatches, BatchLogProcessor, SdkLoggerProvider};
use opentelemetry_sdk::metrics::{PeriodicReader, SdkMeterProvider};
use opentelemetry_sdk::resource::EnvResourceDetector;
use opentelemetry_sdk::trace::{BatchConfigBuilder as SpanBatches, BatchSpanProcessor, SdkTracerProvider};
use tracing::{Metadata, Subscriber};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::Layer;
use tracing_subscriber::registry::LookupSpan;
use uuid::Uuid;

use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::trace;
use client::Sender;
pub(super) use instruments::Instruments;
use queue::{Bounded, Queue, Watched};
use settings::{Settings, Signal, Target};
use spans::{Renamed, Spans};

/// How long a stop waits until the collector has what is left.
const FLUSH: Duration = Duration::from_secs(3);
/// The name under which spans and metrics are recorded.
const SCOPE: &str = "aftercommit";

static RUNNING: OnceLock<Telemetry> = OnceLock::new();

/// What is exported; each is none when it is not.
struct Telemetry {
    traces: Option<SdkTracerProvider>,
    metrics: Option<SdkMeterProvider>,
    logs: Option<SdkLoggerProvider>,
}

/// Starts to export what the environment wants; `program` is what the service is called when the environment does not say so.
/// Does nothing when no endpoint is set.
///
/// # Errors
/// When a variable has a value that cannot be used.
pub(super) fn start(program: &str) -> Result<(), Error> {
    let Some(settings) = Settings::read(&|name| std::env::var(name).ok())? else { return Ok(()) };
    if RUNNING.get().is_some() {
        return Ok(());
    }
    let resource = resource(program, settings.service_name.as_deref());
    let sender = Sender::start()?;
    let telemetry = Telemetry {
        traces: settings.traces.as_ref().map(|to| tracer(&settings, to, &sender, &resource)).transpose()?,
        metrics: settings.metrics.as_ref().map(|to| meter(&settings, to, &sender, &resource)).transpose()?,
        logs: settings.logs.as_ref().map(|to| logger(&settings, to, &sender, &resource)).transpose()?,
    };
    if let Some(traces) = &telemetry.traces {
        aftercommit_outbox::set_traceparent_source(spans::current);
        trace::set_tracing(Spans(traces.tracer(SCOPE)));
    }
    _ = RUNNING.set(telemetry);
    Ok(())
}

/// Tells where to, once there is a log.
pub(super) fn tell() {
    let Some(Telemetry { traces, metrics, logs }) = RUNNING.get() else { return };
    let (traces, metrics, logs) = (traces.is_some(), metrics.is_some(), logs.is_some());
    tracing::info!(traces, metrics, logs, "exporting telemetry by OTLP");
}

/// Gives the collector what is left, for three seconds at most.
pub(super) fn stop() {
    let Some(Telemetry { traces, metrics, logs }) = RUNNING.get() else { return };
    let (traces, metrics, logs) = (traces.clone(), metrics.clone(), logs.clone());
    let shutdowns: [Box<dyn FnOnce() + Send>; 3] = [
        Box::new(move || _ = traces.map(|traces| traces.shutdown_with_timeout(FLUSH))),
        Box::new(move || _ = metrics.map(|metrics| metrics.shutdown_with_timeout(FLUSH))),
        Box::new(move || _ = logs.map(|logs| logs.shutdown_with_timeout(FLUSH))),
    ];
    // Side by side, each on a thread that may be left behind: one that hangs must not take the time of the others.
    let (done, waits) = mpsc::channel();
    for shutdown in shutdowns {
        let done = done.clone();
        thread::spawn(move || {
            shutdown();
            _ = done.send(());
        });
    }
    let deadline = Instant::now() + FLUSH;
    let late = (0..3).any(|_| waits.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_err());
    if late {
        tracing::warn!("the end of the telemetry was not exported within {FLUSH:?}");
    }
}

/// Where metrics are recorded for the export; none when they are not exported.
pub(super) fn meter_to_export() -> Option<Meter> {
    Some(RUNNING.get()?.metrics.as_ref()?.meter(SCOPE))
}

/// The trace and the span in which the caller runs, in hexadecimal digits.
pub(super) fn current_ids() -> Option<(String, String)> {
    opentelemetry::Context::map_current(|context| {
        let span = context.span();
        let ids = span.span_context();
        ids.is_valid().then(|| (ids.trace_id().to_string(), ids.span_id().to_string()))
    })
}

/// What takes spans and log lines to the exporters; none when nothing is exported.
pub(super) fn layer<S>() -> Option<Box<dyn Layer<S> + Send + Sync>>
where
    S: Subscriber + for<'s> LookupSpan<'s> + Send + Sync,
{
    let Telemetry { traces, logs, .. } = RUNNING.get()?;
    let spans = traces.as_ref().map(|traces| {
        let layer = tracing_opentelemetry::layer::<S>().with_tracer(Renamed(traces.tracer(SCOPE)));
        let layer = layer.with_location(false).with_threads(false).with_tracked_inactivity(false);
        layer.with_filter(filter_fn(is_span_of_ours))
    });
    let lines = logs.as_ref().map(|logs| {
        let lines = OpenTelemetryTracingBridge::builder(logs);
        lines.with_tracing_span_attributes(TracingSpanAttributes::all()).build()
    });
    // One after the other, so that a line is written down within its span.
    Some(match (spans, lines) {
        (Some(spans), Some(lines)) => spans.and_then(lines).boxed(),
        (Some(spans), None) => spans.boxed(),
        (None, Some(lines)) => lines.boxed(),
        (None, None) => return None,
    })
}

/// Spans only: the lines within them are exported as logs. And none of the libraries that carry messages and telemetry.
fn is_span_of_ours(metadata: &Metadata<'_>) -> bool {
    const CARRIERS: [&str; 6] = ["hyper", "h2", "rustls", "opentelemetry", "async_nats", "sqlx"];
    let krate = metadata.target().split("::").next().unwrap_or_default();
    metadata.is_span() && !CARRIERS.iter().any(|carrier| krate.starts_with(carrier))
}

/// Who exports.
fn resource(program: &str, service_name: Option<&str>) -> Resource {
    let own = [
        KeyValue::new("service.name", program.to_string()),
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        KeyValue::new("service.instance.id", Uuid::new_v4().to_string()),
    ];
    let resource = Resource::builder().with_attributes(own).with_detector(Box::new(EnvResourceDetector::new()));
    match service_name {
        Some(name) => resource.with_service_name(name.to_string()).build(),
        None => resource.build(),
    }
}

fn tracer(
    settings: &Settings,
    target: &Target,
    sender: &Sender,
    resource: &Resource,
) -> Result<SdkTracerProvider, Error> {
    let queue = Arc::new(Queue::new(Signal::Traces, settings.span_queue));
    let exporter = SpanExporter::builder().with_http().with_http_client(sender.client(target, &queue)?);
    let exporter = exporter.with_endpoint(&target.url).with_timeout(target.timeout).with_protocol(Protocol::HttpBinary);
    let exporter = Watched::new(exporter.build().map_err(failed)?, &queue);
    let batches = SpanBatches::default().with_max_queue_size(settings.span_queue).build();
    let processor = BatchSpanProcessor::builder(exporter).with_batch_config(batches).build();
    let provider = SdkTracerProvider::builder().with_sampler(settings.sampler.clone());
    Ok(provider.with_span_processor(Bounded::new(processor, queue)).with_resource(resource.clone()).build())
}

fn meter(
    settings: &Settings,
    target: &Target,
    sender: &Sender,
    resource: &Resource,
) -> Result<SdkMeterProvider, Error> {
    let queue = Arc::new(Queue::new(Signal::Metrics, usize::MAX));
    let exporter = MetricExporter::builder().with_http().with_http_client(sender.client(target, &queue)?);
    let exporter = exporter.with_endpoint(&target.url).with_timeout(target.timeout).with_protocol(Protocol::HttpBinary);
    let exporter = Watched::new(exporter.build().map_err(failed)?, &queue);
    let reader = PeriodicReader::builder(exporter).with_interval(settings.metric_interval).build();
    Ok(SdkMeterProvider::builder().with_reader(reader).with_resource(resource.clone()).build())
}

fn logger(
    settings: &Settings,
    target: &Target,
    sender: &Sender,
    resource: &Resource,
) -> Result<SdkLoggerProvider, Error> {
    let queue = Arc::new(Queue::new(Signal::Logs, settings.log_queue));
    let exporter = LogExporter::builder().with_http().with_http_client(sender.client(target, &queue)?);
    let exporter = exporter.with_endpoint(&target.url).with_timeout(target.timeout).with_protocol(Protocol::HttpBinary);
    let exporter = Watched::new(exporter.build().map_err(failed)?, &queue);
    let batches = LogBatches::default().with_max_queue_size(settings.log_queue).build();
    let processor = BatchLogProcessor::builder(exporter).with_batch_config(batches).build();
    let provider = SdkLoggerProvider::builder().with_log_processor(Bounded::new(processor, queue));
    Ok(provider.with_resource(resource.clone()).build())
}

/// The exporter's own words hold no value of a header.
fn failed(error: opentelemetry_otlp::ExporterBuildError) -> Error {
    Error::with_source(ErrorKind::Config, "telemetry cannot be exported by OTLP", error)
}
