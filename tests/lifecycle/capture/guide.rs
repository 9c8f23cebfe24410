//! The SQL of the guide runs, and does what the guide says.

use serde_json::{Value, json};

use super::Shop;

const GUIDE: &str = include_str!("../../../docs/guides/capture-a-table.md");

fn blocks(language: &str) -> Vec<&'static str> {
    let fence = format!("```{language}\n");
    GUIDE.split(&fence).skip(1).map(|rest| rest.split("```").next().unwrap()).collect()
}

#[tokio::test]
async fn the_sql_of_the_guide_does_what_it_says() {
    let shop = Shop::with("").await;
    let [tables, install, changes, choose, customers, handle, look] = blocks("sql")[..] else { panic!("other blocks") };
    for sql in [tables, install, changes] {
        shop.run(sql).await;
    }
    let told = shop.told().await;
    let types: Vec<&str> = told.iter().map(|(event_type, ..)| event_type.as_str()).collect();
    assert_eq!(types, ["order.inserted", "order.updated", "order.deleted"]);
    assert_eq!(told[1].2, serde_json::from_str::<Value>(blocks("json")[0]).unwrap());
    for sql in [choose, customers, handle] {
        shop.run(sql).await;
    }
    shop.run("insert into customer values (1, 'Ann'); insert into orders values (8, 1, 'new', 5); update orders set state = 'paid', id = 9").await;
    let told = shop.told().await;
    assert_eq!(
        told.iter().map(|(event_type, ..)| event_type.as_str()).collect::<Vec<_>>(),
        ["customer.inserted", "order.updated"]
    );
    assert_eq!((told[1].1.as_deref(), &told[1].2["old"]["state"]), (Some("1"), &json!("new")));
    // The handler makes a copy of what it is told.
    let apply = async |data: &Value| {
        sqlx::query("select apply_order(jsonb_build_object('data', $1::jsonb))")
            .bind(data)
            .execute(&shop.pool)
            .await
            .unwrap();
    };
    shop.run("select aftercommit.capture('orders', type => 'order')").await;
    shop.run("insert into orders values (20, 1, 'new', 5), (21, 1, 'new', 6); update orders set id = 22 where id = 20; delete from orders where id = 21")
        .await;
    for (_, _, data) in shop.told().await {
        apply(&data).await;
    }
    let copy: Vec<(i64, String)> =
        sqlx::query_as("select id, state from order_copy").fetch_all(&shop.pool).await.unwrap();
    assert_eq!(copy, [(22, "new".to_string())]);
    shop.run(look).await;
    assert_eq!(shop.one::<i64>("select count(*) from aftercommit.captures").await, 1);
}
