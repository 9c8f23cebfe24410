//! The library refuses exactly what the constraints of the table refuse, and before the transaction is spoilt.

use std::collections::BTreeMap;

use crate::support::Database;
use aftercommit::EventId;
use aftercommit::outbox::{self, PublishErrorKind, RawEvent};
use sqlx::types::Json;
use sqlx::{Connection, PgTransaction};

#[derive(Clone)]
struct Values {
    event_type: String,
    version: u32,
    key: Option<String>,
    headers: BTreeMap<String, String>,
    payload: Vec<u8>,
    content_type: String,
}

impl Values {
    fn legal() -> Self {
        Self {
            event_type: "order.placed".into(),
            version: 1,
            key: Some("order-7".into()),
            headers: BTreeMap::from([("tenant".into(), "acme".into())]),
            payload: b"{}".to_vec(),
            content_type: "application/json".into(),
        }
    }

    fn header(name: &str, value: &str) -> Self {
        Self { headers: BTreeMap::from([(name.into(), value.into())]), ..Self::legal() }
    }

    fn raw(&self) -> RawEvent {
        let raw = RawEvent::new(&self.event_type, &self.content_type, self.payload.clone()).version(self.version);
        let raw = self.headers.iter().fold(raw, |raw, (name, value)| raw.header(name, value));
        match &self.key {
            Some(key) => raw.key(key),
            None => raw,
        }
    }
}

/// The texts that break things, for every field that is a text.
fn hostile_texts() -> Vec<String> {
    let mut texts: Vec<String> = [
        "",
        " ",
        "a",
        "A-Z_9",
        "a.b",
        ".",
        "a.",
        ".a",
        "a..b",
        "a b",
        " a",
        "a ",
        "a\t",
        "\ta",
        "*",
        "a.*",
        "a.>",
        ">",
        "$JS.API",
        "a\n",
        "\na",
        "a\r\nb",
        "a\r",
        "a\0b",
        "\0",
        "\u{1}",
        "\u{1f}",
        "\u{7f}",
        "\u{80}",
        "\u{a0}a",
        "a\u{2003}",
        "\u{2028}",
        "\u{feff}a",
        "ä",
        "ſ",
        "K",
        "日本",
        "\u{10ffff}",
        "a/b",
        "a:b",
        "a;b=\"c\"",
        "\\",
        "\"",
        "\"\\\"",
        "'",
        "';--",
        "%",
        "%00",
        "~",
        "!",
        "nats-",
        "Nats-Msg-Id",
        "NATS-x",
        "nAtS-",
        "nats",
        "natsx-",
        "ce-",
        "CE-id",
        "Ce-",
        "ce",
        "cex-",
        "xce-id",
        "Aftercommit-Repair",
        "aftercommit-",
        "AFTERCOMMIT-end",
        "aftercommit",
        "-",
        "_",
        "Nat\u{17f}-x",
        "text/plain; charset=utf-8",
        "{}",
        "[]",
        "null",
        "traceparent",
    ]
    .map(String::from)
    .to_vec();
    for length in [127, 128, 129, 199, 200, 201, 511, 512, 513, 16_384] {
        texts.push("x".repeat(length));
        texts.push("ä".repeat(length / 2));
    }
    texts
}

/// Headers around the size limit, in bytes of jsonb text, where a quote and a backslash take two.
fn large_headers() -> Vec<BTreeMap<String, String>> {
    let mut cases = Vec::new();
    for (filler, width) in [("x", 1), ("\"", 2), ("\\", 2)] {
        for size in [16_383, 16_384, 16_385] {
            let room = size - r#"{"a": "b", "tenant": ""}"#.len();
            let value = filler.repeat(room / width) + &"y".repeat(room % width);
            cases.push(BTreeMap::from([("a".into(), "b".into()), ("tenant".into(), value)]));
        }
    }
    cases.push((0..1_000).map(|n| (format!("h{n}"), String::new())).collect());
    cases.push((0..2_000).map(|n| (format!("h{n}"), String::new())).collect());
    cases
}

/// Short texts out of characters that a rule could get wrong, the same in every run.
fn random_texts(count: usize) -> Vec<String> {
    let alphabet: Vec<char> = "aZ0_-. \t\n\r\0\u{1}\u{1f}\u{7f}~!\"\\:ä\u{a0}*>$ncNCetsTSE".chars().collect();
    let mut state = 42_u64;
    let mut next = move |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap() % below
    };
    (0..count).map(|_| (0..next(7)).map(|_| alphabet[next(alphabet.len())]).collect()).collect()
}

/// What PostgreSQL says to a plain INSERT: `None` when it takes the row, else the constraint or the SQLSTATE.
async fn plain_insert(tx: &mut PgTransaction<'_>, values: &Values) -> Option<String> {
    let mut savepoint = tx.begin().await.unwrap();
    let result = sqlx::query(
        "insert into aftercommit.outbox (event_id, type, version, key, headers, payload, content_type)
         values (gen_random_uuid(), $1, $2::bigint, $3, $4, $5, $6)",
    )
    .bind(&values.event_type)
    .bind(i64::from(values.version))
    .bind(&values.key)
    .bind(Json(&values.headers))
    .bind(&values.payload)
    .bind(&values.content_type)
    .execute(&mut *savepoint)
    .await;
    savepoint.rollback().await.unwrap();
    let error = result.err()?;
    let error = error.as_database_error().unwrap_or_else(|| panic!("{error}"));
    Some(error.constraint().map_or_else(|| error.code().unwrap().into_owned(), String::from))
}

/// Whether a refusal by the table concerns the field that the library names.
fn is_about(refusal: &str, field: &str) -> bool {
    // PostgreSQL cannot hold a NUL in text (22021) or jsonb (22P05), nor a version above its integers (22003).
    let constraint = match field.split('.').next().unwrap() {
        "headers" => "outbox_header",
        "type" => "outbox_type",
        "version" => "outbox_version",
        "key" => "outbox_key",
        "payload" => "outbox_payload",
        "content_type" => "outbox_content_type",
        other => panic!("unknown field {other}"),
    };
    refusal.starts_with(constraint) || matches!(refusal, "22021" | "22P05" | "22003")
}

#[tokio::test]
async fn the_library_and_the_table_agree_on_every_value() {
    let database = Database::migrated().await;
    let pool = database.pool().await;
    let mut tx = pool.begin().await.unwrap();

    let mut cases = Vec::new();
    for text in hostile_texts().into_iter().chain(random_texts(400)) {
        cases.push(Values { event_type: text.clone(), ..Values::legal() });
        cases.push(Values { key: Some(text.clone()), ..Values::legal() });
        cases.push(Values { content_type: text.clone(), ..Values::legal() });
        cases.push(Values::header(&text, "x"));
        cases.push(Values::header("x", &text));
    }
    cases.extend(large_headers().into_iter().map(|headers| Values { headers, ..Values::legal() }));
    cases.extend(
        [0, 1, 2, i32::MAX as u32, i32::MAX as u32 + 1, u32::MAX].map(|version| Values { version, ..Values::legal() }),
    );
    cases.extend(
        [0, 999_999, 1_000_000, 1_000_001].map(|bytes| Values { payload: vec![0xff; bytes], ..Values::legal() }),
    );
    cases.push(Values { key: None, headers: BTreeMap::new(), ..Values::legal() });

    let (mut taken, mut refused) = (0, 0);
    for values in &cases {
        let by_table = plain_insert(&mut tx, values).await;
        let raw = values.raw();
        match (outbox::publish_raw(&mut tx, raw).await, by_table) {
            (Ok(_), None) => taken += 1,
            (Err(error), Some(refusal)) => {
                assert_eq!(error.kind(), PublishErrorKind::Invalid, "{error}");
                assert_eq!(error.event_type(), values.event_type);
                let field = error.field().unwrap();
                assert!(is_about(&refusal, field), "library: {field}, table: {refusal}; {}", show(values));
                refused += 1;
            }
            (library, table) => panic!("library: {library:?}, table: {table:?}; {}", show(values)),
        }
    }
    assert!(taken > 500 && refused > 500, "{taken} taken, {refused} refused");

    // After all those refusals the transaction is as good as new.
    let id = outbox::publish_raw(&mut tx, Values::legal().raw()).await.unwrap();
    tx.commit().await.unwrap();
    let rows: i64 = sqlx::query_scalar("select count(*) from aftercommit.outbox").fetch_one(&pool).await.unwrap();
    assert_eq!(rows, taken + 1);
    assert_ne!(id, EventId::from(sqlx::types::Uuid::nil()));
}

fn show(values: &Values) -> String {
    format!(
        "type {:?}, version {}, key {:?}, headers {:?}, content type {:?}",
        values.event_type, values.version, values.key, values.headers, values.content_type
    )
}

/// What Rust types cannot express, but another writer can.
#[tokio::test]
async fn the_table_refuses_headers_that_are_no_object_of_strings() {
    let database = Database::migrated().await;
    let pool = database.pool().await;
    for headers in [
        "[]",
        "[\"a\"]",
        "[{\"a\": \"b\"}]",
        "\"a\"",
        "1",
        "null",
        "true",
        "{\"a\": 1}",
        "{\"a\": null}",
        "{\"a\": true}",
        "{\"a\": []}",
        "{\"a\": [\"b\"]}",
        "{\"a\": {}}",
        "{\"a\": {\"b\": \"c\"}}",
        "{\"a\": [[\"b\"]]}",
        "{\"ok\": \"x\", \"a\": [\"b\"]}",
        "{\"ok\": \"x\", \"Nats-Rollup\": \"all\"}",
    ] {
        let error = sqlx::query(
            "insert into aftercommit.outbox (event_id, type, headers, payload)
             values (gen_random_uuid(), 'a', $1::jsonb, '')",
        )
        .bind(serde_json::from_str::<serde_json::Value>(headers).unwrap())
        .execute(&pool)
        .await
        .expect_err(headers);
        let constraint =
            error.as_database_error().unwrap().constraint().unwrap_or_else(|| panic!("{headers}: {error}"));
        assert!(constraint.starts_with("outbox_header"), "{headers}: {constraint}");
    }
    for version in [0, -1, i32::MIN] {
        let error = sqlx::query(
            "insert into aftercommit.outbox (event_id, type, version, payload) values (gen_random_uuid(), 'a', $1, '')",
        )
        .bind(version)
        .execute(&pool)
        .await
        .unwrap_err();
        assert_eq!(error.as_database_error().unwrap().constraint(), Some("outbox_version_is_positive"));
    }
}
