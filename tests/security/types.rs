//! Publishers that share a database: which role may publish what.

use aftercommit::outbox::{self, RawEvent};
use sqlx::{Connection, PgConnection};

use crate::stage::Stage;

async fn publish(stage: &Stage, login: &str, event_type: &str, key: Option<&str>) -> Result<(), String> {
    let mut connection = PgConnection::connect(&stage.database.url_of(login)).await.unwrap();
    let mut tx = connection.begin().await.unwrap();
    let event = RawEvent::new(event_type, "text/plain", "x");
    let event = match key {
        Some(key) => event.key(key),
        None => event,
    };
    let library = outbox::publish_raw(&mut tx, event).await.map(drop).map_err(|error| error.to_string());
    tx.rollback().await.unwrap();
    let sql = sqlx::query("select aftercommit.publish($1, '{}', $2)")
        .bind(event_type)
        .bind(key)
        .execute(&mut connection)
        .await
        .map(drop)
        .map_err(|error| error.to_string());
    assert_eq!(library.is_ok(), sql.is_ok(), "{library:?} {sql:?}");
    sql
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_publishes_what_it_may_once_that_is_switched_on() {
    let stage = Stage::new().await;
    let shop = stage.roles.login(&stage.database, "shop", &["publisher"]).await;
    let billing = stage.roles.login(&stage.database, "billing", &["publisher"]).await;
    // Off, as it comes.
    publish(&stage, &billing, "order.placed", None).await.unwrap();
    stage
        .database
        .execute(&format!(
            "insert into aftercommit.allowed_type (role, type, key_prefix)
             values ('{shop}', 'order.*', ''), ('{billing}', 'invoice.sent', 'invoice-'), ('{billing}', 'hello', '');
             alter table aftercommit.outbox enable trigger allowed_types"
        ))
        .await;
    let cases: [(&str, &str, Option<&str>, bool); 10] = [
        (&shop, "order.placed", None, true),
        (&shop, "order.line.added", Some("anything"), true),
        (&shop, "orders.placed", None, false),
        (&shop, "order", None, false),
        (&shop, "invoice.sent", Some("invoice-1"), false),
        (&billing, "invoice.sent", Some("invoice-1"), true),
        (&billing, "invoice.sent", Some("order-1"), false),
        (&billing, "invoice.sent", None, false),
        (&billing, "hello", Some("order-1"), true),
        (&billing, "order.placed", None, false),
    ];
    for (login, event_type, key, allowed) in cases {
        let answer = publish(&stage, login, event_type, key).await;
        assert_eq!(answer.is_ok(), allowed, "{login} {event_type} {key:?}: {answer:?}");
        if let Err(error) = answer {
            assert!(error.contains(login) && error.contains("aftercommit.allowed_type"), "{error}");
        }
    }
    // Nobody else is let through either.
    assert!(publish(&stage, &stage.login("publisher"), "order.placed", None).await.is_err());
    stage.database.execute("alter table aftercommit.outbox disable trigger allowed_types").await;
    publish(&stage, &billing, "order.placed", None).await.unwrap();
}
