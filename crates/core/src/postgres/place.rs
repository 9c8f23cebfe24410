//! Places in the relay's log as values: what had been settled, and where the stream ended then. Between two places of one
//! stream lies exactly what was published between them, in the outbox as in the stream.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::postgres::PgRow;
use sqlx::{FromRow, Row};

use super::mark_row;
use super::session::Session;
use super::snapshot::Mark;
use super::time;

/// A text that is not a place.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// Its snapshot is not one.
    #[error(transparent)]
    Snapshot(#[from] super::snapshot::SnapshotError),
    /// Its snapshot has more running transactions than PostgreSQL can have.
    #[error("more transactions are running than can be")]
    Running,
}

/// Everything that `mark` holds lies in the stream at or before `sequence`, everything else behind it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Text", into = "Text")]
pub struct Place {
    /// The row of the log; -1 for the beginning of all.
    pub seq: i64,
    /// What had been settled.
    pub mark: Mark,
    /// The last sequence of the stream by then.
    pub sequence: u64,
}

#[derive(Serialize, Deserialize)]
struct Text {
    seq: i64,
    snapshot: String,
    id: i64,
    xid: u64,
    floor: i64,
    sequence: u64,
}

impl From<Place> for Text {
    fn from(Place { seq, mark, sequence }: Place) -> Self {
        let Mark { snapshot, last_id: id, next_xid: xid, floor } = mark;
        Self { seq, snapshot: snapshot.to_string(), id, xid, floor, sequence }
    }
}

impl TryFrom<Text> for Place {
    type Error = PlaceError;

    fn try_from(text: Text) -> Result<Self, Self::Error> {
        let Text { seq, snapshot, id, xid, floor, sequence } = text;
        let mark = Mark { snapshot: snapshot.parse()?, last_id: id, next_xid: xid, floor };
        if !mark.is_plausible() {
            return Err(PlaceError::Running);
        }
        Ok(Self { seq, mark, sequence })
    }
}

impl Place {
    /// Before everything.
    pub fn beginning() -> Self {
        Self { seq: -1, mark: Mark::nothing(), sequence: 0 }
    }
}

/// The columns of a place, as it is read from them.
macro_rules! columns {
    () => {
        "seq, settled::text, settled_id, settled_xid::text, settled_floor, base_sequence"
    };
}

/// The first place from which everything in `stream` can be compared: the beginning, unless the outbox went into another
/// stream before. None when nothing ever went into this one.
pub async fn first(connection: &mut Session, stream: &str) -> Result<Option<Place>, sqlx::Error> {
    let row = sqlx::query(concat!(
        "select ",
        columns!(),
        ", exists (select from aftercommit.relay_log other where other.stream <> $1 and other.seq < l.seq) as moved
           from aftercommit.relay_log l where stream = $1 order by seq limit 1"
    ))
    .bind(stream)
    .fetch_optional(connection)
    .await?;
    let Some(row) = row else { return Ok(None) };
    Ok(Some(if row.try_get("moved")? { Place::from_row(&row)? } else { Place::beginning() }))
}

/// The next place behind `from`, at most `messages` further in the stream if there is one so near, and not behind the
/// state `until`.
pub async fn next(
    connection: &mut Session,
    stream: &str,
    from: &Place,
    messages: u64,
    until: i64,
) -> Result<Option<Place>, sqlx::Error> {
    sqlx::query_as(concat!(
        "(select ",
        columns!(),
        " from aftercommit.relay_log
          where stream = $1 and seq > $2 and seq <= $4 and base_sequence <= $3 order by seq desc limit 1)
         union all
         (select ",
        columns!(),
        " from aftercommit.relay_log where stream = $1 and seq > $2 and seq <= $4 order by seq limit 1)
         limit 1"
    ))
    .bind(stream)
    .bind(from.seq)
    .bind(from.sequence.saturating_add(messages).cast_signed())
    .bind(until)
    .fetch_optional(connection)
    .await
}

/// The lowest place to which the relay went back since `from`, because the stream had lost its end.
pub async fn gone_back(connection: &mut Session, stream: &str, from: &Place) -> Result<Option<Place>, sqlx::Error> {
    sqlx::query_as(concat!(
        "select ",
        columns!(),
        " from aftercommit.relay_log
          where stream = $1 and $2 >= 0 and seq > $2 and base_sequence < $3 order by base_sequence, seq limit 1"
    ))
    .bind(stream)
    .bind(from.seq)
    .bind(from.sequence.cast_signed())
    .fetch_optional(connection)
    .await
}

/// The newest place whose settled events lie at or before `sequence` in the stream.
pub async fn at(connection: &mut Session, stream: &str, sequence: u64) -> Result<Option<Place>, sqlx::Error> {
    sqlx::query_as(concat!(
        "select ",
        columns!(),
        " from aftercommit.relay_log where stream = $1 and base_sequence <= $2 order by seq desc limit 1"
    ))
    .bind(stream)
    .bind(sequence.cast_signed())
    .fetch_optional(connection)
    .await
}

/// A time up to which the place holds whatever was committed: when its mark was taken. None when the log has
/// forgotten it, and for a mark that does not hold all that was committed then.
pub async fn marked_at(connection: &mut Session, place: &Place) -> Result<Option<DateTime<Utc>>, sqlx::Error> {
    let at: Option<time::Time> = sqlx::query_scalar(
        "select min(created_at)
           from (select created_at, target_id, target, cut from aftercommit.relay_log
                  where seq < $1 order by seq desc limit 1000) as before
          where target_id = $2 and target::text = $3 and not cut",
    )
    .bind(place.seq)
    .bind(place.mark.last_id)
    .bind(place.mark.snapshot.to_string())
    .fetch_one(connection)
    .await?;
    Ok(at.map(|at| at.0))
}

/// The database's clock.
pub async fn now(connection: &mut Session) -> Result<DateTime<Utc>, sqlx::Error> {
    sqlx::query_scalar("select clock_timestamp()").fetch_one(connection).await
}

impl FromRow<'_, PgRow> for Place {
    fn from_row(row: &PgRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            seq: row.try_get("seq")?,
            mark: mark_row::mark(row, ["settled", "settled_id", "settled_xid"], row.try_get("settled_floor")?)?,
            sequence: row.try_get::<i64, _>("base_sequence")?.cast_unsigned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_survives_being_written_down() {
        let mark = Mark { snapshot: "10:20:10,14".parse().unwrap(), last_id: 7, next_xid: 21, floor: 3 };
        for place in [Place { seq: 5, mark, sequence: 9 }, Place::beginning()] {
            let text = serde_json::to_string(&place).unwrap();
            assert_eq!(serde_json::from_str::<Place>(&text).unwrap(), place);
        }
        for (snapshot, xid) in [("1:2:3; drop", 1), ("2:1:", 1), ("1:1:", u64::MAX)] {
            let forged = format!(r#"{{"seq":1,"snapshot":"{snapshot}","id":1,"xid":{xid},"floor":0,"sequence":1}}"#);
            assert!(serde_json::from_str::<Place>(&forged).is_err(), "{forged}");
        }
    }
}
