//! How telemetry is sent: with the HTTP client that the worker's HTTP subscribers have, on a thread of its own.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::header::{HeaderName, HeaderValue, USER_AGENT};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use tokio::sync::{mpsc, oneshot};
use tracing::subscriber::{NoSubscriber, with_default};

use aftercommit_core::config::{ClientCertificate, read_file};
use aftercommit_core::error::{Error, ErrorKind, causes, on_one_line};

use super::queue::Queue;
use super::settings::Target;

/// How much of an answer is read.
const ANSWER: usize = 64 * 1024;

type Job = Pin<Box<dyn Future<Output = ()> + Send>>;
type Answer = Result<Response<Bytes>, String>;

/// The thread that sends.
#[derive(Clone)]
pub(super) struct Sender(mpsc::UnboundedSender<Job>);

impl Sender {
    /// Starts the thread. What it does is neither traced nor logged: otherwise each export would be the cause of the next.
    pub(super) fn start() -> Result<Self, Error> {
        let failed = |error| Error::with_source(ErrorKind::Config, "telemetry cannot be exported", error);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let (sender, mut jobs) = mpsc::unbounded_channel::<Job>();
        let run = async move {
            while let Some(job) = jobs.recv().await {
                tokio::spawn(job);
            }
        };
        let thread = thread::Builder::new().name("otlp".into());
        thread.spawn(move || with_default(NoSubscriber::default(), || runtime.block_on(run))).map_err(failed)?;
        Ok(Self(sender))
    }

    /// A client for the exporter of one signal.
    pub(super) fn client(&self, target: &Target, queue: &Arc<Queue>) -> Result<OtlpClient, Error> {
        let tls = tls(target)?;
        let mut http = HttpConnector::new();
        http.enforce_http(false);
        http.set_nodelay(true);
        let https = HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1();
        let client =
            Client::builder(TokioExecutor::new()).pool_timer(TokioTimer::new()).build(https.wrap_connector(http));
        Ok(OtlpClient {
            client,
            sender: self.clone(),
            headers: target.headers.clone(),
            timeout: target.timeout,
            queue: Arc::clone(queue),
        })
    }
}

/// Sends the exports of one signal. The exporters are asked from threads without a runtime, so the work is done elsewhere.
pub(super) struct OtlpClient {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    sender: Sender,
    headers: Vec<(HeaderName, HeaderValue)>,
    timeout: Duration,
    queue: Arc<Queue>,
}

impl fmt::Debug for OtlpClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OtlpClient").finish_non_exhaustive()
    }
}

impl HttpClient for OtlpClient {
    fn send_bytes<'c, 'f>(
        &'c self,
        mut request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'f>>
    where
        'c: 'f,
        Self: 'f,
    {
        let agent = concat!("aftercommit/", env!("CARGO_PKG_VERSION"));
        request.headers_mut().insert(USER_AGENT, HeaderValue::from_static(agent));
        for (name, value) in &self.headers {
            request.headers_mut().insert(name, value.clone());
        }
        let (answer, answered) = oneshot::channel();
        let sent = exchange(self.client.clone(), request.map(Full::new), self.timeout);
        let job = async { _ = answer.send(sent.await) };
        Box::pin(async move {
            let gone = || "the thread that sends is gone".to_string();
            let answer = match self.sender.0.send(Box::pin(job)) {
                Ok(()) => answered.await.unwrap_or_else(|_| Err(gone())),
                Err(_) => Err(gone()),
            };
            match &answer {
                Ok(response) if response.status().is_success() => {}
                Ok(response) => self.queue.trouble(format!("the collector answered {}", response.status())),
                Err(problem) => self.queue.trouble(problem.clone()),
            }
            answer.map_err(HttpError::from)
        })
    }
}

async fn exchange(
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    request: Request<Full<Bytes>>,
    limit: Duration,
) -> Answer {
    let exchange = async {
        let response = client.request(request).await.map_err(|error| {
            let causes = causes(&error).skip(1).map(ToString::to_string);
            format!("the collector cannot be reached: {}", on_one_line(causes))
        })?;
        let (head, body) = response.into_parts();
        let body = Limited::new(body, ANSWER).collect().await;
        let body = body.map_err(|_| "the collector's answer broke off, or is too long".to_string())?;
        Ok(Response::from_parts(head, body.to_bytes()))
    };
    let late = || Err(format!("the collector did not answer within {limit:?}"));
    tokio::time::timeout(limit, exchange).await.unwrap_or_else(|_| late())
}

fn tls(target: &Target) -> Result<ClientConfig, Error> {
    const CA: &str = "OTEL_EXPORTER_OTLP_CERTIFICATE";
    let refuse = |problem: String| Error::new(ErrorKind::Config, problem);
    let mut roots = RootCertStore::empty();
    match &target.ca {
        Some(path) => {
            let pem = read_file(path, CA)?;
            for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
                let added = certificate.map_err(|_| ()).and_then(|found| roots.add(found).map_err(|_| ()));
                added.map_err(|()| refuse(format!("the file {} has a broken certificate ({CA})", path.display())))?;
            }
            if roots.is_empty() {
                return Err(refuse(format!("the file {} has no certificate in PEM form ({CA})", path.display())));
            }
        }
        None if target.url.starts_with("https://") => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                return Err(refuse(format!(
                    "this system has no certificates of authorities: install them, or set {CA}"
                )));
            }
        }
        None => {}
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::with_source(ErrorKind::Config, "TLS cannot be used", error))?
        .with_root_certificates(roots);
    match &target.certificate {
        Some(certificate) => with_certificate(config, certificate),
        None => Ok(config.with_no_client_auth()),
    }
}

fn with_certificate(
    config: rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>,
    ClientCertificate { certificate, key }: &ClientCertificate,
) -> Result<ClientConfig, Error> {
    const NAMES: (&str, &str) = ("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", "OTEL_EXPORTER_OTLP_CLIENT_KEY");
    let refuse = |problem: String| Error::new(ErrorKind::Config, problem);
    let pem = read_file(certificate, NAMES.0)?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    let chain = chain.ok().filter(|chain| !chain.is_empty()).ok_or_else(|| {
        refuse(format!("the file {} has no certificate in PEM form ({})", certificate.display(), NAMES.0))
    })?;
    let pem = read_file(key, NAMES.1)?;
    let secret = PrivateKeyDer::from_pem_slice(pem.as_bytes())
        .map_err(|_| refuse(format!("the file {} has no private key in PEM form ({})", key.display(), NAMES.1)))?;
    config.with_client_auth_cert(chain, secret).map_err(|error| {
        let problem = format!("certificate and key do not fit together ({}, {})", NAMES.0, NAMES.1);
        Error::with_source(ErrorKind::Config, problem, error)
    })
}
