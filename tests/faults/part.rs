//! A process of the system under test, and the ways from it to the servers.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::Mutex;

use super::support::{Proxy, Way, free_address, get};

/// Connections of one process to the servers of one kind.
pub struct Ways(Vec<Proxy>);

impl Ways {
    /// To servers by their URLs.
    pub async fn to(urls: &[String]) -> Self {
        let mut ways = Vec::new();
        for url in urls {
            ways.push(Proxy::to(url).await);
        }
        Self(ways)
    }

    /// Where the process finds them, each with this in front.
    pub fn urls(&self, scheme: &str) -> String {
        self.0.iter().map(|way| format!("{scheme}{}", way.address)).collect::<Vec<_>>().join(",")
    }

    /// From now on forgets connections that rest for so long.
    pub fn forget_after(&self, rest: Duration) {
        self.0.iter().for_each(|way| way.forget_after(rest));
    }

    /// Disturbs all of them for a while.
    pub async fn disturb(&self, how: Way, lasts: Duration) {
        self.0.iter().for_each(|way| way.set(how));
        tokio::time::sleep(lasts).await;
        // What was disturbed stays so until it is cut.
        join_all(self.0.iter().map(Proxy::cut)).await;
    }
}

/// A process that is started again when it ends, unless somebody holds its lock.
pub struct Part {
    pub name: String,
    /// Where it tells about itself, if it does.
    pub http: Option<String>,
    pub nats: Option<Ways>,
    pub postgres: Option<Ways>,
    log: PathBuf,
    command: Mutex<Command>,
    child: Mutex<Option<Child>>,
}

impl Part {
    pub fn new(name: String, directory: &Path, command: Command) -> Self {
        let log = directory.join(format!("{name}.log"));
        let (command, child) = (Mutex::new(command), Mutex::new(None));
        Self { name, http: None, nats: None, postgres: None, log, command, child }
    }

    /// Lets it tell about itself over HTTP.
    pub fn with_http(mut self) -> Self {
        let address = free_address();
        self.command.get_mut().env("AFTERCOMMIT_HTTP", &address);
        self.http = Some(address);
        self
    }

    /// Gives it its ways, which it must have been told of.
    pub fn with_ways(mut self, nats: Ways, postgres: Ways) -> Self {
        (self.nats, self.postgres) = (Some(nats), Some(postgres));
        self
    }

    async fn start(&self, child: &mut Option<Child>) {
        let log = File::options().create(true).append(true).open(&self.log).unwrap();
        let mut command = self.command.lock().await;
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        *child = Some(command.spawn().unwrap());
    }

    /// Starts it when it does not run. Returns how it ended, when it had.
    pub async fn supervise(&self) -> Option<String> {
        let Ok(mut child) = self.child.try_lock() else { return None };
        let ended = match child.as_mut() {
            Some(running) => Some(running.try_wait().unwrap()?.to_string()),
            None => None,
        };
        self.start(&mut child).await;
        ended
    }

    /// SIGKILL, and another start so much later.
    pub async fn kill(&self, pause: Duration) {
        let mut child = self.child.lock().await;
        end(&mut child);
        tokio::time::sleep(pause).await;
        self.start(&mut child).await;
    }

    /// SIGTERM, and another start so much later.
    pub async fn stop(&self, pause: Duration) {
        let mut child = self.child.lock().await;
        signal(&child, "TERM");
        let ended = async || child.as_mut().is_none_or(|child| child.try_wait().unwrap().is_some());
        let waited = aftercommit::testing::eventually(Duration::from_secs(20), "it ends", ended).await;
        if waited.is_err() {
            end(&mut child);
        }
        tokio::time::sleep(pause).await;
        self.start(&mut child).await;
    }

    /// SIGSTOP, and SIGCONT so much later.
    pub async fn freeze(&self, pause: Duration) {
        let child = self.child.lock().await;
        signal(&child, "STOP");
        tokio::time::sleep(pause).await;
        signal(&child, "CONT");
    }

    /// SIGKILL for good.
    pub async fn end(&self) {
        end(&mut *self.child.lock().await);
    }

    /// What is wrong with it, as it says itself; none when all is well.
    pub async fn complaint(&self) -> Option<String> {
        let address = self.http.as_deref()?;
        match get(address, "/healthz").await {
            Some((200, _)) => None,
            Some((_, says)) => Some(says.trim().to_string()),
            None => Some("it does not answer".into()),
        }
    }
}

fn signal(child: &Option<Child>, signal: &str) {
    if let Some(child) = child {
        Command::new("sh").args(["-c", &format!("kill -s {signal} {}", child.id())]).status().unwrap();
    }
}

fn end(child: &mut Option<Child>) {
    if let Some(mut child) = child.take() {
        _ = child.kill();
        _ = child.wait();
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        end(self.child.get_mut());
    }
}
