//! Every kind of statement, of table and of session is captured.

use std::io::Write;

use serde_json::json;
use sqlx::Connection;

use super::Shop;

const ORDERS: &str = "create table orders (id bigint primary key, state text, cents int);
    select aftercommit.capture('orders', type => 'order');";

#[tokio::test]
async fn statements_that_do_several_things_are_told_whole() {
    let shop = Shop::with(ORDERS).await;
    shop.run("insert into orders values (1, 'a', 1), (2, 'b', 2)").await;
    shop.told().await;
    shop.run(
        "insert into orders values (2, 'B', 3), (3, 'c', 3) on conflict (id) do update set state = excluded.state",
    )
    .await;
    assert_eq!(shop.told_of().await, ["order.updated 2", "order.inserted 3"]);
    shop.run("insert into orders values (2, 'x', 3) on conflict do nothing").await;
    assert_eq!(shop.told_of().await, [""; 0]);
    shop.run("with gone as (delete from orders where id = 1 returning *) insert into orders select 10 + id, state, cents from gone").await;
    assert_eq!(shop.told_of().await, ["order.deleted 1", "order.inserted 11"]);
    shop.run("with more as (update orders set cents = 7 where id = 2) update orders set cents = 8 where id = 3").await;
    let mut both = shop.told_of().await;
    both.sort();
    assert_eq!(both, ["order.updated 2", "order.updated 3"]);
    if shop.at_least(15).await {
        shop.run(
            "merge into orders o using (values (2, 20), (3, 30), (4, 40)) as n (id, cents) on o.id = n.id
               when matched and n.id = 2 then delete
               when matched then update set cents = n.cents
               when not matched then insert values (n.id, 'm', n.cents)",
        )
        .await;
        let mut told = shop.told_of().await;
        told.sort();
        assert_eq!(told, ["order.deleted 2", "order.inserted 4", "order.updated 3"]);
    }
}

#[tokio::test]
async fn copy_is_told_row_by_row() {
    let shop = Shop::with(ORDERS).await;
    let mut rows = Vec::new();
    for id in 1..=3000 {
        writeln!(rows, "{id}\tcopied\t\\N").unwrap();
    }
    let mut connection = shop.pool.acquire().await.unwrap();
    let mut copy = connection.copy_in_raw("copy orders from stdin").await.unwrap();
    copy.send(rows).await.unwrap();
    copy.finish().await.unwrap();
    let keys: Vec<i64> = shop.told().await.iter().map(|(_, key, _)| key.as_ref().unwrap().parse().unwrap()).collect();
    assert_eq!(keys, (1..=3000).collect::<Vec<_>>(), "in the order of the rows");
}

/// The plan of the trigger's statement is kept from the first time, when there was one row.
#[tokio::test]
async fn a_large_statement_after_a_small_one_is_not_slow() {
    let shop = Shop::with(ORDERS).await;
    let mut session = sqlx::PgConnection::connect(&shop.database.config.url).await.unwrap();
    for sql in [
        "insert into orders select n, 'new', n from generate_series(1, 30000) as n",
        "update orders set cents = 0 where id = 1",
        "update orders set cents = 0 where id = 2",
        // A loop within a loop would take minutes.
        "set statement_timeout = '40s'",
        "update orders set cents = cents + 1",
    ] {
        sqlx::raw_sql(sql).execute(&mut session).await.unwrap();
    }
    let paired: i64 = shop
        .one(
            "select count(*) from aftercommit.events where type = 'order.updated' and data->>'changed' = '[\"cents\"]'
                and (data->'new'->>'id')::int > 2 and data->'new'->>'cents' = ((data->'new'->>'id')::int + 1)::text",
        )
        .await;
    assert_eq!(paired, 29_998);
}

#[tokio::test]
async fn constraints_and_triggers_of_the_table_do_their_work_before() {
    let shop = Shop::with(&format!(
        "{ORDERS} create table customer (id int primary key);
         alter table orders add customer int references customer deferrable initially deferred;
         create function louder() returns trigger language plpgsql as 'begin new.state := upper(new.state); return new; end';
         create trigger louder before insert or update on orders for each row execute function louder();
         select aftercommit.capture('orders', type => 'order')"
    ))
    .await;
    shop.run("begin; insert into orders values (1, 'a', 1, 7); insert into customer values (7); commit").await;
    let told = shop.told().await;
    assert_eq!(told[0].2["new"], json!({"id": 1, "state": "A", "cents": 1, "customer": 7}), "as it is in the table");
    shop.attempt("insert into orders values (2, 'a', 1, 8)").await.unwrap_err();
    shop.run("update orders set state = 'a'").await;
    assert_eq!(shop.told().await, [], "nothing has changed in the end");
}

const PARTITIONED: &str = "
    create table sale (day date, id int, cents int, primary key (day, id)) partition by range (day);
    create table sale_1 partition of sale for values from ('2026-01-01') to ('2026-02-01');
    create table sale_2 (cents int, id int not null, day date not null);
    select aftercommit.capture('sale', type => 'sale', columns => '{id,cents}');
    alter table sale attach partition sale_2 for values from ('2026-02-01') to ('2026-03-01');";

#[tokio::test]
async fn partitions_are_captured_through_their_parent_and_by_themselves() {
    let shop = Shop::with(PARTITIONED).await;
    shop.run("insert into sale values ('2026-01-05', 1, 10), ('2026-02-05', 2, 20)").await;
    shop.run("insert into sale_2 (id, day, cents) values (3, '2026-02-06', 30)").await;
    shop.run("update sale set cents = cents + 1").await;
    shop.run("delete from sale_1").await;
    assert_eq!(
        shop.told_of().await,
        [
            "sale.inserted [\"2026-01-05\", 1]",
            "sale.inserted [\"2026-02-05\", 2]",
            "sale.inserted [\"2026-02-06\", 3]",
            "sale.updated [\"2026-01-05\", 1]",
            "sale.updated [\"2026-02-05\", 2]",
            "sale.updated [\"2026-02-06\", 3]",
            "sale.deleted [\"2026-01-05\", 1]",
        ]
    );
    // PostgreSQL moves a row by deleting it and inserting it again.
    shop.run("update sale set day = '2026-01-09' where id = 2").await;
    let told = shop.told().await;
    let types: Vec<&str> = told.iter().map(|(event_type, ..)| event_type.as_str()).collect();
    assert_eq!(types, ["sale.deleted", "sale.inserted"]);
    assert_eq!(told[1].2["table"], "public.sale");
    shop.run("truncate sale").await;
    assert_eq!(shop.told_of().await, ["sale.truncated -"]);
    shop.run("set session_replication_role = replica; insert into sale values ('2026-01-05', 1, 10); insert into sale_2 (id, day) values (3, '2026-02-06')")
        .await;
    assert_eq!(shop.told().await.len(), 2, "partitions fire always, too");
    assert_eq!(shop.problems().await, [""; 0]);
}

#[tokio::test]
async fn a_child_by_inheritance_is_captured_by_itself() {
    let shop = Shop::with(
        "create table thing (id int primary key, name text);
         create table tool (weight int, primary key (id)) inherits (thing);
         select aftercommit.capture('tool', type => 'tool')",
    )
    .await;
    shop.run("insert into thing values (1, 'a'); insert into tool values (2, 'b', 3); update thing set name = 'c'; delete from thing").await;
    assert_eq!(shop.told_of().await, ["tool.inserted 2", "tool.updated 2", "tool.deleted 2"]);
}

#[tokio::test]
async fn sessions_that_play_a_replica_are_captured_unless_not_wanted() {
    let shop = Shop::with(ORDERS).await;
    let work = "set session_replication_role = replica; insert into orders values (1, 'a', 1), (2, 'b', 2);
                update orders set cents = 3; delete from orders where id = 1; truncate orders";
    shop.run(work).await;
    assert_eq!(
        shop.told_of().await,
        [
            "order.inserted 1",
            "order.inserted 2",
            "order.updated 1",
            "order.updated 2",
            "order.deleted 1",
            "order.truncated -"
        ]
    );
    shop.run("set session_replication_role = local; insert into orders values (1, 'a', 1); delete from orders").await;
    assert_eq!(shop.told_of().await, ["order.inserted 1", "order.deleted 1"]);
    shop.run("select aftercommit.capture('orders', type => 'order', always => false)").await;
    shop.run(work).await;
    assert_eq!(shop.told_of().await, [""; 0]);
}
