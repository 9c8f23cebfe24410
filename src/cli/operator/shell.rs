//! `aftercommit completions` and `aftercommit man`: what packages install beside the programs.

use std::fs;
use std::path::{Path, PathBuf};

use clap::{Args, Command, ValueEnum};
use clap_complete::Shell;
use clap_mangen::Man;

use crate::cli::{relay, worker};
use aftercommit_core::error::{Error, ErrorKind};

#[derive(Args)]
pub(super) struct Completions {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
    /// The program that they are for
    #[arg(long, value_enum, default_value = "aftercommit")]
    program: Program,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Program {
    Aftercommit,
    AftercommitRelay,
    AftercommitWorker,
}

#[derive(Args)]
pub(super) struct ManPages {
    /// The directory to write them to; it is made when it is not there
    #[arg(value_name = "DIRECTORY")]
    directory: PathBuf,
}

/// The script for a shell.
pub(super) fn completions(command: &Completions, operator: Command) -> String {
    let (mut program, name) = match command.program {
        Program::Aftercommit => (operator, "aftercommit"),
        Program::AftercommitRelay => (relay::command(), "aftercommit-relay"),
        Program::AftercommitWorker => (worker::command(), "aftercommit-worker"),
    };
    let mut script = Vec::new();
    clap_complete::generate(command.shell, &mut program, name, &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// Writes all pages. The programs that run as services are in section 8, as services are; the operator's tool and its
/// commands in section 1. So `aftercommit-relay(8)` and `aftercommit-relay(1)`, which is `aftercommit relay`, are two pages.
pub(super) fn man(command: &ManPages, operator: Command) -> Result<String, Error> {
    let directory = &command.directory;
    fs::create_dir_all(directory).map_err(|error| unwritable(directory, error))?;
    let mut written = pages(operator, "1", directory)?;
    for program in [relay::command(), worker::command()] {
        written += pages(program, "8", directory)?;
    }
    Ok(format!("{written} pages written to {}\n", directory.display()))
}

/// The page of a command, and those of the commands below it.
fn pages(command: Command, section: &str, directory: &Path) -> Result<usize, Error> {
    let mut command = command.disable_help_subcommand(true);
    command.build();
    page(&command, section, directory)
}

fn page(command: &Command, section: &str, directory: &Path) -> Result<usize, Error> {
    let name = command.get_display_name().unwrap_or_else(|| command.get_name()).to_string();
    let path = directory.join(format!("{name}.{section}"));
    let mut text = Vec::new();
    let man = Man::new(command.clone()).title(name).section(section);
    man.render(&mut text).and_then(|()| fs::write(&path, text)).map_err(|error| unwritable(&path, error))?;
    let mut written = 1;
    for below in command.get_subcommands().filter(|below| !below.is_hide_set()) {
        written += page(below, section, directory)?;
    }
    Ok(written)
}

fn unwritable(path: &Path, error: std::io::Error) -> Error {
    Error::with_source(ErrorKind::Config, format!("{} cannot be written", path.display()), error)
}
