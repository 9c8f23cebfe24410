//! NATS subjects: validated tokens, and the subject of an event type under a prefix.

use std::fmt;

/// The longest event type in bytes.
pub const MAX_TYPE_BYTES: usize = 200;

/// Why a text cannot be part of a subject.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a subject: {problem}")]
pub struct SubjectError {
    text: String,
    problem: &'static str,
}

/// Checks that `text` is one or more tokens of letters, digits, `_` and `-`, separated by dots.
///
/// # Errors
/// When it is empty, has an empty token or another character, or is longer than [`MAX_TYPE_BYTES`].
pub fn check_tokens(text: &str) -> Result<(), SubjectError> {
    match problem(text) {
        Some(problem) => Err(SubjectError { text: text.chars().take(64).collect(), problem }),
        None => Ok(()),
    }
}

/// [`check_tokens`] for the compiler.
pub const fn problem(text: &str) -> Option<&'static str> {
    let bytes = text.as_bytes();
    if bytes.len() > MAX_TYPE_BYTES {
        return Some("it is longer than 200 bytes");
    }
    let (mut at, mut empty) = (0, true);
    while at < bytes.len() {
        match bytes[at] {
            b'.' if empty => return Some("it has an empty token"),
            b'.' => empty = true,
            b if b.is_ascii_alphanumeric() || b == b'_' || b == b'-' => empty = false,
            _ => return Some("only letters, digits, '_', '-' and dots between them are allowed"),
        }
        at += 1;
    }
    if empty { Some("it has an empty token") } else { None }
}

/// Whether a subject filter, with `*` and `>`, lets a subject through.
pub fn matches(filter: &str, subject: &str) -> bool {
    let mut tokens = subject.split('.');
    for wanted in filter.split('.') {
        match (wanted, tokens.next()) {
            (">", token) => return token.is_some(),
            (_, None) => return false,
            (wanted, Some(token)) if wanted == "*" || wanted == token => {}
            _ => return false,
        }
    }
    tokens.next().is_none()
}

/// The first tokens of every subject that one outbox publishes to, such as `events`.
#[derive(Clone, PartialEq, Eq)]
pub struct SubjectPrefix(String);

impl SubjectPrefix {
    /// Takes a prefix of one or more tokens.
    ///
    /// # Errors
    /// As [`check_tokens`], and when it begins with `$` names that NATS reserves.
    pub fn new(prefix: impl Into<String>) -> Result<Self, SubjectError> {
        let prefix = prefix.into();
        check_tokens(&prefix)?;
        Ok(Self(prefix))
    }

    /// The subject of events of `event_type`: `{prefix}.{type}`.
    pub fn subject(&self, event_type: &str) -> String {
        // As large as it must be, because a message's subject with spare room costs the client another allocation.
        let mut subject = String::with_capacity(self.0.len() + 1 + event_type.len());
        subject.extend([&self.0, ".", event_type]);
        subject
    }

    /// The subject filter that covers every type: `{prefix}.>`.
    pub fn wildcard(&self) -> String {
        format!("{}.>", self.0)
    }

    /// The event type that a subject stands for, when the subject is under this prefix.
    pub fn event_type<'a>(&self, subject: &'a str) -> Option<&'a str> {
        subject.strip_prefix(&self.0)?.strip_prefix('.')
    }
}

impl Default for SubjectPrefix {
    /// `events`.
    fn default() -> Self {
        Self("events".into())
    }
}

impl fmt::Display for SubjectPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for SubjectPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_that_nats_would_read_otherwise_are_refused() {
        for good in ["a", "order.placed", "A-1.b_2"] {
            assert!(check_tokens(good).is_ok(), "{good}");
        }
        let long = "x".repeat(201);
        for bad in ["", ".", "a.", ".a", "a..b", "a.*", "a.>", "a b", "a\r\nb", "$JS.API", "ä", long.as_str()] {
            assert!(check_tokens(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_filter_lets_its_subjects_through() {
        for (filter, subject, through) in [
            ("a.b", "a.b", true),
            ("a.b", "a.b.c", false),
            ("a.b.c", "a.b", false),
            ("a.*", "a.b", true),
            ("a.*", "a.b.c", false),
            ("a.>", "a.b.c", true),
            ("a.>", "a", false),
            ("*.b", "a.b", true),
            (">", "a", true),
        ] {
            assert_eq!(matches(filter, subject), through, "{filter} {subject}");
        }
    }

    #[test]
    fn subject_and_type_are_inverse() {
        let prefix = SubjectPrefix::new("shop.events").unwrap();
        let subject = prefix.subject("order.placed");
        assert_eq!(subject, "shop.events.order.placed");
        assert_eq!(prefix.event_type(&subject), Some("order.placed"));
        assert_eq!(prefix.event_type("shop.eventsorder"), None);
    }
}
