//! Subscribers that are no more are forgotten, and none that anybody still needs.

use std::process::Command;

use crate::support::{Act, Database, Number, Record, Roles, Work};
use aftercommit::config::PostgresConfig;
use aftercommit::operator;
use aftercommit::operator::audit::{self, AuditFilter};
use aftercommit::operator::dead::{self, Filter};
use aftercommit::worker::{Delivery, HandlerError, Subscriber};

fn subscriber() -> Subscriber {
    let record = Record::new(|delivery: &Delivery<Number>| match delivery.event.n {
        3 => Act::Fail(HandlerError::reject("three is refused")),
        _ => Act::Succeed,
    });
    Subscriber::new("old").on::<Number>(record)
}

/// `aftercommit subscriber forget`: exit code and what it says.
fn forget(work: &Work, arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_aftercommit"))
        .args(["subscriber", "forget"])
        .args(arguments)
        .env("DATABASE_URL", &work.outbox.postgres.url)
        .env("AFTERCOMMIT_OPERATOR", "jane")
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(said).unwrap())
}

async fn inbox(work: &Work) -> i64 {
    sqlx::query_scalar("select count(*) from aftercommit.inbox").fetch_one(&work.outbox.pool).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscriber_is_forgotten_when_nobody_needs_it_any_more() {
    let work = Work::shared().await;
    let worker = work.run(subscriber()).await;
    for n in 1..=4 {
        work.send(&n.to_string(), n).await;
    }
    work.wait_for(3).await;
    work.wait_until_acked("old").await;
    let (code, said) = forget(&work, &["old", "--yes"]);
    assert!(code == Some(1) && said.contains("serves the subscriber old"), "{code:?}: {said}");
    worker.stop().await;
    let (code, said) = forget(&work, &["old", "--yes"]);
    assert!(code == Some(1) && said.contains("1 dead letter"), "{code:?}: {said}");
    assert_eq!(inbox(&work).await, 4, "nothing was done");
    let letters = Filter { subscriber: Some("old".into()), ..Filter::default() };
    dead::discard(&work.outbox.postgres, "jane", &letters).await.unwrap();
    let (code, said) = forget(&work, &["old"]);
    assert!(code == Some(2) && said.contains("forget old --yes"), "{code:?}: {said}");
    assert_eq!(inbox(&work).await, 4, "nothing was done");
    // Whoever may remove the inbox and not the rest removes nothing: the subscriber would handle everything again.
    let database = Database { config: work.outbox.postgres.clone() };
    let roles = Roles::of(&database);
    let login = PostgresConfig::new(database.url_of(&roles.login(&database, "operator", &["operator"]).await));
    for refused in [
        operator::subscriber::may_be_forgotten(&login, "old").await.unwrap_err(),
        operator::subscriber::forget(&login, "old", "jane").await.unwrap_err(),
    ] {
        assert!(refused.to_string().contains("nothing was removed"), "{}", refused.report());
    }
    assert_eq!(inbox(&work).await, 4, "nothing was done");
    let (code, said) = forget(&work, &["old", "--yes"]);
    assert!(code == Some(0) && said.contains("forgotten: old, 4 inbox rows"), "{code:?}: {said}");
    assert_eq!(inbox(&work).await, 0);
    let leases: i64 = sqlx::query_scalar("select count(*) from aftercommit.lease where name = 'subscriber:old'")
        .fetch_one(&work.outbox.pool)
        .await
        .unwrap();
    assert_eq!(leases, 0);
    let done = audit::list(&work.outbox.postgres, &AuditFilter::default(), 1).await.unwrap();
    assert_eq!((done[0].action.as_str(), done[0].who.as_str()), ("subscriber forget", "jane"));
    let (code, said) = forget(&work, &["old", "--yes"]);
    assert!(code == Some(1) && said.contains("is the name right"), "{code:?}: {said}");
    let refused = operator::subscriber::forget(&work.outbox.postgres, "no name", "jane").await.unwrap_err();
    assert_eq!(refused.kind(), aftercommit::ErrorKind::Config);
}
