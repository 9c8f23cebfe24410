//! Who may capture, and with whose rights events are written.

use super::{Shop, attempt};
use crate::support::Roles;

const ORDERS: &str = "create schema shop; create table shop.orders (id int primary key, state text);";

/// A login without any of the roles.
async fn login(shop: &Shop, roles: &Roles, name: &str) -> String {
    let login = format!("{}{name}_login", roles.0);
    shop.run(&format!("create role {login} login")).await;
    login
}

#[tokio::test]
async fn whoever_may_write_the_table_is_captured_without_other_rights() {
    let shop = Shop::with(ORDERS).await;
    let roles = Roles::of(&shop.database);
    let owner = roles.login(&shop.database, "owner_of_orders", &["publisher"]).await;
    let clerk = login(&shop, &roles, "clerk").await;
    shop.run(&format!(
        "alter schema shop owner to {owner}; alter table shop.orders owner to {owner}; revoke all on schema public from public;
         grant usage on schema shop to {clerk}; grant select, insert, update, delete, truncate on shop.orders to {clerk}"
    ))
    .await;
    let (owners, clerks) = (shop.database.url_of(&owner), shop.database.url_of(&clerk));
    attempt(&owners, "select aftercommit.capture('shop.orders', type => 'order')").await.unwrap();
    attempt(&clerks, "insert into shop.orders values (1, repeat('x', 2000000)); update shop.orders set state = 'b'; delete from shop.orders; truncate shop.orders")
        .await
        .unwrap();
    assert_eq!(shop.told_of().await, ["order.inserted 1", "order.updated 1", "order.deleted 1", "order.truncated -"]);
    let refused = attempt(
        &clerks,
        "insert into aftercommit.outbox (event_id, type, payload) values (gen_random_uuid(), 'a', '')",
    )
    .await;
    assert!(refused.unwrap_err().contains("permission denied"), "the trigger's rights are not the clerk's");
    // Nobody else makes the function write events of tables of their own.
    shop.run(&format!("create schema clerk authorization {clerk}")).await;
    let refused = attempt(
        &clerks,
        "create table clerk.fake (id int, state text);
         create trigger forged after insert on clerk.fake for each row execute function shop._aftercommit_capture_orders()",
    )
    .await;
    assert!(refused.unwrap_err().contains("permission denied"));
    let security: (bool, String) = sqlx::query_as(
        "select prosecdef, proowner::regrole::text from pg_proc where proname = '_aftercommit_capture_orders'",
    )
    .fetch_one(&shop.pool)
    .await
    .unwrap();
    assert_eq!(security, (true, owner.clone()));
    // The owner looks, compares and removes.
    attempt(&owners, "select * from aftercommit.captures; select * from aftercommit.capture_check()").await.unwrap();
    attempt(&owners, "do $$ begin assert (select ok from aftercommit.capture_check()); end $$").await.unwrap();
    for role in ["reader", "operator"] {
        let login = roles.login(&shop.database, role, &[role]).await;
        let url = shop.database.url_of(&login);
        attempt(&url, "do $$ begin assert (select ok from aftercommit.capture_check()); perform * from aftercommit.captures; end $$").await.unwrap();
        let refused = attempt(&url, "select aftercommit.capture('shop.orders', type => 'order')").await.unwrap_err();
        assert!(refused.contains("permission denied"), "{refused}");
    }
    // A superuser installs it with the owner's rights all the same.
    shop.run(
        "select aftercommit.capture_remove('shop.orders'); select aftercommit.capture('shop.orders', type => 'order')",
    )
    .await;
    assert_eq!(shop.problems().await, [""; 0]);
    attempt(&owners, "select aftercommit.capture('shop.orders', type => 'order', old => true)").await.unwrap();
    attempt(&owners, "select aftercommit.capture_remove('shop.orders')").await.unwrap();
}

#[tokio::test]
async fn who_does_not_own_the_table_or_may_not_publish_is_refused() {
    let shop = Shop::with(ORDERS).await;
    let roles = Roles::of(&shop.database);
    let stranger = roles.login(&shop.database, "stranger", &["publisher"]).await;
    let owner = login(&shop, &roles, "owner_of_orders").await;
    shop.run(&format!("grant all on schema shop to {stranger}, {owner}; grant all on shop.orders to {stranger}; alter table shop.orders owner to {owner}")).await;
    let call = "select aftercommit.capture('shop.orders', type => 'order')";
    let refused = attempt(&shop.database.url_of(&stranger), call).await.unwrap_err();
    assert!(
        refused.contains(&format!("shop.orders cannot be captured by {stranger}, who does not own it")),
        "{refused}"
    );
    let refused = shop.attempt(call).await.unwrap_err();
    assert!(refused.contains(&owner) && refused.contains("grant aftercommit_publisher to"), "{refused}");
    shop.run(&format!("grant {}publisher to {owner}", roles.0)).await;
    shop.run(call).await;
    // A right that is taken away later is told of, and fails the write.
    shop.run(&format!("revoke {}publisher from {owner}", roles.0)).await;
    assert!(shop.problems().await[0].contains("may not use the schema"));
    shop.attempt("insert into shop.orders values (1)").await.unwrap_err();
}

#[tokio::test]
async fn the_types_that_the_tables_owner_may_publish_are_what_counts() {
    let shop = Shop::with(ORDERS).await;
    let roles = Roles::of(&shop.database);
    let owner = roles.login(&shop.database, "owner_of_orders", &["publisher"]).await;
    let clerk = roles.login(&shop.database, "clerk", &["publisher"]).await;
    shop.run(&format!(
        "alter table shop.orders owner to {owner}; grant all on schema shop to {owner}, {clerk}; grant all on shop.orders to {clerk};
         insert into aftercommit.allowed_type (role, type) values ('{owner}', 'order.*'), ('{clerk}', 'nothing');
         alter table aftercommit.outbox enable trigger allowed_types;
         select aftercommit.capture('shop.orders', type => 'order')"
    ))
    .await;
    attempt(&shop.database.url_of(&clerk), "insert into shop.orders values (1)").await.unwrap();
    assert_eq!(shop.told_of().await, ["order.inserted 1"]);
    shop.run("select aftercommit.capture('shop.orders', type => 'invoice')").await;
    let refused = attempt(&shop.database.url_of(&clerk), "insert into shop.orders values (2)").await.unwrap_err();
    assert!(
        refused.contains(&format!("the role {owner} may not publish events of type invoice.inserted")),
        "{refused}"
    );
}
