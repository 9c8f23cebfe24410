//! Health checks and metrics over HTTP, for the relay and the worker.
//!
//! hyper without a framework: three fixed paths need no router, and it costs half the dependencies.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::health::{Check, Health};
use aftercommit_core::telemetry;
use aftercommit_core::text::cut;

/// How long a client may take to send its request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long it may take until the client has the answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// Connections at a time. Who comes beside them is turned away at once, so that whoever opens many and sends nothing takes
/// from the process neither file descriptors nor memory, and is himself the one who waits.
const CONNECTIONS: usize = 64;
/// How often values of histograms are counted; until then each one takes memory.
const UPKEEP: Duration = Duration::from_secs(5);
/// Upper bounds for times: from half a millisecond to ten minutes.
const SECONDS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0];
/// Upper bounds for numbers of events.
const EVENTS: &[f64] = &[1.0, 2.0, 5.0, 10.0, 50.0, 100.0, 500.0, 1_000.0, 5_000.0, 10_000.0, 100_000.0, 1_000_000.0];

/// How much of a subscriber's or a relay's state is shown.
const LINE: usize = 500;

/// Where health checks and metrics are served.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Health checks and metrics")]
pub(super) struct HttpArgs {
    /// Serve /healthz, /readyz and /metrics here, as host:port; off when not given
    #[arg(long, env = "AFTERCOMMIT_HTTP", value_name = "ADDR")]
    http: Option<String>,
    /// Report unhealthy after this long without progress while events wait
    #[arg(long, env = "AFTERCOMMIT_UNHEALTHY_AFTER", value_name = "DURATION", default_value = "30s")]
    #[arg(value_parser = humantime::parse_duration)]
    pub(super) unhealthy_after: Duration,
}

impl HttpArgs {
    /// Opens the port and starts to collect metrics; does nothing when no address is given.
    pub(super) async fn open(&self) -> Result<Option<Server>, Error> {
        let Some(address) = self.http.as_deref() else {
            collect(None)?;
            return Ok(None);
        };
        let listener = TcpListener::bind(address).await.map_err(|error| {
            Error::with_source(
                ErrorKind::Config,
                format!("cannot listen on {address} (AFTERCOMMIT_HTTP or --http)"),
                error,
            )
        })?;
        let recorder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), SECONDS)
            .and_then(|builder| builder.set_buckets_for_metric(Matcher::Suffix("_events".into()), EVENTS))
            .map_err(|error| Error::with_source(ErrorKind::Config, "metrics cannot be collected", error))?
            .build_recorder();
        let metrics = recorder.handle();
        collect(Some(recorder))?;
        // With port 0 the system has chosen one.
        let bound = listener.local_addr().map_or_else(|_| address.to_string(), |bound| bound.to_string());
        tracing::info!(address = bound, "serving /healthz, /readyz and /metrics");
        Ok(Some(Server { listener, metrics, connections: Arc::new(Semaphore::new(CONNECTIONS)) }))
    }
}

/// Has metrics recorded from now on: for the port, if there is one, and for the export, if there is one.
fn collect(recorder: Option<PrometheusRecorder>) -> Result<(), Error> {
    #[cfg(feature = "otlp")]
    if let Some(meter) = super::telemetry::meter_to_export() {
        let buckets = |name: &str| if name.ends_with("_events") { EVENTS.to_vec() } else { SECONDS.to_vec() };
        return install(super::telemetry::Instruments::new(meter, buckets, recorder));
    }
    recorder.map_or(Ok(()), install)
}

fn install(recorder: impl metrics::Recorder + Send + Sync + 'static) -> Result<(), Error> {
    metrics::set_global_recorder(recorder)
        .map_err(|_| Error::new(ErrorKind::Config, "metrics cannot be collected: this process does so already"))?;
    telemetry::describe();
    Ok(())
}

/// Keeps up to date what is looked at only when somebody asks, for the export; forever.
async fn refresh(check: &impl Check) -> Infallible {
    let mut upkeep = tokio::time::interval(UPKEEP);
    loop {
        upkeep.tick().await;
        check.refresh_metrics();
    }
}

/// Whether metrics are exported.
fn is_exported() -> bool {
    #[cfg(feature = "otlp")]
    return super::telemetry::meter_to_export().is_some();
    #[cfg(not(feature = "otlp"))]
    false
}

/// An open port.
pub(super) struct Server {
    listener: TcpListener,
    metrics: PrometheusHandle,
    connections: Arc<Semaphore>,
}

/// Runs a role, and answers questions about it until it ends.
pub(super) async fn beside<T>(server: Option<Server>, check: Arc<impl Check>, role: impl Future<Output = T>) -> T {
    let serve = async {
        match server {
            Some(server) => server.serve(Arc::clone(&check)).await,
            None => std::future::pending().await,
        }
    };
    let export = async {
        match is_exported() {
            true => refresh(&*check).await,
            false => std::future::pending().await,
        }
    };
    tokio::select! {
        result = role => result,
        never = serve => match never {},
        never = export => match never {},
    }
}

impl Server {
    async fn serve(self, check: Arc<impl Check>) -> Infallible {
        let mut upkeep = tokio::time::interval(UPKEEP);
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                _ = upkeep.tick() => {
                    self.metrics.run_upkeep();
                    continue;
                }
            };
            let Ok((stream, _)) = accepted else {
                // No file descriptors left, or the client went away already.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let Ok(place) = Arc::clone(&self.connections).try_acquire_owned() else { continue };
            let (metrics, check) = (self.metrics.clone(), check.clone());
            let service = service_fn(move |request| {
                let response = answer(&request, &metrics, check.as_ref());
                std::future::ready(Ok::<_, Infallible>(response))
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            // A client that breaks off harms nobody.
            tokio::spawn(async move {
                _ = tokio::time::timeout(ANSWER_TIMEOUT, connection).await;
                drop(place);
            });
        }
    }
}

fn answer<B>(request: &Request<B>, metrics: &PrometheusHandle, check: &impl Check) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = respond(StatusCode::METHOD_NOT_ALLOWED, "only GET\n".into());
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    match request.uri().path() {
        "/healthz" => health(check.health()),
        "/readyz" => health(check.readiness()),
        "/metrics" => {
            check.refresh_metrics();
            respond(StatusCode::OK, metrics.render())
        }
        _ => respond(StatusCode::NOT_FOUND, "there are /healthz, /readyz and /metrics\n".into()),
    }
}

fn health(Health { ok, text }: Health) -> Response<Full<Bytes>> {
    // Line by line, because each subscriber has one.
    let text: String = text.lines().map(|line| format!("{}\n", cut(line, LINE))).collect();
    respond(if ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, text)
}

fn respond(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = status;
    // The version is that of the Prometheus text format; for the other paths it is plain text all the same.
    let content_type = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}
