//! Notices of changed links.

use aftercommit::hooks::{DeleteErrorKind, LinkChange, Links};
use aftercommit::prune::PruneErrorKind;
use sqlx::PgPool;

use crate::support::{Database, SOON};

async fn stewards() -> (Database, PgPool, Links) {
    let database = Database::migrated().await;
    database
        .execute(
            "create table systems (id bigint primary key); insert into systems select generate_series(1, 3);
             create table stewards (system_id bigint constraint of_system references systems on delete cascade, user_id text,
                                    primary key (system_id, user_id))",
        )
        .await;
    let pool = database.pool().await;
    (database, pool, Links::new("system.stewards_changed", "public.stewards", "system_id", "user_id"))
}

async fn told(pool: &PgPool) -> Vec<LinkChange> {
    let events: Vec<serde_json::Value> =
        sqlx::query_scalar("select data from aftercommit.events where type = 'system.stewards_changed' order by id")
            .fetch_all(pool)
            .await
            .unwrap();
    events.into_iter().map(|event| serde_json::from_value(event).unwrap()).collect()
}

fn change(owner: &str, added: &[&str], removed: &[&str]) -> LinkChange {
    let texts = |texts: &[&str]| texts.iter().map(ToString::to_string).collect();
    LinkChange { owner: owner.into(), added: texts(added), removed: texts(removed) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_notice_goes_only_when_something_was_written() {
    let (_database, pool, links) = stewards().await;
    let mut tx = pool.begin().await.unwrap();
    assert!(links.add(&mut tx, 1, ["ann", "bob", "ann"]).await.unwrap().is_some());
    assert!(links.add(&mut tx, 1, ["ann"]).await.unwrap().is_none());
    assert!(links.remove(&mut tx, 1, ["carl"]).await.unwrap().is_none());
    assert!(links.remove(&mut tx, 2, ["ann"]).await.unwrap().is_none());
    assert!(links.add(&mut tx, 1, [""; 0]).await.unwrap().is_none());
    assert!(links.remove(&mut tx, 1, ["bob", "carl"]).await.unwrap().is_some());
    assert!(links.set(&mut tx, 1, ["ann"]).await.unwrap().is_none());
    assert!(links.set(&mut tx, 1, ["dora"]).await.unwrap().is_some());
    links.add(&mut tx, 3, ["dora"]).await.unwrap();
    assert_eq!(links.remove_everywhere(&mut tx, "dora").await.unwrap().len(), 2, "one for each system");
    assert!(links.remove_everywhere(&mut tx, "dora").await.unwrap().is_empty());
    tx.commit().await.unwrap();
    assert_eq!(
        told(&pool).await,
        [
            change("1", &["ann", "bob"], &[]),
            change("1", &[], &["bob"]),
            change("1", &["dora"], &["ann"]),
            change("3", &["dora"], &[]),
            change("1", &[], &["dora"]),
            change("3", &[], &["dora"]),
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_change_writes_nothing_and_the_transaction_goes_on() {
    let (_database, pool, links) = stewards().await;
    let mut tx = pool.begin().await.unwrap();
    let error = links.add(&mut tx, 99, ["ann"]).await.unwrap_err();
    assert_eq!(error.kind(), DeleteErrorKind::Refused(PruneErrorKind::ForeignKey), "{error}");
    assert_eq!(error.constraint(), Some("of_system"));
    links.add(&mut tx, 1, ["ann"]).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(told(&pool).await, [change("1", &["ann"], &[])]);
    let mut tx = pool.begin().await.unwrap();
    links.add(&mut tx, 1, ["bob"]).await.unwrap();
    tx.rollback().await.unwrap();
    assert_eq!(told(&pool).await.len(), 1);
    for (table, owner, told) in [("nowhere", "system_id", "no table"), ("stewards", "system", "no column \"system\"")] {
        let wrong = Links::new("x", table, owner, "user_id");
        let error = wrong.add(&mut pool.begin().await.unwrap(), 1, ["ann"]).await.unwrap_err().to_string();
        assert!(error.contains(told), "{error}");
    }
}

/// Of two transactions that change one owner the second waits for the first, so that the events are in the order of commits.
#[tokio::test(flavor = "multi_thread")]
async fn changes_of_one_owner_are_told_in_the_order_of_commits() {
    let (_database, pool, links) = stewards().await;
    let (mut first, mut second) = (pool.begin().await.unwrap(), pool.begin().await.unwrap());
    let pid: i32 = sqlx::query_scalar("select pg_backend_pid()").fetch_one(&mut *second).await.unwrap();
    links.add(&mut first, 1, ["ann"]).await.unwrap();
    let mut other = pool.begin().await.unwrap();
    links.add(&mut other, 2, ["ann"]).await.unwrap();
    other.commit().await.unwrap();
    let adding = tokio::spawn({
        let links = links.clone();
        async move {
            links.add(&mut second, 1, ["bob"]).await.unwrap();
            second.commit().await.unwrap();
        }
    });
    let waits = async || -> bool {
        let sql = "select cardinality(pg_blocking_pids($1)) > 0";
        sqlx::query_scalar(sql).bind(pid).fetch_one(&pool).await.unwrap()
    };
    aftercommit::testing::eventually(SOON, "the second waits", waits).await.unwrap();
    first.commit().await.unwrap();
    adding.await.unwrap();
    let expected = [change("1", &["ann"], &[]), change("2", &["ann"], &[]), change("1", &["bob"], &[])];
    assert_eq!(told(&pool).await, expected);
}
