//! Guarantees of publishing: what commits is in the outbox, what rolls back is not, and nothing else happens.

use std::collections::BTreeMap;

use crate::support::{Database, Roles};
use aftercommit::outbox::{self, PublishErrorKind, RawEvent};
use aftercommit::{Event, EventId};
use serde::{Deserialize, Serialize};
use sqlx::{Connection, PgPool};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Measured {
    sensor: u32,
    value: f64,
}

impl Event for Measured {
    const TYPE: &'static str = "sensor.measured";
    const VERSION: u32 = 3;

    fn key(&self) -> Option<String> {
        Some(format!("sensor-{}", self.sensor))
    }
}

fn measured(sensor: u32) -> Measured {
    Measured { sensor, value: 0.5 }
}

/// The event ids in the order of the log.
async fn written(pool: &PgPool) -> Vec<EventId> {
    let ids: Vec<sqlx::types::Uuid> =
        sqlx::query_scalar("select event_id from aftercommit.outbox order by id").fetch_all(pool).await.unwrap();
    ids.into_iter().map(EventId::from).collect()
}

#[tokio::test]
async fn a_typed_event_becomes_one_row() {
    let database = Database::migrated().await;
    let pool = database.pool().await;
    let mut tx = pool.begin().await.unwrap();
    let id = outbox::publish(&mut tx, &measured(7)).await.unwrap();
    tx.commit().await.unwrap();

    let row: (sqlx::types::Uuid, String, i32, Option<String>, serde_json::Value, Vec<u8>, String) =
        sqlx::query_as("select event_id, type, version, key, headers, payload, content_type from aftercommit.outbox")
            .fetch_one(&pool)
            .await
            .unwrap();
    assert_eq!(row.0, id.as_uuid());
    assert_eq!(row.0.get_version_num(), 7);
    assert_eq!((row.1.as_str(), row.2, row.3.as_deref()), ("sensor.measured", 3, Some("sensor-7")));
    assert_eq!(row.4, serde_json::json!({}));
    assert_eq!(serde_json::from_slice::<Measured>(&row.5).unwrap(), measured(7));
    assert_eq!(row.6, "application/json");
}

#[tokio::test]
async fn a_raw_event_arrives_byte_for_byte() {
    let database = Database::migrated().await;
    let pool = database.pool().await;
    let payload: Vec<u8> = (0..=255).collect();
    let given = EventId::new();
    let mut tx = pool.begin().await.unwrap();
    let event = RawEvent::new("label.printed", "application/pdf", payload.clone())
        .id(given)
        .version(2)
        .key("Paket \u{1f4e6}\n")
        .header("tenant", "acme")
        .header("X-Quote", r#"a "b" \c"#);
    assert_eq!(outbox::publish_raw(&mut tx, event).await.unwrap(), given);
    let typed = RawEvent::of(&measured(1)).unwrap().header("tenant", "acme");
    outbox::publish_raw(&mut tx, typed).await.unwrap();
    tx.commit().await.unwrap();

    type Row = (i32, Option<String>, sqlx::types::Json<BTreeMap<String, String>>, Vec<u8>, String);
    let rows: Vec<Row> =
        sqlx::query_as("select version, key, headers, payload, content_type from aftercommit.outbox order by id")
            .fetch_all(&pool)
            .await
            .unwrap();
    let (version, key, headers, bytes, content_type) = &rows[0];
    assert_eq!((*version, key.as_deref(), content_type.as_str()), (2, Some("Paket \u{1f4e6}\n"), "application/pdf"));
    assert_eq!(*bytes, payload);
    assert_eq!(headers["X-Quote"], r#"a "b" \c"#);
    assert_eq!((rows[1].1.as_deref(), rows[1].2["tenant"].as_str()), (Some("sensor-1"), "acme"));
}

/// Far above the 65,535 parameters that one statement can have.
#[tokio::test]
async fn any_number_is_written_in_order_by_one_statement() {
    let database = Database::migrated().await;
    let pool = database.pool().await;
    database
        .execute(
            "create table statements (rows bigint);
             create function count_statement() returns trigger language plpgsql as
                 'begin insert into statements select count(*) from written; return null; end';
             create trigger count_statement after insert on aftercommit.outbox
                 referencing new table as written for each statement execute function count_statement()",
        )
        .await;
    let events: Vec<Measured> = (0..100_000).map(measured).collect();
    let mut tx = pool.begin().await.unwrap();
    let ids = outbox::publish_all(&mut tx, &events).await.unwrap();
    assert!(outbox::publish_all(&mut tx, &[] as &[Measured]).await.unwrap().is_empty());
    tx.commit().await.unwrap();

    assert_eq!(written(&pool).await, ids);
    let keys: Vec<String> =
        sqlx::query_scalar("select key from aftercommit.outbox order by id").fetch_all(&pool).await.unwrap();
    assert!(keys.iter().zip(&events).all(|(key, event)| *key == event.key().unwrap()));
    let statements: Vec<i64> = sqlx::query_scalar("select rows from statements").fetch_all(&pool).await.unwrap();
    assert_eq!(statements, [100_000]);
}

#[tokio::test]
async fn payloads_beyond_one_statement_are_split_in_order() {
    let database = Database::migrated().await;
    let pool = database.pool().await;
    #[derive(Serialize, Deserialize)]
    struct Large(String);
    impl Event for Large {
        const TYPE: &'static str = "large.made";
    }
    let events: Vec<Large> = (0..70).map(|n| Large(n.to_string() + &"x".repeat(999_990))).collect();
    let mut tx = pool.begin().await.unwrap();
    let ids = outbox::publish_all(&mut tx, &events).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(written(&pool).await, ids);
}

#[tokio::test]
async fn a_refused_event_writes_nothing_and_spoils_nothing() {
    let database = Database::migrated().await;
    let pool = database.pool().await;
    let mut tx = pool.begin().await.unwrap();
    let first = outbox::publish(&mut tx, &measured(1)).await.unwrap();

    let refused = Measured { sensor: 2, value: f64::NAN };
    let error = outbox::publish(&mut tx, &refused).await.unwrap_err();
    assert_eq!(error.kind(), PublishErrorKind::Invalid);
    assert_eq!((error.event_type(), error.field()), ("sensor.measured", Some("payload.value")));
    assert_eq!(
        error.to_string(),
        "event \"sensor.measured\" is refused: payload.value is NaN or infinite, which JSON cannot hold"
    );
    let error = outbox::publish_all(&mut tx, &[measured(3), refused, measured(4)]).await.unwrap_err();
    assert_eq!(error.field(), Some("payload.value"));

    let last = outbox::publish(&mut tx, &measured(5)).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(written(&pool).await, [first, last]);
}

#[tokio::test]
async fn the_same_id_twice_is_a_duplicate_and_shows_no_row() {
    let database = Database::migrated().await;
    let pool = database.pool().await;
    let event =
        || RawEvent::new("order.placed", "text/plain", "top secret").id(EventId::from(sqlx::types::Uuid::max()));
    let mut tx = pool.begin().await.unwrap();
    outbox::publish_raw(&mut tx, event()).await.unwrap();
    let error = outbox::publish_raw(&mut tx, event()).await.unwrap_err();
    assert_eq!(error.kind(), PublishErrorKind::Duplicate);
    assert_eq!((error.event_type(), error.field()), ("order.placed", None));
    let shown = format!("{error} {error:?}");
    assert!(!shown.contains("ffffffff") && !shown.contains("secret") && !shown.contains("746f70"), "{shown}");
}

/// The DETAIL of a violated constraint shows the whole row.
#[tokio::test]
async fn errors_of_the_database_never_show_the_row() {
    let database = Database::migrated().await;
    let pool = database.pool().await;
    database
        .execute("alter table aftercommit.outbox add constraint ours check (type <> 'order.placed') not valid")
        .await;
    let mut tx = pool.begin().await.unwrap();
    let event = RawEvent::new("order.placed", "text/plain", "payload-secret").key("key-secret");
    let error = outbox::publish_raw(&mut tx, event).await.unwrap_err();
    assert_eq!(error.kind(), PublishErrorKind::Database);
    let mut shown = format!("{error} {error:?}");
    let mut cause = std::error::Error::source(&error);
    while let Some(error) = cause {
        shown += &format!(" {error} {error:?}");
        cause = error.source();
    }
    assert!(shown.contains("ours") && shown.contains("23514"), "{shown}");
    let hex = "7061796c6f61642d736563726574";
    assert!(!shown.contains("secret") && !shown.contains(hex), "{shown}");
}

#[tokio::test]
async fn faults_of_the_database_are_told_apart() {
    let bare = Database::empty().await;
    let mut tx = bare.pool().await.begin().await.unwrap();
    let error = outbox::publish(&mut tx, &measured(1)).await.unwrap_err();
    assert_eq!(error.kind(), PublishErrorKind::Database);
    assert!(error.to_string().contains("aftercommit migrate"), "{error}");

    let database = Database::migrated().await;
    let pool = database.pool().await;
    let mut tx = pool.begin().await.unwrap();
    let backend: i32 = sqlx::query_scalar("select pg_backend_pid()").fetch_one(&mut *tx).await.unwrap();
    let gone: bool =
        sqlx::query_scalar("select pg_terminate_backend($1, 10000)").bind(backend).fetch_one(&pool).await.unwrap();
    assert!(gone);
    let error = outbox::publish(&mut tx, &measured(1)).await.unwrap_err();
    assert_eq!(error.kind(), PublishErrorKind::Unavailable, "{error}");
}

#[tokio::test]
async fn a_serialization_failure_is_a_conflict() {
    let database = Database::migrated().await;
    let pool = database.pool().await;
    database.execute("create table counter (n int); insert into counter values (0)").await;
    let mut ours = pool.begin_with("begin isolation level serializable").await.unwrap();
    let mut theirs = pool.begin_with("begin isolation level serializable").await.unwrap();
    for tx in [&mut ours, &mut theirs] {
        sqlx::query_scalar::<_, i32>("select n from counter").fetch_one(&mut **tx).await.unwrap();
    }
    sqlx::query("update counter set n = 1").execute(&mut *theirs).await.unwrap();
    outbox::publish(&mut ours, &measured(1)).await.unwrap();
    // Reads what the other one writes into the log, and the other way round: a cycle.
    sqlx::query("select count(*) from aftercommit.outbox").execute(&mut *theirs).await.unwrap();
    theirs.commit().await.unwrap();
    let error = outbox::publish(&mut ours, &measured(2)).await.unwrap_err();
    assert_eq!(error.kind(), PublishErrorKind::Conflict, "{error}");
}

/// G8: a publishing service needs these rights and no other.
#[tokio::test]
async fn a_role_that_may_only_insert_is_enough() {
    let database = Database::migrated().await;
    let pool = database.pool().await;
    let roles = Roles::of(&database);
    let shop = roles.login(&database, "shop", &["publisher"]).await;
    let shop = PgPool::connect(&database.url_of(&shop)).await.unwrap();
    let mut tx = shop.begin().await.unwrap();
    let mut ids = vec![outbox::publish(&mut tx, &measured(1)).await.unwrap()];
    ids.extend(outbox::publish_all(&mut tx, &[measured(2), measured(3)]).await.unwrap());
    let raw = RawEvent::new("a", "text/plain", "x").id(EventId::new()).key("k").header("tenant", "acme");
    ids.push(outbox::publish_raw(&mut tx, raw).await.unwrap());
    tx.commit().await.unwrap();
    assert_eq!(written(&pool).await, ids);

    // The function has no rights of its own: it needs the same INSERT.
    sqlx::query("select aftercommit.publish('a', '{}')").execute(&shop).await.unwrap();
    database.execute(&format!("revoke insert (headers) on aftercommit.outbox from {}publisher", roles.0)).await;
    let error = sqlx::query("select aftercommit.publish('a', '{}')").execute(&shop).await.unwrap_err();
    assert_eq!(error.as_database_error().unwrap().code().as_deref(), Some("42501"));
}

/// An event of A does not go when B commits, and one connection can publish again and again.
#[tokio::test]
async fn transactions_do_not_mix() {
    let database = Database::migrated().await;
    let pool = database.pool().await;
    let mut connection = pool.acquire().await.unwrap();
    let mut other = pool.begin().await.unwrap();
    let theirs = outbox::publish(&mut other, &measured(0)).await.unwrap();
    let mut ids = Vec::new();
    for n in 1..=3 {
        let mut tx = connection.begin().await.unwrap();
        ids.push(outbox::publish(&mut tx, &measured(n)).await.unwrap());
        tx.commit().await.unwrap();
        assert_eq!(written(&pool).await, ids);
    }
    other.commit().await.unwrap();
    // The other transaction took its id first.
    ids.insert(0, theirs);
    assert_eq!(written(&pool).await, ids);
}

/// Handlers and services run on several threads.
#[tokio::test]
async fn publishing_can_be_spawned() {
    let database = Database::migrated().await;
    let pool = database.pool().await;
    let ids = tokio::spawn(async move {
        let mut tx = pool.begin().await.unwrap();
        let events = [measured(1), measured(2)];
        outbox::publish(&mut tx, &events[0]).await.unwrap();
        outbox::publish_all(&mut tx, events.iter().filter(|event| event.sensor > 1)).await.unwrap()
    });
    assert_eq!(ids.await.unwrap().len(), 1);
}

/// Savepoints keep the id of the whole transaction, which is what a reader asks a snapshot about.
#[tokio::test]
async fn a_savepoint_writes_with_the_transactions_xid() {
    let database = Database::migrated().await;
    let pool = database.pool().await;
    let mut tx = pool.begin().await.unwrap();
    outbox::publish(&mut tx, &measured(1)).await.unwrap();
    let mut savepoint = tx.begin().await.unwrap();
    outbox::publish(&mut savepoint, &measured(2)).await.unwrap();
    savepoint.commit().await.unwrap();
    tx.commit().await.unwrap();
    let distinct: i64 =
        sqlx::query_scalar("select count(distinct xid) from aftercommit.outbox").fetch_one(&pool).await.unwrap();
    assert_eq!(distinct, 1);
}
