//! With which event a new subscriber starts.

use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};

use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::jetstream::Connection;
use aftercommit_core::jetstream::consumer::{self, ConsumerSpec};
use aftercommit_core::jetstream::history::History;
use aftercommit_core::jetstream::stream::StreamReader;
use aftercommit_core::postgres::session::Session;
use aftercommit_core::postgres::{database_error, start};

/// Differences between this machine's clock and that of NATS.
const CLOCKS: TimeDelta = TimeDelta::minutes(1);

/// With which event of the stream a subscriber starts when its consumer is made for the first time. As text, in
/// `worker.toml` and on the command line: `all`, `new`, a time such as `2026-03-01T12:00:00Z`, or a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Start {
    /// The oldest one that the stream holds.
    #[default]
    All,
    /// The first one that is stored after the consumer was made.
    New,
    /// The first one that was stored at this time, to the second, or later.
    Time(DateTime<Utc>),
    /// The one with this sequence in the stream, or the first behind it.
    Sequence(u64),
}

/// A text that is no [`Start`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no start: take \"all\", \"new\", a time such as \"2026-03-01T12:00:00Z\", or a sequence of the stream"
)]
pub struct StartError(String);

impl FromStr for Start {
    type Err = StartError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refuse = || StartError(text.chars().take(64).collect());
        match text {
            "all" => Ok(Self::All),
            "new" => Ok(Self::New),
            _ if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) => {
                let sequence =
                    text.parse::<u64>().ok().filter(|sequence| (1..=i64::MAX.cast_unsigned()).contains(sequence));
                sequence.map(Self::Sequence).ok_or_else(refuse)
            }
            _ => {
                let time = DateTime::parse_from_rfc3339(text).map_err(|_| refuse())?;
                Ok(Self::Time(time.with_timezone(&Utc)))
            }
        }
    }
}

impl fmt::Display for Start {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::New => f.write_str("new"),
            Self::Time(time) => f.write_str(&time.to_rfc3339_opts(SecondsFormat::AutoSi, true)),
            Self::Sequence(sequence) => write!(f, "{sequence}"),
        }
    }
}

impl Start {
    /// The sequence with which the consumer of a subscriber starts; none for the oldest. Where it started once it starts
    /// again, whatever is said later and however often its consumer is made: so that is written down before. In another
    /// stream it starts anew.
    pub(super) async fn place(
        self,
        nats: &Connection,
        session: Option<&mut Session>,
        spec: &ConsumerSpec,
    ) -> Result<Option<u64>, Error> {
        if matches!(self, Self::Time(time) if time > Utc::now() + CLOCKS) {
            let problem = format!("subscriber {} starts with {self}, which is still to come: take \"new\"", spec.name);
            return Err(Error::new(ErrorKind::Config, problem));
        }
        let Some(session) = session else {
            if self == Self::All {
                return Ok(None);
            }
            let problem = "where it starts is written down in its database: set DATABASE_URL (--database-url)";
            return Err(Error::new(
                ErrorKind::Config,
                format!("subscriber {} starts with {self}: {problem}", spec.name),
            ));
        };
        let failed = |error| database_error(format!("where subscriber {} starts is not known", spec.name), error);
        let known = start::of(session, &spec.name, &spec.stream).await.map_err(failed)?;
        if self == Self::All && known.is_none() {
            return Ok(None);
        }
        let stream = StreamReader::new(nats, &spec.stream);
        let extent = stream.extent().await?;
        if let Some(known) = known.filter(|known| known.stream_created == extent.created) {
            return Ok(Some(known.sequence));
        }
        if consumer::locate(&nats.jetstream(), spec).await?.is_some() {
            // It has started.
            return Ok(None);
        }
        let (sequence, at) = match self {
            Self::All => return Ok(None),
            Self::New => (extent.last + 1, None),
            Self::Time(time) => {
                let history = History::new(nats, &spec.stream).await?;
                (history.since(extent.first.max(1), extent.last, time).await?, Some(time))
            }
            Self::Sequence(sequence) => {
                let stored = stream.stored_at(sequence).await?;
                (sequence, stored)
            }
        };
        let asked = self.to_string();
        let names = (spec.name.as_str(), spec.stream.as_str(), asked.as_str());
        let started = start::record(session, names, extent.created, sequence, at).await.map_err(failed)?;
        Ok(Some(started.sequence))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_is_read_as_it_is_written() {
        for text in ["all", "new", "17", "2026-03-01T12:00:00Z"] {
            assert_eq!(text.parse::<Start>().unwrap().to_string(), text);
        }
        let local: Start = "2026-03-01T12:00:00+02:00".parse().unwrap();
        assert_eq!(local.to_string(), "2026-03-01T10:00:00Z");
        for bad in ["", "0", "-1", "old", "2026-03-01", "99999999999999999999"] {
            let error = bad.parse::<Start>().unwrap_err().to_string();
            assert!(error.contains("\"new\""), "{error}");
        }
    }
}
