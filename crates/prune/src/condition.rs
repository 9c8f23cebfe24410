//! Conditions: a piece of SQL with values.

use std::fmt;
use std::sync::Arc;

use sqlx::error::BoxDynError;
use sqlx::postgres::PgArguments;
use sqlx::{Arguments, Encode, Postgres, Type};

use crate::error::PruneError;

/// Adds one value to the arguments of a statement.
type Bind = Arc<dyn Fn(&mut PgArguments) -> Result<(), BoxDynError> + Send + Sync>;

/// A condition on rows of the pruned table: SQL, with `$1`, `$2`, … for its values. The columns of the table stand without a
/// prefix, or behind `t.`.
///
/// The SQL is code: never build it from what a user typed; bind that as a value. What would leave the parentheses
/// around it, a comment and a semicolon are refused, so that a caller can only narrow a spec's own condition.
///
/// ```
/// use aftercommit::prune::Condition;
///
/// let condition = Condition::new("status = $1 and finished_at is not null").bind("terminated");
/// ```
#[derive(Clone)]
pub struct Condition {
    sql: String,
    values: Vec<Bind>,
}

impl Condition {
    /// A condition without values.
    pub fn new(sql: impl Into<String>) -> Self {
        Self { sql: sql.into(), values: Vec::new() }
    }

    /// The value of the next placeholder: the first is `$1`.
    pub fn bind<T>(mut self, value: T) -> Self
    where
        T: for<'q> Encode<'q, Postgres> + Type<Postgres> + Clone + Send + Sync + 'static,
    {
        self.values.push(Arc::new(move |arguments| arguments.add(value.clone())));
        self
    }

    /// Its text for a statement that has `before` values already, and its values added to them.
    pub(crate) fn write(&self, before: usize, arguments: &mut PgArguments) -> Result<String, PruneError> {
        let refuse = |problem: String| PruneError::spec(format!("the condition {:?} {problem}", self.sql));
        let (sql, highest) = renumbered(&self.sql, before).map_err(refuse)?;
        if highest != self.values.len() {
            let (has, values) = (highest, self.values.len());
            return Err(refuse(format!("has placeholders up to ${has}, and {values} values")));
        }
        for (index, value) in self.values.iter().enumerate() {
            value(arguments)
                .map_err(|error| refuse(format!("has a value ${} that cannot be sent: {error}", index + 1)))?;
        }
        Ok(sql)
    }

    /// Whether it can stand in a statement.
    pub(crate) fn check(&self) -> Result<(), PruneError> {
        self.write(0, &mut PgArguments::default()).map(drop)
    }
}

/// The highest placeholder of a piece of SQL that is to stand in a statement as one expression; 0 without one.
///
/// # Errors
/// [`Spec`](crate::PruneErrorKind::Spec) when it would leave the parentheses around it, is empty, or has a comment or a semicolon.
#[doc(hidden)]
pub fn check_expression(sql: &str) -> Result<usize, PruneError> {
    let (_, highest) =
        renumbered(sql, 0).map_err(|problem| PruneError::spec(format!("the condition {sql:?} {problem}")))?;
    Ok(highest)
}

/// The text without the values.
impl fmt::Debug for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Condition").field("sql", &self.sql).finish_non_exhaustive()
    }
}

/// The text with `by` added to the number of each placeholder, and the highest number that it has. An error when the text
/// would end the expression that it stands in.
fn renumbered(sql: &str, by: usize) -> Result<(String, usize), String> {
    let mut out = String::with_capacity(sql.len() + 8);
    let (mut open, mut highest, mut rest) = (Vec::new(), 0, sql);
    if sql.trim().is_empty() {
        return Err("is empty".into());
    }
    while let Some(c) = rest.chars().next() {
        let taken = match c {
            '\'' if out.ends_with(['e', 'E']) => quoted(rest, '\'', true)?,
            '\'' | '"' => quoted(rest, c, false)?,
            '$' => match placeholder(rest) {
                Some((number, length)) => {
                    highest = highest.max(number);
                    out.push_str(&format!("${}", number.saturating_add(by)));
                    rest = &rest[length..];
                    continue;
                }
                None if out.ends_with(|c: char| c.is_alphanumeric() || c == '_') => 1,
                None => dollar_quoted(rest)?,
            },
            '\0' => return Err("has a NUL character".into()),
            ';' => return Err("has a semicolon: it must be one expression".into()),
            '-' if rest.starts_with("--") => return Err("has a comment: take it out".into()),
            '/' if rest.starts_with("/*") => return Err("has a comment: take it out".into()),
            '(' | '[' => {
                open.push(c);
                1
            }
            ')' | ']' => {
                let matching = if c == ')' { '(' } else { '[' };
                if open.pop() != Some(matching) {
                    return Err(format!("closes {c:?} that it did not open"));
                }
                1
            }
            c => c.len_utf8(),
        };
        out.push_str(&rest[..taken]);
        rest = &rest[taken..];
    }
    match open.pop() {
        Some(c) => Err(format!("does not close {c:?}")),
        None => Ok((out, highest)),
    }
}

/// The length of what stands between quotes, with both.
fn quoted(text: &str, quote: char, backslash: bool) -> Result<usize, String> {
    let mut chars = text.char_indices().skip(1).peekable();
    while let Some((at, c)) = chars.next() {
        if backslash && c == '\\' {
            chars.next();
        } else if c == quote {
            if chars.peek().is_none_or(|(_, next)| *next != quote) {
                return Ok(at + 1);
            }
            chars.next();
        }
    }
    Err(format!("does not close {quote:?}"))
}

/// The number of a placeholder that the text begins with, and its length.
fn placeholder(text: &str) -> Option<(usize, usize)> {
    let digits = text[1..].bytes().take_while(u8::is_ascii_digit).count();
    text[1..=digits].parse().ok().filter(|number| *number > 0).map(|number| (number, digits + 1))
}

/// The length of a string between `$tag$` and `$tag$`, or of the dollar alone.
fn dollar_quoted(text: &str) -> Result<usize, String> {
    let tag = text[1..].find('$').map(|end| &text[..end + 2]);
    let Some(tag) = tag.filter(|tag| tag[1..tag.len() - 1].chars().all(|c| c.is_alphanumeric() || c == '_')) else {
        return Ok(1);
    };
    let end = text[tag.len()..].find(tag).ok_or_else(|| format!("does not close {tag:?}"))?;
    Ok(end + 2 * tag.len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn placeholders_follow_those_before_them() {
        for (sql, by, expected, highest) in [
            ("a = $1 and b = $2", 3, "a = $4 and b = $5", 2),
            ("a = '$1' and b = $1", 1, "a = '$1' and b = $2", 1),
            ("\"$1\" = $1", 1, "\"$1\" = $2", 1),
            ("a = $$ $1 ) $$ or a = $1", 2, "a = $$ $1 ) $$ or a = $3", 1),
            ("a = $x$ ; $1 $x$", 2, "a = $x$ ; $1 $x$", 0),
            ("a = E'\\'$1)' and b", 2, "a = E'\\'$1)' and b", 0),
            ("a = 'it''s)' and (b[1] = $10)", 1, "a = 'it''s)' and (b[1] = $11)", 10),
            ("ä$1 = 1", 0, "ä$1 = 1", 1),
        ] {
            assert_eq!(renumbered(sql, by), Ok((expected.into(), highest)), "{sql}");
        }
    }

    #[test]
    fn a_condition_cannot_leave_its_parentheses() {
        for sql in [
            "",
            "  ",
            "a) or (true",
            "a -- ",
            "a /* */",
            "a; delete from x",
            "(a",
            "a = 'x",
            "a = \"x",
            "a = $$x",
            "a[1",
            "(a]",
            "a = E'\\'",
            "a\0",
            "a))",
            "a = $t$ $u$",
        ] {
            assert!(renumbered(sql, 0).is_err(), "{sql:?}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_refused_or_kept(sql in "[a$1'\"()\\\\\\[\\]E;é/* -]{0,30}") {
            if let Ok((kept, _)) = renumbered(&sql, 0) {
                prop_assert_eq!(kept, sql);
            }
        }
    }

    #[test]
    fn values_and_placeholders_must_agree() {
        assert!(Condition::new("a = $1").bind(1_i64).check().is_ok());
        for wrong in [Condition::new("a = $1"), Condition::new("a").bind(1_i64), Condition::new("a = $2").bind(1_i64)] {
            let error = wrong.check().unwrap_err().to_string();
            assert!(error.contains("placeholders up to") && error.contains("values"), "{error}");
        }
    }
}
