//! What the programs log, and how.

use std::io::IsTerminal;
use std::sync::OnceLock;
use std::{env, fmt};

use clap::{Args, ValueEnum};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::fmt::format::{JsonFields, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormattedFields};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::{LookupSpan, SpanRef};
use tracing_subscriber::util::SubscriberInitExt;

use aftercommit_core::error::Error;

#[cfg(feature = "otlp")]
use super::telemetry;

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

/// Logs to standard error, as `RUST_LOG` says; without it from level info, of the NATS client only warnings. Exports the same
/// lines, and traces and metrics, when the environment says where to; `program` is what the service is called there when the
/// environment does not.
///
/// # Errors
/// When the environment says something about the export that cannot be done.
pub(super) fn start_logging(program: &str) -> Result<(), Error> {
    #[cfg(feature = "otlp")]
    telemetry::start(program)?;
    let wanted = env::var(EnvFilter::DEFAULT_ENV).ok().filter(|wanted| !wanted.is_empty());
    let filter = wanted.and_then(|wanted| EnvFilter::try_new(wanted).ok());
    let filter = filter.unwrap_or_else(|| EnvFilter::new("info,async_nats=warn"));
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match FORMAT.get() {
        // The fields of a line are beside its message, those of its innermost span under `span`.
        Some(LogFormat::Json) => {
            lines.json().flatten_event(true).with_span_list(false).map_event_format(WithTrace).boxed()
        }
        _ => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
    };
    let registry = tracing_subscriber::registry().with(filter).with(filter_fn(is_discreet)).with(lines);
    #[cfg(feature = "otlp")]
    let registry = registry.with(telemetry::layer());
    registry.init();
    #[cfg(not(feature = "otlp"))]
    if let Some(variable) = wanted_in_vain(&|name| env::var(name).ok()) {
        tracing::warn!(
            variable,
            program,
            "nothing is exported by OTLP: this program was built without the feature otlp"
        );
    }
    Ok(())
}

/// The span of one command of the operator's tool; none when no spans are exported, so that its lines stay short.
pub(super) fn command_span(command: &str) -> tracing::Span {
    match aftercommit_core::trace::tracing() {
        Some(_) => tracing::info_span!("command", command),
        None => tracing::Span::none(),
    }
}

/// Exports what is left; the process ends.
pub(super) fn stop_logging() {
    #[cfg(feature = "otlp")]
    telemetry::stop();
}

/// The variable that says where to export to, for a program that cannot export; none when nothing is to be exported.
#[cfg_attr(feature = "otlp", allow(dead_code))]
fn wanted_in_vain(environment: &dyn Fn(&str) -> Option<String>) -> Option<&'static str> {
    const ENDPOINTS: [&str; 4] = [
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
        "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT",
    ];
    let is_off = environment("OTEL_SDK_DISABLED").is_some_and(|text| text.eq_ignore_ascii_case("true"));
    let is_set = |name: &&str| environment(name).is_some_and(|url| !url.trim().is_empty());
    ENDPOINTS.into_iter().find(is_set).filter(|_| !is_off)
}

/// JSON lines with the trace that they belong to: the fields `trace_id` and `span_id` beside the message, where tracing tools
/// look for them.
struct WithTrace<F>(F);

impl<S, F> FormatEvent<S, JsonFields> for WithTrace<F>
where
    S: Subscriber + for<'s> LookupSpan<'s>,
    F: FormatEvent<S, JsonFields>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, JsonFields>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let (trace_id, span_id) = match current_ids() {
            Some((trace_id, span_id)) => (Some(trace_id), Some(span_id)),
            // Without an export there are no spans but the publisher's, whose trace the worker's spans name.
            None => (context.event_scope().into_iter().flatten().find_map(|span| named_trace(&span)), None),
        };
        let Some(trace_id) = trace_id else { return self.0.format_event(context, writer, event) };
        let mut line = String::new();
        self.0.format_event(context, Writer::new(&mut line), event)?;
        let Some(open) = line.trim_end().strip_suffix('}') else { return writer.write_str(&line) };
        write!(writer, "{open},\"trace_id\":\"{trace_id}\"")?;
        if let Some(span_id) = span_id {
            write!(writer, ",\"span_id\":\"{span_id}\"")?;
        }
        writeln!(writer, "}}")
    }
}

#[cfg(feature = "otlp")]
use telemetry::current_ids;

#[cfg(not(feature = "otlp"))]
fn current_ids() -> Option<(String, String)> {
    None
}

/// The field `trace_id` of a span, if it has one that is nothing else.
fn named_trace<S: for<'s> LookupSpan<'s>>(span: &SpanRef<'_, S>) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Named {
        trace_id: Option<String>,
    }
    let extensions = span.extensions();
    let fields = extensions.get::<FormattedFields<JsonFields>>()?;
    let Named { trace_id } = serde_json::from_str(&fields.fields).ok()?;
    trace_id.filter(|id| id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit()))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_cannot_export_says_which_variable_is_in_vain() {
        let wanted = |variables: &[(&str, &str)]| {
            let of = |name: &str| variables.iter().find(|(own, _)| *own == name).map(|(_, value)| value.to_string());
            wanted_in_vain(&of)
        };
        let endpoint = ("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "http://collector:4318/v1/logs");
        assert_eq!(wanted(&[endpoint]), Some(endpoint.0));
        assert_eq!(wanted(&[endpoint, ("OTEL_SDK_DISABLED", "true")]), None);
        assert_eq!(wanted(&[("OTEL_EXPORTER_OTLP_ENDPOINT", ""), ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")]), None);
    }
}
