//! What the subscribers of the bench do with an event, and what they are measured beside.

use sqlx::{Executor, PgTransaction};
use uuid::Uuid;

use super::failed;
use aftercommit_core::envelope::Envelope;
use aftercommit_core::error::Error;
use aftercommit_core::postgres::session::Session;

/// Where an event came from, in the order in which it took effect.
pub(crate) type Effect = (Uuid, i64, Option<String>);

/// Makes the table with a row for each event, and the function that writes one.
pub(crate) async fn create_effects(session: &mut Session) -> Result<(), Error> {
    session
        .execute(
            "create table public.bench_effect (
                 place bigint generated always as identity primary key,
                 event_id uuid not null,
                 outbox_id bigint not null,
                 key text,
                 at timestamptz not null default clock_timestamp());
             create function public.bench_apply(event jsonb) returns void language sql as $$
                 insert into public.bench_effect (event_id, outbox_id, key)
                 values ((event->>'id')::uuid, (event->>'sequence')::bigint, event->>'partitionkey')
             $$",
        )
        .await
        .map(drop)
        .map_err(failed)
}

/// Forgets what was handled, for the next subscriber.
pub(crate) async fn clear_effects(session: &mut Session) -> Result<(), Error> {
    session
        .execute("truncate public.bench_effect restart identity; truncate aftercommit.inbox")
        .await
        .map(drop)
        .map_err(failed)
}

/// The one-row handler.
pub(crate) async fn insert_effect(
    tx: &mut PgTransaction<'_>,
    event_id: Uuid,
    outbox_id: i64,
    key: Option<&str>,
) -> Result<(), sqlx::Error> {
    sqlx::query("insert into public.bench_effect (event_id, outbox_id, key) values ($1, $2, $3)")
        .bind(event_id)
        .bind(outbox_id)
        .bind(key)
        .execute(&mut **tx)
        .await
        .map(drop)
}

/// The same for several events in one statement.
pub(crate) async fn insert_effects(tx: &mut PgTransaction<'_>, effects: &[Effect]) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into public.bench_effect (event_id, outbox_id, key) select * from unnest($1::uuid[], $2::bigint[], $3::text[])",
    )
    .bind(effects.iter().map(|effect| effect.0).collect::<Vec<_>>())
    .bind(effects.iter().map(|effect| effect.1).collect::<Vec<_>>())
    .bind(effects.iter().map(|effect| effect.2.as_deref()).collect::<Vec<_>>())
    .execute(&mut **tx)
    .await
    .map(drop)
}

/// A control: what the worker does with a batch, without an inbox and everything else that makes it happen once.
pub(crate) async fn handle_without_inbox(
    session: &mut Session,
    events: &[Envelope],
    at_once: bool,
) -> Result<(), Error> {
    let mut tx = session.begin().await.map_err(failed)?;
    if at_once {
        let effects: Vec<Effect> =
            events.iter().map(|event| (event.id.as_uuid(), event.sequence, event.key.clone())).collect();
        insert_effects(tx.for_others(), &effects).await.map_err(failed)?;
    } else {
        for event in events {
            insert_effect(tx.for_others(), event.id.as_uuid(), event.sequence, event.key.as_deref())
                .await
                .map_err(failed)?;
        }
    }
    tx.commit().await.map_err(failed)
}

/// How many rows were written, also by transactions that have not ended or were rolled back. It costs nothing.
pub(crate) async fn written(session: &mut Session) -> Result<u64, Error> {
    let written: i64 =
        sqlx::query_scalar("select case when is_called then last_value else 0 end from public.bench_effect_place_seq")
            .fetch_one(session)
            .await
            .map_err(failed)?;
    Ok(written.unsigned_abs())
}

/// How many rows are there, and the seconds between the first and the last one.
pub(crate) async fn effects_span(session: &mut Session) -> Result<(u64, f64), Error> {
    let (count, seconds): (i64, Option<f64>) =
        sqlx::query_as("select count(*), extract(epoch from max(at) - min(at))::float8 from public.bench_effect")
            .fetch_one(session)
            .await
            .map_err(failed)?;
    Ok((count.unsigned_abs(), seconds.unwrap_or_default()))
}

/// What took effect, in that order.
pub(crate) async fn effects(session: &mut Session) -> Result<Vec<Effect>, Error> {
    sqlx::query_as("select event_id, outbox_id, key from public.bench_effect order by place")
        .fetch_all(session)
        .await
        .map_err(failed)
}

/// A floor: looks whether there is an event behind the last one.
pub(crate) async fn empty_poll(session: &mut Session) -> Result<(), Error> {
    sqlx::query("select exists (select from aftercommit.outbox where id > $1)")
        .bind(i64::MAX)
        .fetch_one(session)
        .await
        .map(drop)
        .map_err(failed)
}

/// A part of what every way with a guarantee needs: one row, and a commit that waits for the disk.
pub(crate) async fn durable_commit(session: &mut Session) -> Result<(), Error> {
    sqlx::query("insert into public.bench_effect (event_id, outbox_id) values ($1, 0)")
        .bind(Uuid::nil())
        .execute(session)
        .await
        .map(drop)
        .map_err(failed)
}

/// How many transactions a database has seen. The server's processes tell about theirs once a second.
pub(crate) async fn transactions(session: &mut Session, database: &str) -> Result<u64, Error> {
    let transactions: i64 =
        sqlx::query_scalar("select xact_commit + xact_rollback from pg_stat_database where datname = $1")
            .bind(database)
            .fetch_one(session)
            .await
            .map_err(failed)?;
    Ok(transactions.unsigned_abs())
}

/// The name of the database.
pub(crate) async fn database(session: &mut Session) -> Result<String, Error> {
    sqlx::query_scalar("select current_database()").fetch_one(session).await.map_err(failed)
}
