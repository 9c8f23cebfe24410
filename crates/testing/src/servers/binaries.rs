//! Where the servers' programs are.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use aftercommit_core::error::{Error, ErrorKind};

/// Where packages put PostgreSQL: a directory, how names of versions in it begin, and the way from there to the programs.
const POSTGRES_PLACES: [(&str, &str, &str); 6] = [
    ("/usr/lib/postgresql", "", "bin"),
    ("/usr", "pgsql-", "bin"),
    ("/usr/libexec", "postgresql", ""),
    ("/opt/homebrew/opt", "postgresql", "bin"),
    ("/usr/local/opt", "postgresql", "bin"),
    ("/usr/local", "pgsql", "bin"),
];

/// The directory that holds `initdb` and `postgres`.
pub(super) fn postgres() -> Result<PathBuf, Error> {
    let complete = |directory: &PathBuf| directory.join("initdb").is_file() && directory.join("postgres").is_file();
    if let Some(directory) = env::var_os("AFTERCOMMIT_PG_BIN").map(PathBuf::from) {
        return if complete(&directory) {
            Ok(directory)
        } else {
            Err(missing(format!(
                "AFTERCOMMIT_PG_BIN names {}, but initdb and postgres are not there",
                directory.display()
            )))
        };
    }
    let packaged = POSTGRES_PLACES.iter().flat_map(|(parent, prefix, rest)| {
        versions(Path::new(parent), prefix).into_iter().map(move |dir| dir.join(rest))
    });
    path().chain(packaged).find(complete).ok_or_else(|| {
        missing(
            "no PostgreSQL server is installed here: install the package postgresql (14 or newer), or set \
                 AFTERCOMMIT_PG_BIN to the directory of initdb and postgres",
        )
    })
}

/// The nats-server program of `wanted`, or the newest.
pub(super) fn nats_server(wanted: Option<&str>) -> Result<PathBuf, Error> {
    if let Some(program) = env::var_os("AFTERCOMMIT_NATS_SERVER").map(PathBuf::from) {
        return if program.is_file() {
            Ok(program)
        } else {
            Err(missing(format!("AFTERCOMMIT_NATS_SERVER names {}, which is not there", program.display())))
        };
    }
    let here = env::current_dir().unwrap_or_default();
    let cached = here
        .ancestors()
        .flat_map(|above| versions(&above.join(".cache/nats-server"), ""))
        .map(|directory| directory.join("nats-server"));
    cached
        .chain(path().map(|directory| directory.join("nats-server")))
        .filter(|program| program.is_file())
        .find(|program| wanted.is_none_or(|wanted| nats_version(program).is_ok_and(|version| version == wanted)))
        .ok_or_else(|| {
            let which = wanted.map(|version| format!(" {version}")).unwrap_or_default();
            missing(format!(
                "nats-server{which} is not installed here: install it, or set AFTERCOMMIT_NATS_SERVER to the program"
            ))
        })
}

/// The pgbouncer program. Packages put it where only administrators' paths lead.
pub(super) fn pgbouncer() -> Result<PathBuf, Error> {
    path()
        .chain(["/usr/sbin".into(), "/usr/local/sbin".into()])
        .map(|directory| directory.join("pgbouncer"))
        .find(|program| program.is_file())
        .ok_or_else(|| missing("PgBouncer is not installed here: install the package pgbouncer"))
}

/// What `nats-server --version` says, without the `v`.
pub(super) fn nats_version(program: &Path) -> Result<String, Error> {
    let output = Command::new(program)
        .arg("--version")
        .output()
        .map_err(|error| Error::with_source(ErrorKind::Config, format!("cannot run {}", program.display()), error))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.rsplit(": v").next().unwrap_or_default().trim();
    Ok(version.to_string())
}

fn path() -> impl Iterator<Item = PathBuf> {
    env::var_os("PATH").map(|path| env::split_paths(&path).collect::<Vec<_>>()).unwrap_or_default().into_iter()
}

/// What is in `parent` and begins with `prefix`, highest version first.
fn versions(parent: &Path, prefix: &str) -> Vec<PathBuf> {
    let numbers = |path: &PathBuf| -> Vec<u64> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
    };
    let mut found: Vec<PathBuf> = fs::read_dir(parent)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)))
        .collect();
    found.sort_by_key(|path| std::cmp::Reverse(numbers(path)));
    found
}

fn missing(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Config, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_version_comes_first_by_number_not_by_letter() {
        let parent = env::temp_dir().join(crate::unique_name("versions"));
        for name in ["9.6", "14", "15", "2.12.8", "notes"] {
            fs::create_dir_all(parent.join(name)).unwrap();
        }
        let names: Vec<String> = versions(&parent, "")
            .iter()
            .map(|path| path.file_name().unwrap_or_default().to_string_lossy().into_owned())
            .collect();
        fs::remove_dir_all(&parent).unwrap();
        assert_eq!(names, ["15", "14", "9.6", "2.12.8", "notes"]);
    }
}
