//! The metrics of the facade `metrics` as instruments of OpenTelemetry, under the same names and with the same buckets.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use metrics::{
    Counter, CounterFn, Gauge, GaugeFn, Histogram, HistogramFn, Key, KeyName, Metadata, Recorder, SharedString, Unit,
};
use opentelemetry::KeyValue;
use opentelemetry::metrics::Meter;

use aftercommit_core::telemetry::METRICS;

/// The upper bounds of a histogram's buckets, by its name.
pub(in crate::cli) type Buckets = fn(&str) -> Vec<f64>;

/// Records for the export what is recorded for another recorder, too, if there is one.
pub(in crate::cli) struct Instruments<R> {
    beside: Option<R>,
    meter: Meter,
    buckets: Buckets,
    /// One handle for each set of labels: made anew, a gauge would begin at 0 again.
    made: Mutex<Made>,
}

#[derive(Default)]
struct Made {
    counters: HashMap<Key, Arc<Count>>,
    gauges: HashMap<Key, Arc<Level>>,
    histograms: HashMap<Key, Arc<Sizes>>,
}

impl<R> Instruments<R> {
    pub(in crate::cli) fn new(meter: Meter, buckets: Buckets, beside: Option<R>) -> Self {
        Self { beside, meter, buckets, made: Mutex::default() }
    }

    fn made<H: Clone>(&self, key: &Key, of: fn(&mut Made) -> &mut HashMap<Key, H>, make: impl FnOnce() -> H) -> H {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        of(&mut made).entry(key.clone()).or_insert_with(make).clone()
    }
}

fn labels(key: &Key) -> Vec<KeyValue> {
    key.labels().map(|label| KeyValue::new(label.key().to_string(), label.value().to_string())).collect()
}

/// What the metric says, when it is one of ours.
fn meaning(name: &str) -> &'static str {
    METRICS.iter().find(|metric| metric.name == name).map_or("", |metric| metric.meaning)
}

impl<R: Recorder> Recorder for Instruments<R> {
    fn describe_counter(&self, name: KeyName, unit: Option<Unit>, text: SharedString) {
        if let Some(beside) = &self.beside {
            beside.describe_counter(name, unit, text);
        }
    }

    fn describe_gauge(&self, name: KeyName, unit: Option<Unit>, text: SharedString) {
        if let Some(beside) = &self.beside {
            beside.describe_gauge(name, unit, text);
        }
    }

    fn describe_histogram(&self, name: KeyName, unit: Option<Unit>, text: SharedString) {
        if let Some(beside) = &self.beside {
            beside.describe_histogram(name, unit, text);
        }
    }

    fn register_counter(&self, key: &Key, metadata: &Metadata<'_>) -> Counter {
        let own = self.made(
            key,
            |made| &mut made.counters,
            || {
                let name = key.name().to_string();
                let counter = self.meter.u64_counter(name).with_description(meaning(key.name())).build();
                let count = Count { counter, labels: labels(key), absolute: AtomicU64::new(0) };
                // Shown before there is anything to count.
                count.increment(0);
                Arc::new(count)
            },
        );
        match &self.beside {
            Some(beside) => Counter::from_arc(Arc::new(Both(beside.register_counter(key, metadata), own))),
            None => Counter::from_arc(own),
        }
    }

    fn register_gauge(&self, key: &Key, metadata: &Metadata<'_>) -> Gauge {
        let own = self.made(
            key,
            |made| &mut made.gauges,
            || {
                let name = key.name().to_string();
                let gauge = self.meter.f64_gauge(name).with_description(meaning(key.name())).build();
                let level = Level { gauge, labels: labels(key), value: Mutex::new(0.0) };
                level.set(0.0);
                Arc::new(level)
            },
        );
        match &self.beside {
            Some(beside) => Gauge::from_arc(Arc::new(Both(beside.register_gauge(key, metadata), own))),
            None => Gauge::from_arc(own),
        }
    }

    fn register_histogram(&self, key: &Key, metadata: &Metadata<'_>) -> Histogram {
        let own = self.made(
            key,
            |made| &mut made.histograms,
            || {
                let name = key.name().to_string();
                let histogram = self.meter.f64_histogram(name).with_description(meaning(key.name()));
                let histogram = histogram.with_boundaries((self.buckets)(key.name())).build();
                Arc::new(Sizes { histogram, labels: labels(key) })
            },
        );
        match &self.beside {
            Some(beside) => Histogram::from_arc(Arc::new(Both(beside.register_histogram(key, metadata), own))),
            None => Histogram::from_arc(own),
        }
    }
}

struct Count {
    counter: opentelemetry::metrics::Counter<u64>,
    labels: Vec<KeyValue>,
    /// The highest value that was given as a whole.
    absolute: AtomicU64,
}

impl CounterFn for Count {
    fn increment(&self, value: u64) {
        self.counter.add(value, &self.labels);
    }

    fn absolute(&self, value: u64) {
        let before = self.absolute.fetch_max(value, Ordering::Relaxed);
        self.increment(value.saturating_sub(before));
    }
}

struct Level {
    gauge: opentelemetry::metrics::Gauge<f64>,
    labels: Vec<KeyValue>,
    value: Mutex<f64>,
}

impl Level {
    fn change(&self, change: impl FnOnce(f64) -> f64) {
        let mut value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        *value = change(*value);
        self.gauge.record(*value, &self.labels);
    }
}

impl GaugeFn for Level {
    fn increment(&self, value: f64) {
        self.change(|before| before + value);
    }

    fn decrement(&self, value: f64) {
        self.change(|before| before - value);
    }

    fn set(&self, value: f64) {
        self.change(|_| value);
    }
}

struct Sizes {
    histogram: opentelemetry::metrics::Histogram<f64>,
    labels: Vec<KeyValue>,
}

impl HistogramFn for Sizes {
    fn record(&self, value: f64) {
        self.histogram.record(value, &self.labels);
    }
}

/// The other recorder's handle, and ours.
struct Both<H, O>(H, Arc<O>);

impl<O: CounterFn> CounterFn for Both<Counter, O> {
    fn increment(&self, value: u64) {
        self.0.increment(value);
        self.1.increment(value);
    }

    fn absolute(&self, value: u64) {
        self.0.absolute(value);
        self.1.absolute(value);
    }
}

impl<O: GaugeFn> GaugeFn for Both<Gauge, O> {
    fn increment(&self, value: f64) {
        self.0.increment(value);
        self.1.increment(value);
    }

    fn decrement(&self, value: f64) {
        self.0.decrement(value);
        self.1.decrement(value);
    }

    fn set(&self, value: f64) {
        self.0.set(value);
        self.1.set(value);
    }
}

impl<O: HistogramFn> HistogramFn for Both<Histogram, O> {
    fn record(&self, value: f64) {
        self.0.record(value);
        self.1.record(value);
    }
}
