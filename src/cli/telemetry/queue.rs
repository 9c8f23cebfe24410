//! What waits to be exported: never more than a fixed number, and what is lost is counted and told, but rarely.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use metrics::counter;
use opentelemetry::logs::Severity;
use opentelemetry::{Context, InstrumentationScope};
use opentelemetry_otlp::{LogExporter, MetricExporter, SpanExporter};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::logs::{LogBatch, LogProcessor, SdkLogRecord};
use opentelemetry_sdk::metrics::Temporality;
use opentelemetry_sdk::metrics::data::ResourceMetrics;
use opentelemetry_sdk::metrics::exporter::PushMetricExporter;
use opentelemetry_sdk::trace::{Span, SpanData, SpanProcessor};

use aftercommit_core::telemetry::TELEMETRY_LOST_TOTAL;

use super::settings::Signal;

/// How often trouble is told while it lasts.
const TOLD_EVERY: Duration = Duration::from_secs(300);

/// One signal's way to the collector.
#[derive(Debug)]
pub(super) struct Queue {
    signal: Signal,
    /// The most that waits.
    limit: usize,
    waiting: AtomicUsize,
    /// What found the queue full since that was told.
    crowded: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Why the last export failed.
    reason: String,
    /// What was lost since all was well.
    lost: u64,
    /// When trouble was told last, while there is trouble.
    told: Option<Instant>,
}

/// What there is to tell after an export.
#[derive(Debug, PartialEq, Eq)]
enum News {
    None,
    Trouble { reason: String, lost: u64 },
    Well { lost: u64 },
}

impl Queue {
    pub(super) fn new(signal: Signal, limit: usize) -> Self {
        let (waiting, crowded, state) = Default::default();
        Self { signal, limit, waiting, crowded, state }
    }

    /// Why the export that is under way fails.
    pub(super) fn trouble(&self, reason: String) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).reason = reason;
    }

    /// Whether one more may wait; else it is lost.
    fn enter(&self) -> bool {
        if self.waiting.fetch_add(1, Ordering::Relaxed) < self.limit {
            return true;
        }
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        self.crowded.fetch_add(1, Ordering::Relaxed);
        false
    }

    /// So many have left the queue, exported or not.
    fn left(&self, items: usize, result: &OTelSdkResult) {
        self.waiting.fetch_sub(items, Ordering::Relaxed);
        let crowded = self.crowded.swap(0, Ordering::Relaxed);
        let failed = if result.is_err() { items as u64 } else { 0 };
        if crowded + failed > 0 {
            let signal = self.signal.to_string();
            counter!(TELEMETRY_LOST_TOTAL.name, "signal" => signal).increment(crowded + failed);
        }
        let signal = tracing::field::display(self.signal);
        match self.news(result.is_err(), crowded + failed, Instant::now()) {
            News::None => {}
            News::Trouble { reason, lost } => tracing::warn!(signal, lost, error = reason, "telemetry is lost"),
            News::Well { lost } => tracing::info!(signal, lost, "telemetry is exported again"),
        }
    }

    fn news(&self, failed: bool, lost: u64, now: Instant) -> News {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.lost += lost;
        let quiet = state.told.is_none_or(|told| now.duration_since(told) >= TOLD_EVERY);
        let reason = match failed {
            true => state.reason.clone(),
            false => format!("more than {} wait: the collector is too slow", self.limit),
        };
        match (failed || lost > 0, state.told) {
            (true, _) if quiet => {
                state.told = Some(now);
                News::Trouble { reason, lost: state.lost }
            }
            (false, Some(_)) => {
                state.told = None;
                News::Well { lost: std::mem::take(&mut state.lost) }
            }
            _ => News::None,
        }
    }
}

/// An exporter whose results are looked at.
#[derive(Debug)]
pub(super) struct Watched<E> {
    exporter: E,
    queue: Arc<Queue>,
}

impl<E> Watched<E> {
    pub(super) fn new(exporter: E, queue: &Arc<Queue>) -> Self {
        Self { exporter, queue: Arc::clone(queue) }
    }
}

impl opentelemetry_sdk::trace::SpanExporter for Watched<SpanExporter> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let items = batch.len();
        let result = self.exporter.export(batch).await;
        self.queue.left(items, &result);
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

impl opentelemetry_sdk::logs::LogExporter for Watched<LogExporter> {
    async fn export(&self, batch: LogBatch<'_>) -> OTelSdkResult {
        let items = batch.iter().count();
        let result = self.exporter.export(batch).await;
        self.queue.left(items, &result);
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

impl PushMetricExporter for Watched<MetricExporter> {
    async fn export(&self, metrics: &ResourceMetrics) -> OTelSdkResult {
        // There is no queue: the next export has everything again.
        self.queue.enter();
        let result = self.exporter.export(metrics).await;
        self.queue.left(1, &result);
        result
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn temporality(&self) -> Temporality {
        self.exporter.temporality()
    }
}

/// A processor that is given no more than its queue takes.
#[derive(Debug)]
pub(super) struct Bounded<P> {
    processor: P,
    queue: Arc<Queue>,
}

impl<P> Bounded<P> {
    pub(super) fn new(processor: P, queue: Arc<Queue>) -> Self {
        Self { processor, queue }
    }
}

impl<P: SpanProcessor> SpanProcessor for Bounded<P> {
    fn on_start(&self, span: &mut Span, context: &Context) {
        self.processor.on_start(span, context);
    }

    fn on_end(&self, span: SpanData) {
        if self.queue.enter() {
            self.processor.on_end(span);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.processor.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.processor.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.processor.set_resource(resource);
    }
}

impl<P: LogProcessor> LogProcessor for Bounded<P> {
    fn emit(&self, record: &mut SdkLogRecord, scope: &InstrumentationScope) {
        if self.queue.enter() {
            self.processor.emit(record, scope);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.processor.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.processor.shutdown_with_timeout(timeout)
    }

    fn event_enabled(&self, level: Severity, target: &str, name: Option<&str>) -> bool {
        self.processor.event_enabled(level, target, name)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.processor.set_resource(resource);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_wait_than_the_limit() {
        let queue = Queue::new(Signal::Traces, 2);
        assert_eq!([queue.enter(), queue.enter(), queue.enter()], [true, true, false]);
        queue.left(2, &Ok(()));
        assert!(queue.enter());
    }

    #[test]
    fn trouble_is_told_when_it_begins_then_rarely_and_its_end_once() {
        let queue = Queue::new(Signal::Logs, 10);
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        queue.trouble("away".into());
        let trouble = |lost| News::Trouble { reason: "away".into(), lost };
        assert_eq!(queue.news(false, 0, at(0)), News::None);
        assert_eq!(queue.news(true, 5, at(1)), trouble(5));
        assert_eq!(queue.news(true, 5, at(2)), News::None);
        assert_eq!(queue.news(true, 5, at(302)), trouble(15));
        assert_eq!(queue.news(false, 0, at(303)), News::Well { lost: 15 });
        assert_eq!(queue.news(false, 0, at(304)), News::None);
        let News::Trouble { reason, lost: 7 } = queue.news(false, 7, at(305)) else { panic!("nothing is told") };
        assert!(reason.contains("too slow"), "{reason}");
    }
}
