//! What the leading relay says of itself.

use super::session::Session;

/// A leader's report, written with each heartbeat.
#[derive(Debug, Clone)]
pub struct Report {
    /// The leading relay: host, process id and a random part.
    pub holder: String,
    /// The epoch of its lease.
    pub epoch: i64,
    /// Name of the stream that it publishes to.
    pub stream: String,
    /// The outbox id of the last event stored in the stream; 0 before the first.
    pub last_id: i64,
    /// The stream sequence of that event; 0 before the first.
    pub last_sequence: u64,
    /// Events stored in the stream since this relay took the lead.
    pub published: u64,
    /// What it does or waits for, for a person.
    pub state: String,
}

/// Replaces the report, unless one of a later epoch is there.
pub async fn write(connection: &mut Session, report: &Report) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into aftercommit.relay_status as s
                (holder, epoch, stream, last_id, last_sequence, published, state, updated_at)
         values ($1, $2, $3, $4, $5, $6, $7, clock_timestamp())
         on conflict (only_row) do update
            set holder = excluded.holder, epoch = excluded.epoch, stream = excluded.stream,
                since = case when s.epoch = excluded.epoch then s.since else excluded.since end,
                last_id = case when excluded.last_id = 0 then s.last_id else excluded.last_id end,
                last_sequence = case when excluded.last_sequence = 0 then s.last_sequence else excluded.last_sequence end,
                published = excluded.published, state = excluded.state, updated_at = excluded.updated_at
          where s.epoch <= excluded.epoch",
    )
    .bind(&report.holder)
    .bind(report.epoch)
    .bind(&report.stream)
    .bind(report.last_id)
    .bind(report.last_sequence.cast_signed())
    .bind(report.published.cast_signed())
    .bind(&report.state)
    .execute(connection)
    .await
    .map(drop)
}
