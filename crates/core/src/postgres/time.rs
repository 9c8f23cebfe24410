//! Times as a database may hold them and a program can bear them.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use sqlx::postgres::{PgRow, PgTypeInfo, PgValueFormat, PgValueRef};
use sqlx::{Decode, Postgres, Row, Type};

/// The microseconds from the Unix epoch to PostgreSQL's, 2000-01-01.
const EPOCH: i64 = 946_684_800_000_000;
/// 0001-01-01 00:00:00 and 9999-12-31 23:59:59.999999, in microseconds since the Unix epoch: what RFC 3339 can write.
const FIRST: i64 = -62_135_596_800_000_000;
const LAST: i64 = 253_402_300_799_999_999;

/// A `timestamptz`. `infinity`, years before Christ and years of five digits become the nearest time between the years 1
/// and 9999; the driver's own type panics at some of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Time(pub(super) DateTime<Utc>);

impl Type<Postgres> for Time {
    fn type_info() -> PgTypeInfo {
        <DateTime<Utc> as Type<Postgres>>::type_info()
    }
}

impl<'r> Decode<'r, Postgres> for Time {
    fn decode(value: PgValueRef<'r>) -> Result<Self, sqlx::error::BoxDynError> {
        if value.format() == PgValueFormat::Text {
            return Err("a time came as text".into());
        }
        Ok(Self(nearest(<i64 as Decode<Postgres>>::decode(value)?)))
    }
}

impl From<Time> for DateTime<Utc> {
    fn from(time: Time) -> Self {
        time.0
    }
}

/// A number of seconds that is read as a [`span`].
#[derive(Debug, Clone, Copy, sqlx::Type)]
#[sqlx(transparent)]
pub(super) struct Seconds(f64);

impl From<Seconds> for Duration {
    fn from(seconds: Seconds) -> Self {
        span(seconds.0)
    }
}

/// The time so many microseconds after PostgreSQL's epoch, or the nearest one.
fn nearest(since_2000: i64) -> DateTime<Utc> {
    let micros = since_2000.saturating_add(EPOCH).clamp(FIRST, LAST);
    DateTime::UNIX_EPOCH + TimeDelta::microseconds(micros)
}

/// The time in a column.
pub(super) fn at(row: &PgRow, column: &str) -> Result<DateTime<Utc>, sqlx::Error> {
    row.try_get::<Time, _>(column).map(|time| time.0)
}

/// The time in a column that may be null.
pub(super) fn maybe_at(row: &PgRow, column: &str) -> Result<Option<DateTime<Utc>>, sqlx::Error> {
    row.try_get::<Option<Time>, _>(column).map(|time| time.map(|time| time.0))
}

/// A span of so many seconds; at most a hundred years, because nothing that is measured here is older, and not below zero.
pub fn span(seconds: f64) -> Duration {
    const LONGEST: f64 = 100.0 * 366.0 * 86_400.0;
    if seconds > 0.0 { Duration::from_secs_f64(seconds.min(LONGEST)) } else { Duration::ZERO }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_of_microseconds_is_a_time_that_can_be_written() {
        for (since_2000, text) in [
            (0, "2000-01-01T00:00:00+00:00"),
            (i64::MAX, "9999-12-31T23:59:59.999999+00:00"),
            (i64::MIN, "0001-01-01T00:00:00+00:00"),
            (-EPOCH - 1, "1969-12-31T23:59:59.999999+00:00"),
        ] {
            let time = nearest(since_2000);
            assert_eq!(time.to_rfc3339(), text);
            assert_eq!(DateTime::parse_from_rfc3339(text).unwrap(), time);
        }
    }

    #[test]
    fn no_number_of_seconds_is_too_much() {
        assert_eq!(span(1.5), Duration::from_millis(1500));
        for seconds in [f64::NAN, -1.0, f64::NEG_INFINITY] {
            assert_eq!(span(seconds), Duration::ZERO);
        }
        assert!(span(f64::INFINITY) > Duration::from_secs(3_000_000_000));
    }
}
