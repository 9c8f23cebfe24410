//! What cannot be captured is refused by name, and nothing is left behind.

use super::Shop;

const TABLES: &str = r#"
    create table orders (id int primary key, name text, total int generated always as (id * 2) stored);
    create table keyless (id int, name text);
    create table account (id int primary key, name text, password_hash text, "apiKey" text, spin int);
    create table card (id int primary key, salt text, hash text, iban text, credit_card text, "userPin" text,
                       tokenized text, asphalt text, rehash text, "caribaN" text);
    create table odd (id int primary key, "aftercommit row" int);
    create table object (id int primary key, "new object" int);
    create table attached (id int primary key) partition by list (id);
    create table attached_1 (id int primary key);
    select aftercommit.capture('attached_1', type => 'x');
    alter table attached attach partition attached_1 for values in (1);
    create view orders_view as select * from orders;
    create materialized view orders_copy as select * from orders;
    create table parted (id int primary key) partition by list (id);
    create table parted_1 partition of parted for values in (1);
    create table thing (id int primary key);
    create table tool () inherits (thing);
    create foreign data wrapper nothing;
    create server nowhere foreign data wrapper nothing;
    create foreign table far (id int) server nowhere;
    create sequence counter;"#;

#[tokio::test]
async fn what_cannot_be_captured_is_refused_by_name() {
    let shop = Shop::with(TABLES).await;
    let cases: [(&str, &[&str]); 55] = [
        ("'orders_view', type => 'x'", &["public.orders_view", "view: capture the tables behind it"]),
        ("'orders_copy', type => 'x'", &["public.orders_copy", "materialized view"]),
        ("'far', type => 'x'", &["public.far", "foreign table"]),
        ("'counter', type => 'x'", &["public.counter", "no table"]),
        ("'orders_pkey', type => 'x'", &["public.orders_pkey", "no table"]),
        ("'pg_class', type => 'x'", &["pg_class", "system table"]),
        ("'information_schema.sql_sizing', type => 'x'", &["sql_sizing", "system table"]),
        ("'aftercommit.outbox', type => 'x'", &["aftercommit.outbox", "belongs to aftercommit itself"]),
        ("'parted_1', type => 'x'", &["public.parted_1", "capture public.parted"]),
        ("'attached_1', type => 'x'", &["capture public.attached, after", "capture_remove('public.attached_1')"]),
        (
            "'attached', type => 'x'",
            &["public.attached_1 is captured by itself", "capture_remove('public.attached_1')"],
        ),
        ("'odd', type => 'x'", &["public.odd", "\"aftercommit row\"", "rename it"]),
        ("'object', type => 'x', columns => '{id}'", &["public.object", "\"new object\"", "rename it"]),
        ("null, type => 'x'", &["the table to capture is null"]),
        ("'thing', type => 'x'", &["public.thing", "public.tool", "inherit"]),
        ("'nothing_there', type => 'x'", &["nothing_there", "does not exist"]),
        ("'keyless', type => 'x'", &["public.keyless", "no primary key", "key => 'column'"]),
        ("'keyless', type => 'x', key => ''", &["the key '' of events of public.keyless is not understood"]),
        ("'keyless', type => 'x', key => 'id,'", &["the key 'id,' of events of public.keyless is not understood"]),
        ("'keyless', type => 'x', key => 'id,,name'", &["key 'id,,name'"]),
        ("'keyless', type => 'x', key => '\"id'", &["key '\"id'"]),
        ("'orders', type => 'x', columns => '{{id,name}}'", &["arrays within an array", "columns for public.orders"]),
        ("'orders', type => 'x', \"on\" => '{{insert}}'", &["arrays within an array", "\"on\" for public.orders"]),
        ("'orders', type => 'x', allow => '{nix}'", &["public.orders has no column nix"]),
        ("'orders', type => 'x', allow => '{NULL}'", &["public.orders has no column null"]),
        ("'card', type => 'x'", &["credit_card, hash, iban, salt, userPin of public.card looks"]),
        ("'keyless', type => 'x', key => 'id, nam'", &["public.keyless has no column nam"]),
        ("'orders', type => 'x', columns => '{id,nope,never}'", &["public.orders has no column never, nope"]),
        ("'orders', type => 'x', columns => array[null]", &["public.orders has no column null"]),
        ("'orders', type => 'x', columns => '{xmin}'", &["public.orders has no column xmin"]),
        ("'orders', type => 'x', watch => '{nope}'", &["public.orders has no column nope"]),
        ("'orders', type => 'x', watch => '{}'", &["public.orders", "watched"]),
        ("'orders', type => 'x', columns => '{total}'", &["column total of public.orders is generated"]),
        ("'orders', type => 'x', watch => '{total}'", &["column total of public.orders is generated"]),
        ("'orders', type => 'x', key => 'total'", &["column total of public.orders is generated"]),
        (
            "'account', type => 'x'",
            &["apiKey, password_hash of public.account looks like a secret", "allow => '{apiKey,password_hash}'"],
        ),
        (
            "'account', type => 'x', columns => '{id}', headers => '{\"h\": {\"column\": \"apiKey\"}}'",
            &["apiKey", "secret"],
        ),
        (
            "'account', type => 'x', allow => '{apiKey}'",
            &["the column password_hash of public.account looks like a secret"],
        ),
        ("'orders', type => 'x', columns => '{id,name,id}'", &["column id of public.orders is named twice"]),
        ("'orders', type => 'x', key => 'name, id, name'", &["column name of public.orders is named twice"]),
        ("'orders', type => 'or der'", &["'or der'", "public.orders", "tokens"]),
        ("'orders', type => ''", &["''"]),
        ("'orders', type => null", &["NULL"]),
        ("'orders', type => repeat('x', 191)", &["190 bytes"]),
        (
            "'orders', type => 'x', \"on\" => '{insert,upsert}'",
            &["{insert,upsert}", "public.orders", "insert, update and delete"],
        ),
        ("'orders', type => 'x', \"on\" => '{}'", &["{}"]),
        ("'orders', type => 'x', \"on\" => null", &["NULL"]),
        ("'orders', type => 'x', oversize => 'drop'", &["'drop'", "truncate-columns or key-only"]),
        ("'orders', type => 'x', old => null", &["old and always"]),
        ("'orders', type => 'x', headers => '[]'", &["public.orders", "object"]),
        ("'orders', type => 'x', headers => '{\"a b\": \"x\"}'", &["'a b' is not legal"]),
        ("'orders', type => 'x', headers => '{\"Ce-Type\": \"x\"}'", &["'Ce-Type'", "reserved"]),
        ("'orders', type => 'x', headers => '{\"a\": 1}'", &["value of a", "column"]),
        ("'orders', type => 'x', headers => '{\"a\": {\"column\": \"nope\"}}'", &["no column nope"]),
        ("'orders', type => 'x', headers => jsonb_build_object('a', repeat('x', 17000))", &["more bytes"]),
    ];
    for (arguments, words) in cases {
        let told = shop.attempt(&format!("select aftercommit.capture({arguments})")).await.unwrap_err();
        for word in words {
            assert!(told.contains(word), "{arguments}: {told}");
        }
    }
    let told = shop
        .attempt("create temp table short (id int primary key); select aftercommit.capture('short', type => 'x')")
        .await
        .unwrap_err();
    assert!(told.contains("temporary table"), "{told}");
    let left: i64 = shop
        .one("select count(*) + (select count(*) from aftercommit.captures) from pg_trigger where not tgisinternal and tgname like '%capture%'")
        .await;
    assert_eq!(left, 6, "those of attached_1");
    shop.run("select aftercommit.capture_remove('attached_1'); select aftercommit.capture('attached', type => 'x')")
        .await;
    assert_eq!(shop.problems().await, [""; 0]);
    shop.run("select aftercommit.capture_remove('attached')").await;
    // What only looks like it, and what somebody has allowed.
    shop.run("select aftercommit.capture('account', type => 'x', columns => '{id,spin}')").await;
    shop.run("select aftercommit.capture('account', type => 'x', allow => '{password_hash,apiKey}')").await;
    shop.run("select aftercommit.capture('orders', type => 'x')").await;
    shop.run("insert into orders (id, name) values (1, 'a')").await;
    assert_eq!(
        shop.told().await[0].2["new"],
        serde_json::json!({"id": 1, "name": "a"}),
        "without the generated column"
    );
}

#[tokio::test]
async fn a_table_that_gets_children_later_is_told_of() {
    let shop =
        Shop::with("create table thing (id int primary key); select aftercommit.capture('thing', type => 'thing')")
            .await;
    shop.run("create table tool () inherits (thing)").await;
    assert!(shop.problems().await[0].contains("inherit from it (public.tool)"));
    let remedy = "select remedy from aftercommit.capture_check()";
    assert_eq!(shop.one::<Option<String>>(remedy).await, None, "no call puts that right");
}
