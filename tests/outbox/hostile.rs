//! Hostile values against the table and the function: what they take comes out of the stream as it was written, or is
//! parked with a reason; what they refuse is refused by name and leaves nothing behind.

use std::collections::{BTreeMap, BTreeSet};

use crate::support::{Message, Outbox, RunningRelay, SOON};
use aftercommit::envelope::Envelope;
use aftercommit::operator;
use aftercommit::relay::{ParkPolicy, RelayConfig};
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, Postgres};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use proptest::sample::select;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use sqlx::types::Uuid;
use sqlx::{Connection, PgTransaction};

/// Rows, and how many of them share a transaction.
const ROWS: usize = 2_000;
const TOGETHER: usize = 100;
/// Payloads that PostgreSQL takes and the stream does not.
const STREAM_TAKES: i32 = 990_000;

/// An event that somebody tries to write. What is `None` has a legal value.
#[derive(Debug, Clone)]
struct Attempt {
    event_type: Option<String>,
    key: Option<String>,
    /// As text, because it need not be JSON.
    headers: Option<String>,
    content_type: Option<String>,
    version: Option<i64>,
    payload: Option<Vec<u8>>,
    /// Through `aftercommit.publish`, which takes JSON.
    by_function: bool,
}

fn text() -> impl Strategy<Value = String> {
    const NASTY: &[&str] = &[
        "",
        " ",
        ".",
        "a..b",
        ".a",
        "a.",
        "*",
        ">",
        "a.*",
        "a.>",
        "$JS.API.STREAM.DELETE.X",
        "$SYS.>",
        "_INBOX.x",
        "a\r\nNats-Rollup: all",
        "a\n",
        "\r\n\r\n",
        "a\0b",
        "%00",
        "%0d%0a",
        "%",
        "a%zz",
        "\"",
        "\\",
        "';--",
        "$1",
        "\u{feff}a",
        "\u{202e}a",
        "\u{2028}",
        "ｅvents",
        "null",
        "{}",
        "text/plain; charset=\"utf-8\"",
        "HPUB a 1 2",
        "NATS/1.0 503",
        "-ERR 'x'",
    ];
    let long = (select(&["x", "é", "日", "\u{1}", "%", "a."][..]), 50..700_usize).prop_map(|(part, n)| part.repeat(n));
    prop_oneof![
        3 => select(NASTY).prop_map(String::from),
        3 => any::<String>(),
        2 => "\\PC{1,60}",
        2 => "[ -~]{1,40}",
        2 => "[A-Za-z0-9_.-]{1,30}",
        1 => "[\\x00-\\x20a:*>]{0,8}",
        1 => long,
    ]
}

fn headers() -> impl Strategy<Value = String> {
    const NAMES: &[&str] = &[
        "Nats-Msg-Id",
        "nats-rollup",
        "NATS-Expected-Last-Sequence",
        "Nats-",
        "ce-id",
        "CE-Type",
        "cE-",
        "Status",
        "Description",
        "Aftercommit-Repair",
        "aftercommit-end",
        "AFTERCOMMIT-Subject",
        "aftercommit",
        "traceparent",
        "Traceparent",
        "content-type",
        "Content-Length",
        "Host",
        "a",
        "A",
        "__proto__",
        "partitionkey",
        "id",
        "-",
    ];
    const WRONG: &[&str] = &[
        "",
        "{",
        "nonsense",
        "[]",
        "null",
        "1",
        "\"a\"",
        "{\"a\": 1}",
        "{\"a\": null}",
        "{\"a\": {\"b\": \"c\"}}",
        "{\"a\": [\"b\"]}",
        "{\"a\": \"\\u0000\"}",
        "{\"a\": \"\\ud800\"}",
        "{\"a\": \"x\", \"a\": 1}",
        "{\"a\": 1, \"a\": \"x\"}",
        "{\"a\": \"x\"} {}",
        "{\"a\": 1e999999}",
        "{\"\": \"x\"}",
    ];
    let name = prop_oneof![3 => select(NAMES).prop_map(String::from), 1 => "[A-Za-z0-9_-]{1,20}", 1 => text()];
    let value = prop_oneof![3 => "[!-~]([ -~]{0,30}[!-~])?", 1 => text()];
    let object = btree_map(name, value, 0..5).prop_map(|object| serde_json::to_string(&object).unwrap());
    let large = (16_300..16_400_usize).prop_map(|size| format!("{{\"large\": \"{}\"}}", "x".repeat(size - 13)));
    prop_oneof![8 => object, 2 => select(WRONG).prop_map(String::from), 1 => large]
}

fn payload() -> impl Strategy<Value = Vec<u8>> {
    const JSON: &[&str] = &[
        "null",
        "{\"n\": 12345678901234567890.10}",
        "1e400",
        "1e400000",
        "\"\\u0000\"",
        "\"\\ud83d\\ude00\"",
        "{",
        "",
        "{\"a\": 1, \"a\": 2}",
    ];
    let deep = (1..20_000_usize).prop_map(|depth| "[".repeat(depth) + &"]".repeat(depth));
    let large = select(&[STREAM_TAKES as usize, 1_000_000, 1_000_001][..]).prop_map(|bytes| vec![b'7'; bytes]);
    prop_oneof![
        20 => vec(any::<u8>(), 0..300),
        10 => select(JSON).prop_map(Vec::from),
        10 => text().prop_map(|text| serde_json::to_vec(&text).unwrap()),
        2 => deep.prop_map(Vec::from),
        4 => large,
    ]
}

fn attempt() -> impl Strategy<Value = Attempt> {
    let some = |strategy: BoxedStrategy<String>| prop::option::weighted(0.3, strategy);
    let version = select(vec![-1, 0, 1, 2, i64::from(i32::MAX), i64::from(i32::MAX) + 1, i64::MIN]);
    (
        some(text().boxed()),
        some(text().boxed()),
        some(headers().boxed()),
        some(text().boxed()),
        prop::option::weighted(0.1, version),
        prop::option::weighted(0.5, payload()),
        any::<bool>(),
    )
        .prop_map(|(event_type, key, headers, content_type, version, payload, by_function)| Attempt {
            content_type: content_type.filter(|_| !by_function),
            version: version.filter(|_| !by_function),
            // The function takes text.
            payload: payload.filter(|payload| !by_function || std::str::from_utf8(payload).is_ok()),
            event_type,
            key,
            headers,
            by_function,
        })
}

impl Attempt {
    async fn write(&self, tx: &mut PgTransaction<'_>) -> Result<Uuid, sqlx::Error> {
        let mut savepoint = tx.begin().await?;
        let statement = match self.by_function {
            true => "select aftercommit.publish($1, convert_from($2, 'UTF8')::jsonb, $3, $4::text::jsonb)",
            false => {
                "insert into aftercommit.outbox (event_id, type, payload, key, headers, content_type, version)
                 values (gen_random_uuid(), $1, $2, $3, $4::text::jsonb, $5, $6::bigint) returning event_id"
            }
        };
        let query = sqlx::query_scalar(statement)
            .bind(self.event_type.as_deref().unwrap_or("order.placed"))
            .bind(self.payload.as_deref().unwrap_or(b"{}"))
            .bind(self.key.as_deref())
            .bind(self.headers.as_deref().unwrap_or("{\"tenant\": \"acme\"}"));
        let query = match self.by_function {
            true => query,
            false => {
                query.bind(self.content_type.as_deref().unwrap_or("application/json")).bind(self.version.unwrap_or(1))
            }
        };
        let id = query.fetch_one(&mut *savepoint).await;
        match id.is_ok() {
            true => savepoint.commit().await?,
            false => savepoint.rollback().await?,
        }
        id
    }

    /// Whether a refusal names a value that is not legal here.
    fn explains(&self, refusal: &sqlx::Error) -> bool {
        let Some(error) = refusal.as_database_error() else { return false };
        let texts = [&self.event_type, &self.key, &self.headers, &self.content_type];
        let json = self.headers.is_some() || (self.by_function && self.payload.is_some());
        match (error.constraint(), error.code().as_deref()) {
            (Some(constraint), _) => [
                ("outbox_type", self.event_type.is_some()),
                ("outbox_key", self.key.is_some()),
                ("outbox_header", self.headers.is_some()),
                ("outbox_content_type", self.content_type.is_some()),
                ("outbox_version", self.version.is_some()),
                ("outbox_payload", self.payload.is_some()),
            ]
            .iter()
            .any(|(name, hostile)| *hostile && constraint.starts_with(name)),
            // A NUL in text.
            (None, Some("22021")) => {
                texts.into_iter().flatten().any(|text| text.contains('\0')) || (self.by_function && json)
            }
            // No JSON; a NUL in JSON; a number that is too large; JSON that is too deep.
            (None, Some("22P02" | "22P05" | "54001")) => json,
            (None, Some("22003")) => json || self.version.is_some(),
            _ => false,
        }
    }
}

/// A row as it was taken.
#[derive(Debug, PartialEq, sqlx::FromRow)]
struct Taken {
    event_id: Uuid,
    id: i64,
    #[sqlx(rename = "type")]
    event_type: String,
    version: i32,
    key: Option<String>,
    #[sqlx(json)]
    headers: BTreeMap<String, String>,
    payload: Vec<u8>,
    content_type: String,
}

impl Taken {
    /// That the row has the bytes that were written.
    fn assert_is(&self, attempt: &Attempt) {
        assert_eq!(self.event_type, attempt.event_type.as_deref().unwrap_or("order.placed"));
        assert_eq!(self.key, attempt.key);
        let headers = attempt.headers.as_deref().unwrap_or("{\"tenant\": \"acme\"}");
        // Of two values with one name the last one counts.
        assert_eq!(serde_json::json!(self.headers), serde_json::from_str::<serde_json::Value>(headers).unwrap());
        assert_eq!(self.content_type, attempt.content_type.as_deref().unwrap_or("application/json"));
        assert_eq!(i64::from(self.version), attempt.version.unwrap_or(1));
        if !attempt.by_function {
            assert_eq!(self.payload, attempt.payload.as_deref().unwrap_or(b"{}"));
        }
    }

    /// That the message is this event.
    fn assert_is_in(&self, message: &Message, outbox: &Outbox) {
        assert_eq!(message.subject, format!("{}.{}", outbox.naming.prefix, self.event_type));
        let headers = message.headers.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let event = Envelope::from_headers(headers, message.payload.clone().into()).unwrap();
        let read = Self {
            event_id: event.id.as_uuid(),
            id: event.sequence,
            event_type: event.event_type,
            version: event.version.try_into().unwrap(),
            key: event.key,
            headers: event.headers,
            payload: event.payload.to_vec(),
            content_type: event.content_type,
        };
        assert!(read == *self, "written {self:?}, read {read:?}");
        assert_eq!(event.source, "/test");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_table_takes_comes_out_unchanged() {
    let seed: u8 = std::env::var("AFTERCOMMIT_SEED").map_or(7, |seed| seed.parse().unwrap());
    println!("AFTERCOMMIT_SEED={seed}");
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[seed; 32]);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let outbox = Outbox::new(database, Nats::shared().await.unwrap().url()).await;
    let _relay = RunningRelay::start(RelayConfig { park_policy: ParkPolicy::Skip, ..outbox.relay_config() });
    eventually(SOON, "the relay leads", async || {
        sqlx::query("select from aftercommit.relay_status").fetch_optional(&outbox.pool).await.unwrap().is_some()
    })
    .await
    .unwrap();
    let js = outbox.js().await;
    let mut stream = js.get_stream(&outbox.naming.stream).await.unwrap().cached_info().config.clone();
    stream.max_message_size = STREAM_TAKES;
    js.update_stream(stream).await.unwrap();

    let (mut taken, mut refusals) = (BTreeMap::new(), BTreeSet::new());
    for _ in 0..ROWS / TOGETHER {
        let mut tx = outbox.pool.begin().await.unwrap();
        for _ in 0..TOGETHER {
            let attempt = attempt().new_tree(&mut runner).unwrap().current();
            match attempt.write(&mut tx).await {
                Ok(id) => _ = taken.insert(id, attempt),
                Err(error) => {
                    assert!(attempt.explains(&error), "{error}: {attempt:?}");
                    let error = error.into_database_error().unwrap();
                    refusals.insert(error.constraint().map_or_else(|| error.code().unwrap().into(), String::from));
                }
            }
        }
        tx.commit().await.unwrap();
    }
    assert!(taken.len() > ROWS / 8, "only {} are taken", taken.len());
    assert!(refusals.len() >= 12, "only for {refusals:?}");

    let rows: Vec<Taken> = sqlx::query_as(
        "select event_id, id, type, version, key, headers, payload, content_type from aftercommit.outbox order by id",
    )
    .fetch_all(&outbox.pool)
    .await
    .unwrap();
    assert_eq!(rows.len(), taken.len(), "what was refused left nothing behind");
    let mut parked = Vec::new();
    let waited = eventually(SOON, "everything is in the stream or parked", async || {
        parked = operator::relay::parked(&outbox.postgres, 1_000).await.unwrap();
        outbox.stored().await + parked.len() as u64 >= rows.len() as u64
    })
    .await;
    let state: String =
        sqlx::query_scalar("select state from aftercommit.relay_status").fetch_one(&outbox.pool).await.unwrap();
    assert!(waited.is_ok(), "{} of {}, {} parked: {state}", outbox.stored().await, rows.len(), parked.len());
    for row in &rows {
        row.assert_is(&taken[&row.event_id]);
    }
    assert!(!parked.is_empty() && parked.iter().all(|event| event.code == Some(10054) && !event.reason.is_empty()));
    let parked_ids: BTreeSet<Uuid> = parked.iter().map(|event| event.event_id.as_uuid()).collect();
    let expected: Vec<&Taken> = rows.iter().filter(|row| !parked_ids.contains(&row.event_id)).collect();
    let messages = outbox.messages().await;
    assert_eq!(messages.len(), expected.len());
    let mut by_id: BTreeMap<&str, _> = messages.iter().map(|message| (&*message.headers["ce-id"], message)).collect();
    for row in expected {
        row.assert_is_in(by_id.remove(&*row.event_id.to_string()).expect("it is in the stream"), &outbox);
    }
    for row in rows.iter().filter(|row| parked_ids.contains(&row.event_id)) {
        assert!(row.payload.len() >= STREAM_TAKES as usize - 100_000, "{} was parked", row.event_id);
    }
}
