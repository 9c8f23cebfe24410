//! Subscribers that post their events to an HTTP endpoint, as CloudEvents.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER, USER_AGENT};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};

use super::handler::HandlerError;
use super::transaction_error::Unreachable;
use aftercommit_core::config::{ClientCertificate, Secret, read_file};
use aftercommit_core::envelope::Envelope;
use aftercommit_core::error::{Error, ErrorKind, causes, on_one_line};
use aftercommit_core::trace::{self, TraceContext};
use aftercommit_outbox::{TRACEPARENT, TRACESTATE};

/// How long connecting may take at most, TLS included; half of the timeout when that is shorter, so that it can be told
/// from an endpoint that does not answer.
const CONNECT: Duration = Duration::from_secs(10);
/// What an endpoint may ask for with Retry-After.
const RETRY_AFTER_RANGE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(3600));
/// Answers are not read for what they say, only so that their connections can be used again; up to this size.
const ANSWER: usize = 64 * 1024;
/// But for those that are read, up to this size.
const EXCHANGED: usize = 1024 * 1024;
/// And for so long.
const ANSWER_TIME: Duration = Duration::from_millis(250);
/// The events' own headers, which a setting cannot replace.
const RESERVED: [&str; 9] = [
    "connection",
    "content-length",
    "content-type",
    "host",
    "idempotency-key",
    "te",
    "traceparent",
    "tracestate",
    "transfer-encoding",
];

/// Where events are posted, and how.
pub struct Endpoint {
    uri: Uri,
    pub(super) mode: ContentMode,
    pub(super) timeout: Duration,
    headers: BTreeMap<String, Value>,
    /// What some answers mean, where it is not what they usually do.
    answers: BTreeMap<u16, HttpAnswer>,
    pub(super) ca: Option<PathBuf>,
    pub(super) certificate: Option<ClientCertificate>,
    /// Made when the worker starts; reading a file for `aftercommit provision` needs neither secrets nor certificates.
    ready: OnceLock<Ready>,
}

/// How an event becomes a request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum ContentMode {
    /// Attributes in headers, the payload as it is.
    #[default]
    Binary,
    /// All of it in JSON.
    Structured,
}

/// What an answer means for the event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum HttpAnswer {
    /// It is handled.
    Done,
    /// A failed attempt.
    Retry,
    /// A dead letter, now.
    Reject,
    /// The endpoint cannot take it at present: it waits, and no attempt is spent.
    Unavailable,
}

impl HttpAnswer {
    /// What an answer usually means, by its status.
    fn usual(status: u16) -> Self {
        match status {
            200..=299 => Self::Done,
            // The login, the path or the way to the endpoint is wrong: that says nothing of the event, and every event
            // would get it.
            401..=405 | 407 | 410 | 421 | 426 | 511 => Self::Unavailable,
            // The endpoint is overloaded, or those behind it are away.
            429 | 502 | 503 | 504 => Self::Unavailable,
            // They speak of this try and not of the event.
            408 | 425 => Self::Retry,
            400..=499 => Self::Reject,
            _ => Self::Retry,
        }
    }
}

/// The value of a header.
enum Value {
    Text(Secret),
    /// The variable of the environment that has it.
    Environment(String),
}

struct Ready {
    client: Client<Connector, Full<Bytes>>,
    headers: HeaderMap,
}

impl Endpoint {
    /// Posts to `url`.
    pub(super) fn new(url: &str) -> Result<Self, String> {
        let uri: Uri = url.parse().map_err(|_| "it is not a URL such as https://shop.example/events".to_string())?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) {
            return Err("it must begin with http:// or https://".into());
        }
        if uri.authority().is_none_or(|authority| authority.as_str().contains('@') || authority.host().is_empty()) {
            return Err("it must name a host, and no user: log in with `headers`".into());
        }
        Ok(Self {
            uri,
            mode: ContentMode::default(),
            timeout: Duration::from_secs(30),
            headers: BTreeMap::new(),
            answers: BTreeMap::new(),
            ca: None,
            certificate: None,
            ready: OnceLock::new(),
        })
    }

    /// Sends this header with each event; `env:NAME` stands for the value of a variable of the environment.
    pub(super) fn header(&mut self, name: &str, value: &str) -> Result<(), String> {
        let lower = name.to_ascii_lowercase();
        if HeaderName::try_from(name).is_err() {
            return Err(format!("{name:?} is not the name of a header"));
        }
        if lower.starts_with("ce-") || RESERVED.contains(&lower.as_str()) {
            return Err(format!("{name} is set by the worker itself"));
        }
        let value = match value.strip_prefix("env:") {
            Some("") => return Err(format!("{name}: `env:` needs the name of a variable")),
            Some(variable) => Value::Environment(variable.into()),
            None if HeaderValue::try_from(value).is_err() => {
                return Err(format!("{name}: the value has characters that a header cannot have"));
            }
            None => Value::Text(Secret::Text(value.into())),
        };
        match self.headers.insert(lower, value) {
            None => Ok(()),
            Some(_) => Err(format!("{name} is given twice")),
        }
    }

    /// Gives answers of this status another meaning than they usually have.
    pub(super) fn answer(&mut self, status: &str, meaning: HttpAnswer) -> Result<(), String> {
        match status.parse() {
            Ok(status @ 200..=599) => {
                self.answers.insert(status, meaning);
                Ok(())
            }
            _ => Err(format!("{status:?} is not the status of an answer, 200 to 599")),
        }
    }

    /// Whether the connection is secret.
    pub(super) fn is_https(&self) -> bool {
        self.uri.scheme_str() == Some("https")
    }

    /// Reads the variables and files that the settings name.
    ///
    /// # Errors
    /// When one is missing or cannot be used.
    pub(super) fn prepare(&self) -> Result<(), Error> {
        let ready = Ready { client: self.client()?, headers: self.resolve_headers()? };
        if let Some(name) = ["http_proxy", "https_proxy", "all_proxy"].into_iter().find(|name| is_set(name)) {
            tracing::warn!(endpoint = %self, variable = name, "events are posted directly: the worker uses no proxy");
        }
        if !self.headers.is_empty() && self.is_in_clear() {
            tracing::warn!(endpoint = %self, "headers from the settings travel unencrypted: give a url with https://");
        }
        // It was prepared before when this one is not taken.
        let _ = self.ready.set(ready);
        Ok(())
    }

    /// Whether others on the way can read what is sent.
    fn is_in_clear(&self) -> bool {
        let host = self.uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let here = host == "localhost" || host.parse().is_ok_and(|address: IpAddr| address.is_loopback());
        !self.is_https() && !here
    }

    fn resolve_headers(&self) -> Result<HeaderMap, Error> {
        let mut headers = HeaderMap::new();
        let agent = concat!("aftercommit-worker/", env!("CARGO_PKG_VERSION"));
        headers.insert(USER_AGENT, HeaderValue::from_static(agent));
        for (name, value) in &self.headers {
            let refuse = |problem: String| Error::new(ErrorKind::Config, format!("the header {name}: {problem}"));
            let text = match value {
                Value::Text(text) => text.read(name)?,
                Value::Environment(variable) => std::env::var(variable)
                    .map_err(|_| refuse(format!("the environment has no variable {variable}, or no text in it")))?,
            };
            let mut value = HeaderValue::try_from(text)
                .map_err(|_| refuse("the value has characters that a header cannot have".into()))?;
            value.set_sensitive(true);
            let name = HeaderName::try_from(name).map_err(|_| refuse("it is no name of a header".into()))?;
            headers.insert(name, value);
        }
        Ok(headers)
    }

    fn client(&self) -> Result<Client<Connector, Full<Bytes>>, Error> {
        let mut http = HttpConnector::new();
        http.enforce_http(false);
        http.set_nodelay(true);
        let tls = if self.is_https() { self.tls()? } else { trusting(RootCertStore::empty(), None)? };
        let https = HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1();
        let connector = Connector { https: https.wrap_connector(http), limit: CONNECT.min(self.timeout / 2) };
        Ok(Client::builder(TokioExecutor::new()).pool_timer(TokioTimer::new()).build(connector))
    }

    fn tls(&self) -> Result<ClientConfig, Error> {
        let refuse = |problem: String| Error::new(ErrorKind::Config, problem);
        let mut roots = RootCertStore::empty();
        match &self.ca {
            Some(path) => {
                let pem = read_file(path, "ca")?;
                for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
                    let added =
                        certificate.map_err(|_| ()).and_then(|certificate| roots.add(certificate).map_err(|_| ()));
                    added.map_err(|()| refuse(format!("the file {} has a broken certificate (ca)", path.display())))?;
                }
                if roots.is_empty() {
                    return Err(refuse(format!("the file {} has no certificate in PEM form (ca)", path.display())));
                }
            }
            None => {
                roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
                if roots.is_empty() {
                    return Err(refuse(
                        "this system has no certificates of authorities: install them, or set `ca`".into(),
                    ));
                }
            }
        }
        trusting(roots, self.certificate.as_ref())
    }

    /// Posts an event and waits for the answer.
    pub(super) async fn post(&self, event: &Envelope) -> Result<(), HandlerError> {
        let ready = self.ready.get().ok_or_else(|| Unreachable("the endpoint was not prepared".into()))?;
        let request = self.request(event, &ready.headers).map_err(|()| {
            HandlerError::reject("the event cannot be an HTTP request: an attribute has illegal characters")
        })?;
        match tokio::time::timeout(self.timeout, ready.client.request(request)).await {
            Ok(Ok(response)) => {
                let verdict = self.judge(response.status(), response.headers());
                discard(response).await;
                verdict
            }
            Ok(Err(error)) if error.is_connect() => {
                Err(Unreachable(format!("{self} cannot be reached: {}", reasons(&error))).into())
            }
            // Whether it was taken is unknown; it is sent again.
            Ok(Err(error)) => Err(HandlerError::unavailable(format!(
                "the connection to {self} was lost before an answer came: {}",
                reasons(&error)
            ))),
            Err(_) => Err(HandlerError::retry(format!("{self} did not answer within {:?}", self.timeout))),
        }
    }

    fn request(&self, event: &Envelope, more: &HeaderMap) -> Result<Request<Full<Bytes>>, ()> {
        let mut headers: Vec<(String, String)> = vec![("idempotency-key".into(), event.id.to_string())];
        let (content_type, body) = match self.mode {
            ContentMode::Binary => {
                headers.extend(event.to_http_headers());
                (event.content_type.as_str(), event.payload.clone())
            }
            ContentMode::Structured => ("application/cloudevents+json; charset=utf-8", event.to_json().into()),
        };
        headers.extend(trace_headers(event));
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.uri.clone();
        *request.headers_mut() = more.clone();
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::try_from(content_type).map_err(|_| ())?);
        for (name, value) in headers {
            let name = HeaderName::try_from(name).map_err(|_| ())?;
            request.headers_mut().insert(name, HeaderValue::try_from(value).map_err(|_| ())?);
        }
        Ok(request)
    }

    /// Posts JSON and returns the answer's body, for who has no event: of at most 1 MiB, within the timeout. Any answer but
    /// a 2xx is an error.
    ///
    /// # Errors
    /// As a handler's about the answer.
    pub async fn exchange(&self, body: Vec<u8>) -> Result<Bytes, HandlerError> {
        if self.ready.get().is_none() {
            self.prepare()?;
        }
        let ready = self.ready.get().ok_or_else(|| Unreachable("the endpoint was not prepared".into()))?;
        let mut request = Request::new(Full::new(Bytes::from(body)));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.uri.clone();
        *request.headers_mut() = ready.headers.clone();
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let asked = async {
            let response = ready.client.request(request).await.map_err(|error| {
                let problem = format!("{self} cannot be reached, or the connection was lost: {}", reasons(&error));
                if error.is_connect() { Unreachable(problem).into() } else { HandlerError::unavailable(problem) }
            })?;
            let verdict = self.judge(response.status(), response.headers());
            if let Err(error) = verdict {
                discard(response).await;
                return Err(error);
            }
            let body = Limited::new(response.into_body(), EXCHANGED).collect().await;
            body.map(|body| body.to_bytes())
                .map_err(|_| HandlerError::retry(format!("{self} broke its answer off, or it has more than 1 MiB")))
        };
        let late = || HandlerError::retry(format!("{self} did not answer within {:?}", self.timeout));
        tokio::time::timeout(self.timeout, asked).await.unwrap_or_else(|_| Err(late()))
    }

    /// What an answer means for the event.
    fn judge(&self, status: StatusCode, headers: &HeaderMap) -> Result<(), HandlerError> {
        let meaning = self.answers.get(&status.as_u16()).copied().unwrap_or(HttpAnswer::usual(status.as_u16()));
        let hint = match status.as_u16() {
            300..=399 => "; redirects are not followed",
            431 if self.mode == ContentMode::Binary => {
                "; in the mode \"structured\" the attributes of events are no headers"
            }
            _ => "",
        };
        let text = format!("{self} answered {status}{hint}");
        match meaning {
            HttpAnswer::Done => Ok(()),
            HttpAnswer::Retry => Err(HandlerError::retry(text)),
            HttpAnswer::Reject => Err(HandlerError::reject(text)),
            HttpAnswer::Unavailable => Err(HandlerError::Unavailable {
                error: text.into(),
                after: headers.get(RETRY_AFTER).and_then(|value| retry_after(value.to_str().ok()?, Utc::now())),
            }),
        }
    }
}

/// The headers of the trace that the endpoint is to go on with: the handler's span where spans are exported, else whatever the
/// publisher has given.
fn trace_headers(event: &Envelope) -> Vec<(String, String)> {
    if let Some(TraceContext { traceparent, tracestate }) = trace::tracing().and_then(|tracing| tracing.current()) {
        let parent = [(TRACEPARENT.to_string(), traceparent)].into_iter();
        return parent.chain(tracestate.map(|state| (TRACESTATE.to_string(), state))).collect();
    }
    let own = event.headers.iter().map(|(name, value)| (name.to_ascii_lowercase(), value.clone()));
    own.filter(|(name, _)| matches!(name.as_str(), TRACEPARENT | TRACESTATE)).collect()
}

/// Whether the environment has this variable, in small or capital letters.
fn is_set(name: &str) -> bool {
    [name.to_string(), name.to_ascii_uppercase()]
        .iter()
        .any(|name| std::env::var_os(name).is_some_and(|v| !v.is_empty()))
}

/// Reads an answer's end, so that its connection can be used again.
async fn discard(response: Response<Incoming>) {
    let _ = tokio::time::timeout(ANSWER_TIME, Limited::new(response.into_body(), ANSWER).collect()).await;
}

/// Seconds, or a date as HTTP writes it.
fn retry_after(value: &str, now: DateTime<Utc>) -> Option<Duration> {
    let wait = match value.trim().parse::<u64>() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => (DateTime::parse_from_rfc2822(value.trim()).ok()?.to_utc() - now).to_std().unwrap_or_default(),
    };
    Some(wait.clamp(RETRY_AFTER_RANGE.0, RETRY_AFTER_RANGE.1))
}

fn trusting(roots: RootCertStore, certificate: Option<&ClientCertificate>) -> Result<ClientConfig, Error> {
    let failed = |problem: String| Error::new(ErrorKind::Config, problem);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::with_source(ErrorKind::Config, "TLS cannot be used", error))?
        .with_root_certificates(roots);
    let Some(ClientCertificate { certificate, key }) = certificate else {
        return Ok(config.with_no_client_auth());
    };
    let pem = read_file(certificate, "cert")?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    let chain = chain.ok().filter(|chain| !chain.is_empty());
    let chain = chain
        .ok_or_else(|| failed(format!("the file {} has no certificate in PEM form (cert)", certificate.display())))?;
    let pem = read_file(key, "key")?;
    let secret = PrivateKeyDer::from_pem_slice(pem.as_bytes())
        .map_err(|_| failed(format!("the file {} has no private key in PEM form (key)", key.display())))?;
    config.with_client_auth_cert(chain, secret).map_err(|error| {
        Error::with_source(ErrorKind::Config, "certificate and key do not fit together (cert, key)", error)
    })
}

/// The causes of an error; those of the client say nothing of what was sent.
fn reasons(error: &(dyn std::error::Error + 'static)) -> String {
    on_one_line(causes(error).skip(usize::from(error.source().is_some())).map(ToString::to_string))
}

/// Connects within a limit that holds for the handshake of TLS, too.
#[derive(Clone)]
struct Connector {
    https: Inner,
    limit: Duration,
}

type Inner = HttpsConnector<HttpConnector>;
type BoxError = Box<dyn std::error::Error + Send + Sync>;

impl tower_service::Service<Uri> for Connector {
    type Response = <Inner as tower_service::Service<Uri>>::Response;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.https.poll_ready(context)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let (connecting, limit) = (self.https.call(uri), self.limit);
        Box::pin(async move {
            match tokio::time::timeout(limit, connecting).await {
                Ok(connected) => connected,
                Err(_) => Err(format!("not connected within {limit:?}").into()),
            }
        })
    }
}

/// Scheme and host; the rest of a URL may hold secrets.
impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = self.uri.scheme_str().unwrap_or_default();
        write!(f, "{scheme}://{}", self.uri.authority().map_or("", |authority| authority.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint() -> Endpoint {
        Endpoint::new("https://shop.example:8443/events?token=hunter2").unwrap()
    }

    #[test]
    fn both_forms_of_retry_after_are_understood_within_limits() {
        let now = "2026-11-06T08:49:37Z".parse().unwrap();
        for (value, seconds) in [
            ("7", Some(7)),
            ("0", Some(1)),
            ("99999999", Some(3600)),
            ("Fri, 06 Nov 2026 08:50:37 GMT", Some(60)),
            ("Fri, 06 Nov 2026 08:00:00 GMT", Some(1)),
            ("soon", None),
            ("-3", None),
        ] {
            assert_eq!(retry_after(value, now), seconds.map(Duration::from_secs), "{value}");
        }
    }

    #[test]
    fn each_class_of_answers_has_its_consequence() {
        let judge = |status: u16| endpoint().judge(StatusCode::from_u16(status).unwrap(), &HeaderMap::new());
        for status in [200, 202, 204, 299] {
            assert!(judge(status).is_ok(), "{status}");
        }
        for status in [401, 402, 403, 404, 405, 407, 410, 421, 426, 429, 502, 503, 504, 511] {
            assert!(matches!(judge(status), Err(HandlerError::Unavailable { after: None, .. })), "{status}");
        }
        for status in [301, 307, 304, 408, 425, 500, 501, 505, 599] {
            assert!(matches!(judge(status), Err(HandlerError::Retry { after: None, .. })), "{status}");
        }
        for status in [400, 406, 409, 413, 415, 422, 431, 451] {
            assert!(matches!(judge(status), Err(HandlerError::Reject { .. })), "{status}");
        }
    }

    #[test]
    fn an_answer_means_what_the_settings_say() {
        let mut endpoint = endpoint();
        endpoint.answer("409", HttpAnswer::Done).unwrap();
        endpoint.answer("404", HttpAnswer::Reject).unwrap();
        endpoint.answer("200", HttpAnswer::Retry).unwrap();
        let judge = |status: u16| endpoint.judge(StatusCode::from_u16(status).unwrap(), &HeaderMap::new());
        assert!(judge(409).is_ok());
        assert!(matches!(judge(404), Err(HandlerError::Reject { .. })));
        assert!(matches!(judge(200), Err(HandlerError::Retry { .. })));
        let refused = judge(431).unwrap_err();
        assert!(matches!(refused, HandlerError::Reject { .. }) && format!("{refused:?}").contains("structured"));
        for status in ["", "4xx", "199", "600", "-1"] {
            assert!(endpoint.answer(status, HttpAnswer::Done).is_err(), "{status}");
        }
    }

    #[test]
    fn what_travels_in_clear_is_known() {
        for (url, in_clear) in [
            ("http://shop.example/", true),
            ("http://10.0.0.1:80/", true),
            ("https://shop.example/", false),
            ("http://localhost:8080/", false),
            ("http://127.0.0.2/", false),
            ("http://[::1]:8080/", false),
        ] {
            assert_eq!(Endpoint::new(url).unwrap().is_in_clear(), in_clear, "{url}");
        }
    }

    #[test]
    fn what_may_be_secret_is_not_shown() {
        let mut endpoint = endpoint();
        endpoint.header("Authorization", "Bearer hunter2").unwrap();
        endpoint.prepare().unwrap();
        let answer = endpoint.judge(StatusCode::NOT_FOUND, &HeaderMap::new());
        let shown = format!("{endpoint} {answer:?} {:?}", endpoint.ready.get().unwrap().headers);
        assert!(!shown.contains("hunter2"), "{shown}");
        assert!(shown.starts_with("https://shop.example:8443 "), "{shown}");
    }

    #[test]
    fn urls_and_headers_that_cannot_be_meant_are_refused() {
        for url in ["", "shop.example", "ftp://shop.example/", "http://", "/events", "http://me:hunter2@shop.example/"]
        {
            let problem = Endpoint::new(url).err().unwrap();
            assert!(!problem.contains("hunter2"), "{problem}");
        }
        let mut endpoint = endpoint();
        for (name, value) in [
            ("ce-id", "1"),
            ("Content-Type", "text/plain"),
            ("Idempotency-Key", "1"),
            ("Host", "other"),
            ("a b", "1"),
            ("X-Key", "a\nb"),
            ("X-Key", "env:"),
        ] {
            assert!(endpoint.header(name, value).is_err(), "{name}");
        }
        endpoint.header("X-Key", "1").unwrap();
        assert!(endpoint.header("x-key", "2").is_err());
    }

    #[test]
    fn a_variable_that_is_missing_is_named() {
        let mut endpoint = endpoint();
        endpoint.header("Authorization", "env:AFTERCOMMIT_TEST_NOWHERE").unwrap();
        let error = endpoint.prepare().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.report().contains("authorization") && error.report().contains("AFTERCOMMIT_TEST_NOWHERE"));
    }
}
