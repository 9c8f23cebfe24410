//! A temporary directory with one server process in it, and the guard that removes both.
//!
//! The guard is a shell that reads from a pipe which only this process can write to. The pipe closes when the instance is
//! dropped and also when this process is killed; then the guard ends the server and removes the directory.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File};
use std::net::TcpListener;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::processes::{Owner, as_user, cannot, send, threads};
use crate::{eventually, unique_name};
use aftercommit_core::error::{Error, ErrorKind};

/// $1: the directory, $2: the signal that ends the server. A dead process that nobody collects is a zombie (Z). What a test
/// has mounted in the directory, where that can be, goes with it.
const GUARD: &str = r#"
cat >/dev/null
if server=$(cat "$1/pid"); then
    kill -s CONT "$server"; kill -s "$2" "$server"
    tries=0
    while [ "$tries" -lt 100 ] && kill -0 "$server" && ! grep -q '^State:.Z' "/proc/$server/status"; do
        sleep 0.1
        tries=$((tries + 1))
    done
fi
grep -sF " $1/" /proc/mounts | while read -r _ place _; do umount -l "$place"; done
rm -rf "$1"
"#;

/// $0: the directory, then the server's command. The process notes its own id before it becomes the server, so that the
/// guard knows it from the first moment.
const START: &str = r#"echo "$$" >"$0/pid" && exec "$@""#;

/// How long a server may take to start, to stand still or to end; recovery after a crash takes longest.
pub(super) const DEADLINE: Duration = Duration::from_secs(60);

/// See the module.
#[derive(Debug)]
pub(super) struct Instance {
    software: &'static str,
    directory: PathBuf,
    guard: Child,
    server: Option<Child>,
}

impl Instance {
    /// Makes the directory and starts its guard. `software` is what errors call it, `end` the signal that ends it.
    pub(super) fn create(software: &'static str, end: &str, owner: Option<Owner>) -> Result<Self, Error> {
        let directory = std::env::temp_dir().join(unique_name(&format!("aftercommit-{software}")));
        let failed = |error| cannot(format!("cannot make the directory {}", directory.display()), error);
        DirBuilder::new().mode(0o700).create(&directory).map_err(failed)?;
        if let Some((user, group)) = owner {
            std::os::unix::fs::chown(&directory, Some(user), Some(group)).map_err(failed)?;
        }
        // A group of its own, because Ctrl-C in a terminal goes to all processes of the group, and without its outputs,
        // because whoever reads them to their end would wait for the guard too.
        let guard = Command::new("sh")
            .args(["-c", GUARD, "sh"])
            .args([directory.as_os_str(), end.as_ref()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .map_err(|error| cannot(format!("cannot start the guard of {software}"), error))?;
        Ok(Self { software, directory, guard, server: None })
    }

    /// A name that no other instance has.
    pub(super) fn name(&self) -> String {
        self.directory.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// The file with the server's output.
    pub(super) fn log(&self) -> PathBuf {
        self.directory.join("log")
    }

    /// Starts `command` as the server.
    pub(super) fn start(&mut self, command: &Command, owner: Option<Owner>) -> Result<(), Error> {
        let start = || {
            let log = File::options().create(true).append(true).open(self.log())?;
            let mut shell = Command::new("sh");
            shell.args(["-c", START]).arg(&self.directory).arg(command.get_program()).args(command.get_args());
            as_user(&mut shell, owner);
            shell.current_dir(&self.directory).process_group(0);
            shell.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()
        };
        self.server = Some(start().map_err(|error| cannot(format!("cannot start {}", self.software), error))?);
        Ok(())
    }

    /// Waits until `ready` holds while the server runs. After an error it does not run.
    pub(super) async fn ready(&mut self, mut ready: impl AsyncFnMut() -> bool) -> Result<(), Error> {
        let what = format!("{} accepts connections", self.software);
        let server = &mut self.server;
        let mut ended = false;
        let outcome = eventually(DEADLINE, &what, async || {
            let running = server.as_mut().is_some_and(|server| matches!(server.try_wait(), Ok(None)));
            ended = !running;
            ended || ready().await
        })
        .await;
        if outcome.is_ok() && !ended {
            return Ok(());
        }
        let how = if ended { "ended at once" } else { "does not answer" };
        let error = Error::new(ErrorKind::NotReady, format!("{} {how}; {}", self.software, self.log_tail()));
        self.kill().await?;
        Err(error)
    }

    /// The server's process id; an error when it does not run.
    pub(super) fn pid(&self) -> Result<u32, Error> {
        self.server
            .as_ref()
            .map(Child::id)
            .ok_or_else(|| Error::new(ErrorKind::NotReady, format!("{} does not run", self.software)))
    }

    pub(super) fn is_running(&self) -> bool {
        self.server.is_some()
    }

    /// Sends a signal to the server.
    pub(super) fn signal(&self, signal: &str) -> Result<(), Error> {
        send(signal, &[self.pid()?])
    }

    /// Halts the server's process with SIGSTOP, and returns when it stands still: its threads stop one after the other, and
    /// one that waits for the disk only when the disk has answered. It blocks: it seldom takes more than a millisecond.
    pub(super) fn halt(&self) -> Result<(), Error> {
        let (pid, begun) = (self.pid()?, Instant::now());
        self.signal("STOP")?;
        loop {
            let threads = threads(pid)?;
            // Dead threads do not move either; a dead process that nobody has collected yet has one of them.
            let is_dead = |state| matches!(state, 'Z' | 'X');
            if threads.iter().all(|thread| is_dead(thread.state)) {
                let said = format!("{} cannot be halted, because it has ended; {}", self.software, self.log_tail());
                return Err(Error::new(ErrorKind::NotReady, said));
            }
            let Some(moving) = threads.iter().find(|thread| thread.state != 'T' && !is_dead(thread.state)) else {
                return Ok(());
            };
            if begun.elapsed() > DEADLINE {
                let (software, thread, state) = (self.software, moving.pid, moving.state);
                let said = format!(
                    "{software} does not stand still {DEADLINE:?} after SIGSTOP: its thread {thread} is in state {state} \
                     (D waits for a disk)"
                );
                return Err(Error::new(ErrorKind::NotReady, said));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Kills the server's process and waits until it has ended. One that has ended already is no error.
    pub(super) async fn kill(&mut self) -> Result<(), Error> {
        if let Some(server) = self.server.as_mut() {
            server.kill().map_err(|error| cannot(format!("cannot kill {}", self.software), error))?;
        }
        self.ended().await
    }

    /// Waits until the server, which was told to end, has ended.
    pub(super) async fn ended(&mut self) -> Result<(), Error> {
        let Some(server) = self.server.as_mut() else { return Ok(()) };
        eventually(DEADLINE, "the server has ended", async || !matches!(server.try_wait(), Ok(None))).await?;
        self.server = None;
        // A process that is given the same id later is nothing to the guard. There is no file if the shell failed.
        match fs::remove_file(self.directory.join("pid")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(cannot(format!("cannot forget the process of {}", self.software), error))
            }
            _ => Ok(()),
        }
    }

    /// The end of the server's output, for errors.
    fn log_tail(&self) -> String {
        let log = fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        format!("the end of its log: {}", lines[lines.len().saturating_sub(8)..].join(" | "))
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        drop(self.guard.stdin.take());
        // The guard sees that the server has ended only when we have collected it. Errors are of no use here: the guard
        // does its work whether we wait for it or not.
        while matches!(self.guard.try_wait(), Ok(None)) {
            let _ = self.server.as_mut().map(Child::try_wait);
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// A port of 127.0.0.1 on which nothing listens. It lies below those that systems give to outgoing connections, so that
/// none of them takes it while the server on it is down. Another process may still be quicker: try again with another one.
/// No port is given twice: the server of another test may be down for a moment, and its clients would find this one in its place.
pub(super) fn free_port() -> u16 {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    loop {
        let port = 10_000 + (Uuid::now_v7().as_u128() % 22_000) as u16;
        let new = GIVEN.lock().unwrap_or_else(PoisonError::into_inner).insert(port);
        if new && TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}
