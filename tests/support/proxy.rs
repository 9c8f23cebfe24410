//! A way to a server that can be disturbed.

use std::sync::Arc;
use std::time::Duration;

use aftercommit::testing::eventually;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::SOON;

/// What the way does to bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Way {
    Open,
    /// What the server says does not arrive; what the client says does.
    Deaf,
    /// What the client says does not arrive; what the server says does.
    Mute,
    /// What the server says arrives later.
    Slow(Duration),
    /// Connections are cut and new ones refused.
    Cut,
}

/// Forwards connections to a server.
pub struct Proxy {
    pub address: String,
    way: watch::Sender<Way>,
    /// Each direction of each connection holds one more.
    open: Arc<()>,
}

impl Proxy {
    /// To the server of a URL such as `nats://127.0.0.1:4222`.
    pub async fn to(url: &str) -> Self {
        let server = url.rsplit("//").next().unwrap().to_string();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (way, told) = watch::channel(Way::Open);
        let open = Arc::new(());
        let held = Arc::downgrade(&open);
        tokio::spawn(async move {
            loop {
                let Ok((client, _)) = listener.accept().await else { continue };
                if *told.borrow() == Way::Cut {
                    continue;
                }
                let Ok(server) = TcpStream::connect(&server).await else { continue };
                let Some(open) = held.upgrade() else { return };
                let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
                tokio::spawn(pass(from_client, to_server, told.clone(), false, open.clone()));
                tokio::spawn(pass(from_server, to_client, told.clone(), true, open));
            }
        });
        Self { address, way, open }
    }

    pub fn set(&self, way: Way) {
        self.way.send_replace(way);
    }

    /// Cuts all connections and lets new ones through.
    pub async fn cut(&self) {
        self.set(Way::Cut);
        eventually(SOON, "the connections are cut", async || Arc::strong_count(&self.open) == 1).await.unwrap();
        self.set(Way::Open);
    }
}

async fn pass(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut told: watch::Receiver<Way>,
    answers: bool,
    _open: Arc<()>,
) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let read = tokio::select! {
            read = from.read(&mut buffer) => read,
            Ok(_) = told.wait_for(|way| *way == Way::Cut) => return,
        };
        let Ok(length @ 1..) = read else { return };
        let way = *told.borrow();
        match way {
            Way::Cut => return,
            Way::Deaf | Way::Mute if answers == (way == Way::Deaf) => {
                // Half a message must not follow: this connection stays so until it is cut.
                _ = told.wait_for(|way| *way == Way::Cut).await;
                return;
            }
            Way::Slow(delay) if answers => tokio::select! {
                () = tokio::time::sleep(delay) => {}
                Ok(_) = told.wait_for(|way| *way == Way::Cut) => return,
            },
            _ => {}
        }
        if to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}
