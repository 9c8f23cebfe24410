//! Texts of others on a terminal.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use chrono::{DateTime, Utc};

use aftercommit_core::text::is_harmless;
pub(super) use aftercommit_core::text::{counted, cut, plain};

/// A payload: text as it is, the rest in Base64.
pub(super) fn payload(bytes: &[u8]) -> String {
    match text(bytes) {
        Some(text) => text.to_string(),
        None => format!("(Base64) {}", STANDARD.encode(bytes)),
    }
}

/// A payload as a member of a JSON object: its name and its value.
pub(super) fn payload_member(bytes: &[u8]) -> (&'static str, String) {
    match text(bytes) {
        Some(text) => ("payload", text.to_string()),
        None => ("payload_base64", STANDARD.encode(bytes)),
    }
}

fn text(bytes: &[u8]) -> Option<&str> {
    let harmless = |c: char| is_harmless(c) || matches!(c, '\n' | '\t' | '\r');
    std::str::from_utf8(bytes).ok().filter(|text| text.chars().all(harmless))
}

/// A time to the millisecond.
pub(super) fn time(at: DateTime<Utc>) -> String {
    at.format("%Y-%m-%d %H:%M:%S%.3fZ").to_string()
}

/// Rows under a heading, in columns as wide as they need to be; the last one is not filled up.
pub(super) fn table(heading: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([heading[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..heading.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let padded = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_string() + "\n"
    };
    let rows = rows.iter().map(|row| line(row.iter().map(String::as_str).collect()));
    std::iter::once(line(heading.to_vec())).chain(rows).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_reaches_the_terminal_that_it_would_obey() {
        assert_eq!(payload(b"\x1b]0;gotcha\x07"), "(Base64) G10wO2dvdGNoYQc=");
        assert_eq!(payload(b"{\n}"), "{\n}");
        assert_eq!(payload_member(&[0xff]), ("payload_base64", "/w==".into()));
    }

    #[test]
    fn a_table_has_columns() {
        let rows = [vec!["1".into(), "é".into(), "x".into()], vec!["22".into(), "ab".into(), "long".into()]];
        assert_eq!(table(&["id", "k", "reason"], &rows), "id  k   reason\n1   é   x\n22  ab  long\n");
    }
}
