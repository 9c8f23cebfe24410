//! `aftercommit erase`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::json;

use super::as_json;
use super::terminal::{plain, table, time};
use super::who::WhoArgs;
use crate::cli::PostgresArgs;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_lifecycle::erase::operate::{self, ErasureParticipant, ErasureStatus};
use aftercommit_lifecycle::erase::{Act, Request, Subject, file};
use aftercommit_lifecycle::fanout::JobId;

#[derive(Subcommand)]
pub(super) enum Erase {
    /// Ask all services what they would delete of a tenant or a person; nothing is deleted
    #[command(after_help = "Example:\n  aftercommit erase preview tenant 42 --config erase.toml")]
    Preview(PreviewArgs),
    /// Ask all services to delete a tenant or a person, and to verify that nothing is left
    #[command(
        after_help = "Example:\n  aftercommit erase request tenant 42 --name Acme --config erase.toml --wait 10m"
    )]
    Request(RequestArgs),
    /// Show how an erasure stands, with what each service has deleted
    #[command(after_help = "Examples:\n  aftercommit erase status tenant 42 --json\n  \
                            aftercommit erase status --job 019aa1c2-7c1f-7b2e-9d55-0d3c5a7e9b11")]
    Status(StatusArgs),
}

/// Who is asked.
#[derive(Args)]
struct ServicesArgs {
    /// What says who takes part, and what is looked at before anybody is asked
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Who takes part, separated by commas; without it and without --config those in aftercommit.participant
    #[arg(long, value_name = "NAME", value_delimiter = ',', conflicts_with = "config")]
    participants: Vec<String>,
}

#[derive(Args)]
struct SubjectArgs {
    /// What it is, such as tenant or person
    #[arg(value_name = "KIND")]
    kind: String,
    /// Its id
    #[arg(value_name = "ID")]
    id: String,
}

#[derive(Args)]
pub(super) struct PreviewArgs {
    #[command(flatten)]
    subject: SubjectArgs,
    #[command(flatten)]
    services: ServicesArgs,
    /// How long to wait for answers; who has not answered then is shown as ?
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = humantime::parse_duration)]
    wait: Duration,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    who: WhoArgs,
    #[command(flatten)]
    postgres: PostgresArgs,
}

#[derive(Args)]
pub(super) struct RequestArgs {
    #[command(flatten)]
    subject: SubjectArgs,
    #[command(flatten)]
    services: ServicesArgs,
    /// The subject's name, which must be what the query of the file says; it is kept nowhere
    #[arg(long = "name", value_name = "NAME", requires = "config")]
    called: Option<String>,
    /// Pass over the guards of the file, such as other admins; the audit trail says so
    #[arg(long)]
    force: bool,
    /// Erase a subject once more that is erased, because there are rows of it again
    #[arg(long)]
    again: bool,
    /// Wait until it has ended and is verified, at most this long
    #[arg(long, value_name = "DURATION", num_args = 0..=1, default_missing_value = "10m", value_parser = humantime::parse_duration)]
    wait: Option<Duration>,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    who: WhoArgs,
    #[command(flatten)]
    postgres: PostgresArgs,
}

#[derive(Args)]
pub(super) struct StatusArgs {
    /// What it is, such as tenant or person
    #[arg(value_name = "KIND", requires = "id", required_unless_present = "job")]
    kind: Option<String>,
    /// Its id: the last erasure of it
    #[arg(value_name = "ID")]
    id: Option<String>,
    /// The job's id instead
    #[arg(long, value_name = "JOB", conflicts_with_all = ["kind", "id"])]
    job: Option<JobId>,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    postgres: PostgresArgs,
}

impl ServicesArgs {
    fn request(&self, subject: Subject, who: &str, asks: Option<Option<&str>>) -> Result<Request, Error> {
        let Some(path) = &self.config else {
            let request = Request::new(subject, who);
            return Ok(if self.participants.is_empty() {
                request
            } else {
                request.participants(self.participants.clone())
            });
        };
        let config = file::load(path)?;
        match asks {
            Some(name) => config.request(subject, who, name),
            None => config.preview(subject, who),
        }
    }
}

impl SubjectArgs {
    fn subject(&self) -> Subject {
        Subject::new(&self.kind, &self.id)
    }
}

/// The text, and the exit status: 1 when it was asked to wait and not all of it is done.
pub(super) async fn run(command: Erase) -> Result<(String, ExitCode), Error> {
    match command {
        Erase::Preview(command) => {
            let config = command.postgres.config()?;
            let request = command.services.request(command.subject.subject(), &command.who.name(), None)?;
            let job = operate::preview(&config, request).await?;
            told(&operate::wait(&config, job, command.wait).await?, command.json, true)
        }
        Erase::Request(command) => ask(command).await,
        Erase::Status(command) => {
            let config = command.postgres.config()?;
            let job = match (command.job, command.kind, command.id) {
                (None, Some(kind), Some(id)) => {
                    let subject = Subject::new(kind, id);
                    operate::last(&config, &subject).await?.ok_or_else(|| {
                        Error::new(ErrorKind::NotReady, format!("nobody has asked to erase {subject}"))
                    })?
                }
                (Some(job), ..) => job,
                _ => return Err(Error::new(ErrorKind::Config, "name the kind and the id of a subject, or --job")),
            };
            told(&operate::status(&config, job).await?, command.json, false)
        }
    }
}

async fn ask(command: RequestArgs) -> Result<(String, ExitCode), Error> {
    let config = command.postgres.config()?;
    let subject = command.subject.subject();
    let told_of = plain(&subject.to_string());
    let request = command.services.request(subject, &command.who.name(), Some(command.called.as_deref()))?;
    let asked = operate::ask(&config, request.force(command.force).again(command.again)).await?;
    let (job, status) = (asked.job, &asked.status);
    let known = match status.as_str() {
        "completed" => format!("nothing was done: {told_of} is erased already, by job {job}\n"),
        "running" => format!("nothing was done: {told_of} is being erased, by job {job}\n"),
        _ => format!(
            "nothing was done: job {job} for {told_of} is {status}; ask those anew that failed with `aftercommit job retry {job}`\n"
        ),
    };
    let first = if asked.new { format!("asked to erase {told_of}: job {job}\n") } else { known };
    let Some(limit) = command.wait else {
        let well = asked.new || matches!(status.as_str(), "running" | "completed");
        let text = if command.json { as_json(&json!({ "asked": asked }))? } else { first };
        return Ok((text, if well { ExitCode::SUCCESS } else { ExitCode::FAILURE }));
    };
    let ended = operate::wait(&config, job, limit).await?;
    if command.json {
        let exit = if ended.is_completed() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
        return Ok((as_json(&json!({ "asked": asked, "erasure": ended }))?, exit));
    }
    let (text, exit) = told(&ended, false, true)?;
    Ok((first + &text, exit))
}

/// `ends`: that it is not done is a failure.
fn told(status: &ErasureStatus, json: bool, ends: bool) -> Result<(String, ExitCode), Error> {
    let exit = if ends && !status.is_completed() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    Ok((if json { as_json(status)? } else { shown(status) }, exit))
}

fn number(count: Option<u64>) -> String {
    count.map_or_else(|| "?".into(), |count| count.to_string())
}

fn shown(status: &ErasureStatus) -> String {
    let act = match status.act {
        Act::Preview => "preview",
        Act::Erase => "erasure",
        Act::Verify => "verification",
    };
    let mut text = format!(
        "{act} of {}: {}, job {}, requested {} by {}\n",
        plain(&status.subject.to_string()),
        plain(&status.status),
        status.job,
        time(status.requested_at),
        plain(&status.requested_by)
    );
    let rows: Vec<Vec<String>> = status.participants.iter().flat_map(rows).collect();
    text += &table(&["service", "status", "table", "rows"], &rows);
    for one in &status.participants {
        let name = plain(&one.participant);
        text.extend(one.error.iter().map(|error| format!("{name} failed: {}\n", plain(error))));
        text.extend(one.notes.iter().map(|note| format!("{name}: {}\n", plain(note))));
    }
    text += &format!(
        "services_completed: {}, services_failed: {}, services_silent: {}",
        status.services_completed, status.services_failed, status.services_silent
    );
    text += &match status.total_items_deleted {
        Some(deleted) => format!(", total_items_deleted: {deleted}\n"),
        None => format!(", total_items_found: {}\n", number(status.total_items_found)),
    };
    if status.services_silent == status.participants.len() as u64 {
        text += "nobody has answered: do the services' workers run, and does a coordinator take answers here ([[coordinator]] in worker.toml)?\n";
    }
    if let Some(verification) = &status.verification {
        text += &format!("verification: {}, job {}\n", plain(&verification.status), verification.job);
        for (service, counts) in &verification.late {
            let counts: Vec<String> = counts.iter().map(|(table, count)| format!("{table} {count}")).collect();
            text += &format!("  late, and swept: {}: {}\n", plain(service), plain(&counts.join(", ")));
        }
        for left in &verification.left {
            text += &format!("  {}: {}\n", plain(&left.participant), plain(&left.reason));
        }
    }
    text
}

/// One line for each table of a service; `?` where it has not said it.
fn rows(one: &ErasureParticipant) -> Vec<Vec<String>> {
    let (name, status) = (plain(&one.participant), plain(&one.status));
    match &one.counts {
        Some(counts) if !counts.is_empty() => counts
            .iter()
            .map(|(table, count)| vec![name.clone(), status.clone(), plain(table), count.to_string()])
            .collect(),
        _ => vec![vec![name, status, String::new(), number(one.total)]],
    }
}
