//! Asking a process over HTTP.

use std::net::TcpListener;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

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
