//! `aftercommit forget`.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use serde_json::json;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::as_json;
use super::terminal::counted;
use super::who::WhoArgs;
use crate::cli::run_role;
use crate::cli::servers::Servers;
use aftercommit_core::backoff::Backoff;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_lifecycle::erase::forget::{self, ForgetConfig, Forgotten, Selection};

/// Waits after a failure with --every.
const AGAIN: Backoff = Backoff { first: Duration::from_secs(1), max: Duration::from_secs(60) };

#[derive(Args)]
pub(super) struct Forget {
    /// Events by their ids
    #[arg(long = "event", value_name = "EVENT_ID", value_delimiter = ',')]
    events: Vec<Uuid>,
    /// Events with this key
    #[arg(long, value_name = "KEY", value_parser = NonEmptyStringValueParser::new())]
    key: Option<String>,
    /// Events with a key that begins so
    #[arg(long, value_name = "PREFIX", value_parser = NonEmptyStringValueParser::new())]
    key_prefix: Option<String>,
    /// Events of this type; of all that is given an event must fit each
    #[arg(long = "type", value_name = "TYPE", value_parser = NonEmptyStringValueParser::new())]
    event_type: Option<String>,
    /// Why, for the record: such as the number of the request. No personal data, because this stays
    #[arg(long, value_name = "TEXT", value_parser = NonEmptyStringValueParser::new(), required_unless_present_any = ["resume", "dry_run"])]
    why: Option<String>,
    /// Go on with what was begun, by a process that died or by the SQL function aftercommit.forget
    #[arg(long, conflicts_with_all = ["events", "key", "key_prefix", "event_type", "why", "dry_run", "yes"])]
    resume: bool,
    /// With --resume: look again at this interval until a signal
    #[arg(long, value_name = "DURATION", requires = "resume", conflicts_with = "json", value_parser = humantime::parse_duration)]
    every: Option<Duration>,
    /// How long to wait for the relay, or for open transactions, when nothing moves
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = humantime::parse_duration)]
    patience: Duration,
    /// Only say how many events it finds in the tables
    #[arg(long, conflicts_with = "yes")]
    dry_run: bool,
    /// Do it without having named each event; it cannot be undone
    #[arg(long)]
    yes: bool,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    who: WhoArgs,
    #[command(flatten)]
    servers: Servers,
}

impl Forget {
    /// Whether it goes on until a signal.
    pub(super) fn goes_on(&self) -> bool {
        self.every.is_some()
    }

    fn config(&self) -> Result<ForgetConfig, Error> {
        let (postgres, nats, naming) = self.servers.config()?;
        Ok(ForgetConfig { patience: self.patience, ..ForgetConfig::new(postgres, nats, naming) })
    }

    fn selection(&self) -> Selection {
        Selection {
            events: self.events.clone(),
            key: self.key.clone(),
            key_prefix: self.key_prefix.clone(),
            event_type: self.event_type.clone(),
        }
    }
}

/// Goes on with what is begun, again and again, until a signal ends it. The exit status is 0 after an orderly stop, 2 when a
/// setting is at fault.
pub(super) fn go_on(command: Forget) -> ExitCode {
    run_role("aftercommit", async |shutdown: CancellationToken| {
        let (config, every) = (command.config()?, command.every.unwrap_or(Duration::from_secs(10)));
        let mut failures = 0;
        loop {
            let resumed = tokio::select! {
                resumed = forget::resume(&config) => resumed,
                () = shutdown.cancelled() => return Ok(()),
            };
            let wait = match resumed {
                Ok(all) => {
                    failures = 0;
                    for Forgotten { request, waits_for, .. } in all {
                        if let Some(waits_for) = waits_for {
                            tracing::warn!(request, waits_for, "a request to forget is not through");
                        }
                    }
                    every
                }
                Err(error) if error.kind() == ErrorKind::Config => return Err(error),
                Err(error) => {
                    failures += 1;
                    tracing::warn!(
                        error = error.report(),
                        "what was begun to forget cannot be gone on with, trying again"
                    );
                    AGAIN.after(failures)
                }
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = shutdown.cancelled() => return Ok(()),
            }
        }
    })
}

/// The text, and the exit status: 1 when something is not through.
pub(super) async fn run(command: Forget) -> Result<(String, ExitCode), Error> {
    let (config, selection) = (command.config()?, command.selection());
    if command.resume {
        return told(&forget::resume(&config).await?, command.json);
    }
    if selection == Selection::default() {
        let problem = "nothing was done: name events with --event, or say which with --key, --key-prefix or --type";
        return Err(Error::new(ErrorKind::Config, problem));
    }
    let described = selection.events.is_empty();
    if command.dry_run || (described && !command.yes) {
        let found = forget::find(&config.postgres, &selection).await?;
        if command.dry_run && command.json {
            return Ok((as_json(&json!({ "dry_run": true, "found": found }))?, ExitCode::SUCCESS));
        }
        let found = format!(
            "{} of the outbox, {} and {} waiting to run again would be forgotten, with whatever else the stream has of them",
            counted(found.outbox, "event"),
            counted(found.dead_letters, "dead letter"),
            counted(found.redriven, "event"),
        );
        if command.dry_run {
            return Ok((found + "\n", ExitCode::SUCCESS));
        }
        let problem = format!("nothing was done: {found}. It cannot be undone: say --yes");
        return Err(Error::new(ErrorKind::Config, problem));
    }
    let why = command.why.as_deref().unwrap_or_default();
    let forgotten = forget::forget(&config, &command.who.name(), why, &selection).await?;
    told(&[forgotten], command.json)
}

fn told(all: &[Forgotten], json: bool) -> Result<(String, ExitCode), Error> {
    let through = all.iter().all(|forgotten| forgotten.waits_for.is_none() && forgotten.unknown.is_empty());
    let exit = if through { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    let text = match all {
        _ if json => as_json(&all)?,
        [] => "there is nothing to go on with\n".into(),
        all => all.iter().map(line).collect(),
    };
    Ok((text, exit))
}

fn line(forgotten: &Forgotten) -> String {
    let Forgotten { request, events, messages, unknown, waits_for } = forgotten;
    let events = counted(events - unknown.len() as u64, "event");
    let unknown = match unknown.as_slice() {
        [] => String::new(),
        unknown => {
            let ids: Vec<String> = unknown.iter().map(ToString::to_string).collect();
            format!("not found: {}; should a copy come later, it is erased\n", ids.join(", "))
        }
    };
    let told = match (waits_for, messages) {
        (Some(waits_for), _) => format!(
            "request {request}: {events} forgotten in the tables of this database; for the stream it waits for {waits_for}, then run \
             `aftercommit forget --resume`\n"
        ),
        (None, Some(messages)) => {
            format!("request {request}: {events} forgotten; {} of the stream erased\n", counted(*messages, "message"))
        }
        (None, None) => {
            format!("request {request}: {events} forgotten; this database publishes to no stream\n")
        }
    };
    told + &unknown
}
