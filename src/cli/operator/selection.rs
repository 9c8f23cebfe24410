//! Which dead letters a command is about.

use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use humantime::{Duration, format_duration};
use uuid::Uuid;

use crate::admin::dead::Filter;

/// What letters can be found by.
#[derive(Args)]
pub(super) struct LetterArgs {
    /// Letters by id
    #[arg(value_name = "ID")]
    ids: Vec<i64>,
    /// The letters of this event; may be given several times
    #[arg(long = "event", value_name = "EVENT_ID")]
    events: Vec<Uuid>,
    /// Only this subscriber's
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    subscriber: Option<String>,
    /// Only those of events of this type
    #[arg(long = "type", value_name = "TYPE", value_parser = NonEmptyStringValueParser::new())]
    event_type: Option<String>,
    /// Only those of events with this key
    #[arg(long, value_name = "KEY", value_parser = NonEmptyStringValueParser::new())]
    key: Option<String>,
    /// Only those whose reason contains this text
    #[arg(long, value_name = "TEXT", value_parser = NonEmptyStringValueParser::new())]
    error: Option<String>,
    /// Only those that have been dead letters for at least so long, such as 1h
    #[arg(long, value_name = "DURATION")]
    older_than: Option<Duration>,
    /// Only those that became dead letters within the last so long, such as 1h
    #[arg(long, value_name = "DURATION")]
    newer_than: Option<Duration>,
}

impl LetterArgs {
    pub(super) fn filter(&self) -> Filter {
        Filter {
            ids: self.ids.clone(),
            events: self.events.iter().map(|id| (*id).into()).collect(),
            subscriber: self.subscriber.clone(),
            event_type: self.event_type.clone(),
            key: self.key.clone(),
            error: self.error.clone(),
            older_than: self.older_than.map(Into::into),
            newer_than: self.newer_than.map(Into::into),
            all: false,
        }
    }

    /// The same as arguments for a shell, each behind a space.
    fn said(&self) -> String {
        let mut said: String = self.ids.iter().map(|id| format!(" {id}")).collect();
        said.extend(self.events.iter().map(|id| format!(" --event {id}")));
        let texts = [
            ("--subscriber", &self.subscriber),
            ("--type", &self.event_type),
            ("--key", &self.key),
            ("--error", &self.error),
        ];
        for (flag, text) in texts {
            said.extend(text.iter().map(|text| format!(" {flag} {}", quoted(text))));
        }
        for (flag, age) in [("--older-than", self.older_than), ("--newer-than", self.newer_than)] {
            said.extend(age.map(|age| format!(" {flag} {}", quoted(&format_duration(age.into()).to_string()))));
        }
        said
    }
}

/// The same for what changes something: all of them must be said.
#[derive(Args)]
pub(super) struct SelectionArgs {
    #[command(flatten)]
    letters: LetterArgs,
    /// All dead letters in the database
    #[arg(long, conflicts_with_all =
        ["ids", "events", "subscriber", "event_type", "key", "error", "older_than", "newer_than"])]
    all: bool,
}

impl SelectionArgs {
    pub(super) fn filter(&self) -> Filter {
        Filter { all: self.all, ..self.letters.filter() }
    }

    /// As arguments for a shell, each behind a space; empty when nothing is said.
    pub(super) fn said(&self) -> String {
        if self.all { " --all".into() } else { self.letters.said() }
    }
}

/// A word for a shell.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:@,+=".contains(c);
    if text.chars().all(plain) { text.into() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        selection: SelectionArgs,
    }

    #[test]
    fn what_is_said_says_the_same_again() {
        let event = "01a1fc42-0bc3-7cc0-af42-b56e125f1d94";
        let line =
            ["test", "17", "18", "--event", event, "--error", "it's $HOME", "--older-than", "90m", "--key", "a-1"];
        let line = Line::try_parse_from(line).unwrap_or_else(|error| panic!("{error}"));
        let said = line.selection.said();
        assert_eq!(said, format!(" 17 18 --event {event} --key a-1 --error 'it'\\''s $HOME' --older-than '1h 30m'"));
        assert!(Line::try_parse_from(["test", "--all", "--key", "a"]).is_err());
        assert!(Line::try_parse_from(["test", "--error", ""]).is_err());
    }
}
