//! What an event says of a change, and which changes make one.

use serde_json::json;

use super::Shop;

const ORDERS: &str = "create table orders (id bigint primary key, state text, cents int, note text);";

#[tokio::test]
async fn inserts_updates_deletes_and_truncates_are_told() {
    let shop = Shop::with(&format!("{ORDERS} select aftercommit.capture('orders', type => 'order')")).await;
    shop.run("insert into orders values (7, 'new', 995)").await;
    shop.run("update orders set state = 'paid', cents = 990").await;
    shop.run("delete from orders").await;
    shop.run("truncate orders").await;
    let new = json!({"id": 7, "state": "new", "cents": 995, "note": null});
    let paid = json!({"id": 7, "state": "paid", "cents": 990, "note": null});
    let event = |event_type: &str, key: Option<&str>, data| (event_type.to_string(), key.map(str::to_string), data);
    let key = json!({"id": 7});
    let table = "public.orders";
    assert_eq!(
        shop.told().await,
        [
            event(
                "order.inserted",
                Some("7"),
                json!({"op": "insert", "table": table, "key": key, "new": new, "old": null, "changed": null})
            ),
            event(
                "order.updated",
                Some("7"),
                json!({"op": "update", "table": table, "key": key, "new": paid, "old": null, "changed": ["state", "cents"]})
            ),
            event(
                "order.deleted",
                Some("7"),
                json!({"op": "delete", "table": table, "key": key, "new": null, "old": paid, "changed": null})
            ),
            event(
                "order.truncated",
                None,
                json!({"op": "truncate", "table": table, "key": null, "new": null, "old": null, "changed": null})
            ),
        ]
    );
}

#[tokio::test]
async fn an_update_is_told_only_when_a_watched_column_changes() {
    let shop = Shop::with(&format!(
        "{ORDERS} insert into orders values (1, 'new', 1, 'a'), (2, 'new', 2, 'b');
         select aftercommit.capture('orders', type => 'order', columns => '{{id,cents}}', watch => '{{state,cents}}')"
    ))
    .await;
    shop.run("update orders set note = 'x'").await;
    shop.run("update orders set state = state, cents = cents").await;
    shop.run("update orders set state = null where false").await;
    assert_eq!(shop.told().await, []);
    shop.run("update orders set note = 'y', cents = 2").await;
    let told = shop.told().await;
    assert_eq!(told.len(), 1, "only one of the two rows has changed: {told:?}");
    assert_eq!(told[0].2["new"], json!({"id": 1, "cents": 2}), "a watched column need not be carried");
    shop.run("update orders set state = null where id = 2").await;
    assert_eq!(shop.told().await[0].2["changed"], json!(["state"]));
}

#[tokio::test]
async fn only_the_chosen_operations_are_told() {
    let shop = Shop::with(&format!(
        "{ORDERS} select aftercommit.capture('orders', type => 'order', \"on\" => '{{delete,insert}}')"
    ))
    .await;
    shop.run("insert into orders values (1); update orders set cents = 1; delete from orders").await;
    assert_eq!(shop.told_of().await, ["order.inserted 1", "order.deleted 1"]);
    shop.run("select aftercommit.capture('orders', type => 'order', \"on\" => '{update}')").await;
    shop.run("insert into orders values (1); update orders set cents = 1; delete from orders; truncate orders").await;
    assert_eq!(shop.told_of().await, ["order.updated 1"]);
}

#[tokio::test]
async fn updates_carry_old_values_where_that_is_asked_for() {
    let shop = Shop::with(&format!(
        "{ORDERS} insert into orders values (1, 'new', 1, 'a');
         select aftercommit.capture('orders', type => 'order', columns => '{{id,state}}', old => true)"
    ))
    .await;
    shop.run("update orders set state = 'paid'").await;
    let (_, _, data) = &shop.told().await[0];
    assert_eq!((&data["old"], &data["new"]), (&json!({"id": 1, "state": "new"}), &json!({"id": 1, "state": "paid"})));
}

/// Each row has to find its own old values, whatever its key was and is.
#[tokio::test]
async fn keys_that_change_places_are_told_with_the_old_ones() {
    for per_row in [false, true] {
        let shop = Shop::with(
            "create table place (id int primary key deferrable, name text);
             insert into place select n, 'n' || n from generate_series(1, 300) as n;
             create function nothing() returns trigger language plpgsql as 'begin return null; end'",
        )
        .await;
        if per_row {
            shop.run("create trigger other after update on place for each row execute function nothing()").await;
        }
        shop.run("select aftercommit.capture('place', type => 'place')").await;
        shop.run("update place set id = id % 300 + 1, name = name || '!' where id <> 150 or true").await;
        let told = shop.told().await;
        assert_eq!(told.len(), 300);
        for (_, key, data) in told {
            let old = data["old"]["id"].as_i64().unwrap();
            assert_eq!(data["old"], json!({"id": old}), "the old key alone");
            assert_eq!(data["new"], json!({"id": old % 300 + 1, "name": format!("n{old}!")}));
            assert_eq!(key, Some((old % 300 + 1).to_string()));
            assert_eq!(data["changed"], json!(["id", "name"]));
        }
    }
}

#[tokio::test]
async fn what_is_rolled_back_is_told_to_nobody() {
    let shop = Shop::with(&format!("{ORDERS} select aftercommit.capture('orders', type => 'order')")).await;
    shop.run("begin; insert into orders values (1); rollback").await;
    shop.run(
        "begin; insert into orders values (2); savepoint a; insert into orders values (3); update orders set cents = 1;
         rollback to a; insert into orders values (4); commit",
    )
    .await;
    shop.run(
        "do $$ begin insert into orders values (5); raise exception 'no'; exception when others then null; end $$",
    )
    .await;
    shop.attempt("insert into orders values (6), (2)").await.unwrap_err();
    assert_eq!(shop.told_of().await, ["order.inserted 2", "order.inserted 4"]);
}
