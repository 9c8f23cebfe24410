//! `aftercommit status`.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::as_json;
use crate::cli::servers::Servers;
use aftercommit_core::error::Error;
use aftercommit_operator::status::{Paint, screen, status};

/// Moves to the top of a terminal and clears what is below.
const CLEAR: &str = "\u{1b}[H\u{1b}[2J";

#[derive(Args)]
pub(super) struct Status {
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    /// Exit with status 1 when something is stuck or needs attention
    #[arg(long)]
    check: bool,
    /// Print it again and again until it is interrupted, every 2 seconds or as often as given
    #[arg(long, value_name = "DURATION", num_args = 0..=1, require_equals = true, default_missing_value = "2s")]
    #[arg(conflicts_with_all = ["json", "check"], value_parser = humantime::parse_duration)]
    watch: Option<Duration>,
    #[command(flatten)]
    servers: Servers,
}

/// What to print, and the exit status.
pub(super) async fn run(command: Status) -> Result<(String, ExitCode), Error> {
    let (postgres, nats, naming) = command.servers.config()?;
    let terminal = std::io::stdout().is_terminal();
    let paint = paint(terminal, std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty()));
    while let Some(every) = command.watch {
        let text = match status(&postgres, &nats, &naming).await {
            Ok(status) => screen(&status, paint),
            // It may come back.
            Err(error) => format!("{}\n", aftercommit_core::text::plain(&error.report())),
        };
        let clear = if terminal { CLEAR } else { "" };
        if write!(std::io::stdout(), "{clear}{text}").and_then(|()| std::io::stdout().flush()).is_err() {
            // Nobody reads it any more.
            return Ok((String::new(), ExitCode::SUCCESS));
        }
        tokio::time::sleep(every).await;
    }
    let status = status(&postgres, &nats, &naming).await?;
    let text = if command.json { as_json(&status)? } else { screen(&status, paint) };
    let exit = if command.check && !status.well { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    Ok((text, exit))
}

fn paint(terminal: bool, no_colour: bool) -> Paint {
    if terminal && !no_colour { Paint::Colours } else { Paint::Plain }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_for_terminals_whose_owner_wants_them() {
        assert_eq!(paint(true, false), Paint::Colours);
        assert_eq!(paint(true, true), Paint::Plain);
        assert_eq!(paint(false, false), Paint::Plain);
    }
}
