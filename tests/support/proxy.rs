//! A way to a server that can be disturbed.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

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
    /// Connections up to this number are silent until they are cut.
    forgotten: watch::Sender<u64>,
    /// Connections that rest for so long are silent from then on.
    rest: watch::Sender<Option<Duration>>,
    /// How many were forgotten because they rested.
    rested: Arc<AtomicU64>,
    /// How many connections there have been.
    count: Arc<AtomicU64>,
    /// Each direction of each connection holds one more.
    open: Arc<()>,
}

impl Proxy {
    /// To the server of a URL such as `nats://127.0.0.1:4222`.
    pub async fn to(url: &str) -> Self {
        let server = url.rsplit("//").next().unwrap().to_string();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let ((way, told), (forgotten, told_forgotten)) = (watch::channel(Way::Open), watch::channel(0));
        let (open, count) = (Arc::new(()), Arc::new(AtomicU64::new(0)));
        let (held, counter) = (Arc::downgrade(&open), Arc::clone(&count));
        let ((rest, told_rest), rested) = (watch::channel(None), Arc::new(AtomicU64::new(0)));
        let counted = Arc::clone(&rested);
        tokio::spawn(async move {
            loop {
                let Ok((client, _)) = listener.accept().await else { continue };
                if *told.borrow() == Way::Cut {
                    continue;
                }
                let Ok(server) = TcpStream::connect(&server).await else { continue };
                let Some(open) = held.upgrade() else { return };
                let number = counter.fetch_add(1, Ordering::SeqCst) + 1;
                let told = Told {
                    way: told.clone(),
                    forgotten: told_forgotten.clone(),
                    number,
                    rest: told_rest.clone(),
                    used: Arc::new(Mutex::new(Instant::now())),
                    silent: Arc::default(),
                    rested: Arc::clone(&counted),
                };
                let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
                tokio::spawn(pass(from_client, to_server, told.clone(), false, open.clone()));
                tokio::spawn(pass(from_server, to_client, told, true, open));
            }
        });
        Self { address, way, forgotten, rest, rested, count, open }
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

    /// From now on forgets each connection on which nothing went for so long, as a firewall does: what comes then arrives
    /// nowhere, and nobody is told.
    pub fn forget_after(&self, rest: Duration) {
        self.rest.send_replace(Some(rest));
    }

    /// How many connections somebody has tried to use that were forgotten because they rested.
    pub fn rested(&self) -> u64 {
        self.rested.load(Ordering::SeqCst)
    }

    /// Passes nothing on any more between those who are connected now, and tells nobody, as a firewall does with
    /// connections that were idle for long. New ones are not concerned. Returns how many connections there have been.
    pub fn forget(&self) -> u64 {
        let count = self.count.load(Ordering::SeqCst);
        self.forgotten.send_replace(count);
        count
    }
}

/// What one connection is told.
#[derive(Clone)]
struct Told {
    way: watch::Receiver<Way>,
    forgotten: watch::Receiver<u64>,
    number: u64,
    rest: watch::Receiver<Option<Duration>>,
    /// When something last went, in either direction.
    used: Arc<Mutex<Instant>>,
    /// Whether it has rested for too long.
    silent: Arc<AtomicBool>,
    rested: Arc<AtomicU64>,
}

impl Told {
    /// Returns when the connection is cut.
    async fn cut(&self) {
        _ = self.way.clone().wait_for(|way| *way == Way::Cut).await;
    }

    /// Whether it is still known, at a moment when something is to go.
    fn is_known(&self) -> bool {
        let mut used = self.used.lock().unwrap();
        let rested = self.rest.borrow().is_some_and(|rest| used.elapsed() >= rest);
        *used = Instant::now();
        if rested && !self.silent.swap(true, Ordering::SeqCst) {
            self.rested.fetch_add(1, Ordering::SeqCst);
        }
        !self.silent.load(Ordering::SeqCst)
    }

    /// Returns when it is forgotten.
    async fn forgotten(&self) {
        _ = self.forgotten.clone().wait_for(|last| *last >= self.number).await;
    }
}

async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, told: Told, answers: bool, _open: Arc<()>) {
    tokio::select! {
        () = told.cut() => {}
        () = async {
            tokio::select! {
                () = forward(&mut from, &mut to, &told, answers) => {}
                // The connection stays, and nobody hears anything.
                () = told.forgotten() => std::future::pending().await,
            }
        } => {}
    }
}

async fn forward(from: &mut OwnedReadHalf, to: &mut OwnedWriteHalf, told: &Told, answers: bool) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let Ok(length @ 1..) = from.read(&mut buffer).await else { return };
        if !told.is_known() {
            std::future::pending().await
        }
        let way = *told.way.borrow();
        match way {
            // Half a message must not follow: this connection stays so until it is cut.
            Way::Deaf | Way::Mute if answers == (way == Way::Deaf) => std::future::pending().await,
            Way::Slow(delay) if answers => tokio::time::sleep(delay).await,
            _ => {}
        }
        if to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}
