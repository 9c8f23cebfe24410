//! Parts of pages: times, numbers, tables, charts, states.

pub(crate) mod assets;
mod chart;

use chrono::{DateTime, Utc};
use maud::{Markup, html};

pub(crate) use chart::chart;

/// A time with its age; the whole of it, with the zone, stands behind it.
pub(crate) fn time(at: DateTime<Utc>, now: DateTime<Utc>) -> Markup {
    html! {
        time datetime=(at.to_rfc3339()) title=(at.format("%Y-%m-%d %H:%M:%S%.3f UTC")) {
            (at.format("%m-%d %H:%M:%S")) " " span.age { (age(now, at)) }
        }
    }
}

/// How long ago, in one unit; what lies ahead is said to.
fn age(now: DateTime<Utc>, at: DateTime<Utc>) -> String {
    let seconds = now.signed_duration_since(at).num_seconds();
    match seconds {
        -1..=1 => "now".into(),
        2.. => format!("{} ago", span(seconds)),
        _ => format!("in {}", span(-seconds)),
    }
}

/// A span of time in one unit, such as `3 min`.
pub(crate) fn span(seconds: i64) -> String {
    match seconds {
        ..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// A number with thin spaces, or `?` when it is not known.
pub(crate) fn number(value: Option<i128>) -> Markup {
    let Some(value) = value else { return html! { span.unknown title="not known" { "?" } } };
    let digits = value.unsigned_abs().to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    html! { span.number { @if value < 0 { "−" } (text) } }
}

/// What is not there, or a text.
pub(crate) fn or_none(text: Option<&str>) -> Markup {
    match text {
        Some(text) => html! { (text) },
        None => html! { span.none { "–" } },
    }
}

/// How something stands: a word with a sign of its own shape, so that no colour is needed to read it.
pub(crate) fn state(tone: Tone, word: &str) -> Markup {
    html! { span class={ "state " (tone.class()) } { span.sign aria-hidden="true" { (tone.sign()) } (word) } }
}

/// How good or bad a state is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tone {
    Well,
    Rests,
    Look,
    Stuck,
    Unknown,
}

impl Tone {
    fn class(self) -> &'static str {
        match self {
            Self::Well => "well",
            Self::Rests => "rests",
            Self::Look => "look",
            Self::Stuck => "stuck",
            Self::Unknown => "unknown",
        }
    }

    fn sign(self) -> &'static str {
        match self {
            Self::Well => "●",
            Self::Rests => "◌",
            Self::Look => "▲",
            Self::Stuck => "■",
            Self::Unknown => "?",
        }
    }
}

/// A table, or what would be in it.
pub(crate) fn table(caption: &str, heads: &[(&str, &str)], rows: &[Vec<Markup>], empty: &str) -> Markup {
    if rows.is_empty() {
        return html! { p.empty { (empty) } };
    }
    html! {
        div.wide tabindex="0" role="region" aria-label=(caption) {
            table {
                caption { (caption) }
                thead { tr { @for (name, class) in heads { th scope="col" class=(class) { (name) } } } }
                tbody {
                    @for row in rows {
                        tr { @for (cell, (_, class)) in row.iter().zip(heads) { td class=(class) { (cell) } } }
                    }
                }
            }
        }
    }
}

/// The command that does the same, to copy.
pub(crate) fn command(text: &str) -> Markup {
    html! { p.command { span { "The same on the command line: " } code { (text) } } }
}

/// Names and values.
pub(crate) fn facts(pairs: &[(&str, Markup)]) -> Markup {
    html! { dl.facts { @for (name, value) in pairs { div { dt { (name) } dd { (value) } } } } }
}

/// A payload: text as it is, anything else as bytes in hexadecimal. Folded, and cut after 64 KiB.
pub(crate) fn payload(bytes: &[u8], shown: bool) -> Markup {
    const MOST: usize = 64 << 10;
    if !shown {
        return html! { p.empty { "Your role does not see payloads; it takes reader. This one has " (bytes.len()) " bytes." } };
    }
    let (start, is_cut) = (&bytes[..bytes.len().min(MOST)], bytes.len() > MOST);
    let text = match std::str::from_utf8(start) {
        Ok(text) => text.to_string(),
        // A character may have been cut in two.
        Err(error) if is_cut && error.error_len().is_none() => {
            String::from_utf8_lossy(&start[..error.valid_up_to()]).into_owned()
        }
        Err(_) => start.iter().take(4096).map(|byte| format!("{byte:02x} ")).collect(),
    };
    html! {
        details.payload {
            summary { "Payload, " (bytes.len()) " bytes" }
            pre { (pretty(&text)) }
            @if is_cut { p.empty { "Only the beginning is shown." } }
        }
    }
}

/// JSON with line breaks, in the order and with the numbers of its writer; anything else as it is.
fn pretty(text: &str) -> String {
    let raw: Result<Box<serde_json::value::RawValue>, _> = serde_json::from_str(text);
    match raw {
        Ok(raw) => broken_into_lines(raw.get()),
        Err(_) => text.into(),
    }
}

/// Valid JSON, broken into lines without reading its values.
fn broken_into_lines(json: &str) -> String {
    let (mut text, mut depth, mut in_string, mut escaped) = (String::new(), 0_usize, false, false);
    let line = |text: &mut String, depth: usize| {
        text.push('\n');
        text.push_str(&"  ".repeat(depth.min(64)));
    };
    let mut characters = json.chars().filter(|c| !c.is_control()).peekable();
    while let Some(c) = characters.next() {
        if in_string {
            text.push(c);
            (in_string, escaped) = (escaped || c != '"', !escaped && c == '\\');
            continue;
        }
        match c {
            '"' => {
                in_string = true;
                text.push(c);
            }
            '{' | '[' => {
                while characters.next_if(|c| c.is_whitespace()).is_some() {}
                text.push(c);
                if let Some(end) = characters.next_if(|c| matches!(c, '}' | ']')) {
                    text.push(end);
                    continue;
                }
                depth += 1;
                line(&mut text, depth);
            }
            '}' | ']' => {
                depth = depth.saturating_sub(1);
                line(&mut text, depth);
                text.push(c);
            }
            ',' => {
                text.push(c);
                line(&mut text, depth);
            }
            ':' => text.push_str(": "),
            c if c.is_whitespace() => {}
            c => text.push(c),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;

    use super::*;

    #[test]
    fn numbers_and_ages_are_short_and_what_is_unknown_is_no_number() {
        assert_eq!(number(Some(1_234_567)).into_string(), "<span class=\"number\">1\u{202f}234\u{202f}567</span>");
        assert!(number(None).into_string().contains('?'));
        let now = Utc::now();
        let ago = |seconds| age(now, now - TimeDelta::seconds(seconds));
        assert_eq!(
            [ago(0), ago(59), ago(3700), ago(200_000), ago(-90)],
            ["now", "59 s ago", "61 min ago", "2 d ago", "in 90 s"]
        );
    }

    #[test]
    fn json_is_broken_into_lines_and_nothing_else_is_changed() {
        let text = r#"{"b":12345678901234567890.10,"a":[],"t":"a,{\"b\\","o":{"x":[1,2]}}"#;
        let lines = broken_into_lines(text);
        let expected = "{\n  \"b\": 12345678901234567890.10,\n  \"a\": [],\n  \"t\": \"a,{\\\"b\\\\\",\n  \"o\": {\n    \"x\": [\n      1,\n      2\n    ]\n  }\n}";
        assert_eq!(lines, expected);
        assert_eq!(pretty("<script>"), "<script>");
    }

    #[test]
    fn texts_of_others_stay_texts() {
        let shown = payload(b"{\"a\": \"<script>alert(1)</script>\"}", true).into_string();
        assert!(shown.contains("&lt;script&gt;") && !shown.contains("<script>"), "{shown}");
        assert!(!payload(b"secret", false).into_string().contains("secret"));
    }
}
