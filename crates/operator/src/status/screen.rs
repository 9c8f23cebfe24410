//! The status on one screen.

use std::fmt::{self, Write};

use chrono::{DateTime, SecondsFormat, Utc};

use super::model::{Severity, Status, SubscriberStatus};
use aftercommit_core::postgres::status::COUNT_LIMIT;
use aftercommit_core::postgres::time;
use aftercommit_core::text::{counted, cut, plain, span};

/// Whether there are colours and bars: only on a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Paint {
    /// None.
    Plain,
    /// As ANSI sequences.
    #[cfg_attr(not(feature = "cli"), expect(dead_code, reason = "only the command line has a terminal"))]
    Colours,
}

const RED: &str = "31";
const YELLOW: &str = "33";
const GREEN: &str = "32";
const BOLD: &str = "1";

/// How long a full bar is.
const BAR: usize = 10;

impl Paint {
    fn paint(self, colour: &str, text: &str) -> String {
        match self {
            Self::Plain => text.into(),
            Self::Colours => format!("\u{1b}[{colour}m{text}\u{1b}[0m"),
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&screen(self, Paint::Plain))
    }
}

/// Everything, the verdict first.
pub fn screen(status: &Status, paint: Paint) -> String {
    let mut text = verdict(status, paint);
    text += "\n";
    let more = if status.backlog.events >= COUNT_LIMIT { " or more" } else { "" };
    let oldest = status.backlog.oldest_seconds.map(|age| format!(", the oldest written {} ago", span(time::span(age))));
    let parked = match status.parked.events + status.parked.behind {
        0 => String::new(),
        parked => format!("; {parked} parked"),
    };
    let events = counted(status.backlog.events, "event");
    line(&mut text, "backlog", &format!("{events}{more} to publish{}{parked}", oldest.unwrap_or_default()));
    relay(status, &mut text);
    match (&status.stream, &status.stream_error) {
        (Some(stream), _) => {
            let messages = counted(i128::from(stream.messages), "message");
            let (first, last) = (stream.first_stream_sequence, stream.last_stream_sequence);
            line(&mut text, "stream", &format!("{}: {messages}, sequences {first} to {last}", plain(&stream.name)));
        }
        (None, error) => {
            line(&mut text, "stream", &format!("?  {}", cut(error.as_deref().unwrap_or("not asked"), 300)))
        }
    }
    for pause in &status.paused {
        let reason = pause.reason.as_ref().map(|reason| format!(": {}", cut(reason, 200))).unwrap_or_default();
        let (name, by) = (plain(&pause.name), plain(&pause.by));
        line(&mut text, "paused", &format!("{name} since {} by {by}{reason}", at(pause.since)));
    }
    text += &subscribers(status, paint);
    for other in status.other_consumers.iter().flatten() {
        let kind = if other.durable { "durable" } else { "temporary" };
        let pending = counted(i128::from(other.pending), "message");
        let told = format!("{} ({kind}, {pending} not delivered): no subscriber of aftercommit", plain(&other.name));
        line(&mut text, "other", &told);
    }
    text
}

fn line(text: &mut String, name: &str, value: &str) {
    let _ = writeln!(text, "{name:<11}  {value}");
}

fn verdict(status: &Status, paint: Paint) -> String {
    if status.problems.is_empty() {
        return paint.paint(GREEN, "OK: everything flows") + "\n";
    }
    let stuck = status.problems.iter().filter(|problem| problem.severity == Severity::Stuck).count();
    let rest = status.problems.len() - stuck;
    let parts = [(stuck, "stuck"), (rest, if rest == 1 { "needs attention" } else { "need attention" })];
    let parts: Vec<String> =
        parts.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")).collect();
    let colour = if stuck > 0 { RED } else { YELLOW };
    let mut text = paint.paint(colour, &format!("NOT WELL: {}", parts.join(", "))) + "\n";
    for problem in &status.problems {
        let (mark, colour) = match problem.severity {
            Severity::Stuck => ("STUCK", RED),
            Severity::Attention => ("LOOK", YELLOW),
        };
        let _ = writeln!(
            text,
            "  {} {}: {}",
            paint.paint(colour, &format!("{mark:<5}")),
            plain(&problem.place),
            plain(&problem.what)
        );
        let _ = writeln!(text, "        -> {}", plain(&problem.remedy));
    }
    text
}

fn relay(status: &Status, text: &mut String) {
    let Some(relay) = &status.relay else { return line(text, "relay", "none has ever led this outbox") };
    let (leader, epoch) = (plain(&relay.leader), relay.epoch);
    if !relay.alive {
        return line(text, "relay", &format!("none leads; the last was {leader}, epoch {epoch}"));
    }
    let since = relay.since.map(|since| format!(" since {}", at(since))).unwrap_or_default();
    line(text, "relay", &format!("{leader} leads{since}, epoch {epoch}"));
    let state = cut(relay.state.as_deref().unwrap_or("?"), 300);
    let number = |number: Option<i64>| number.map_or_else(|| "?".into(), |number| number.to_string());
    let (id, sequence) = (number(relay.last_outbox_id), number(relay.last_stream_sequence));
    line(text, "", &format!("{state}; last outbox id {id}, stream sequence {sequence}"));
}

const HEADINGS: [&str; 8] =
    ["subscriber", "pending", "in flight", "oldest", "failing", "redrive", "dead letters", "active worker"];

fn subscribers(status: &Status, paint: Paint) -> String {
    if status.subscribers.is_empty() {
        return String::new();
    }
    let most = status.subscribers.values().filter_map(|one| one.pending).max().unwrap_or(0);
    let rows: Vec<Vec<String>> = status.subscribers.iter().map(|(name, one)| row(name, one)).collect();
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or(0).max(HEADINGS[column].len())
    };
    let widths: Vec<usize> = (0..HEADINGS.len() - 1).map(width).collect();
    let format_row = |cells: &[String]| {
        let mut line = format!("{:<1$}", cells[0], widths[0]);
        for (cell, width) in cells[1..].iter().zip(&widths[1..]) {
            let _ = write!(line, "  {cell:>width$}");
        }
        line + "  " + &cells[HEADINGS.len() - 1]
    };
    let headings = HEADINGS.map(String::from);
    let mut text = format!("\n{}\n", paint.paint(BOLD, format_row(&headings).trim_end()));
    for (row, one) in rows.iter().zip(status.subscribers.values()) {
        let bar = match (paint, one.pending) {
            (Paint::Colours, Some(pending)) if pending > 0 => {
                let length = (pending as u128 * BAR as u128).div_ceil(most.max(1).into());
                format!("  {}", paint.paint(YELLOW, &"█".repeat(length as usize)))
            }
            _ => String::new(),
        };
        let _ = writeln!(text, "{}{bar}", format_row(row));
    }
    text
}

fn row(name: &str, one: &SubscriberStatus) -> Vec<String> {
    let unsigned = |number: Option<u64>| number.map_or_else(|| "?".into(), |number| number.to_string());
    let signed = |number: Option<i64>| number.map_or_else(|| "?".into(), |number| number.to_string());
    let oldest = match (one.pending, one.in_flight, one.oldest_seconds) {
        (Some(0), Some(0), _) => "-".into(),
        (_, _, Some(age)) => span(time::span(age)),
        _ => "?".into(),
    };
    let active = match (&one.active, one.failing) {
        (Some(active), _) => {
            let since = one.active_since.map(|since| format!(" since {}", at(since))).unwrap_or_default();
            let standbys = one.standbys.filter(|standbys| *standbys > 0);
            plain(active) + &since + &standbys.map(|more| format!(", {more} standing by")).unwrap_or_default()
        }
        (None, Some(_)) => "none".into(),
        (None, None) => "? (none in this database)".into(),
    };
    let paused = if one.paused { ", paused" } else { "" };
    let lost = if one.has_consumer == Some(false) { ", no consumer" } else { "" };
    let numbers = [unsigned(one.pending), unsigned(one.in_flight), oldest, signed(one.failing), signed(one.redrive)];
    let mut cells = vec![plain(name)];
    cells.extend(numbers);
    cells.extend([signed(one.dead_letters), format!("{active}{paused}{lost}")]);
    cells
}

fn at(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Secs, true)
}
