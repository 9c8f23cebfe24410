//! What publishing does, through every driver.

use std::error::Error;
use std::fmt::Write;

use aftercommit::outbox::{EventId, PublishError, PublishErrorKind, RawEvent};
use aftercommit_adapters::database::{Columns, Database, Written};
use aftercommit_adapters::{Connection, Placed, Transaction, drivers};
use sqlx::Connection as _;
use uuid::Uuid;

/// All of the table for one driver.
macro_rules! table {
    ($connection:ty) => {
        table! { $connection:
            a_typed_event_is_the_row_that_sqlx09_writes,
            a_raw_event_keeps_what_its_caller_chose,
            a_value_that_only_serializes_is_published,
            several_events_keep_their_order,
            several_events_are_all_written_or_none,
            a_rollback_takes_it_along,
            a_rollback_to_a_savepoint_takes_it_along,
            an_illegal_event_leaves_the_transaction_usable,
            a_second_event_with_an_id_is_a_duplicate,
            a_lock_that_is_not_free_in_time_is_a_conflict,
            a_missing_schema_is_named_with_the_way_out,
            a_missing_grant_is_named,
            a_session_that_is_ended_is_an_outage,
            errors_show_no_payload,
        }
    };
    ($connection:ty: $($behaviour:ident,)*) => {
        $(#[tokio::test]
        async fn $behaviour() {
            super::$behaviour::<$connection>().await;
        })*
    };
}

mod sqlx09 {
    table!(super::drivers::Sqlx09);
}

mod sqlx08 {
    table!(super::drivers::Sqlx08);
}

mod tokio_postgres {
    table!(super::drivers::TokioPostgres);
}

mod diesel {
    table!(super::drivers::Diesel);
}

mod diesel_async {
    table!(super::drivers::DieselAsync);
}

mod sea_orm {
    table!(super::drivers::SeaOrm);
}

async fn a_typed_event_is_the_row_that_sqlx09_writes<C: Connection>() {
    let database = Database::migrated().await;
    let events = [Placed::number(7), Placed::number(-7), Placed::number(i64::MAX)];
    let mut ids = Vec::new();

    let mut connection = C::connect(&database.url).await;
    let mut tx = connection.begin().await;
    for event in &events {
        ids.push(tx.publish(event).await.unwrap());
    }
    tx.commit().await;
    let mut connection = drivers::Sqlx09::connect(&database.url).await;
    let mut tx = connection.begin().await;
    for event in &events {
        ids.push(tx.publish(event).await.unwrap());
    }
    tx.commit().await.unwrap();

    let written = database.written().await;
    assert_eq!(written.iter().map(|row| row.event_id).collect::<Vec<_>>(), uuids(&ids));
    let (mine, reference) = written.split_at(events.len());
    assert_eq!(bytes(mine), bytes(reference));
    let keyed = ("order.placed".into(), 3, Some("order-7".into()), "{}".into(), "application/json".into());
    assert_eq!(mine[0].columns, keyed);
    assert_eq!(mine[1].columns.2, None);
    let payload = "{\"order\":7,\"note\":\"Nr. 7: \\\"Grüße\\\" \u{2028} \\\\\"}";
    assert_eq!(mine[0].payload, payload.as_bytes());
}

async fn a_raw_event_keeps_what_its_caller_chose<C: Connection>() {
    let database = Database::migrated().await;
    let id = EventId::new();
    let payload: Vec<u8> = (0..=255).collect();
    let event = RawEvent::new("label.printed", "application/octet-stream; q=\"1\"", payload.clone())
        .id(id)
        .version(i32::MAX as u32)
        .key("Päckchen 'x' $1")
        .header("tenant", r#"a"c\me"#)
        .header("B-2", "");
    let bare = RawEvent::new("a", "text/plain", "");

    let mut connection = C::connect(&database.url).await;
    let mut tx = connection.begin().await;
    assert_eq!(tx.publish_raw(event.clone()).await.unwrap(), id);
    let other = tx.publish_raw(bare).await.unwrap();
    tx.commit().await;

    let columns = (
        "label.printed".into(),
        i32::MAX,
        Some("Päckchen 'x' $1".into()),
        r#"{"B-2": "", "tenant": "a\"c\\me"}"#.into(),
        "application/octet-stream; q=\"1\"".into(),
    );
    let plain = ("a".into(), 1, None, "{}".into(), "text/plain".into());
    assert_eq!(
        database.written().await,
        [
            Written { event_id: id.as_uuid(), columns, payload },
            Written { event_id: other.as_uuid(), columns: plain, payload: Vec::new() },
        ]
    );
}

async fn a_value_that_only_serializes_is_published<C: Connection>() {
    #[derive(serde::Serialize)]
    struct Told<'a> {
        name: &'a str,
    }
    let database = Database::migrated().await;
    let mut connection = C::connect(&database.url).await;
    let mut tx = connection.begin().await;
    tx.publish_raw(RawEvent::json("told", &Told { name: "ann" }).unwrap()).await.unwrap();
    tx.commit().await;
    let written = database.written().await;
    assert_eq!((&*written[0].payload, &*written[0].columns.4), (&br#"{"name":"ann"}"#[..], "application/json"));
}

async fn several_events_keep_their_order<C: Connection>() {
    let database = Database::migrated().await;
    // With keys and without, so that a null is among the values.
    let events: Vec<_> = [3, -1, 2, 3, -2].map(Placed::number).into();

    let mut connection = C::connect(&database.url).await;
    let mut tx = connection.begin().await;
    assert_eq!(tx.publish_all(&[]).await.unwrap(), []);
    let ids = tx.publish_all(&events).await.unwrap();
    tx.commit().await;
    let mut connection = drivers::Sqlx09::connect(&database.url).await;
    let mut tx = connection.begin().await;
    tx.publish_all(&events).await.unwrap();
    tx.commit().await.unwrap();

    let written = database.written().await;
    let (mine, reference) = written.split_at(events.len());
    assert_eq!(mine.iter().map(|row| row.event_id).collect::<Vec<_>>(), uuids(&ids));
    assert_eq!(bytes(mine), bytes(reference));
    let keys: Vec<_> = mine.iter().map(|row| row.columns.2.as_deref()).collect();
    assert_eq!(keys, [Some("order-3"), None, Some("order-2"), Some("order-3"), None]);
}

async fn several_events_are_all_written_or_none<C: Connection>() {
    let database = Database::migrated().await;
    let mut connection = C::connect(&database.url).await;
    let mut tx = connection.begin().await;
    let error = tx.publish_all(&[Placed::number(1), Placed::number(0), Placed::number(2)]).await.unwrap_err();
    assert_eq!((error.kind(), error.field()), (PublishErrorKind::Invalid, Some("key")));
    tx.commit().await;
    assert_eq!(database.written().await, []);
}

async fn a_rollback_takes_it_along<C: Connection>() {
    let database = Database::migrated().await;
    let mut connection = C::connect(&database.url).await;
    let mut tx = connection.begin().await;
    tx.publish(&Placed::number(1)).await.unwrap();
    tx.publish_all(&[Placed::number(2), Placed::number(3)]).await.unwrap();
    tx.rollback().await;
    assert_eq!(database.written().await, []);

    let mut tx = connection.begin().await;
    let id = tx.publish(&Placed::number(4)).await.unwrap();
    tx.commit().await;
    assert_eq!(database.written().await[0].event_id, id.as_uuid());
}

async fn a_rollback_to_a_savepoint_takes_it_along<C: Connection>() {
    let database = Database::migrated().await;
    let mut connection = C::connect(&database.url).await;
    let mut tx = connection.begin().await;
    let before = tx.publish(&Placed::number(1)).await.unwrap();
    tx.publish_in_vain(RawEvent::new("a", "text/plain", "")).await.unwrap();
    let behind = tx.publish(&Placed::number(2)).await.unwrap();
    tx.commit().await;
    let written: Vec<_> = database.written().await.iter().map(|row| row.event_id).collect();
    assert_eq!(written, uuids(&[before, behind]));
}

async fn an_illegal_event_leaves_the_transaction_usable<C: Connection>() {
    let database = Database::migrated().await;
    let mut connection = C::connect(&database.url).await;
    let mut tx = connection.begin().await;
    let error = tx.publish(&Placed::number(0)).await.unwrap_err();
    assert_eq!((error.kind(), error.field()), (PublishErrorKind::Invalid, Some("key")));
    let raw = RawEvent::new("a", "text/plain", "").header("Nats-Msg-Id", "7");
    let error = tx.publish_raw(raw).await.unwrap_err();
    assert_eq!((error.kind(), error.field()), (PublishErrorKind::Invalid, Some("headers.Nats-Msg-Id")));
    tx.publish(&Placed::number(1)).await.unwrap();
    tx.commit().await;
    assert_eq!(database.written().await.len(), 1);
}

async fn a_second_event_with_an_id_is_a_duplicate<C: Connection>() {
    let database = Database::migrated().await;
    let event = || RawEvent::new("a", "text/plain", "x").id(Uuid::nil().into());
    let mut connection = C::connect(&database.url).await;
    let mut tx = connection.begin().await;
    tx.publish_raw(event()).await.unwrap();
    tx.commit().await;

    let mut tx = connection.begin().await;
    let error = tx.publish_raw(event()).await.unwrap_err();
    assert_eq!(error.kind(), PublishErrorKind::Duplicate);
    assert!(error.to_string().contains("[23505]"), "{error}");
    tx.rollback().await;
}

async fn a_lock_that_is_not_free_in_time_is_a_conflict<C: Connection>() {
    let database = Database::migrated().await;
    let mut other = database.connect().await;
    let mut locked = other.begin().await.unwrap();
    sqlx::raw_sql("lock table aftercommit.outbox in share mode").execute(&mut *locked).await.unwrap();

    let mut connection = C::connect(&database.url).await;
    let mut tx = connection.begin().await;
    tx.execute("set local lock_timeout = '50ms'").await;
    let error = tx.publish(&Placed::number(1)).await.unwrap_err();
    assert_eq!(error.kind(), PublishErrorKind::Conflict, "{error}");
    assert!(error.to_string().contains("[55P03]"), "{error}");
    tx.rollback().await;
}

async fn a_missing_schema_is_named_with_the_way_out<C: Connection>() {
    let database = Database::empty().await;
    let mut connection = C::connect(&database.url).await;
    let mut tx = connection.begin().await;
    let error = tx.publish(&Placed::number(1)).await.unwrap_err();
    assert_eq!(error.kind(), PublishErrorKind::Database);
    assert_eq!(
        error.to_string(),
        "event \"order.placed\" was not written: relation \"aftercommit.outbox\" does not exist [42P01] \
         (is the schema there, and up to date? run `aftercommit migrate`, or name another schema with --schema, \
         AFTERCOMMIT_SCHEMA)"
    );
    tx.rollback().await;
}

async fn a_missing_grant_is_named<C: Connection>() {
    let database = Database::migrated().await;
    database
        .execute(
            "do $$ begin
                 create role without_grants;
             exception when duplicate_object or unique_violation then null;
             end $$",
        )
        .await;
    let mut connection = C::connect(&database.url).await;
    let mut tx = connection.begin().await;
    tx.execute("set local role without_grants").await;
    let error = tx.publish(&Placed::number(1)).await.unwrap_err();
    assert_eq!(error.kind(), PublishErrorKind::Database);
    assert!(error.to_string().ends_with(" [42501] (the role lacks a grant)"), "{error}");
    tx.rollback().await;
}

async fn a_session_that_is_ended_is_an_outage<C: Connection>() {
    let database = Database::migrated().await;
    let mut connection = C::connect(&database.url).await;
    let mut tx = connection.begin().await;
    tx.publish(&Placed::number(1)).await.unwrap();
    database.terminate().await;
    let error = tx.publish(&Placed::number(2)).await.unwrap_err();
    assert_eq!(error.kind(), PublishErrorKind::Unavailable, "{error}");
    assert!(error.to_string().starts_with("event \"order.placed\" was not written"), "{error}");
    drop(tx);
    assert_eq!(database.written().await, []);
}

async fn errors_show_no_payload<C: Connection>() {
    let database = Database::migrated().await;
    // The DETAIL of the first shows the row; the message of the second shows a part of the payload.
    database
        .execute(
            "alter table aftercommit.outbox add constraint nothing_forbidden check (type <> 'forbidden');
             create function public.count_it() returns trigger language plpgsql as $$
             begin
                 perform convert_from(new.payload, 'UTF8')::integer;
                 return new;
             end $$;
             create trigger count_it before insert on aftercommit.outbox for each row
                 when (new.type = 'counted') execute function public.count_it()",
        )
        .await;
    let mut connection = C::connect(&database.url).await;
    for event_type in ["forbidden", "counted"] {
        let mut tx = connection.begin().await;
        let event = RawEvent::new(event_type, "text/plain", "hush").key("hush").header("tenant", "hush");
        let error = tx.publish_raw(event).await.unwrap_err();
        assert_eq!(error.kind(), PublishErrorKind::Database);
        let shown = everything(&error);
        assert!(shown.contains(event_type) && !shown.contains("ailing row"), "{shown}");
        assert!(!shown.contains("hush") && !shown.contains("68757368"), "{shown}");
        tx.rollback().await;
    }

    let mut tx = connection.begin().await;
    tx.publish_raw(RawEvent::new("a", "text/plain", "hush")).await.unwrap();
    database.terminate().await;
    let shown = everything(&tx.publish_raw(RawEvent::new("a", "text/plain", "hush")).await.unwrap_err());
    assert!(!shown.contains("hush") && !shown.contains("68757368"), "{shown}");
}

/// All that a log could make of an error.
fn everything(error: &PublishError) -> String {
    let mut text = String::new();
    let mut next: Option<&dyn Error> = Some(error);
    while let Some(error) = next {
        write!(text, "{error}\n{error:?}\n{error:#?}\n").unwrap();
        next = error.source();
    }
    text
}

/// What does not differ between two publishes of one event.
fn bytes(written: &[Written]) -> Vec<(&Columns, &[u8])> {
    written.iter().map(|row| (&row.columns, row.payload.as_slice())).collect()
}

fn uuids(ids: &[EventId]) -> Vec<Uuid> {
    ids.iter().map(|id| id.as_uuid()).collect()
}
