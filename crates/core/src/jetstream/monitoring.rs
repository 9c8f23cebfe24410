//! What nats-server tells over HTTP and not to clients.

use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::error::{Error, ErrorKind};

/// How long the server may take to answer.
const DEADLINE: Duration = Duration::from_secs(5);
/// The answer has some 10 KB; what is much longer comes from something else.
const LONGEST_ANSWER: u64 = 1 << 20;

/// When the server writes messages to the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sync {
    /// Where the server that said so was asked; others of its cluster may be set otherwise.
    pub server: String,
    /// Before it acknowledges.
    pub always: bool,
    /// Else: so often.
    pub interval: Duration,
    /// Bytes that its streams have on the disk.
    pub stored: u64,
    /// How many they may have; 0 when it does not say.
    pub limit: u64,
}

/// Asks the server's monitoring port, such as `http://127.0.0.1:8222`. `/varz` would have it too, but not when somebody
/// asked for it while JetStream was still starting.
pub async fn sync(url: &str) -> Result<Sync, Error> {
    let address = address(url)?;
    let answer = tokio::time::timeout(DEADLINE, get(&address, "/jsz"))
        .await
        .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
        .map_err(|error| {
            Error::with_source(ErrorKind::Broker, format!("the monitoring port {address} does not answer"), error)
        })?;
    parse(&answer, &address).ok_or_else(|| {
        Error::new(ErrorKind::Broker, format!("the program on {address} is not a nats-server with JetStream"))
    })
}

/// Host and port.
fn address(url: &str) -> Result<String, Error> {
    let address = url.strip_prefix("http://").map(|rest| rest.split('/').next().unwrap_or(rest));
    match address {
        Some(address) if address.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) => {
            Ok(address.into())
        }
        _ => Err(Error::new(ErrorKind::Config, "--nats-monitor is not of the form http://host:8222")),
    }
}

/// One request by hand: HTTP/1.0 answers in one piece and closes the connection.
async fn get(address: &str, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes()).await?;
    let mut answer = String::new();
    stream.take(LONGEST_ANSWER).read_to_string(&mut answer).await?;
    Ok(answer)
}

#[derive(Deserialize)]
struct Jsz {
    #[serde(default)]
    disabled: bool,
    #[serde(default)]
    storage: u64,
    config: JetStreamConfig,
}

#[derive(Deserialize)]
struct JetStreamConfig {
    #[serde(default)]
    sync_always: bool,
    #[serde(default)]
    sync_interval: u64,
    #[serde(default)]
    max_storage: i64,
}

/// Reads a whole HTTP answer of `/jsz` from `server`. None when it is not the answer of a nats-server with JetStream.
pub fn parse(answer: &str, server: &str) -> Option<Sync> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    if head.split(' ').nth(1) != Some("200") {
        return None;
    }
    let Jsz { config, storage, .. } = serde_json::from_str(body).ok().filter(|jsz: &Jsz| !jsz.disabled)?;
    let interval = Duration::from_nanos(config.sync_interval);
    let limit = u64::try_from(config.max_storage).unwrap_or(0);
    Some(Sync { server: server.into(), always: config.sync_always, interval, stored: storage, limit })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_understood() {
        let answer = |status, fields| format!("HTTP/1.0 {status}\r\nA: b\r\n\r\n{{\"server_id\": \"N\", {fields}}}");
        let always = r#""config": {"sync_interval": 120000000000, "sync_always": true}"#;
        let interval = Duration::from_mins(2);
        let sync = |always| Sync { server: "n1".into(), always, interval, stored: 0, limit: 0 };
        let parse = |answer: &str| parse(answer, "n1");
        assert_eq!(parse(&answer("200 OK", always)), Some(sync(true)));
        assert_eq!(parse(&answer("200 OK", r#""config": {"sync_interval": 120000000000}"#)), Some(sync(false)));
        assert_eq!(parse(&answer("404 Not Found", always)), None);
        assert_eq!(parse(&answer("200 OK", r#""disabled": true, "config": {}"#)), None, "without JetStream");
        assert_eq!(parse("SSH-2.0"), None);
    }

    #[test]
    fn only_plain_http_is_asked() {
        assert_eq!(address("http://n1:8222").unwrap(), "n1:8222");
        assert_eq!(address("http://[::1]:8222/").unwrap(), "[::1]:8222");
        for url in ["https://n1:8222", "n1:8222", "http://n1", "nats://n1:4222"] {
            assert_eq!(address(url).unwrap_err().kind(), ErrorKind::Config, "{url}");
        }
    }
}
