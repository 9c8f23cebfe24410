//! Installing, looking, comparing, removing: in SQL, in Rust and by the command.

use std::process::Output;

use aftercommit::ErrorKind;
use aftercommit::capture::{self, Capture, Installed, Operation, Oversize};
use aftercommit::config::PostgresConfig;
use aftercommit::operator::doctor::{DoctorConfig, Role, Severity, doctor};
use serde_json::{Value, json};
use sqlx::postgres::PgDatabaseError;
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use super::Shop;
use crate::support::{Database, succeeded};

const ORDERS: &str = "create table orders (id int primary key, state text, cents int);";

#[tokio::test]
async fn the_same_again_changes_nothing_and_another_replaces_it() {
    let shop = Shop::with(ORDERS).await;
    let call = async |arguments: &str| {
        shop.one::<String>(&format!("select aftercommit.capture('orders', type => 'order'{arguments})")).await
    };
    assert_eq!(call("").await, "installed");
    let made = "select string_agg(xmin::text, ' ' order by oid) from pg_trigger where tgrelid = 'orders'::regclass";
    let before = shop.one::<String>(made).await;
    assert_eq!(call("").await, "unchanged");
    assert_eq!(call(", \"on\" => '{delete,update,insert}', headers => '{}'").await, "unchanged");
    assert_eq!(shop.one::<String>(made).await, before, "nothing was touched");
    assert_eq!(call(", columns => '{id}'").await, "replaced");
    shop.run("insert into orders values (1)").await;
    assert_eq!(shop.told().await[0].2["new"], json!({"id": 1}));
    // In the transaction of whoever calls it.
    shop.run("begin; select aftercommit.capture('orders', type => 'another'); rollback").await;
    shop.run("insert into orders values (2)").await;
    assert_eq!(shop.told_of().await, ["order.inserted 2"]);
    assert_eq!(call(", always => false, \"on\" => '{delete}'").await, "replaced");
    assert_eq!(call("").await, "replaced");
    assert_eq!(shop.one::<i64>("select count(*) from pg_proc where proname ~ '_capture_orders'").await, 1);
    assert!(shop.one::<bool>("select aftercommit.capture_remove('orders')").await);
    assert!(!shop.one::<bool>("select aftercommit.capture_remove('orders')").await);
    let left = "select count(*) + (select count(*) from pg_trigger where tgrelid = 'orders'::regclass) from pg_proc where proname ~ '_capture_orders'";
    assert_eq!(shop.one::<i64>(left).await, 0);
}

#[tokio::test]
async fn a_change_of_the_schema_is_noticed() {
    let shop = Shop::with(ORDERS).await;
    let call = "select aftercommit.capture('orders', type => 'order')";
    let cases = [
        ("alter table orders drop column cents", "no column cents any more"),
        ("alter table orders rename state to status", "no column state any more"),
        ("alter table orders alter status type json using null", "not the one"),
        ("alter table orders add at timestamptz", ""),
        (
            "alter table orders disable trigger \"!aftercommit_capture_update\"",
            "!aftercommit_capture_update is disabled",
        ),
        (
            "alter table orders enable trigger \"!aftercommit_capture_row\"",
            "!aftercommit_capture_row is enabled in another way",
        ),
        ("drop trigger \"!aftercommit_capture_delete\" on orders", "!aftercommit_capture_delete is gone"),
        ("alter function _aftercommit_capture_orders set search_path = public", "not the one"),
        ("alter function _aftercommit_capture_orders security invoker", "security definer"),
        (
            "create role another_owner_of_orders; grant usage on schema aftercommit to another_owner_of_orders; alter table orders owner to another_owner_of_orders",
            "another_owner_of_orders may not insert",
        ),
        (
            "alter table orders owner to postgres; alter function _aftercommit_capture_orders owner to another_owner_of_orders",
            "belongs to another role",
        ),
        (
            "create or replace function _aftercommit_capture_orders() returns trigger language plpgsql security definer
             set search_path = pg_catalog, pg_temp as 'begin return null; end'",
            "not the one",
        ),
        ("alter table orders rename to sales", "renamed from public.orders"),
        ("alter table sales rename to orders", "renamed from public.sales"),
        ("create schema another; alter table orders set schema another", "renamed from public.orders"),
        ("alter table another.orders set schema public", "renamed from another.orders"),
        ("alter table orders drop constraint orders_pkey, add primary key (id, at)", "primary key is (id, at) now"),
        ("alter table orders drop constraint orders_pkey, add primary key (id)", "primary key is (id) now"),
        ("alter table orders rename id to number", "no column id any more"),
        ("alter table orders rename number to id", "no column number any more"),
    ];
    shop.run(call).await;
    assert_eq!(shop.problems().await, [""; 0]);
    for (change, problem) in cases {
        shop.run(change).await;
        let problems = shop.problems().await;
        assert_eq!(problems.is_empty(), problem.is_empty(), "{change}: {problems:?}");
        assert!(problem.is_empty() || problems.iter().any(|one| one.contains(problem)), "{change}: {problems:?}");
        let table = match change {
            _ if change.contains("to sales") => "sales",
            _ if change.contains("create schema") => "another.orders",
            _ => "orders",
        };
        let again = call.replace("orders", table);
        if !change.contains("create role") {
            let remedy: Option<String> = shop.one("select remedy from aftercommit.capture_check()").await;
            let asked = remedy.as_deref().is_none_or(|remedy| {
                remedy.strip_suffix(';')
                    == Some(&again.replace("'sales", "'public.sales").replace("'orders", "'public.orders"))
            });
            assert!(asked && remedy.is_none() == problem.is_empty(), "{change}: {remedy:?}");
            shop.run(&remedy.unwrap_or(again)).await;
            assert_eq!(shop.problems().await, [""; 0], "{change}");
        }
    }
    // A new column is worth knowing, and with columns that were chosen not even that.
    shop.run("alter table orders add remark text").await;
    let notes = "select array_to_string(notes, ';') from aftercommit.capture_check()";
    assert!(shop.one::<String>(notes).await.contains("column remark came later"));
    shop.run(
        "select aftercommit.capture('orders', type => 'order', columns => '{id}'); alter table orders add more text",
    )
    .await;
    assert_eq!(shop.one::<String>(notes).await, "");
    shop.run("drop table orders; drop owned by another_owner_of_orders; drop role another_owner_of_orders").await;
    assert_eq!(shop.problems().await, ["its table is gone: drop function public._aftercommit_capture_orders()"]);
}

/// What a check prints restores what is installed, and not the defaults.
#[tokio::test]
async fn the_call_of_a_capture_has_all_its_settings() {
    let shop =
        Shop::with("create table \"Odd, table\" (id int primary key, state text, \"Api, Key\" text, api_key text)")
            .await;
    let call = "select aftercommit.capture('public.\"Odd, table\"', type => 'o', key => '\"Api, Key\", id', columns => '{id,state,\"Api, Key\"}', \
                watch => '{state}', old => true, headers => '{\"a\": \"it''s\", \"b\": {\"column\": \"id\"}}', \"on\" => '{update,delete}', \
                allow => '{api_key}', oversize => 'key-only', always => false);";
    shop.run(call).await;
    let asked = "select aftercommit.capture_call('\"Odd, table\"')";
    assert_eq!(shop.one::<String>(asked).await, call);
    assert_eq!(shop.one::<String>("select call from aftercommit.captures").await, call);
    assert_eq!(shop.one::<String>(call).await, "unchanged");
    // Of what is gone nothing is left in it.
    shop.run("alter table \"Odd, table\" rename to plain; alter table plain drop api_key, add remark text").await;
    shop.run(&shop.one::<String>("select remedy from aftercommit.capture_check()").await).await;
    assert_eq!(shop.problems().await, [""; 0]);
    assert_eq!(
        shop.one::<String>("select aftercommit.capture_call('plain')").await,
        call.replace("\"Odd, table\"", "plain").replace(" allow => '{api_key}',", "")
    );
    // Without a primary key the one of before has to be named.
    shop.run("select aftercommit.capture('plain', type => 'o'); alter table plain drop constraint \"Odd, table_pkey\"")
        .await;
    assert!(shop.problems().await[0].contains("no primary key any more"));
    shop.run(&shop.one::<String>("select remedy from aftercommit.capture_check()").await).await;
    assert_eq!(shop.problems().await, [""; 0]);
    assert!(!shop.one::<bool>("select aftercommit.capture_call('pg_class') is not null").await);
    // A captured table that becomes a partition.
    shop.run(
        "select aftercommit.capture_remove('plain'); create table part (id int primary key);
         select aftercommit.capture('part', type => 'o', columns => '{id}');
         create table whole (id int primary key) partition by list (id);
         alter table whole attach partition part for values in (1)",
    )
    .await;
    shop.run(&shop.one::<String>("select remedy from aftercommit.capture_check()").await).await;
    assert_eq!(
        shop.one::<String>("select call from aftercommit.captures").await,
        "select aftercommit.capture('public.whole', type => 'o', columns => '{id}');"
    );
    assert_eq!(shop.problems().await, [""; 0]);
    shop.run("drop table whole").await;
    shop.run(&shop.one::<String>("select remedy from aftercommit.capture_check()").await).await;
    assert_eq!(shop.one::<i64>("select count(*) from aftercommit.captures").await, 0);
}

/// After such a change a write fails, rather than being told to nobody.
#[tokio::test]
async fn a_column_that_is_gone_fails_the_write() {
    let shop = Shop::with(&format!(
        "{ORDERS} select aftercommit.capture('orders', type => 'order'); insert into orders values (1)"
    ))
    .await;
    shop.run("alter table orders drop column cents").await;
    let refused = shop.attempt("update orders set state = 'x'").await.unwrap_err();
    assert!(refused.contains("cents"), "{refused}");
    // Where it failed says what to do.
    let refused =
        sqlx::query("delete from orders").execute(&shop.pool).await.unwrap_err().into_database_error().unwrap();
    let place = refused.downcast::<PgDatabaseError>();
    let place = place.r#where().unwrap();
    assert!(place.contains("After a change of the table: select * from aftercommit.capture_check()"), "{place}");
    shop.run("begin; alter table orders add cents int; select aftercommit.capture('orders', type => 'order'); commit")
        .await;
    shop.run("update orders set state = 'x'").await;
}

#[tokio::test]
async fn two_that_install_at_once_wait_for_each_other() {
    let shop = Shop::with(ORDERS).await;
    for round in 0..5 {
        let call = |old: bool| format!("select aftercommit.capture('orders', type => 'order', old => {old})");
        let (first, second, third) = (call(round % 2 == 0), call(true), call(false));
        let done = tokio::join!(shop.attempt(&first), shop.attempt(&second), shop.attempt(&third));
        assert_eq!(done, (Ok(()), Ok(()), Ok(())), "round {round}");
        assert_eq!(shop.problems().await, [""; 0]);
        let captures: i64 = shop.one("select count(*) from pg_proc where proname ~ '_capture_orders'").await;
        assert_eq!(captures, 1);
        if round % 2 == 0 {
            shop.run("select aftercommit.capture_remove('orders')").await;
        }
    }
}

#[tokio::test]
async fn a_dump_restores_captures() {
    let shop = Shop::with(&format!(
        "{ORDERS} insert into orders values (1); create table \"Ü b\" (id int primary key) partition by list (id);
         create table b_1 partition of \"Ü b\" for values in (1);
         select aftercommit.capture('orders', type => 'order'), aftercommit.capture('\"Ü b\"', type => 'b');
         delete from aftercommit.outbox"
    ))
    .await;
    let dump = shop.database.pg_dump(&[]);
    let restored = Database::empty().await;
    succeeded(restored.psql(&dump));
    assert_eq!(restored.pg_dump(&[]), dump);
    let restored = Shop { pool: restored.pool().await, database: restored };
    assert_eq!(restored.problems().await, [""; 0]);
    assert_eq!(restored.told().await, [], "a restore is no change");
    restored.run("update orders set cents = 1; set session_replication_role = replica; insert into b_1 values (1); delete from orders").await;
    assert_eq!(restored.told_of().await, ["order.updated 1", "b.inserted 1", "order.deleted 1"]);
    assert_eq!(restored.one::<String>("select aftercommit.capture('orders', type => 'order')").await, "unchanged");
}

/// What the guide says of a dump without the schema of the outbox.
#[tokio::test]
async fn a_dump_of_the_tables_schema_alone_needs_the_outbox_or_no_captures() {
    let shop = Shop::with(&format!("{ORDERS} select aftercommit.capture('orders', type => 'order')")).await;
    let dump = shop.database.pg_dump(&["--schema=public"]).replace("CREATE SCHEMA public;", "");
    let database = Database::empty().await;
    succeeded(database.psql(&dump));
    let restored = Shop { pool: database.pool().await, database };
    let refused = restored.attempt("insert into orders values (1)").await.unwrap_err();
    assert!(refused.contains("aftercommit.outbox"), "{refused}");
    restored.run("drop function public._aftercommit_capture_orders() cascade; insert into orders values (1)").await;
    // With the outbox it is as before.
    let database = Database::migrated().await;
    succeeded(database.psql(&dump));
    let restored = Shop { pool: database.pool().await, database };
    assert_eq!(restored.problems().await, [""; 0]);
    restored.run("insert into orders values (1)").await;
    assert_eq!(restored.told_of().await, ["order.inserted 1"]);
}

#[tokio::test]
async fn two_systems_capture_the_same_table() {
    let shop = Shop::with(ORDERS).await;
    let other = PostgresConfig { schema: "shop_events".parse().unwrap(), ..shop.database.config.clone() };
    aftercommit::operator::migrate(&other).await.unwrap();
    shop.run(
        "select aftercommit.capture('orders', type => 'order'), shop_events.capture('orders', type => 'shop.order')",
    )
    .await;
    shop.run("insert into orders values (1); delete from orders").await;
    assert_eq!(shop.told_of().await, ["order.inserted 1", "order.deleted 1"]);
    let theirs = "select string_agg(type, ' ' order by id) from shop_events.outbox";
    assert_eq!(shop.one::<String>(theirs).await, "shop.order.inserted shop.order.deleted");
    let check = "select count(*) from (select * from aftercommit.capture_check() union all select * from shop_events.capture_check()) as c where ok";
    assert_eq!(shop.one::<i64>(check).await, 2);
    // Without the other one nothing of it is missed.
    shop.run(
        "select aftercommit.capture_remove('orders'); drop schema aftercommit cascade; insert into orders values (2)",
    )
    .await;
    let strays = "select count(*) from pg_proc p join pg_namespace n on n.oid = p.pronamespace
                   where n.nspname in ('public', 'shop_events') and prosrc ~ 'aftercommit[.]'";
    assert_eq!(shop.one::<i64>(strays).await, 0);
    assert!(shop.one::<bool>("select bool_and(ok) from shop_events.capture_check()").await);
}

#[tokio::test]
async fn rust_does_the_same() {
    let shop = Shop::with(ORDERS).await;
    let mut connection = PgConnection::connect(&shop.database.config.url).await.unwrap();
    let capture = Capture::new("orders", "order")
        .key("id")
        .columns(["id", "state"])
        .watch(["state"])
        .old_values()
        .header("origin", "shop");
    let capture = capture
        .header_from("state", "state")
        .operations([Operation::Update, Operation::Delete])
        .oversize(Oversize::KeyOnly);
    let mut tx = connection.begin().await.unwrap();
    assert_eq!(capture.install(&mut tx).await.unwrap(), Installed::Installed);
    tx.commit().await.unwrap();
    assert_eq!(capture.install(&mut connection).await.unwrap(), Installed::Unchanged);
    assert_eq!(capture.clone().only_origin().install(&mut connection).await.unwrap(), Installed::Replaced);
    // The printed statement asks for the same.
    let printed = capture.only_origin().sql(&"aftercommit".parse().unwrap());
    let done: String = sqlx::query_scalar(AssertSqlSafe(printed)).fetch_one(&mut connection).await.unwrap();
    assert_eq!(done, "unchanged");
    let list = capture::list(&mut connection).await.unwrap();
    let shown = serde_json::to_value(&list[0]).unwrap();
    assert_eq!(
        shown,
        json!({"table": "public.orders", "type": "order", "key": ["id"], "columns": ["id", "state"], "watch": ["state"], "old": true,
               "headers": {"origin": "shop", "state": {"column": "state"}}, "on": ["update", "delete"], "oversize": "key-only",
               "always": false, "version": 1, "function": "public._aftercommit_capture_orders()",
               "call": "select aftercommit.capture('public.orders', type => 'order', key => 'id', columns => '{id,state}', watch => '{state}', \
                        old => true, headers => '{\"state\": {\"column\": \"state\"}, \"origin\": \"shop\"}', \"on\" => '{update,delete}', \
                        oversize => 'key-only', always => false);"})
    );
    assert!(capture::check(&mut connection).await.unwrap().iter().all(|checked| checked.ok));
    for (wrong, kind, words) in [
        (Capture::new("nope", "order"), ErrorKind::Config, "there is no table nope"),
        (Capture::new("orders", "order").columns(["x"]), ErrorKind::Config, "has no column x"),
        (Capture::new("pg_class", "x"), ErrorKind::Config, "system table"),
    ] {
        let error = wrong.install(&mut connection).await.unwrap_err();
        assert!(error.kind() == kind && error.to_string().contains(words), "{error}");
    }
    assert!(capture::remove(&mut connection, "orders").await.unwrap());
    assert!(!capture::remove(&mut connection, "orders").await.unwrap());
    shop.run("drop schema aftercommit cascade").await;
    let error = capture::check(&mut connection).await.unwrap_err();
    assert!(error.kind() == ErrorKind::NotReady && error.to_string().contains("aftercommit migrate"), "{error}");
}

fn run(shop: &Shop, arguments: &[&str]) -> Output {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_aftercommit"));
    command.arg("capture").args(arguments).env("DATABASE_URL", &shop.database.config.url).output().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_does_the_same() {
    let shop = Shop::with(ORDERS).await;
    let told = |arguments: &[&str]| succeeded(run(&shop, arguments));
    assert_eq!(told(&["list"]), "no table is captured\n");
    let add = [
        "add",
        "public.orders",
        "--type",
        "order",
        "--column",
        "id,state",
        "--on",
        "insert,delete",
        "--header",
        "origin=a",
        "--header-column",
        "s=state",
    ];
    assert!(
        told(&[&add[..], &["--print"]].concat())
            .starts_with("select aftercommit.capture('public.orders', type => 'order'")
    );
    assert_eq!(told(&["list"]), "no table is captured\n", "it was only printed");
    assert_eq!(told(&add), "public.orders is captured from now on\n");
    assert_eq!(told(&add), "public.orders is captured in this way already\n");
    let result: Value = serde_json::from_str(&told(&[&add[..], &["--old", "--json"]].concat())).unwrap();
    assert_eq!(result, json!({"table": "public.orders", "result": "replaced"}));
    let list = told(&["list"]);
    assert_eq!(list.lines().count(), 2, "{list}");
    assert!(list.contains("insert, delete"), "{list}");
    assert!(told(&["check"]).contains("as it should be"));
    shop.run("alter table orders drop column state").await;
    let drifted = run(&shop, &["check"]);
    assert_eq!(drifted.status.code(), Some(1));
    let told_of = String::from_utf8_lossy(&drifted.stdout);
    assert!(told_of.contains("public.orders: not as it should be\n") && told_of.contains("no column state any more"));
    let call =
        "to put it right: select aftercommit.capture('public.orders', type => 'order', columns => '{id}', old => true";
    assert!(told_of.contains(call), "{told_of}");
    let drifted: Value = serde_json::from_slice(&run(&shop, &["check", "--json"]).stdout).unwrap();
    assert_eq!(drifted[0]["ok"], false);
    for (wrong, status, words) in [
        (&["add", "public.orders", "--type", "a b"][..], 2, "tokens"),
        (&["add", "public.nope", "--type", "a"], 2, "nope"),
        (&["add", "public.orders", "--type", "a", "--on", "upsert"], 2, "upsert"),
        (&["add", "public.orders", "--type", "a", "--column", "nope"], 2, "no column nope"),
        (&["remove", "public.nope"], 2, "nope"),
        (&["add", "nix.orders", "--type", "a"], 2, "there is no table nix.orders"),
        (&["remove", "nix.orders"], 2, "there is no table nix.orders"),
    ] {
        let refused = run(&shop, wrong);
        let error = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(refused.status.code() == Some(status) && error.contains(words), "{wrong:?}: {error}");
    }
    // Whoever holds the table is not waited for long: all who write to it would wait behind us.
    let mut holder = PgConnection::connect(&shop.database.config.url).await.unwrap();
    sqlx::raw_sql("begin; lock table orders in row exclusive mode").execute(&mut holder).await.unwrap();
    let refused = run(&shop, &["add", "public.orders", "--type", "order"]);
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(1) && error.contains("hold a lock"), "{error}");
    sqlx::raw_sql("rollback").execute(&mut holder).await.unwrap();
    assert_eq!(told(&["remove", "public.orders"]), "public.orders is captured no longer\n");
    assert_eq!(run(&shop, &["remove", "public.orders"]).status.code(), Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_warns_of_a_capture_that_no_longer_fits() {
    let shop = Shop::with(&format!("{ORDERS} select aftercommit.capture('orders', type => 'order')")).await;
    let mut config = DoctorConfig::new(shop.database.config.clone(), Default::default(), Default::default());
    config.nats.url = "nats://127.0.0.1:1".into();
    let captures = async |config: &DoctorConfig| {
        let report = doctor(config).await.unwrap();
        report
            .checks
            .into_iter()
            .filter(|check| check.name == "captures")
            .map(|check| (check.status, check.finding, check.remedy.unwrap_or_default()))
            .collect::<Vec<_>>()
    };
    assert_eq!(captures(&config).await, [(Severity::Ok, "1 captured table, as it should be".into(), String::new())]);
    shop.run("alter table orders disable trigger all").await;
    let found = captures(&config).await;
    assert!(found.len() == 1 && found[0].0 == Severity::Warn && found[0].1.contains("public.orders"), "{found:?}");
    assert_eq!(found[0].2, "run: select aftercommit.capture('public.orders', type => 'order');");
    config.roles = vec![Role::Relay];
    assert_eq!(captures(&config).await, [], "not a relay's business");
    shop.run("alter function aftercommit.capture_check() rename to gone").await;
    config.roles = Vec::new();
    assert_eq!(captures(&config).await, [], "the schema of an older version has none");
}
