//! What the programs log, and how.

use std::env;
use std::io::IsTerminal;
use std::sync::OnceLock;

use clap::{Args, ValueEnum};
use tracing::{Level, Metadata};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

/// How log lines are written; text when nobody has chosen.
static FORMAT: OnceLock<LogFormat> = OnceLock::new();

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    /// For people
    Text,
    /// One JSON object per line, for log collectors
    Json,
}

/// The form of log lines.
#[derive(Debug, Args)]
#[command(next_help_heading = "Logs")]
pub(super) struct LogArgs {
    /// How log lines are written to standard error; RUST_LOG says which, such as info,aftercommit_relay=debug
    #[arg(
        long,
        env = "AFTERCOMMIT_LOG_FORMAT",
        value_enum,
        value_name = "FORMAT",
        default_value = "text",
        global = true
    )]
    log_format: LogFormat,
}

impl LogArgs {
    /// From now on lines are written so, in this process.
    pub(super) fn choose(&self) {
        _ = FORMAT.set(self.log_format);
    }
}

/// Logs to standard error, as `RUST_LOG` says; without it from level info, of the NATS client only warnings.
pub(super) fn start_logging() {
    let wanted = env::var(EnvFilter::DEFAULT_ENV).ok().filter(|wanted| !wanted.is_empty());
    let filter = wanted.and_then(|wanted| EnvFilter::try_new(wanted).ok());
    let filter = filter.unwrap_or_else(|| EnvFilter::new("info,async_nats=warn"));
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match FORMAT.get() {
        // The fields of a line are beside its message, those of its innermost span under `span`.
        Some(LogFormat::Json) => lines.json().flatten_event(true).with_span_list(false).boxed(),
        _ => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
    };
    tracing_subscriber::registry().with(filter).with(filter_fn(is_discreet)).with(lines).init();
}

/// Keeps out what the drivers would show of secrets and payloads: the NATS client shows whole messages and answers when it
/// is asked to be talkative, the PostgreSQL driver warns of lines of the password file and of parameters of the URL with
/// what is in them.
fn is_discreet(line: &Metadata<'_>) -> bool {
    match line.target() {
        "async_nats::connection" => *line.level() != Level::TRACE,
        "async_nats::jetstream::context" => *line.level() < Level::DEBUG,
        "sqlx_postgres::options::parse" => line.fields().field("value").is_none(),
        "sqlx_postgres::options::pgpass" => line.fields().field("line").is_none(),
        _ => true,
    }
}
