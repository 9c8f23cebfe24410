//! Asking a process over HTTP.

use std::net::TcpListener;

use aftercommit::testing::eventually;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::SOON;

/// An address on which nothing listens. Its port is none of those from which the system takes one for each connection, so
/// a process that is started anew finds it free again.
pub fn free_address() -> String {
    loop {
        let address = format!("127.0.0.1:{}", 10_000 + uuid::Uuid::now_v7().as_u128() % 22_000);
        if TcpListener::bind(&address).is_ok() {
            return address;
        }
    }
}

/// Status and body of the answer; none while nothing listens.
pub async fn get(address: &str, path: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(address).await.ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    Some((head.split(' ').nth(1)?.parse().ok()?, body.to_string()))
}

/// The value of a metric with these labels, written as Prometheus does; none when it is not there.
pub fn metric(metrics: &str, name_and_labels: &str) -> Option<f64> {
    let line = metrics.lines().find(|line| line.split_once(' ').is_some_and(|(name, _)| name == name_and_labels))?;
    line.rsplit_once(' ')?.1.parse().ok()
}

/// Waits until the process answers with this status and text.
pub async fn answers(address: &str, path: &str, status: u16, text: &str) {
    answers_all(address, path, status, &[text]).await;
}

/// Waits until the process is not well, and says why in these words.
pub async fn complains(address: &str, words: &[&str]) {
    answers_all(address, "/healthz", 503, words).await;
}

async fn answers_all(address: &str, path: &str, status: u16, texts: &[&str]) {
    let mut last = None;
    let found = eventually(SOON, &format!("{path} answers {status} with {texts:?}"), async || {
        last = get(address, path).await;
        last.as_ref().is_some_and(|(found, body)| *found == status && texts.iter().all(|text| body.contains(text)))
    })
    .await;
    assert!(found.is_ok(), "{found:?}; the last answer was {last:?}");
}

/// Waits until a metric of the process has a value as it is wanted.
pub async fn reaches(address: &str, name_and_labels: &str, wanted: impl Fn(f64) -> bool) {
    let mut last = String::new();
    let found = eventually(SOON, &format!("{name_and_labels} is as expected"), async || {
        last = get(address, "/metrics").await.unwrap_or_default().1;
        metric(&last, name_and_labels).is_some_and(&wanted)
    })
    .await;
    assert!(found.is_ok(), "{found:?}\n{last}");
}
