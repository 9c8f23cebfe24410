//! What somebody types to find something: `subscriber:mails type:order.* key:order-7 error:"printer" age:>1h`.

use chrono::{DateTime, NaiveDate, NaiveTime, Utc};

use aftercommit_operator::When;

use crate::problem::Problem;

/// The longest text that is read, in bytes.
const LONGEST: usize = 2048;

/// Names with what they shall be, in the order of the text.
pub(crate) struct Terms(Vec<(String, String)>);

impl Terms {
    /// Reads a text in which only these names may stand. A word without a name is an event's id.
    pub(crate) fn read(text: &str, names: &[&str]) -> Result<Self, Problem> {
        if text.len() > LONGEST {
            return Err(Problem::refused(format!("The search is longer than {LONGEST} bytes.")));
        }
        let mut terms = Vec::new();
        let mut rest = text.trim_start();
        while !rest.is_empty() {
            let name_ends = rest.find(|c: char| c == ':' || c == '"' || c.is_whitespace()).unwrap_or(rest.len());
            let (name, behind) = match rest[name_ends..].strip_prefix(':') {
                Some(behind) => (&rest[..name_ends], behind),
                None => ("id", rest),
            };
            if !names.contains(&name) {
                return Err(Problem::refused(format!(
                    "There is no {name}: here; what can be said is {}.",
                    names.join(", ")
                )));
            }
            let (value, behind) = match behind.strip_prefix('"') {
                Some(quoted) => {
                    quoted.split_once('"').ok_or_else(|| Problem::refused("A quotation mark is not closed."))?
                }
                None => behind.split_at(behind.find(char::is_whitespace).unwrap_or(behind.len())),
            };
            if value.is_empty() {
                return Err(Problem::refused(format!("Nothing stands behind {name}:.")));
            }
            terms.push((name.to_string(), value.to_string()));
            rest = behind.trim_start();
        }
        Ok(Self(terms))
    }

    /// What a name shall be; refused when it is said twice.
    pub(crate) fn one(&self, name: &str) -> Result<Option<String>, Problem> {
        let mut found = self.0.iter().filter(|(found, _)| found == name).map(|(_, value)| value.clone());
        match (found.next(), found.next()) {
            (_, Some(_)) => Err(Problem::refused(format!("{name}: is said twice."))),
            (first, None) => Ok(first),
        }
    }

    /// All that a name shall be.
    pub(crate) fn all(&self, name: &str) -> impl Iterator<Item = &str> {
        self.0.iter().filter(move |(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// `age:>1h` is older than an hour, `age:<1h` younger.
    pub(crate) fn ages(&self) -> Result<(Option<When>, Option<When>), Problem> {
        let (mut older, mut newer) = (None, None);
        for value in self.all("age") {
            let (place, text) = match (value.strip_prefix('>'), value.strip_prefix('<')) {
                (Some(text), _) => (&mut older, text),
                (_, Some(text)) => (&mut newer, text),
                _ => return Err(Problem::refused("Say age:>1h for older than an hour, age:<1h for younger.")),
            };
            *place = Some(when(text)?);
        }
        Ok((older, newer))
    }
}

/// A duration back from now such as `90m`, or a date such as `2026-03-01`.
pub(crate) fn when(text: &str) -> Result<When, Problem> {
    if let Ok(at) = text.parse::<DateTime<Utc>>() {
        return Ok(When::At(at));
    }
    if let Ok(day) = text.parse::<NaiveDate>() {
        return Ok(When::At(day.and_time(NaiveTime::MIN).and_utc()));
    }
    humantime::parse_duration(text).map(When::Ago).map_err(|_| {
        Problem::refused(format!(
            "{text} is neither a duration such as 90m or 7d nor a time such as 2026-03-01T12:00:00Z."
        ))
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const NAMES: [&str; 6] = ["id", "subscriber", "type", "key", "error", "age"];

    #[test]
    fn a_search_has_names_and_quoted_values() {
        let terms =
            Terms::read("subscriber:mails  key:\"a b:c\" age:>1h 019aa1c2", &NAMES).unwrap_or_else(|p| panic!("{p:?}"));
        assert_eq!(terms.one("subscriber").unwrap().as_deref(), Some("mails"));
        assert_eq!(terms.one("key").unwrap().as_deref(), Some("a b:c"));
        assert_eq!(terms.all("id").collect::<Vec<_>>(), ["019aa1c2"]);
        assert_eq!(terms.ages().unwrap(), (Some(When::Ago(Duration::from_hours(1))), None));
    }

    #[test]
    fn what_is_not_understood_is_refused_by_name() {
        for (text, named) in [("subscribers:mails", "subscribers"), ("key:\"open", "closed"), ("key:", "key")] {
            assert!(Terms::read(text, &NAMES).is_err_and(|problem| problem.text.contains(named)), "{text}");
        }
        assert!(Terms::read(&"x".repeat(LONGEST + 1), &NAMES).is_err());
        let twice = Terms::read("key:a key:b", &NAMES).unwrap_or_else(|p| panic!("{p:?}"));
        assert!(twice.one("key").is_err());
        let terms = Terms::read("age:1h", &NAMES).unwrap_or_else(|p| panic!("{p:?}"));
        assert!(terms.ages().is_err());
    }
}
