//! Which dead letters or parked events a command is about.

use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use uuid::Uuid;

use super::time::{said, when};
use aftercommit_operator::{Filter, When};

/// What they can be found by.
#[derive(Args)]
#[command(next_help_heading = "Which")]
pub(super) struct DescribedArgs {
    /// Only those of events of this type
    #[arg(long = "type", value_name = "TYPE", value_parser = NonEmptyStringValueParser::new())]
    event_type: Option<String>,
    /// Only those of events with this key
    #[arg(long, value_name = "KEY", value_parser = NonEmptyStringValueParser::new())]
    key: Option<String>,
    /// Only those whose reason contains this text
    #[arg(long, value_name = "TEXT", value_parser = NonEmptyStringValueParser::new())]
    error: Option<String>,
    /// Only those given up or parked before this time or longer ago than this duration, such as 2026-03-01T12:00:00Z or 1h
    #[arg(long, value_name = "TIME", value_parser = when)]
    older_than: Option<When>,
    /// Only those given up or parked since this time or within this duration
    #[arg(long, value_name = "TIME", value_parser = when)]
    newer_than: Option<When>,
}

impl DescribedArgs {
    fn filter(&self) -> Filter {
        Filter {
            event_type: self.event_type.clone(),
            key: self.key.clone(),
            error: self.error.clone(),
            older_than: self.older_than,
            newer_than: self.newer_than,
            ..Filter::default()
        }
    }

    /// The same as arguments for a shell, each behind a space.
    fn said(&self) -> String {
        let texts = [("--type", &self.event_type), ("--key", &self.key), ("--error", &self.error)];
        let texts = texts.into_iter().filter_map(|(flag, text)| Some((flag, text.clone()?)));
        let times = [("--older-than", self.older_than), ("--newer-than", self.newer_than)];
        let times = times.into_iter().filter_map(|(flag, time)| Some((flag, said(time?))));
        texts.chain(times).map(|(flag, text)| format!(" {flag} {}", quoted(&text))).collect()
    }
}

/// A letter's number, or the id of its event.
#[derive(Debug, Clone, Copy)]
enum LetterId {
    Letter(i64),
    Event(Uuid),
}

fn letter_id(text: &str) -> Result<LetterId, String> {
    let letter = text.parse().map(LetterId::Letter);
    letter
        .or_else(|_| text.parse().map(LetterId::Event))
        .map_err(|_| "it is neither a letter's number nor an event's id".into())
}

/// Dead letters.
#[derive(Args)]
pub(super) struct LetterArgs {
    /// Dead letters by their numbers, or by the ids of their events
    #[arg(value_name = "ID", value_parser = letter_id)]
    ids: Vec<LetterId>,
    /// The same as the id of an event without it
    #[arg(long = "event", value_name = "EVENT_ID", hide = true)]
    events: Vec<Uuid>,
    /// Only this subscriber's
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new(), help_heading = "Which")]
    subscriber: Option<String>,
    #[command(flatten)]
    described: DescribedArgs,
}

impl LetterArgs {
    pub(super) fn filter(&self) -> Filter {
        let mut filter = Filter { subscriber: self.subscriber.clone(), ..self.described.filter() };
        for id in &self.ids {
            match id {
                LetterId::Letter(id) => filter.ids.push(*id),
                LetterId::Event(id) => filter.events.push((*id).into()),
            }
        }
        filter.events.extend(self.events.iter().map(|id| crate::EventId::from(*id)));
        filter
    }

    fn said(&self) -> String {
        let mut said = String::new();
        for id in &self.ids {
            said += &match id {
                LetterId::Letter(id) => format!(" {id}"),
                LetterId::Event(id) => format!(" {id}"),
            };
        }
        said.extend(self.events.iter().map(|id| format!(" {id}")));
        said.extend(self.subscriber.iter().map(|name| format!(" --subscriber {}", quoted(name))));
        said + &self.described.said()
    }
}

/// Dead letters, for what changes something: all of them must be said.
#[derive(Args)]
pub(super) struct SelectedLetters {
    #[command(flatten)]
    letters: LetterArgs,
    /// All dead letters in the database
    #[arg(long, help_heading = "Which", conflicts_with_all =
        ["ids", "events", "subscriber", "event_type", "key", "error", "older_than", "newer_than"])]
    all: bool,
}

/// Parked events.
#[derive(Args)]
pub(super) struct SelectedParked {
    /// Parked events by their ids
    #[arg(value_name = "EVENT_ID")]
    events: Vec<Uuid>,
    #[command(flatten)]
    described: DescribedArgs,
    /// All parked events
    #[arg(long, help_heading = "Which", conflicts_with_all =
        ["events", "event_type", "key", "error", "older_than", "newer_than"])]
    all: bool,
}

/// What a command that changes something is about.
pub(super) trait Selected {
    fn filter(&self) -> Filter;

    /// As arguments for a shell, each behind a space; empty when nothing is said.
    fn said(&self) -> String;
}

impl Selected for SelectedLetters {
    fn filter(&self) -> Filter {
        Filter { all: self.all, ..self.letters.filter() }
    }

    fn said(&self) -> String {
        if self.all { " --all".into() } else { self.letters.said() }
    }
}

impl Selected for SelectedParked {
    fn filter(&self) -> Filter {
        let events = self.events.iter().map(|id| (*id).into()).collect();
        Filter { events, all: self.all, ..self.described.filter() }
    }

    fn said(&self) -> String {
        if self.all {
            return " --all".into();
        }
        self.events.iter().map(|id| format!(" {id}")).collect::<String>() + &self.described.said()
    }
}

/// A word for a shell.
pub(super) fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:@,+=".contains(c);
    if !text.is_empty() && text.chars().all(plain) { text.into() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    const EVENT: &str = "01a1fc42-0bc3-7cc0-af42-b56e125f1d94";

    #[derive(Parser)]
    struct Letters {
        #[command(flatten)]
        selection: SelectedLetters,
    }

    #[derive(Parser)]
    struct Parked {
        #[command(flatten)]
        selection: SelectedParked,
    }

    #[test]
    fn what_is_said_says_the_same_again() {
        let line = ["test", "17", EVENT, "--error", "it's $HOME", "--older-than", "90m", "--key", "a-1"];
        let line = Letters::try_parse_from(line).unwrap_or_else(|error| panic!("{error}"));
        let said = line.selection.said();
        assert_eq!(said, format!(" 17 {EVENT} --key a-1 --error 'it'\\''s $HOME' --older-than '1h 30m'"));
        let filter = line.selection.filter();
        assert_eq!((filter.ids, filter.events.len()), (vec![17], 1));
        let line = ["test", EVENT, "--error", "max_payload of 4096", "--newer-than", "2026-03-01"];
        let line = Parked::try_parse_from(line).unwrap_or_else(|error| panic!("{error}"));
        let said = line.selection.said();
        assert_eq!(said, format!(" {EVENT} --error 'max_payload of 4096' --newer-than 2026-03-01T00:00:00Z"));
    }

    #[test]
    fn all_is_said_alone_and_nothing_is_no_text() {
        assert!(Letters::try_parse_from(["test", "--all", "--key", "a"]).is_err());
        assert!(Letters::try_parse_from(["test", "--error", ""]).is_err());
        assert!(Letters::try_parse_from(["test", "seventeen"]).is_err());
        assert!(Parked::try_parse_from(["test", "--all", "--key", "a"]).is_err());
        assert!(Parked::try_parse_from(["test", "17"]).is_err(), "a parked event has no number");
    }
}
