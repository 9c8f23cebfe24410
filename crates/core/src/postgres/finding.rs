//! What reconcilers found.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use uuid::Uuid;

use super::maybe::Maybe;
use super::session::{Session, Tx};
use super::time;
use aftercommit_outbox::event::EventId;

/// Something that is not as it should be.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct NewFinding {
    /// Such as `missing_from_stream`.
    pub kind: &'static str,
    /// What it is about: an event id, a consumer, a user's key. With the kind, its identity.
    pub item: String,
    /// The event that it is about; none when it is about something else.
    pub event_id: Option<Uuid>,
    /// The event's id in the outbox; none when that is not known.
    pub outbox_id: Option<i64>,
    /// The event's key; none when it has none or it is not known.
    pub key: Option<String>,
    /// The event's sequence in the stream; none when it is not there or that is not known.
    pub stream_seq: Option<i64>,
    /// One line for a person, without payload.
    pub detail: String,
    /// What was done about it.
    pub state: State,
}

/// What has become of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum State {
    /// Nothing was done about it.
    #[default]
    Open,
    /// A repair was queued.
    Repairing,
    /// It was put right.
    Repaired,
    /// It was not found any more.
    Gone,
}

impl State {
    /// The state as the database has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Repairing => "repairing",
            Self::Repaired => "repaired",
            Self::Gone => "gone",
        }
    }
}

/// Writes what a run found. What was found before stays the same row; when it was settled, it is open again.
pub async fn record(session: &mut Session, name: &str, run: i64, findings: &[NewFinding]) -> Result<(), sqlx::Error> {
    fn each<T>(findings: &[NewFinding], field: impl Fn(&NewFinding) -> T) -> Vec<T> {
        findings.iter().map(field).collect()
    }
    sqlx::query(
        "insert into aftercommit.finding as f
                (name, kind, item, event_id, outbox_id, key, stream_seq, detail, state, first_run, last_run, settled_at)
         select distinct on (kind, item) $1, kind, item, event_id, outbox_id, key, stream_seq, detail, state, $2, $2,
                case when state in ('repaired', 'gone') then clock_timestamp() end
           from unnest($3::text[], $4::text[], $5::uuid[], $6::bigint[], $7::text[], $8::bigint[], $9::text[], $10::text[])
             as t(kind, item, event_id, outbox_id, key, stream_seq, detail, state)
          order by kind, item
         on conflict (name, kind, item) do update
            set last_run = excluded.last_run, detail = excluded.detail, state = excluded.state,
                stream_seq = coalesce(excluded.stream_seq, f.stream_seq), settled_at = excluded.settled_at",
    )
    .bind(name)
    .bind(run)
    .bind(each(findings, |finding| finding.kind))
    .bind(each(findings, |finding| finding.item.clone()))
    .bind(each(findings, |finding| finding.event_id))
    .bind(each(findings, |finding| finding.outbox_id))
    .bind(each(findings, |finding| finding.key.clone()))
    .bind(each(findings, |finding| finding.stream_seq))
    .bind(each(findings, |finding| finding.detail.clone()))
    .bind(each(findings, |finding| finding.state.as_str()))
    .execute(session)
    .await
    .map(drop)
}

/// The outbox ids behind `after` of findings that nothing has been done about and that the run `since` or a later one has
/// made, in order.
pub async fn open(
    session: &mut Session,
    name: &str,
    kind: &str,
    since: i64,
    after: i64,
    limit: i64,
) -> Result<Vec<i64>, sqlx::Error> {
    sqlx::query_scalar(
        "select outbox_id from aftercommit.finding
          where name = $1 and kind = $2 and state = 'open' and last_run >= $3 and outbox_id > $4
          order by outbox_id limit $5",
    )
    .bind(name)
    .bind(kind)
    .bind(since)
    .bind(after)
    .bind(limit)
    .fetch_all(session)
    .await
}

/// Settles open findings of `kind` about these items, and returns how many there were.
pub async fn settle(
    session: &mut Session,
    name: &str,
    kind: &str,
    items: &[String],
    state: State,
) -> Result<u64, sqlx::Error> {
    let done = sqlx::query(
        "update aftercommit.finding set state = $4, settled_at = clock_timestamp()
          where name = $1 and kind = $2 and item = any($3) and state in ('open', 'repairing')",
    )
    .bind(name)
    .bind(kind)
    .bind(items)
    .bind(state.as_str())
    .execute(session)
    .await?;
    Ok(done.rows_affected())
}

/// Writes down of open findings of `kind` about these events that they are on their way.
pub async fn mark_repairing(tx: &mut Tx<'_>, name: &str, kind: &str, events: &[Uuid]) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update aftercommit.finding set state = $4
          where name = $1 and kind = $2 and state = 'open' and item = any($3)",
    )
    .bind(name)
    .bind(kind)
    .bind(events.iter().map(Uuid::to_string).collect::<Vec<_>>())
    .bind(State::Repairing.as_str())
    .execute(tx)
    .await
    .map(drop)
}

/// Settles what a sweep over everything did not find again that began with the run `since`.
pub(super) async fn settle_gone(tx: &mut Tx<'_>, name: &str, since: i64) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update aftercommit.finding set settled_at = clock_timestamp(),
                state = case state when 'repairing' then 'repaired' else 'gone' end
          where name = $1 and last_run < $2 and state in ('open', 'repairing')",
    )
    .bind(name)
    .bind(since)
    .execute(tx)
    .await
    .map(drop)
}

/// How many are open, by reconciler and kind.
pub(crate) async fn count_open(
    session: &mut Session,
    names: &[&str],
) -> Result<Vec<(String, String, i64)>, sqlx::Error> {
    sqlx::query_as(
        "select name, kind, count(*) from aftercommit.finding
          where name = any($1) and state in ('open', 'repairing') group by name, kind",
    )
    .bind(names)
    .fetch_all(session)
    .await
}

/// Which findings are wanted; what is none does not matter.
#[derive(Debug, Clone, Default)]
pub struct Wanted<'a> {
    /// Those of this reconciler.
    pub reconciler: Option<&'a str>,
    /// Those of this kind.
    pub kind: Option<&'a str>,
    /// Those that are settled, too.
    pub settled: bool,
}

/// Something that a reconciler found.
#[derive(Debug, Clone, PartialEq, Serialize, sqlx::FromRow)]
pub struct Finding {
    /// Its number.
    pub id: i64,
    /// Who found it.
    #[sqlx(rename = "name")]
    pub reconciler: String,
    /// What it is, such as `item_failed`.
    pub kind: String,
    /// What it is about.
    pub item: String,
    /// The event that it is about.
    #[sqlx(try_from = "Maybe<Uuid>")]
    pub event_id: Option<EventId>,
    /// That event's key.
    pub key: Option<String>,
    /// Where it is in the stream.
    #[sqlx(rename = "stream_seq")]
    pub stream_sequence: Option<i64>,
    /// More, in one line.
    pub detail: String,
    /// `open`, `repairing`, `repaired` or `gone`.
    pub state: String,
    /// When it was first found, by the database's clock.
    #[sqlx(try_from = "time::Time")]
    pub found_at: DateTime<Utc>,
    /// When it was settled.
    #[sqlx(try_from = "Maybe<time::Time>")]
    pub settled_at: Option<DateTime<Utc>>,
    /// The last run that found it.
    pub last_run: i64,
}

/// The last `limit` of the wanted ones, the oldest first.
pub async fn list(session: &mut Session, wanted: &Wanted<'_>, limit: i64) -> Result<Vec<Finding>, sqlx::Error> {
    sqlx::query_as(
        "select * from (
            select id, name, kind, item, event_id, key, stream_seq, detail, state, found_at, settled_at, last_run
              from aftercommit.finding
             where ($1::text is null or name = $1) and ($2::text is null or kind = $2)
               and ($3 or state in ('open', 'repairing'))
             order by id desc limit $4) as last
          order by id",
    )
    .bind(wanted.reconciler)
    .bind(wanted.kind)
    .bind(wanted.settled)
    .bind(limit)
    .fetch_all(session)
    .await
}

/// Deletes what was settled longer than `age` ago, at most `limit` rows.
pub async fn prune(session: &mut Session, age: Duration, limit: i64) -> Result<u64, sqlx::Error> {
    let done = sqlx::query(
        "delete from aftercommit.finding where id = any(array(
            select id from aftercommit.finding
             where settled_at < clock_timestamp() - make_interval(secs => $1) order by settled_at limit $2))",
    )
    .bind(age.as_secs_f64())
    .bind(limit)
    .execute(session)
    .await?;
    Ok(done.rows_affected())
}
