//! An HTTP endpoint that writes down what it gets, byte for byte, and answers as it is told.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

use super::Authority;

/// A request.
#[derive(Debug, Clone)]
pub struct Received {
    pub line: String,
    /// By name in lower case.
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
    pub at: Instant,
}

impl Received {
    /// The number in a binary request's payload.
    pub fn number(&self) -> i64 {
        serde_json::from_slice::<serde_json::Value>(&self.body).unwrap()["n"].as_i64().unwrap()
    }
}

/// What becomes of a request.
pub enum Reply {
    Status(u16),
    With(u16, String),
    /// 200 with this body.
    Body(String),
    /// After a while.
    Slow(Duration),
    /// No answer, and the connection stays open.
    Hang,
    /// The connection ends.
    Cut,
}

type Answer = dyn Fn(&Received, usize) -> Reply + Send + Sync;

/// Listens until it is dropped.
pub struct Endpoint {
    pub address: String,
    received: Arc<Mutex<Vec<Received>>>,
    task: JoinHandle<()>,
}

impl Endpoint {
    /// `answer` gets the request and how many came before it with the same event.
    pub async fn start(answer: impl Fn(&Received, usize) -> Reply + Send + Sync + 'static) -> Self {
        Self::on("127.0.0.1:0", None, answer).await
    }

    pub async fn on(
        address: &str,
        tls: Option<TlsAcceptor>,
        answer: impl Fn(&Received, usize) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let received = Arc::<Mutex<Vec<Received>>>::default();
        let (log, answer) = (Arc::clone(&received), Arc::<Answer>::from(Box::new(answer) as Box<Answer>));
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (log, answer, tls) = (Arc::clone(&log), Arc::clone(&answer), tls.clone());
                connections.spawn(async move {
                    match tls {
                        None => serve(stream, &log, &*answer).await,
                        Some(tls) => match tls.accept(stream).await {
                            Ok(stream) => serve(stream, &log, &*answer).await,
                            Err(_) => None,
                        },
                    }
                });
            }
        });
        Self { address, received, task }
    }

    /// TLS with this authority's certificate, for clients that have one of it, too.
    pub fn tls(authority: &Authority) -> TlsAcceptor {
        let (certificate, key) = authority.issue("server");
        let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()];
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(authority.certificate.as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build();
        let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let config = config.with_client_cert_verifier(clients.unwrap()).with_single_cert(chain, key).unwrap();
        TlsAcceptor::from(Arc::new(config))
    }

    /// What came, in order.
    pub fn received(&self) -> Vec<Received> {
        self.received.lock().unwrap().clone()
    }

    /// The configuration of a subscriber called `webhook` that posts here, with `more` settings; it ends with those of
    /// `http`, for still more of them.
    pub fn toml(&self, more: &str) -> String {
        let url = format!("http://{}/events", self.address);
        format!(
            "[[subscriber]]\nname = \"webhook\"\ntypes = [\"test.number\"]\n{more}\n[subscriber.http]\nurl = \"{url}\"\n"
        )
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    log: &Mutex<Vec<Received>>,
    answer: &Answer,
) -> Option<()> {
    let mut buffer = Vec::new();
    loop {
        let head = loop {
            if let Some(at) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break at;
            }
            if stream.read_buf(&mut buffer).await.ok()? == 0 {
                return None;
            }
        };
        let text = String::from_utf8(buffer[..head].to_vec()).unwrap();
        let (line, headers) = text.split_once("\r\n").unwrap();
        let headers = headers.split("\r\n").map(|line| line.split_once(": ").unwrap());
        let mut all = BTreeMap::new();
        for (name, value) in headers {
            assert!(all.insert(name.to_ascii_lowercase(), value.to_string()).is_none(), "{name} came twice");
        }
        let length: usize = all["content-length"].parse().unwrap();
        while buffer.len() < head + 4 + length {
            if stream.read_buf(&mut buffer).await.ok()? == 0 {
                return None;
            }
        }
        let body = buffer[head + 4..head + 4 + length].to_vec();
        buffer.drain(..head + 4 + length);
        let request = Received { line: line.into(), headers: all, body, at: Instant::now() };
        let before = {
            let mut log = log.lock().unwrap();
            let same =
                |other: &&Received| other.headers.get("idempotency-key") == request.headers.get("idempotency-key");
            let before = log.iter().filter(same).count();
            log.push(request.clone());
            before
        };
        let mut body = String::new();
        let (status, headers) = match answer(&request, before) {
            Reply::Status(status) => (status, String::new()),
            Reply::With(status, headers) => (status, headers),
            Reply::Body(text) => {
                body = text;
                (200, String::new())
            }
            Reply::Slow(time) => {
                tokio::time::sleep(time).await;
                (204, String::new())
            }
            Reply::Hang => std::future::pending().await,
            Reply::Cut => return None,
        };
        let length = if status == 204 { String::new() } else { format!("content-length: {}\r\n", body.len()) };
        let answer = format!("HTTP/1.1 {status} as told\r\n{length}{headers}\r\n{body}");
        stream.write_all(answer.as_bytes()).await.ok()?;
    }
}
