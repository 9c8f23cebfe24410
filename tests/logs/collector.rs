//! A collector of OpenTelemetry's that keeps what programs send it.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::time::Duration;

use aftercommit::testing::eventually;
use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsServiceRequest;
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value};
use opentelemetry_proto::tonic::metrics::v1::metric::Data;
use opentelemetry_proto::tonic::metrics::v1::number_data_point;
use opentelemetry_proto::tonic::resource::v1::Resource;
use prost::Message;

use crate::support::{Endpoint, Received, Reply, SOON};

/// Names and values, as text.
pub type Attributes = BTreeMap<String, String>;

/// One span.
#[derive(Debug, Clone)]
pub struct FoundSpan {
    pub service: String,
    pub name: String,
    pub trace: String,
    pub id: String,
    /// Empty for the first span of a trace.
    pub parent: String,
    /// As the protocol numbers it: 4 is a producer, 5 a consumer.
    pub kind: i32,
    /// 2 is an error.
    pub status: i32,
    pub attributes: Attributes,
    /// The traces that it is linked with.
    pub links: BTreeSet<String>,
    /// What is told within it.
    pub events: Vec<String>,
}

/// One log record.
#[derive(Debug, Clone)]
pub struct FoundLog {
    pub service: String,
    pub target: String,
    pub message: String,
    pub severity: String,
    pub trace: String,
    pub span: String,
    pub attributes: Attributes,
}

/// What was sent of one metric.
#[derive(Debug, Clone, Default)]
pub struct FoundMetric {
    /// The last value of a counter or gauge, by its labels.
    pub values: BTreeMap<String, f64>,
    /// The upper bounds of a histogram.
    pub bounds: Vec<f64>,
    /// How many values a histogram has counted, by its labels.
    pub counts: BTreeMap<String, u64>,
}

/// Listens until it is dropped.
pub struct Collector(pub Endpoint);

impl Collector {
    /// One that takes everything.
    pub async fn start() -> Self {
        Self::answering(|_| Reply::Status(200)).await
    }

    pub async fn answering(answer: impl Fn(&Received) -> Reply + Send + Sync + 'static) -> Self {
        Self(Endpoint::start(move |request, _| answer(request)).await)
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.0.address)
    }

    /// Has a program export to it, and soon.
    pub fn listens_to<'c>(&self, command: &'c mut Command) -> &'c mut Command {
        exports_to(command, &self.url())
    }

    fn bodies(&self, path: &str) -> Vec<Received> {
        let line = format!("POST {path} ");
        self.0.received().into_iter().filter(|request| request.line.starts_with(&line)).collect()
    }

    pub fn spans(&self) -> Vec<FoundSpan> {
        let mut all = Vec::new();
        for request in self.bodies("/v1/traces") {
            let request = ExportTraceServiceRequest::decode(&*request.body).unwrap();
            for of_resource in request.resource_spans {
                let service = service(of_resource.resource.as_ref());
                for span in of_resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                    all.push(FoundSpan {
                        service: service.clone(),
                        name: span.name,
                        trace: hex(&span.trace_id),
                        id: hex(&span.span_id),
                        parent: hex(&span.parent_span_id),
                        kind: span.kind,
                        status: span.status.map_or(0, |status| status.code),
                        attributes: attributes(&span.attributes),
                        links: span.links.iter().map(|link| hex(&link.trace_id)).collect(),
                        events: span
                            .events
                            .into_iter()
                            .map(|event| format!("{} {:?}", event.name, attributes(&event.attributes)))
                            .collect(),
                    });
                }
            }
        }
        all
    }

    pub fn logs(&self) -> Vec<FoundLog> {
        let mut all = Vec::new();
        for request in self.bodies("/v1/logs") {
            let request = ExportLogsServiceRequest::decode(&*request.body).unwrap();
            for of_resource in request.resource_logs {
                let service = service(of_resource.resource.as_ref());
                let records = of_resource.scope_logs.into_iter().flat_map(|scope| {
                    let target = scope.scope.unwrap_or_default().name;
                    scope.log_records.into_iter().map(move |record| (target.clone(), record))
                });
                for (target, record) in records {
                    all.push(FoundLog {
                        service: service.clone(),
                        target,
                        message: record.body.as_ref().map(text).unwrap_or_default(),
                        severity: record.severity_text,
                        trace: hex(&record.trace_id),
                        span: hex(&record.span_id),
                        attributes: attributes(&record.attributes),
                    });
                }
            }
        }
        all
    }

    /// What a service has sent, by the metrics' names.
    pub fn metrics(&self, of: &str) -> BTreeMap<String, FoundMetric> {
        let mut all = BTreeMap::<String, FoundMetric>::new();
        for request in self.bodies("/v1/metrics") {
            let request = ExportMetricsServiceRequest::decode(&*request.body).unwrap();
            let mine = request.resource_metrics.into_iter().filter(|found| service(found.resource.as_ref()) == of);
            for metric in mine.flat_map(|found| found.scope_metrics).flat_map(|scope| scope.metrics) {
                let found = all.entry(metric.name).or_default();
                let points = match metric.data.unwrap() {
                    Data::Gauge(gauge) => gauge.data_points,
                    Data::Sum(sum) => {
                        assert!(sum.is_monotonic && sum.aggregation_temporality == 2, "cumulative");
                        sum.data_points
                    }
                    Data::Histogram(histogram) => {
                        for point in histogram.data_points {
                            found.bounds = point.explicit_bounds;
                            found.counts.insert(labels(&point.attributes), point.count);
                        }
                        continue;
                    }
                    other => panic!("{other:?}"),
                };
                for point in points {
                    let value = match point.value.unwrap() {
                        number_data_point::Value::AsDouble(value) => value,
                        number_data_point::Value::AsInt(value) => value as f64,
                    };
                    found.values.insert(labels(&point.attributes), value);
                }
            }
        }
        all
    }

    /// Waits for a span and returns it.
    pub async fn span(&self, what: &str, wanted: impl Fn(&FoundSpan) -> bool) -> FoundSpan {
        let mut found = None;
        let waited = eventually(SOON, what, async || {
            found = self.spans().into_iter().find(&wanted);
            found.is_some()
        });
        let waited = waited.await;
        assert!(waited.is_ok(), "no span {what}: {:#?}", self.spans());
        found.unwrap()
    }

    /// Everything that was sent, to look for what must not be there.
    pub fn text(&self) -> String {
        let bodies = self.0.received().into_iter().map(|request| String::from_utf8_lossy(&request.body).into_owned());
        bodies.collect()
    }
}

/// Has a program export to this address, and soon.
pub fn exports_to<'c>(command: &'c mut Command, url: &str) -> &'c mut Command {
    command
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        .env("OTEL_BSP_SCHEDULE_DELAY", "200")
        .env("OTEL_BLRP_SCHEDULE_DELAY", "200")
        .env("OTEL_METRIC_EXPORT_INTERVAL", "500")
}

/// How long a stop may take in all: the three seconds for the collector, and what the program itself needs on a slow machine.
pub const STOPPED: Duration = Duration::from_secs(15);

fn service(resource: Option<&Resource>) -> String {
    attributes(&resource.unwrap().attributes).remove("service.name").unwrap()
}

fn attributes(all: &[KeyValue]) -> Attributes {
    all.iter().map(|one| (one.key.clone(), one.value.as_ref().map(text).unwrap_or_default())).collect()
}

fn labels(all: &[KeyValue]) -> String {
    let labels = attributes(all).into_iter().map(|(name, value)| format!("{name}=\"{value}\""));
    labels.collect::<Vec<_>>().join(",")
}

fn text(value: &AnyValue) -> String {
    match value.value.as_ref().unwrap() {
        any_value::Value::StringValue(text) => text.clone(),
        any_value::Value::IntValue(number) => number.to_string(),
        any_value::Value::BoolValue(is) => is.to_string(),
        any_value::Value::DoubleValue(number) => number.to_string(),
        other => format!("{other:?}"),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
