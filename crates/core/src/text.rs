//! Texts of others, such as keys, types and errors, where people read them: on a terminal, in a log, over HTTP.

use std::time::Duration;

/// The text on one line, without what a terminal would obey or what would change the order of its characters.
pub fn plain(text: &str) -> String {
    let shown = |c: char| if is_harmless(c) { c.to_string() } else { c.escape_default().to_string() };
    text.chars().map(shown).collect()
}

/// The same, cut after so many characters.
pub fn cut(text: &str, length: usize) -> String {
    // What is cut off need not be escaped: texts of others can be long.
    let start: String = text.chars().take(length + 1).collect();
    let text = plain(&start);
    match text.char_indices().nth(length) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// A number with what it counts: `1 event`, `2 events`.
pub fn counted(count: impl Into<i128>, one: &str) -> String {
    match count.into() {
        1 => format!("1 {one}"),
        many => format!("{many} {one}s"),
    }
}

/// A duration in words, in its largest unit.
pub fn span(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    for (unit, length) in [("days", 86_400.0), ("hours", 3_600.0), ("minutes", 60.0)] {
        if seconds >= 2.0 * length {
            return format!("{:.0} {unit}", seconds / length);
        }
    }
    if seconds >= 10.0 { format!("{seconds:.0} seconds") } else { format!("{seconds:.1} seconds") }
}

/// Whether a terminal prints the character and does nothing else.
pub fn is_harmless(c: char) -> bool {
    // Beside control characters: line and paragraph separators, marks and overrides of the writing direction, invisible
    // ones.
    let unseen = matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
    !c.is_control() && !unseen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_reaches_the_terminal_that_it_would_obey() {
        assert_eq!(plain("a\nb\u{1b}[31mc"), "a\\nb\\u{1b}[31mc");
        assert_eq!(plain("\u{9b}2J"), "\\u{9b}2J", "a control sequence in one character");
        assert_eq!(plain("pay \u{202e}0001"), "pay \\u{202e}0001", "the other way round");
        assert_eq!(plain("Müller, 東京"), "Müller, 東京");
    }

    #[test]
    fn a_long_text_is_cut() {
        assert_eq!(cut("abc", 2), "ab…");
        assert_eq!(cut("ab", 2), "ab");
        assert_eq!(cut("\u{1b}abc", 3), "\\u{…");
    }

    #[test]
    fn one_is_no_plural() {
        assert_eq!(
            [counted(0, "event"), counted(1, "event"), counted(2, "event")],
            ["0 events", "1 event", "2 events"]
        );
    }

    #[test]
    fn spans_are_told_in_their_largest_unit() {
        for (seconds, text) in [(1, "1.0 seconds"), (90, "90 seconds"), (120, "2 minutes"), (86_400, "24 hours")] {
            assert_eq!(span(Duration::from_secs(seconds)), text);
        }
        assert_eq!(span(Duration::from_hours(7 * 24)), "7 days");
    }
}
