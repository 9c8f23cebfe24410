//! Names, types and sizes.

use serde_json::{Value, json};

use super::Shop;

#[tokio::test]
async fn names_that_need_quotes_work() {
    let shop = Shop::with(
        r#"create schema "Shop ä";
           create table "Shop ä"."Bestellungen ä" (
               "select" int, "Köln.x" int, "it's" text, "say ""hi""" text, "a b" text, "new" int, old int, "back\slash" text,
               "aftercommit.outbox" int, key text, payload text, "§ {}" text, primary key ("select", "Köln.x"));
           select aftercommit.capture('"Shop ä"."Bestellungen ä"', type => 'order', old => true, key => '"Köln.x", "it''s", SELECT',
               headers => '{"who": {"column": "say \"hi\""}}')"#,
    )
    .await;
    let table = r#""Shop ä"."Bestellungen ä""#;
    for role in ["origin", "replica"] {
        shop.run(&format!(
            r#"set session_replication_role = {role};
               insert into {table} values (1, 2, 'q''', 'ü', 'x', 1, 2, 'b\', 3, 'k', 'p', 's'); update {table} set "new" = 3, "a b" = 'y';
               delete from {table}"#
        ))
        .await;
        let headers: Vec<Value> =
            sqlx::query_scalar("select headers from aftercommit.outbox").fetch_all(&shop.pool).await.unwrap();
        assert_eq!(headers, [json!({"who": "%C3%BC"}), json!({"who": "%C3%BC"}), json!({"who": "%C3%BC"})]);
        let told = shop.told().await;
        assert_eq!(told.iter().map(|told| told.1.as_deref().unwrap()).collect::<Vec<_>>(), [r#"[2, "q'", 1]"#; 3]);
        let (_, _, data) = &told[1];
        assert_eq!(data["table"], table);
        assert_eq!(data["key"], json!({"Köln.x": 2, "it's": "q'", "select": 1}));
        assert_eq!(data["changed"], json!(["a b", "new"]));
        let mut row = json!({"select": 1, "Köln.x": 2, "it's": "q'", "say \"hi\"": "ü", "a b": "x", "new": 1, "old": 2, "back\\slash": "b\\",
            "aftercommit.outbox": 3, "key": "k", "payload": "p", "§ {}": "s"});
        assert_eq!(data["old"], row);
        row["new"] = json!(3);
        row["a b"] = json!("y");
        assert_eq!(data["new"], row);
    }
    assert_eq!(shop.problems().await, [""; 0]);
    shop.run(r#"select aftercommit.capture_remove('"Shop ä"."Bestellungen ä"')"#).await;
    // Names of more bytes than what is made of them has room for, in one schema.
    let long = "ü".repeat(31);
    shop.run(&format!("create table {long} (id int primary key); create table {}ä (id int primary key)", &long[..60]))
        .await;
    shop.run(&format!(
        "select aftercommit.capture('{long}', type => 'a'), aftercommit.capture('{}ä', type => 'b')",
        &long[..60]
    ))
    .await;
    shop.run(&format!("insert into {long} values (1); insert into {}ä values (2)", &long[..60])).await;
    assert_eq!(shop.told_of().await, ["a.inserted 1", "b.inserted 2"]);
}

#[tokio::test]
async fn tables_with_many_columns_are_captured_whole() {
    for count in [50, 51, 60, 200, 1500] {
        let columns: Vec<String> = (2..=count).map(|n| format!("c{n} int")).collect();
        let shop = Shop::with(&format!(
            "create table wide (c1 int primary key, {}); select aftercommit.capture('wide', type => 'wide', old => {})",
            columns.join(", "),
            count < 1000,
        ))
        .await;
        shop.run(&format!(
            "insert into wide values (1, {}); update wide set c{count} = -1",
            columns.iter().map(|_| "7").collect::<Vec<_>>().join(", ")
        ))
        .await;
        let told = shop.told().await;
        let expected: serde_json::Map<String, Value> =
            (1..=count).map(|n| (format!("c{n}"), json!(if n == 1 { 1 } else { 7 }))).collect();
        assert_eq!(told[0].2["new"], Value::Object(expected), "{count}");
        assert_eq!(told[1].2["changed"], json!([format!("c{count}")]));
        assert_eq!(told[1].2["new"][format!("c{count}")], -1);
        assert_eq!(told[1].2["new"].as_object().unwrap().len(), count);
        if count < 1000 {
            assert_eq!(told[1].2["old"], told[0].2["new"]);
        }
    }
}

const KINDS: &str = "
    create type mood as enum ('sad', 'glad');
    create domain cents as int check (value >= 0);
    create type place as (street text, number int);
    create table kinds (
        id uuid primary key, b bytea, f float8, n numeric, i interval, d date, t timestamptz, ts timestamp, a int[], ta timestamptz[],
        m mood, c cents, p place, r int4range, tr tstzrange, j json, jb jsonb, x point, y bit varying, ma mood[], mo money, ip inet, ch char(3));";

#[tokio::test]
async fn values_of_all_kinds_are_told_the_same_in_every_session() {
    let shop = Shop::with(&format!("{KINDS} select aftercommit.capture('kinds', type => 'kind', old => true)")).await;
    let row = "'019aa1c2-7c1f-7b2e-9d55-0d3c5a7e9b11', '\\x00ff', 'NaN', 'Infinity', '1 day 02:00', '2026-01-31', '2026-01-31 12:00+01', '2026-01-31 12:00',
        '{1,null,3}', '{2026-01-31 12:00+01}', 'glad', 5, '(Am Markt,3)', '[1,4)', '[2026-01-31 12:00+01,)', '{\"a\" :  1, \"a\": 2}', '{\"z\": null}', '(1.5,2)', b'101',
        '{sad}', '1.50', '::1', 'x'";
    let settings = "set bytea_output = escape; set datestyle = 'German, DMY'; set intervalstyle = sql_standard; set timezone = 'Asia/Tokyo';
        set extra_float_digits = -10; set search_path = pg_temp, public;";
    let strange =
        "create temp table outbox (x int); create function pg_temp.now() returns int language sql as 'select 1 / 0';";
    let mut payloads = Vec::new();
    for settings in ["", settings, &format!("{strange} {settings}")] {
        shop.run(&format!("{settings} insert into public.kinds values ({row}); update public.kinds set f = 0.1::float8 + 0.2::float8, x = '(1.5,3)'; delete from public.kinds"))
            .await;
        let texts: Vec<String> =
            sqlx::query_scalar("select convert_from(payload, 'UTF8') from aftercommit.outbox order by id")
                .fetch_all(&shop.pool)
                .await
                .unwrap();
        shop.told().await;
        assert_eq!(texts.len(), 3);
        payloads.push(texts);
    }
    // `datestyle` of the session reads the literals, too; they are ISO, which each reads the same.
    assert_eq!(payloads[0], payloads[1]);
    assert_eq!(payloads[0], payloads[2]);
    let update: Value = serde_json::from_str(&payloads[0][1]).unwrap();
    assert_eq!(update["changed"], json!(["f", "x"]));
    assert_eq!(update["old"]["f"], "NaN");
    assert_eq!(update["new"]["f"].to_string(), "0.30000000000000004");
    let expected = json!({"b": "\\x00ff", "i": "P1DT2H", "d": "2026-01-31", "t": "2026-01-31T11:00:00+00:00", "ts": "2026-01-31T12:00:00",
        "a": [1, null, 3], "ta": ["2026-01-31T11:00:00+00:00"], "m": "glad", "c": 5, "p": {"street": "Am Markt", "number": 3}, "r": "[1,4)",
        "x": "(1.5,3)", "y": "101", "ma": ["sad"], "jb": {"z": null}, "ip": "::1", "ch": "x  "});
    for (name, value) in expected.as_object().unwrap() {
        assert_eq!(&update["new"][name], value, "{name}");
    }
    assert!(payloads[0][0].contains("{\"a\" :  1, \"a\": 2}"), "JSON is carried as it is: {}", payloads[0][0]);
}

#[tokio::test]
async fn a_change_is_told_that_equality_would_not_see() {
    let shop = Shop::with(
        "create collation lax (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
         create table person (id int primary key, name text collate lax, tags json, at point[], n numeric);
         insert into person values (1, 'ann', '[1]', '{\"(1,2)\"}', 1.0);
         select aftercommit.capture('person', type => 'person')",
    )
    .await;
    shop.run("update person set name = 'Ann'").await;
    shop.run("update person set tags = '[1, 2]'").await;
    shop.run("update person set at = '{\"(1,3)\"}'").await;
    shop.run("update person set n = 1.00, tags = '[1, 2]', at = '{\"(1,3)\"}', name = 'Ann'").await;
    let changed: Vec<_> = shop.told().await.into_iter().map(|(_, _, data)| data["changed"].clone()).collect();
    assert_eq!(changed, [json!(["name"]), json!(["tags"]), json!(["at"])], "equal numbers are no change");
}

#[tokio::test]
async fn a_value_that_is_stored_apart_and_was_not_changed_is_carried() {
    let shop = Shop::with(
        "create table page (id int primary key, body text, title text); alter table page alter body set storage external;
         select aftercommit.capture('page', type => 'page', old => true)",
    )
    .await;
    shop.run("insert into page values (1, repeat('long ', 20000), 'a')").await;
    for role in ["origin", "replica"] {
        shop.told().await;
        shop.run(&format!("set session_replication_role = {role}; update page set title = title || 'b'")).await;
        let (_, _, data) = &shop.told().await[0];
        let long = "long ".repeat(20000);
        assert!(data["new"]["body"] == long && data["old"]["body"] == long);
        assert_eq!(data["changed"], json!(["title"]));
    }
}

#[tokio::test]
async fn a_row_that_is_too_large_is_told_as_the_policy_says() {
    let shop = Shop::with("create table page (id int primary key, body text, title text, more text)").await;
    let write = |id: i32, role: &str| {
        format!(
            "set session_replication_role = {role}; insert into page values ({id}, repeat('x', 5000000), 'short', repeat('y', 400000));
             update page set more = 'z' where id = {id}; delete from page"
        )
    };
    for role in ["origin", "replica"] {
        shop.run("select aftercommit.capture('page', type => 'page', old => true)").await;
        shop.run(&write(1, role)).await;
        let told = shop.told().await;
        assert_eq!(told.len(), 3);
        assert_eq!(told[0].2["truncated"], json!(["body"]), "what fits stays");
        assert_eq!(told[0].2["new"]["title"], "short");
        assert_eq!(told[0].2["new"]["more"].as_str().unwrap().len(), 400_000);
        assert_eq!(told[1].2["changed"], json!(["more"]));
        assert_eq!(told[1].2["new"], json!({"id": 1, "title": "short", "more": "z"}));
        assert_eq!(told[2].2["old"], json!({"id": 1, "title": "short", "more": "z"}));

        shop.run("select aftercommit.capture('page', type => 'page', old => true, oversize => 'key-only')").await;
        shop.run(&write(2, role)).await;
        for (event_type, key, data) in shop.told().await {
            assert_eq!((key.as_deref(), &data["key"]), (Some("2"), &json!({"id": 2})), "{event_type}");
            assert_eq!((&data["new"], &data["old"]), (&Value::Null, &Value::Null));
            assert_eq!(data["truncated"], json!(["body", "id", "more", "title"]));
        }

        shop.run("select aftercommit.capture('page', type => 'page', oversize => 'fail')").await;
        let refused = shop.attempt(&write(3, role)).await.unwrap_err();
        assert!(
            refused.contains("an event of the table public.page has 54") && refused.contains("key-only"),
            "{refused}"
        );
        assert_eq!(shop.told().await, []);
    }
}

#[tokio::test]
async fn a_payload_that_just_fits_is_left_whole() {
    let shop = Shop::with(
        "create table page (id int primary key, body text); select aftercommit.capture('page', type => 'page')",
    )
    .await;
    let rest =
        r#"{"op":"insert","table":"public.page","key":{"id":1},"new":{"id":1,"body":""},"old":null,"changed":null}"#
            .len();
    for more in [0, 1] {
        shop.run(&format!("insert into page values (1, repeat('x', {}))", 1_000_000 - rest + more)).await;
        let (size, data): (i32, Value) =
            sqlx::query_as("select payload_bytes, data from aftercommit.events").fetch_one(&shop.pool).await.unwrap();
        assert_eq!((size == 1_000_000, data.get("truncated").is_none()), (more == 0, more == 0));
        shop.run("delete from page; truncate aftercommit.outbox").await;
    }
}

#[tokio::test]
async fn no_more_columns_are_left_out_than_it_takes() {
    let shop = Shop::with(
        "create table page (id int primary key, body text, more text);
         select aftercommit.capture('page', type => 'page')",
    )
    .await;
    let left = r#"{"op":"insert","table":"public.page","key":{"id":1},"new":{"id":1,"more":""},"old":null,"changed":null,"truncated":["body"]}"#.len();
    // The sum is right to some bytes.
    for (more, truncated) in [
        (999_000, json!(["body"])),
        (1_000_000 - left - 8, json!(["body"])),
        (1_000_000 - left + 1, json!(["body", "more"])),
    ] {
        shop.run(&format!("insert into page values (1, repeat('x', 1200000), repeat('y', {more}))")).await;
        assert_eq!(shop.told().await[0].2["truncated"], truncated, "{more}");
        shop.run("delete from page; truncate aftercommit.outbox").await;
    }
}

#[tokio::test]
async fn keys_of_all_kinds_become_ordering_keys() {
    let shop = Shop::with(
        "create table item (id int, name text, at timestamptz, body text);
         select aftercommit.capture('item', type => 'item', key => 'name')",
    )
    .await;
    shop.run("set timezone = 'Asia/Tokyo'; insert into item values (1, 'a', '2026-01-31 12:00+01', ''), (2, null, null, ''), (3, '', null, ''), (4, repeat('ü', 256), null, ''), (5, repeat('ü', 257), null, '')")
        .await;
    let keys: Vec<_> = shop.told().await.into_iter().map(|(_, key, _)| key).collect();
    let hash: String =
        shop.one("select 'sha256:' || encode(sha256(convert_to(repeat('ü', 257), 'UTF8')), 'hex')").await;
    assert_eq!(keys, [Some("a".into()), None, None, Some("ü".repeat(256)), Some(hash)]);
    shop.run("select aftercommit.capture('item', type => 'item', key => 'name, at')").await;
    shop.run("set timezone = 'Asia/Tokyo'; delete from item where id < 3").await;
    assert_eq!(
        shop.told_of().await,
        [r#"item.deleted ["a", "2026-01-31T11:00:00+00:00"]"#, "item.deleted [null, null]"]
    );
    // A key of megabytes.
    shop.run("select aftercommit.capture('item', type => 'item', key => 'body')").await;
    shop.run("insert into item values (9, 'n', null, repeat('k', 3000000))").await;
    let (_, key, data) = &shop.told().await[0];
    assert!(key.as_ref().unwrap().starts_with("sha256:"));
    assert_eq!(
        (&data["key"], &data["new"], &data["truncated"]),
        (&Value::Null, &json!({"id": 9, "name": "n", "at": null}), &json!(["body"]))
    );
}

#[tokio::test]
async fn headers_are_constants_and_columns() {
    let shop = Shop::with(
        r#"create table item (id int primary key, tenant text, n int);
           select aftercommit.capture('item', type => 'item',
               headers => '{"origin": "Kölner shop", "tenant-id": {"column": "tenant"}, "n": {"column": "n"}}')"#,
    )
    .await;
    let cases = [
        ("acme", Some("acme")),
        ("two words", Some("two words")),
        (" padded ", Some("%20padded%20")),
        ("100%", Some("100%25")),
        ("ü\n", Some("%C3%BC%0A")),
        ("", Some("")),
    ];
    for (tenant, expected) in cases {
        sqlx::query("insert into item values (1, $1, 5)").bind(tenant).execute(&shop.pool).await.unwrap();
        let headers: Value = shop.one("select headers from aftercommit.outbox").await;
        let mut all = json!({"origin": "K%C3%B6lner%20shop", "n": "5"});
        if let Some(expected) = expected {
            all["tenant-id"] = json!(expected);
        }
        assert_eq!(headers, all);
        shop.run("delete from item; truncate aftercommit.outbox").await;
    }
    shop.run("insert into item values (1, null, null); delete from item; truncate item").await;
    let headers: Vec<Value> =
        sqlx::query_scalar("select headers from aftercommit.outbox").fetch_all(&shop.pool).await.unwrap();
    assert_eq!(
        headers,
        [
            json!({"origin": "K%C3%B6lner%20shop"}),
            json!({"origin": "K%C3%B6lner%20shop"}),
            json!({"origin": "K%C3%B6lner%20shop"})
        ]
    );
    shop.run("truncate aftercommit.outbox; insert into item values (2, repeat('ü', 200), 1)").await;
    let hash: String =
        shop.one("select 'sha256:' || encode(sha256(convert_to(repeat('ü', 200), 'UTF8')), 'hex')").await;
    assert_eq!(shop.one::<String>("select headers ->> 'tenant-id' from aftercommit.outbox").await, hash);
}
