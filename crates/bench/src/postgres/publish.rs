//! A publishing service: its transactions, with the library and with an INSERT written by hand.

use std::collections::BTreeMap;

use sqlx::postgres::PgConnection;
use sqlx::types::Json;
use sqlx::{AssertSqlSafe, Connection, Executor, Postgres, QueryBuilder};
use uuid::Uuid;

use super::failed;
use aftercommit_core::config::PostgresConfig;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::postgres::session::Session;
use aftercommit_core::postgres::{database_error, options};
use aftercommit_outbox as outbox;
use aftercommit_outbox::event::{Event, EventId};

/// Accounts that a service changes.
pub(crate) const ACCOUNTS: i64 = 1000;

/// How a transaction writes its events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// With `outbox::publish`, or `outbox::publish_all` for several.
    OutboxReader,
    /// With an INSERT into the outbox, written by hand.
    ByHand,
    /// With the same INSERT into a table of the same columns that has a primary key and nothing else to keep.
    PlainTable,
}

/// Makes what the service has beside the outbox.
pub(crate) async fn create_service(session: &mut Session) -> Result<(), Error> {
    let sql = format!(
        "create table public.bench_account (id bigint primary key, balance bigint not null);
         insert into public.bench_account select n, 0 from generate_series(1, {ACCOUNTS}) as n;
         create table public.bench_plain (
             id bigint generated always as identity primary key,
             event_id uuid not null,
             type text not null,
             version integer not null,
             key text,
             headers jsonb not null,
             payload bytea not null,
             content_type text not null,
             created_at timestamptz not null default clock_timestamp())"
    );
    session.execute(AssertSqlSafe(sql)).await.map(drop).map_err(failed)
}

/// Empties what the service wrote, so that every run finds the same.
pub(crate) async fn clear_service(session: &mut Session) -> Result<(), Error> {
    session.execute("truncate aftercommit.outbox, public.bench_plain").await.map_err(failed)?;
    session.execute("vacuum (analyze) public.bench_account").await.map(drop).map_err(failed)
}

/// A connection of the service.
pub(crate) struct Service(PgConnection);

impl Service {
    pub(crate) async fn connect(config: &PostgresConfig) -> Result<Self, Error> {
        let connected = options(config, "aftercommit-bench")?.connect().await;
        connected.map(Self).map_err(|error| database_error("cannot connect to PostgreSQL", error))
    }

    /// A transaction with one event and nothing else.
    pub(crate) async fn publish<E: Event>(&mut self, event: &E) -> Result<EventId, Error> {
        let mut tx = self.0.begin().await.map_err(failed)?;
        let id = outbox::publish(&mut tx, event).await.map_err(refused)?;
        tx.commit().await.map_err(failed)?;
        Ok(id)
    }

    /// A transaction that changes an account and writes of it. Returns the ids of the events.
    pub(crate) async fn transact<E: Event>(
        &mut self,
        way: Way,
        account: i64,
        events: &[E],
    ) -> Result<Vec<Uuid>, Error> {
        let mut tx = self.0.begin().await.map_err(failed)?;
        sqlx::query("update public.bench_account set balance = balance + 1 where id = $1")
            .bind(account)
            .execute(&mut *tx)
            .await
            .map_err(failed)?;
        let ids = match (way, events) {
            (Way::OutboxReader, [event]) => vec![outbox::publish(&mut tx, event).await.map_err(refused)?.as_uuid()],
            (Way::OutboxReader, events) => {
                let ids = outbox::publish_all(&mut tx, events).await.map_err(refused)?;
                ids.into_iter().map(EventId::as_uuid).collect()
            }
            (way, events) => insert(&mut tx, way, events).await?,
        };
        tx.commit().await.map_err(failed)?;
        Ok(ids)
    }
}

/// As a programmer would write it: one parameter per value, one row per event.
async fn insert<E: Event>(tx: &mut PgConnection, way: Way, events: &[E]) -> Result<Vec<Uuid>, Error> {
    let into = match way {
        Way::PlainTable => {
            "insert into public.bench_plain (event_id, type, version, key, headers, payload, content_type) "
        }
        _ => "insert into aftercommit.outbox (event_id, type, version, key, headers, payload, content_type) ",
    };
    let mut ids = Vec::with_capacity(events.len());
    let mut rows = Vec::with_capacity(events.len());
    for event in events {
        let payload = serde_json::to_vec(event)
            .map_err(|error| Error::with_source(ErrorKind::Integrity, "an event is no JSON", error))?;
        let id = EventId::new().as_uuid();
        ids.push(id);
        rows.push((id, event.key(), payload));
    }
    let mut query = QueryBuilder::<Postgres>::new(into);
    query.push_values(rows, |mut row, (id, key, payload)| {
        row.push_bind(id).push_bind(E::TYPE).push_bind(1_i32).push_bind(key);
        row.push_bind(Json(BTreeMap::<String, String>::new())).push_bind(payload).push_bind("application/json");
    });
    query.build().execute(tx).await.map_err(failed)?;
    Ok(ids)
}

fn refused(error: outbox::PublishError) -> Error {
    Error::with_source(ErrorKind::Integrity, "an event of the bench was refused", error)
}
