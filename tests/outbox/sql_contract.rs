//! The contract for triggers and services in other languages, as docs/sql-contract.md states it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::support::{Database, Roles, succeeded};
use serde_json::{Value, json};
use sqlx::types::Uuid;
use sqlx::{AssertSqlSafe, PgPool};

const CONTRACT: &str = include_str!("../../docs/sql-contract.md");

async fn data(pool: &PgPool) -> Vec<(String, Option<String>, Option<Value>)> {
    sqlx::query_as("select type, key, data from aftercommit.events order by id").fetch_all(pool).await.unwrap()
}

fn sql_examples() -> Vec<&'static str> {
    CONTRACT.split("```sql\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect()
}

/// As the worker sets it for the handler in SQL. Whatever stands there, an event is published.
#[tokio::test]
async fn publish_takes_the_trace_context_of_its_session() {
    let database = Database::migrated().await;
    let pool = database.pool().await;
    let context = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let full = format!("{{\"h\": \"{}\"}}", "x".repeat(16_300));
    let long = "x".repeat(513);
    for (parent, state, own, expected) in [
        (context, "congo=t61", "{}", json!({ "traceparent": context, "tracestate": "congo=t61" })),
        (context, "", "{\"tenant\": \"a\"}", json!({ "traceparent": context, "tenant": "a" })),
        (context, "congo=t61", "{\"Traceparent\": \"mine\"}", json!({ "Traceparent": "mine" })),
        (context, "congo=t61", "{\"tracestate\": \"mine\"}", json!({ "tracestate": "mine" })),
        (context, "ä", "{}", json!({ "traceparent": context })),
        (context, &long, "{}", json!({ "traceparent": context })),
        (context, "", &full, serde_json::from_str(&full).unwrap()),
        ("", "congo=t61", "{}", json!({})),
        ("00-not one\r\nNats-Rollup: all", "", "{}", json!({})),
    ] {
        let mut tx = pool.begin().await.unwrap();
        let set =
            "select set_config('aftercommit.traceparent', $1, true), set_config('aftercommit.tracestate', $2, true)";
        sqlx::query(set).bind(parent).bind(state).execute(&mut *tx).await.unwrap();
        let publish = "select aftercommit.publish('a.b', '{}', headers => $1::jsonb)";
        let id: Uuid = sqlx::query_scalar(publish).bind(own).fetch_one(&mut *tx).await.unwrap();
        let written = "select headers from aftercommit.outbox where event_id = $1";
        let headers: Value = sqlx::query_scalar(written).bind(id).fetch_one(&mut *tx).await.unwrap();
        assert_eq!(headers, expected, "{parent} {state}");
    }
}

#[tokio::test]
async fn the_examples_of_the_contract_run() {
    let database = Database::migrated().await;
    let pool = database.pool().await;
    database
        .execute("create table account (id int primary key, balance int); insert into account values (7, 100)")
        .await;
    let examples = sql_examples();
    assert_eq!(examples.len(), 4);
    for example in examples {
        database.execute(example).await;
    }
    // The trigger publishes with the rights of whoever makes the change.
    let shop = Roles::of(&database).login(&database, "shop", &["publisher"]).await;
    database.execute(&format!("grant all on customer to {shop}")).await;
    for change in [
        "insert into customer values (1, 'Ann')",
        "update customer set name = 'Änne'",
        "begin; update customer set name = 'never'; rollback",
        "delete from customer",
    ] {
        database.execute(&format!("set role {shop}; {change}")).await;
    }
    let customer = |name| Some(json!({"id": 1, "name": name}));
    let key = || Some("customer-1".to_string());
    let captured = Some(
        json!({"op": "update", "table": "public.account", "key": {"id": 7}, "new": {"id": 7, "balance": 0}, "old": null, "changed": ["balance"]}),
    );
    assert_eq!(
        data(&pool).await,
        [
            ("account.debited".into(), Some("account-7".into()), Some(json!({"account": 7, "amount": 10}))),
            ("account.updated".into(), Some("7".into()), captured),
            ("customer.added".into(), key(), customer("Ann")),
            ("customer.changed".into(), key(), customer("Änne")),
            ("customer.removed".into(), key(), customer("Änne")),
        ]
    );
}

#[tokio::test]
async fn the_contract_names_every_column_and_constraint() {
    let database = Database::migrated().await;
    let pool = database.pool().await;
    let names: Vec<String> = sqlx::query_scalar(
        "select column_name::text from information_schema.columns where table_schema = 'aftercommit' and table_name = 'outbox'
         union all
         select conname::text from pg_constraint where conrelid = 'aftercommit.outbox'::regclass and contype in ('c', 'u')",
    )
    .fetch_all(&pool)
    .await
    .unwrap();
    assert!(names.len() > 18, "{names:?}");
    for name in names {
        assert!(CONTRACT.contains(&format!("`{name}`")), "docs/sql-contract.md does not name {name}");
    }
}

#[tokio::test]
async fn the_function_fills_in_the_rest() {
    let database = Database::migrated().await;
    let pool = database.pool().await;
    let id: Uuid = sqlx::query_scalar(
        "select aftercommit.publish(type => 'a.b', payload => '{\"n\": 12345678901234567890.10}', headers => '{\"tenant\": \"acme\"}')",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    let row: (Uuid, i32, Option<String>, Value, Vec<u8>, String) =
        sqlx::query_as("select event_id, version, key, headers, payload, content_type from aftercommit.outbox")
            .fetch_one(&pool)
            .await
            .unwrap();
    let payload = br#"{"n": 12345678901234567890.10}"#.to_vec();
    assert_eq!(row, (id, 1, None, json!({"tenant": "acme"}), payload, "application/json".into()));

    sqlx::query("select aftercommit.publish('a.b', 'null', 'k', null)").execute(&pool).await.unwrap();
    for nothing in ["select aftercommit.publish('a.b', null)", "select aftercommit.publish(null, '{}')"] {
        let error = sqlx::query(nothing).execute(&pool).await.unwrap_err();
        assert_eq!(error.as_database_error().unwrap().code().as_deref(), Some("23502"), "{nothing}");
    }
}

/// Whatever the caller put in front of the system's functions, the function does not see.
#[tokio::test]
async fn the_functions_do_not_follow_the_callers_search_path() {
    let database = Database::migrated().await;
    let pool = database.pool().await;
    database
        .execute(
            "create schema trap;
             create function trap.gen_random_uuid() returns uuid language sql as $$select '00000000-0000-0000-0000-000000000000'::uuid$$;
             create function trap.convert_to(text, name) returns bytea language sql as $$select 'trap'::bytea$$;
             create function trap.int8send(bigint) returns bytea language sql as $$select 'trap'::bytea$$;
             create table trap.outbox (event_id uuid, type text, key text, headers jsonb, payload bytea)",
        )
        .await;
    let mut tx = pool.begin().await.unwrap();
    sqlx::query("set local search_path = trap, aftercommit, pg_catalog").execute(&mut *tx).await.unwrap();
    let id: Uuid = sqlx::query_scalar("select publish('a', '{}')").fetch_one(&mut *tx).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(id.get_version_num(), 7);
    assert_eq!(data(&pool).await, [("a".into(), None, Some(json!({})))]);
}

#[tokio::test]
async fn ids_are_version_7_uuids_in_the_order_of_their_time() {
    let database = Database::migrated().await;
    let pool = database.pool().await;
    let before = SystemTime::now();
    let ids: Vec<Uuid> = sqlx::query_scalar("select aftercommit.new_event_id() from generate_series(1, 20000)")
        .fetch_all(&pool)
        .await
        .unwrap();
    let after = SystemTime::now();
    for id in &ids {
        assert_eq!(id.get_version_num(), 7);
        assert_eq!(id.get_variant(), sqlx::types::uuid::Variant::RFC4122);
        let (seconds, nanos) = id.get_timestamp().unwrap().to_unix();
        let time = UNIX_EPOCH + Duration::new(seconds, nanos);
        // The id has milliseconds in its first 48 bits.
        assert!(time + Duration::from_millis(1) > before && time <= after, "{id}");
    }
    // Two made within a quarter of a microsecond may stand either way; none strays further.
    let micros = |id: &Uuid| {
        let bits = id.as_u128();
        (bits >> 80) * 1_000 + ((bits >> 64) & 0xfff) * 1_000 / 4_096
    };
    assert!(ids.windows(2).all(|pair| micros(&pair[0]) <= micros(&pair[1])));
    let mut distinct = ids.clone();
    distinct.sort();
    distinct.dedup();
    assert_eq!(distinct.len(), ids.len());
    // Some of them differ only behind the milliseconds, so the order is the fraction's doing.
    assert!(ids.windows(2).filter(|pair| pair[0].as_u128() >> 80 == pair[1].as_u128() >> 80).count() > 1_000);
}

#[tokio::test]
async fn the_view_shows_json_and_survives_everything_else() {
    let database = Database::migrated().await;
    let pool = database.pool().await;
    for (content_type, payload, shown) in [
        ("application/json", r#"{"a":1}"#, Some(json!({"a": 1}))),
        ("application/json; charset=utf-8", "[1]", Some(json!([1]))),
        ("application/vnd.acme+json", "1", Some(json!(1))),
        ("image/svg+JSON", "null", Some(Value::Null)),
        ("application/json", "not json", None),
        ("application/json", "", None),
        ("application/json", r#""\u0000""#, None),
        ("application/jsonp", "{}", None),
        ("text/plain; x=application/json", "{}", None),
        ("text/plain", "{}", None),
    ] {
        sqlx::query(
            "insert into aftercommit.outbox (event_id, type, content_type, payload)
             values (gen_random_uuid(), 'a', $1, convert_to($2, 'UTF8'))",
        )
        .bind(content_type)
        .bind(payload)
        .execute(&pool)
        .await
        .unwrap();
        let row: (Option<Value>, i32) =
            sqlx::query_as("select data, payload_bytes from aftercommit.events order by id desc limit 1")
                .fetch_one(&pool)
                .await
                .unwrap();
        assert_eq!(row, (shown, i32::try_from(payload.len()).unwrap()), "{content_type} {payload}");
    }
    sqlx::query("insert into aftercommit.outbox (event_id, type, payload) values (gen_random_uuid(), 'a', '\\xff00')")
        .execute(&pool)
        .await
        .unwrap();
    // Catching an exception is not allowed in a parallel worker before PostgreSQL 17.
    let mut connection = pool.acquire().await.unwrap();
    let version: i32 = sqlx::query_scalar("select current_setting('server_version_num')::int")
        .fetch_one(&mut *connection)
        .await
        .unwrap();
    let force = if version < 160_000 { "set force_parallel_mode = on" } else { "set debug_parallel_query = on" };
    sqlx::query(AssertSqlSafe(force)).execute(&mut *connection).await.unwrap();
    let unreadable: i64 = sqlx::query_scalar("select count(*) filter (where data is null) from aftercommit.events")
        .fetch_one(&mut *connection)
        .await
        .unwrap();
    assert_eq!(unreadable, 7);

    // A reader of the view needs nothing else.
    database
        .execute("create role reader login; grant usage on schema aftercommit to reader; grant select on aftercommit.events to reader")
        .await;
    let reader = PgPool::connect(&database.url_of("reader")).await.unwrap();
    let shown: i64 = sqlx::query_scalar("select count(data) from aftercommit.events").fetch_one(&reader).await.unwrap();
    assert_eq!(shown, 4);
    assert!(sqlx::query("select payload from aftercommit.outbox").execute(&reader).await.is_err());
}

#[tokio::test]
async fn a_dump_restores_with_rows_constraints_and_functions() {
    let database = Database::migrated().await;
    database
        .execute(
            r#"select aftercommit.publish('a.b', '{"n": 1}', 'Schlüssel', '{"tenant": "a \"b\" \\c"}');
               insert into aftercommit.outbox (event_id, type, version, content_type, payload)
               values (gen_random_uuid(), 'label.printed', 2, 'application/pdf', decode('00ff0a5c', 'hex'))"#,
        )
        .await;
    let dump = database.pg_dump(&[]);
    let restored = Database::empty().await;
    succeeded(restored.psql(&dump));
    assert_eq!(restored.pg_dump(&[]), dump);

    let pool = restored.pool().await;
    assert!(sqlx::query("select aftercommit.publish('a..b', '{}')").execute(&pool).await.is_err());
    assert!(
        sqlx::query("select aftercommit.publish('a', '{}', null, '{\"ce-id\": \"\"}')").execute(&pool).await.is_err()
    );
    sqlx::query("select aftercommit.publish('a', '{}')").execute(&pool).await.unwrap();
    let ids: Vec<i64> =
        sqlx::query_scalar("select id from aftercommit.outbox order by id").fetch_all(&pool).await.unwrap();
    assert_eq!((ids.len(), ids[..2].to_vec()), (3, vec![1, 2]));
    assert_eq!(aftercommit::operator::migrate(&restored.config).await.unwrap(), Vec::<String>::new());
}

/// Defaults are evaluated in the order of the columns, so the transaction has its number before the row has its id. The
/// relay relies on it: an id below its mark belongs to a transaction that the mark knows.
#[tokio::test]
async fn the_transactions_number_stands_before_the_id() {
    let database = Database::migrated().await;
    let columns: Vec<String> = sqlx::query_scalar(
        "select attname::text from pg_attribute
          where attrelid = 'aftercommit.outbox'::regclass and attnum > 0 and not attisdropped order by attnum",
    )
    .fetch_all(&database.pool().await)
    .await
    .unwrap();
    assert_eq!(columns[..2], ["xid", "id"]);
}
