//! Starting, listing and signalling processes with nothing but the standard library and a shell.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use aftercommit_core::error::{Error, ErrorKind};

/// User and group ids.
pub(super) type Owner = (u32, u32);

/// Sends a signal, such as `KILL`, to processes. One that has ended already is no error.
pub(super) fn send(signal: &str, pids: &[u32]) -> Result<(), Error> {
    // The shell's own kill, because a program of that name is not everywhere.
    Command::new("sh")
        .args(["-c", r#"kill -s "$0" "$@""#, signal])
        .args(pids.iter().map(u32::to_string))
        .stderr(Stdio::null())
        .status()
        .map(drop)
        .map_err(|error| cannot(format!("cannot send SIG{signal}"), error))
}

/// A running process, or one thread of it.
pub(super) struct Process {
    /// Of a thread, the thread's own.
    pub(super) pid: u32,
    pub(super) parent: u32,
    /// As in `ps`: `T` is stopped, `Z` dead and not yet collected.
    pub(super) state: char,
}

/// All processes, from /proc or, where there is none, from `ps`.
pub(super) fn processes() -> Result<Vec<Process>, Error> {
    let failed = |error| cannot("cannot list processes", error);
    if has_proc() {
        return Process::below(Path::new("/proc")).map_err(failed);
    }
    let list = Command::new("ps").args(["-A", "-o", "pid=,state=,ppid="]).output().map_err(failed)?;
    let list = String::from_utf8_lossy(&list.stdout);
    Ok(list.lines().filter_map(|line| Process::from_fields(line.split_ascii_whitespace())).collect())
}

/// The threads of a process, from /proc or, where there is none, the process itself, from `ps`. Empty when it is gone.
pub(super) fn threads(pid: u32) -> Result<Vec<Process>, Error> {
    if !has_proc() {
        return Ok(processes()?.into_iter().filter(|process| process.pid == pid).collect());
    }
    match Process::below(Path::new(&format!("/proc/{pid}/task"))) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(cannot(format!("cannot list the threads of process {pid}"), error))
        }
        found => Ok(found.unwrap_or_default()),
    }
}

fn has_proc() -> bool {
    Path::new("/proc/self/stat").exists()
}

impl Process {
    /// Those of which `directory` has directories. One that ends meanwhile is left out.
    fn below(directory: &Path) -> std::io::Result<Vec<Self>> {
        let entries = fs::read_dir(directory)?;
        let stats = entries.filter_map(|entry| fs::read_to_string(entry.ok()?.path().join("stat")).ok());
        Ok(stats.filter_map(|stat| Self::from_stat(&stat)).collect())
    }

    /// From `pid (name) state parent …`; the name may hold anything.
    fn from_stat(stat: &str) -> Option<Self> {
        let (pid, rest) = (stat.split_once(' ')?.0, stat.rsplit_once(") ")?.1);
        Self::from_fields(std::iter::once(pid).chain(rest.split_ascii_whitespace()))
    }

    fn from_fields<'a>(mut fields: impl Iterator<Item = &'a str>) -> Option<Self> {
        Some(Self {
            pid: fields.next()?.parse().ok()?,
            state: fields.next()?.chars().next()?,
            parent: fields.next()?.parse().ok()?,
        })
    }
}

/// The user as whom to run a server that refuses to run as root; none when we are not root ourselves.
pub(super) fn unprivileged() -> Result<Option<Owner>, Error> {
    if id(&["-u"]) != Some(0) {
        return Ok(None);
    }
    ["postgres", "nobody"].iter().find_map(|name| Some((id(&["-u", name])?, id(&["-g", name])?))).map(Some).ok_or_else(
        || Error::new(ErrorKind::Config, "PostgreSQL refuses to run as root, and there is no user postgres or nobody"),
    )
}

fn id(arguments: &[&str]) -> Option<u32> {
    let output = Command::new("id").args(arguments).stderr(Stdio::null()).output().ok()?;
    String::from_utf8_lossy(&output.stdout).trim().parse().ok()
}

/// Runs `command` to its end as `owner`; its output is in the error if it fails.
pub(super) fn run(command: &mut Command, owner: Option<Owner>) -> Result<(), Error> {
    let program = command.get_program().to_string_lossy().into_owned();
    as_user(command, owner);
    let output = command.output().map_err(|error| cannot(format!("cannot run {program}"), error))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', " | ");
    Err(Error::new(ErrorKind::NotReady, format!("{program} failed ({}): {said}", output.status)))
}

pub(super) fn as_user(command: &mut Command, owner: Option<Owner>) {
    command.env("LC_ALL", "C");
    if let Some((user, group)) = owner {
        command.uid(user).gid(group);
    }
}

pub(super) fn cannot(message: impl Into<String>, error: std::io::Error) -> Error {
    Error::with_source(ErrorKind::NotReady, message, error)
}
