//! The programs that the demo runs, each with its output in a log file.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use crate::Result;
use crate::servers::split_password;

/// Where the programs are and where their output goes.
pub struct Programs {
    binaries: PathBuf,
    pub logs: PathBuf,
}

/// A program that runs until it is killed, here or at the latest when this value is dropped.
pub struct Program {
    pub name: String,
    command: Command,
    child: Child,
}

impl Programs {
    /// The binaries of this package lie one directory above the examples.
    pub fn new(logs: PathBuf) -> Result<Self> {
        let demo = std::env::current_exe()?;
        let binaries = demo.parent().and_then(Path::parent).ok_or("the demo is not in a target directory")?;
        Ok(Self { binaries: binaries.to_path_buf(), logs })
    }

    /// A command of this package with the environment that it reads. What is empty is not to be set.
    pub fn aftercommit(&self, program: &str, environment: Vec<(&'static str, String)>) -> Command {
        let mut command = Command::new(self.binaries.join(program));
        for (name, value) in environment {
            match value.as_str() {
                "" => command.env_remove(name),
                value => command.env(name, value),
            };
        }
        command
    }

    /// PostgreSQL's own benchmark on this database.
    pub fn pgbench(arguments: &[&str], url: &str) -> Command {
        let directory = std::env::var_os("AFTERCOMMIT_PG_BIN").map(PathBuf::from);
        let mut command = Command::new(directory.map_or("pgbench".into(), |directory| directory.join("pgbench")));
        // Everybody can see a command line.
        let (url, password) = split_password(url);
        command.args(arguments).arg(url).envs(password.map(|password| ("PGPASSWORD", password)));
        command
    }

    /// Runs a command to its end. Its output goes to a log of that name.
    pub async fn run(&self, name: &str, command: Command) -> Result<()> {
        let mut program = self.start(name, command)?;
        let status = loop {
            match program.ended()? {
                Some(status) => break status,
                None => tokio::time::sleep(crate::TICK).await,
            }
        };
        if status.success() { Ok(()) } else { Err(format!("{name} failed ({status}): {}", self.said(name)).into()) }
    }

    /// Starts a command. Its output goes to a log of that name.
    pub fn start(&self, name: &str, mut command: Command) -> Result<Program> {
        let log = File::create(self.log(name)).map_err(|error| format!("cannot write a log for {name}: {error}"))?;
        // A group of its own, because the demo ends its programs itself when Ctrl-C is pressed.
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        let child = spawn(name, &mut command)?;
        Ok(Program { name: name.into(), command, child })
    }

    fn log(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{name}.log"))
    }

    /// The last things that a program said.
    pub fn said(&self, name: &str) -> String {
        let log = std::fs::read_to_string(self.log(name)).unwrap_or_default();
        let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
        lines[lines.len().saturating_sub(3)..].join(" | ")
    }

    /// All that a program said.
    pub fn output(&self, name: &str) -> Result<String> {
        Ok(std::fs::read_to_string(self.log(name))?)
    }
}

impl Program {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How the program ended, if it did.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Kills the program with SIGKILL and starts it again.
    pub fn kill_and_restart(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        self.child = spawn(&self.name, &mut self.command)?;
        Ok(())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(name: &str, command: &mut Command) -> Result<Child> {
    let program = command.get_program().to_string_lossy().into_owned();
    command.spawn().map_err(|error| format!("cannot start {name} ({program}): {error}").into())
}
