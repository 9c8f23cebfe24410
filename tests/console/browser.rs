//! A console on real servers, and who asks it.

use std::net::SocketAddr;

use aftercommit::config::PostgresConfig;
use aftercommit::console::{Access, Console, ConsoleConfig, Proxy, Role, serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::support::Outbox;

/// A running console.
pub struct Site {
    pub address: SocketAddr,
    pub rights: Vec<(String, Option<Role>)>,
    _running: DropGuard,
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    /// A header of it.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }
}

/// Everybody comes through a proxy on this machine, and has the role that is the name of their group.
pub fn through_a_proxy() -> Access {
    let roles = Role::ALL.map(|role| (role.name().to_string(), role));
    Access::Proxy(Proxy::new(vec![[127, 0, 0, 1].into()], roles.into()))
}

impl Site {
    pub async fn start(outbox: &Outbox, access: Access) -> Self {
        Self::with(outbox, access, "", Vec::new()).await
    }

    pub async fn with(outbox: &Outbox, access: Access, path: &str, subscribers: Vec<PostgresConfig>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let url = format!("http://{address}{path}").parse().unwrap();
        let (postgres, nats, naming) = (outbox.postgres.clone(), outbox.nats.clone(), outbox.naming.clone());
        let config = ConsoleConfig { access, subscribers, ..ConsoleConfig::new(postgres, nats, naming, url) };
        let shutdown = CancellationToken::new();
        let console = Console::start(config, &shutdown).unwrap();
        tokio::spawn(serve(listener, console.router(), shutdown.clone()));
        Self { address, rights: console.rights(), _running: shutdown.drop_guard() }
    }

    /// One request with these headers beside Host.
    pub async fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        let host = self.address.to_string();
        let host = headers.iter().find(|(name, _)| *name == "Host").map_or(host.as_str(), |(_, value)| value);
        let mut request = format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n");
        for (name, value) in headers.iter().filter(|(name, _)| *name != "Host") {
            request += &format!("{name}: {value}\r\n");
        }
        if !body.is_empty() {
            request +=
                &format!("Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {}\r\n", body.len());
        }
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(format!("{request}\r\n{body}").as_bytes()).await.unwrap();
        let mut bytes = Vec::new();
        // A console that refuses to read on may cut the connection.
        _ = stream.read_to_end(&mut bytes).await;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        Answer { status, head: head.into(), body: body.into() }
    }

    /// A page as somebody with this role sees it.
    pub async fn see(&self, role: Role, path: &str) -> Answer {
        self.ask("GET", path, &[("x-forwarded-user", "jane"), ("x-forwarded-groups", role.name())], "").await
    }
}
