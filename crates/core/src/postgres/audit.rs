//! What operators did.

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;
use sqlx::PgConnection;
use sqlx::types::Json;
use uuid::Uuid;

use super::job::ours;
use super::maybe::Maybe;
use super::session::{Session, Tx};
use super::time;
use aftercommit_outbox::event::EventId;

/// Something that an operator does.
#[derive(Debug, Clone)]
pub struct Entry<'a> {
    /// As the operator's tool was told, or found out.
    pub who: &'a str,
    /// Such as `relay pause`.
    pub action: &'a str,
    /// The subscriber that it is about; none when it is about none.
    pub subscriber: Option<&'a str>,
    /// The event that it is about; none when it is about several or none.
    pub event_id: Option<Uuid>,
    /// An object; no payload that is still elsewhere.
    pub detail: Value,
}

/// Writes it down, in the transaction that does it.
pub async fn write(tx: &mut Tx<'_>, entry: &Entry<'_>) -> Result<(), sqlx::Error> {
    sqlx::query("insert into aftercommit.audit (who, action, subscriber, event_id, detail) values ($1, $2, $3, $4, $5)")
        .bind(entry.who)
        .bind(entry.action)
        .bind(entry.subscriber)
        .bind(entry.event_id)
        .bind(Json(&entry.detail))
        .execute(tx)
        .await
        .map(drop)
}

/// The same in a transaction that is not ours, for the schema of this process.
pub async fn write_in(connection: &mut PgConnection, entry: &Entry<'_>) -> Result<(), sqlx::Error> {
    sqlx::query(ours(
        "insert into aftercommit.audit (who, action, subscriber, event_id, detail) values ($1, $2, $3, $4, $5)",
    ))
    .bind(entry.who)
    .bind(entry.action)
    .bind(entry.subscriber)
    .bind(entry.event_id)
    .bind(Json(&entry.detail))
    .persistent(false)
    .execute(connection)
    .await
    .map(drop)
}

/// Which rows are wanted; what is none does not matter.
#[derive(Debug, Clone, Default)]
pub struct Wanted<'a> {
    /// Those about this event.
    pub event_id: Option<Uuid>,
    /// Those about this subscriber.
    pub subscriber: Option<&'a str>,
    /// Those of the last so many seconds.
    pub since: Option<f64>,
    /// Those from this time on.
    pub from: Option<DateTime<Utc>>,
}

/// Something that an operator did.
#[derive(Debug, Clone, PartialEq, Serialize, sqlx::FromRow)]
pub struct AuditEntry {
    /// When, by the database's clock.
    #[sqlx(try_from = "time::Time")]
    pub at: DateTime<Utc>,
    /// Who, as the operator's tool was told.
    pub who: String,
    /// Who, as PostgreSQL knows it.
    pub role: String,
    /// What, such as `dead retry`.
    pub action: String,
    /// The subscriber that it concerns.
    pub subscriber: Option<String>,
    /// The event that it concerns.
    #[sqlx(try_from = "Maybe<Uuid>")]
    pub event_id: Option<EventId>,
    /// More about it. Payloads and headers that an action kept stay in the table `aftercommit.audit`.
    pub detail: Value,
}

/// The last `limit` of the wanted rows, the oldest first. What an event held is in the table only, never here.
pub async fn list(connection: &mut Session, wanted: &Wanted<'_>, limit: i64) -> Result<Vec<AuditEntry>, sqlx::Error> {
    sqlx::query_as(
        "select at, who, role, action, subscriber, event_id, detail
           from (select id, at, who, role, action, subscriber, event_id,
                        detail - 'payload_base64' - 'headers' as detail
                   from aftercommit.audit
                  where ($1::uuid is null or event_id = $1)
                    and ($2::text is null or subscriber = $2)
                    and ($3::float8 is null or at >= clock_timestamp() - make_interval(secs => $3))
                    and ($5::timestamptz is null or at >= $5)
                  order by id desc limit $4) as last
          order by id",
    )
    .bind(wanted.event_id)
    .bind(wanted.subscriber)
    .bind(wanted.since)
    .bind(limit)
    .bind(wanted.from)
    .fetch_all(connection)
    .await
}
