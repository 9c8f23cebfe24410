//! What a service's own tests see of the events of an open transaction.

use crate::support::{Database, Number};
use aftercommit::outbox::{self, RawEvent};
use aftercommit::testing::{assert_published, clear, pending, pending_of};
use futures_util::FutureExt;
use sqlx::{Connection, PgPool};

fn number(n: i64) -> Number {
    Number { key: Some("a".into()), n }
}

async fn pool() -> PgPool {
    Database::migrated().await.pool().await
}

/// The message of an assertion that must fail.
async fn failure<T>(assertion: impl IntoFuture<Output = T>) -> String {
    let panic = std::panic::AssertUnwindSafe(assertion.into_future()).catch_unwind().await;
    let Err(panic) = panic else { panic!("the assertion holds") };
    panic.downcast_ref::<String>().unwrap().clone()
}

#[tokio::test]
async fn the_events_of_the_open_transaction_are_listed_in_order() {
    let pool = pool().await;
    let mut other = pool.begin().await.unwrap();
    outbox::publish(&mut other, &number(100)).await.unwrap();
    let mut tx = pool.begin().await.unwrap();
    assert!(pending(&mut tx).await.unwrap().is_empty(), "it has no id yet");
    let mut ids = outbox::publish_all(&mut tx, &[number(1), number(2)]).await.unwrap();
    let raw = RawEvent::new("label.printed", "text/plain", "hello").version(3).header("tenant", "acme");
    ids.push(outbox::publish_raw(&mut tx, raw).await.unwrap());

    let events = pending(&mut tx).await.unwrap();
    assert_eq!(events.iter().map(|event| event.id).collect::<Vec<_>>(), ids);
    assert_eq!(events[1].read::<Number>().unwrap(), number(2));
    assert_eq!(events[1].key.as_deref(), Some("a"));
    let label = &events[2];
    assert_eq!((label.event_type.as_str(), label.version, &label.payload[..]), ("label.printed", 3, &b"hello"[..]));
    assert_eq!((label.content_type.as_str(), label.headers["tenant"].as_str()), ("text/plain", "acme"));
    assert!(label.read::<Number>().unwrap_err().to_string().contains("label.printed"));
    assert!(!format!("{label:?}").contains("hello"));

    tx.commit().await.unwrap();
    let mut tx = pool.begin().await.unwrap();
    assert!(pending(&mut tx).await.unwrap().is_empty(), "they are committed, not pending");
    assert!(pending(&mut pool.acquire().await.unwrap()).await.unwrap().is_empty(), "no transaction");
}

#[tokio::test]
async fn savepoints_take_their_events_along() {
    let pool = pool().await;
    let mut tx = pool.begin().await.unwrap();
    outbox::publish(&mut tx, &number(1)).await.unwrap();
    let mut kept = tx.begin().await.unwrap();
    outbox::publish(&mut kept, &number(2)).await.unwrap();
    let inside = assert_published::<Number>(&mut kept).times(2).await;
    kept.commit().await.unwrap();
    let mut undone = tx.begin().await.unwrap();
    outbox::publish(&mut undone, &number(3)).await.unwrap();
    assert_published::<Number>(&mut undone).times(3).await;
    undone.rollback().await.unwrap();
    assert_eq!(assert_published::<Number>(&mut tx).await, inside);
}

#[tokio::test]
async fn an_assertion_returns_the_matches_in_order() {
    let pool = pool().await;
    let mut tx = pool.begin().await.unwrap();
    outbox::publish_all(&mut tx, &[number(1), number(2), number(3)]).await.unwrap();
    let odd = assert_published::<Number>(&mut tx).matching(|number| number.n % 2 == 1).times(2).await;
    assert_eq!(odd.iter().map(|published| published.event.n).collect::<Vec<_>>(), [1, 3]);
    assert_published::<Number>(&mut tx).matching(|number| number.n > 3).never().await;
    let least = 3;
    assert_eq!(assert_published::<Number>(&mut tx).matching(|number| number.n >= least).await.len(), 1);
}

#[tokio::test]
async fn a_failed_assertion_says_what_was_expected_and_what_is_there() {
    let pool = pool().await;
    let mut tx = pool.begin().await.unwrap();
    let nothing = failure(assert_published::<Number>(&mut tx)).await;
    assert!(
        nothing.contains("at least 1 of test.number, found 0") && nothing.contains("published nothing"),
        "{nothing}"
    );

    outbox::publish(&mut tx, &number(7)).await.unwrap();
    let id = outbox::publish_raw(&mut tx, RawEvent::new("label.printed", "text/plain", "hello")).await.unwrap();
    let message = failure(assert_published::<Number>(&mut tx).matching(|number| number.n == 8).times(2)).await;
    assert!(message.contains("tests/testing/pending.rs:"), "{message}");
    assert!(message.contains("expected exactly 2 of test.number that match, found 0"), "{message}");
    assert!(message.contains(r#"test.number"#) && message.contains(r#"key "a" {"key":"a","n":7}"#), "{message}");
    assert!(message.contains(&format!("label.printed {id} hello")), "{message}");
    let message = failure(assert_published::<Number>(&mut tx).never()).await;
    assert!(message.contains("expected exactly 0 of test.number, found 1"), "{message}");

    let wrong = RawEvent::new("test.number", "application/json", r#"{"n": "seven"}"#);
    let id = outbox::publish_raw(&mut tx, wrong).await.unwrap();
    assert!(pending_of::<Number>(&mut tx).await.unwrap_err().to_string().contains(&id.to_string()));
}

#[tokio::test]
async fn clearing_removes_only_what_the_open_transaction_published() {
    let pool = pool().await;
    let mut tx = pool.begin().await.unwrap();
    outbox::publish(&mut tx, &number(1)).await.unwrap();
    tx.commit().await.unwrap();
    let mut tx = pool.begin().await.unwrap();
    assert_eq!(clear(&mut tx).await.unwrap(), 0);
    outbox::publish_all(&mut tx, &[number(2), number(3)]).await.unwrap();
    assert_eq!(clear(&mut tx).await.unwrap(), 2);
    assert_published::<Number>(&mut tx).never().await;
    outbox::publish(&mut tx, &number(4)).await.unwrap();
    assert_eq!(assert_published::<Number>(&mut tx).times(1).await[0].event.n, 4);
    tx.commit().await.unwrap();
    let left: Vec<String> =
        sqlx::query_scalar("select data ->> 'n' from aftercommit.events order by id").fetch_all(&pool).await.unwrap();
    assert_eq!(left, ["1", "4"]);
}
