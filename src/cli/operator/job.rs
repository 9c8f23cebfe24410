//! `aftercommit job`.

use clap::{Args, Subcommand};

use super::as_json;
use super::terminal::{plain, time};
use super::who::WhoArgs;
use crate::cli::PostgresArgs;
use aftercommit_core::error::Error;
use aftercommit_lifecycle::fanout::{Job as JobRow, JobId, JobStatus, ParticipantStatus, WantedJobs, operate};

#[derive(Subcommand)]
pub(super) enum Job {
    /// Ask participants not to begin that have not begun; whoever has begun goes on
    #[command(after_help = "Example:\n  aftercommit job cancel 019aa1c2-7c1f-7b2e-9d55-0d3c5a7e9b11")]
    Cancel(Cancel),
    /// Show the last jobs, the newest first
    #[command(after_help = "Example:\n  aftercommit job list --status partial")]
    List(List),
    /// Ask participants anew that have failed: all of them, or one
    #[command(after_help = "Example:\n  aftercommit job retry 019aa1c2-7c1f-7b2e-9d55-0d3c5a7e9b11 --participant pos")]
    Retry(Retry),
    /// Show a job with what each participant answered
    #[command(after_help = "Example:\n  aftercommit job show 019aa1c2-7c1f-7b2e-9d55-0d3c5a7e9b11 --json")]
    Show(Show),
}

#[derive(Args)]
pub(super) struct List {
    /// Only jobs of this kind, such as tenant.deletion
    #[arg(long, value_name = "KIND")]
    kind: Option<String>,
    /// Only jobs with this status
    #[arg(long, value_parser = ["running", "completed", "partial", "failed", "cancelled"])]
    status: Option<String>,
    /// Only jobs that run and are past the time they were due
    #[arg(long)]
    overdue: bool,
    /// Maximum number to show
    #[arg(long, default_value_t = 50)]
    limit: i64,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    postgres: PostgresArgs,
}

#[derive(Args)]
pub(super) struct Show {
    /// The job's id
    #[arg(value_name = "JOB")]
    job: JobId,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    postgres: PostgresArgs,
}

#[derive(Args)]
pub(super) struct Retry {
    /// The job's id
    #[arg(value_name = "JOB")]
    job: JobId,
    /// Only this participant
    #[arg(long, value_name = "NAME")]
    participant: Option<String>,
    #[command(flatten)]
    who: WhoArgs,
    #[command(flatten)]
    postgres: PostgresArgs,
}

#[derive(Args)]
pub(super) struct Cancel {
    /// The job's id
    #[arg(value_name = "JOB")]
    job: JobId,
    #[command(flatten)]
    who: WhoArgs,
    #[command(flatten)]
    postgres: PostgresArgs,
}

pub(super) async fn run(command: Job) -> Result<String, Error> {
    match command {
        Job::List(command) => {
            let wanted = WantedJobs {
                kind: command.kind.as_deref(),
                status: command.status.as_deref(),
                overdue: command.overdue,
            };
            let jobs = operate::list(&command.postgres.config()?, wanted, command.limit).await?;
            match command.json {
                true => as_json(&jobs),
                false if jobs.is_empty() => Ok("there are no such jobs\n".into()),
                false => Ok(jobs.iter().map(|job| line(job) + "\n").collect()),
            }
        }
        Job::Show(command) => {
            let status = operate::show(&command.postgres.config()?, command.job).await?;
            if command.json { as_json(&status) } else { Ok(shown(&status)) }
        }
        Job::Retry(command) => {
            let config = command.postgres.config()?;
            let participant = command.participant.as_deref();
            let asked = operate::retry(&config, &command.who.name(), command.job, participant).await?;
            Ok(format!("asked anew: {}\n", plain(&asked.join(", "))))
        }
        Job::Cancel(command) => {
            let asked = operate::cancel(&command.postgres.config()?, &command.who.name(), command.job).await?;
            Ok(format!("asked not to begin: {}; whoever has begun goes on\n", plain(&asked.join(", "))))
        }
    }
}

fn line(job: &JobRow) -> String {
    let JobRow { id, kind, request_key, requested_by, requested_at, status, .. } = job;
    let overdue = job.due_at.is_some_and(|due| status == "running" && due < chrono::Utc::now());
    let overdue = if overdue { ", overdue" } else { "" };
    format!(
        "{id}  {}  {}  {}{overdue}  requested {} by {}",
        plain(kind),
        plain(request_key),
        plain(status),
        time(*requested_at),
        plain(requested_by)
    )
}

fn shown(status: &JobStatus) -> String {
    let mut text = line(&status.job) + "\n";
    text += &format!(
        "services_completed: {}, services_failed: {}, total: {}\n",
        status.completed, status.failed, status.total
    );
    for participant in &status.participants {
        let ParticipantStatus { participant: name, status, round, counts, notes, error, ended_at, .. } = participant;
        let round = if *round > 1 { format!(" (asked {round} times)") } else { String::new() };
        let ended = ended_at.map(|ended| format!("  {}", time(ended))).unwrap_or_default();
        let counts: Vec<String> = counts.iter().map(|(name, count)| format!("{name} {count}")).collect();
        let error = error.as_deref().map(|error| format!(": {}", plain(error))).unwrap_or_default();
        text += &format!("  {}  {}{round}{ended}  {}{error}\n", plain(name), plain(status), plain(&counts.join(", ")));
        text.extend(notes.iter().map(|note| format!("    note: {}\n", plain(note))));
    }
    for child in &status.children {
        text += &format!("  job {}  {}  {}\n", child.id, plain(&child.kind), plain(&child.status));
    }
    text
}
