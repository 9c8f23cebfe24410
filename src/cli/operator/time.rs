//! Points in time on the command line: a duration back from now, or a date.

use chrono::{DateTime, NaiveDate, NaiveTime, SecondsFormat, Utc};
use humantime::format_duration;

use aftercommit_operator::When;

/// Reads `90m`, `2026-03-01T12:00:00Z` or `2026-03-01`, the last one as its first moment in UTC.
pub(super) fn when(text: &str) -> Result<When, String> {
    if let Ok(at) = text.parse::<DateTime<Utc>>() {
        return Ok(When::At(at));
    }
    if let Ok(day) = text.parse::<NaiveDate>() {
        return Ok(When::At(day.and_time(NaiveTime::MIN).and_utc()));
    }
    let wrong = |_| "a duration such as 90m or 7d is needed, or a time such as 2026-03-01T12:00:00Z".to_string();
    humantime::parse_duration(text).map(When::Ago).map_err(wrong)
}

/// The same again.
pub(super) fn said(when: When) -> String {
    match when {
        When::Ago(age) => format_duration(age).to_string(),
        When::At(at) => at.to_rfc3339_opts(SecondsFormat::AutoSi, true),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn durations_and_dates_are_understood_and_said_again() {
        let at = |text: &str| When::At(text.parse().unwrap());
        for (text, expected) in [
            ("90m", When::Ago(Duration::from_mins(90))),
            ("2026-03-01T12:00:00Z", at("2026-03-01T12:00:00Z")),
            ("2026-03-01T12:00:00+02:00", at("2026-03-01T10:00:00Z")),
            ("2026-03-01", at("2026-03-01T00:00:00Z")),
        ] {
            assert_eq!(when(text), Ok(expected), "{text}");
            assert_eq!(when(&said(expected)), Ok(expected));
        }
        assert!(when("yesterday").is_err_and(|problem| problem.contains("90m")));
    }
}
