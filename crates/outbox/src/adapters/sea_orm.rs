//! Publishing with SeaORM 2.
//!
//! ```no_run
//! use aftercommit_outbox::sea_orm as outbox;
//! # use aftercommit_outbox::Event;
//! # #[derive(serde::Serialize, serde::Deserialize)]
//! # struct OrderPlaced { order: i64 }
//! # impl Event for OrderPlaced { const TYPE: &'static str = "order.placed"; }
//! use sea_orm::TransactionTrait;
//!
//! # async fn place(db: sea_orm::DatabaseConnection) -> Result<(), Box<dyn std::error::Error>> {
//! let tx = db.begin().await?;
//! outbox::publish(&tx, &OrderPlaced { order: 7 }).await?;
//! tx.commit().await?;
//! # Ok(())
//! # }
//! ```
//!
//! Neither a late publish compiles, nor one without a transaction. The first of these compiles, the others differ from
//! it in one thing each:
//!
//! ```no_run
//! # use aftercommit_outbox::{RawEvent, sea_orm as outbox};
//! # use sea_orm::TransactionTrait;
//! # async fn in_time(db: sea_orm::DatabaseConnection) -> Result<(), Box<dyn std::error::Error>> {
//! let tx = db.begin().await?;
//! outbox::publish_raw(&tx, RawEvent::new("a", "text/plain", "")).await?;
//! tx.commit().await?;
//! # Ok(())
//! # }
//! ```
//!
//! ```compile_fail,E0382
//! # use aftercommit_outbox::{RawEvent, sea_orm as outbox};
//! # use sea_orm::TransactionTrait;
//! # async fn late(db: sea_orm::DatabaseConnection) -> Result<(), Box<dyn std::error::Error>> {
//! let tx = db.begin().await?;
//! tx.commit().await?;
//! outbox::publish_raw(&tx, RawEvent::new("a", "text/plain", "")).await?;
//! # Ok(())
//! # }
//! ```
//!
//! ```compile_fail,E0308
//! # use aftercommit_outbox::{RawEvent, sea_orm as outbox};
//! # async fn bare(db: sea_orm::DatabaseConnection) -> Result<(), Box<dyn std::error::Error>> {
//! outbox::publish_raw(&db, RawEvent::new("a", "text/plain", "")).await?;
//! # Ok(())
//! # }
//! ```
//!
//! A transaction that was begun within another one is a savepoint. SeaORM lets both be used at a time, so what is
//! published through the outer one while a savepoint is open goes with the savepoint.
//!
//! # PgBouncer
//! SeaORM prepares every statement under a name, its own and ours, and cannot be told otherwise. Behind PgBouncer in
//! transaction mode it needs one that tracks prepared statements: from 1.21 on, with `max_prepared_statements` set.
//! [`set_pooled`](crate::set_pooled) changes nothing here.

use std::collections::BTreeMap;

use ::sea_orm::{ConnectionTrait, DatabaseTransaction, DbBackend, DbErr, RuntimeErr, Statement, Value};
use serde_json::Value as Json;

use crate::check::{self, NewEvent};
use crate::error::{Problem, PublishError, PublishErrorKind};
use crate::event::{Event, EventId};
use crate::insert::{Columns, ONE, admitted, statements, written};
use crate::raw::RawEvent;
use crate::schema::PublishStatement;
use crate::sqlx09;

/// Any number of events, as [`MANY`](crate::insert::MANY) has them. An array of SeaORM cannot hold nulls, so an event
/// without a key comes with an empty one, which none may have.
static MANY: PublishStatement = PublishStatement::new(
    "insert into aftercommit.outbox (event_id, type, version, key, headers, payload, content_type)
         select event_id, type, version, case when key operator(pg_catalog.<>) '' then key end,
                headers, payload, content_type
           from unnest($1::pg_catalog.uuid[], $2::pg_catalog.text[], $3::integer[], $4::pg_catalog.text[],
                       $5::pg_catalog.jsonb[], $6::pg_catalog.bytea[], $7::pg_catalog.text[])
                as event (event_id, type, version, key, headers, payload, content_type)",
);

/// Writes one event in the caller's transaction. Its payload is the event's JSON.
///
/// # Errors
/// [`PublishErrorKind::Invalid`] when the event is refused; then nothing was written and the transaction is still
/// usable; also when the transaction is none of PostgreSQL. Any other kind when PostgreSQL refused the statement; then
/// the transaction can only be rolled back.
pub async fn publish<E: Event>(tx: &DatabaseTransaction, event: &E) -> Result<EventId, PublishError> {
    publish_raw(tx, RawEvent::of(event)?).await
}

/// Writes any number of events of one type in the caller's transaction, in their order and in one statement (a further
/// one for each 64 MiB of payload). Without events it does nothing.
///
/// # Errors
/// As [`publish`]; when one event is refused, none is written.
pub async fn publish_all<'e, E: Event>(
    tx: &DatabaseTransaction,
    events: impl IntoIterator<Item = &'e E>,
) -> Result<Vec<EventId>, PublishError> {
    write(tx, &admitted(events)?).await
}

/// Writes one event whose bytes, content type, headers or id the caller chose.
///
/// # Errors
/// As [`publish`], and [`PublishErrorKind::Duplicate`] when an event with the caller's id is in the outbox.
pub async fn publish_raw(tx: &DatabaseTransaction, event: RawEvent) -> Result<EventId, PublishError> {
    let event = check::admit(event)?;
    write(tx, std::slice::from_ref(&event)).await?;
    Ok(event.event_id.into())
}

async fn write(tx: &DatabaseTransaction, events: &[NewEvent]) -> Result<Vec<EventId>, PublishError> {
    if let Some(NewEvent { event_type, .. }) = events.first() {
        if tx.get_database_backend() != DbBackend::Postgres {
            return Err(PublishError::invalid(event_type, Problem::new("transaction", "is none of PostgreSQL")));
        }
        insert(tx, events).await.map_err(|error| failed(event_type, error))?;
    }
    Ok(written(events))
}

async fn insert(tx: &DatabaseTransaction, events: &[NewEvent]) -> Result<(), DbErr> {
    if let [event] = events {
        return execute(tx, ONE.sql(), one(event)).await;
    }
    for events in statements(events) {
        execute(tx, MANY.sql(), many(events)).await?;
    }
    Ok(())
}

async fn execute(tx: &DatabaseTransaction, sql: &str, values: [Value; 7]) -> Result<(), DbErr> {
    tx.execute_raw(Statement::from_sql_and_values(DbBackend::Postgres, sql, values)).await?;
    Ok(())
}

fn one(event: &NewEvent) -> [Value; 7] {
    [
        event.event_id.into(),
        event.event_type.as_str().into(),
        event.version.into(),
        event.key.clone().into(),
        json(&event.headers).into(),
        event.payload.clone().into(),
        event.content_type.as_str().into(),
    ]
}

fn many(events: &[NewEvent]) -> [Value; 7] {
    let Columns { event_ids, types, versions, keys, headers, payloads, content_types } = Columns::of(events);
    let texts = |texts: Vec<&str>| texts.into_iter().map(String::from).collect::<Vec<_>>().into();
    [
        event_ids.into(),
        texts(types),
        versions.into(),
        texts(keys.into_iter().map(Option::unwrap_or_default).collect()),
        headers.into_iter().map(json).collect::<Vec<_>>().into(),
        payloads.into_iter().map(<[u8]>::to_vec).collect::<Vec<_>>().into(),
        texts(content_types),
    ]
}

fn json(headers: &BTreeMap<String, String>) -> Json {
    headers.iter().map(|(name, value)| (name.clone(), Json::from(value.as_str()))).collect()
}

fn failed(event_type: &str, error: DbErr) -> PublishError {
    let told = match &error {
        DbErr::Exec(RuntimeErr::SqlxError(error))
        | DbErr::Query(RuntimeErr::SqlxError(error))
        | DbErr::Conn(RuntimeErr::SqlxError(error)) => sqlx09::refusal(event_type, error),
        DbErr::Conn(_) | DbErr::ConnectionAcquire(_) => Err(PublishErrorKind::Unavailable),
        _ => Err(PublishErrorKind::Database),
    };
    told.unwrap_or_else(|kind| PublishError::driver(event_type, kind, error))
}
