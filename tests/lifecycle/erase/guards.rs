//! What is looked at before anybody is asked.

use std::time::Duration;

use aftercommit::fanout::{JobErrorKind, Jobs};

use super::*;

const NAME: &str = "select name from public.tenants where id = $1::uuid";
const ADMINS: &str = "select count(*) from public.admins where tenant_id = $1::uuid and name <> 'ann'";

async fn refused(fleet: &Fleet, request: Request) -> String {
    let error = request.ask(&mut fleet.pool.begin().await.unwrap()).await.unwrap_err();
    assert_eq!(error.kind(), JobErrorKind::Refused, "{error}");
    error.to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_wrong_tenant_is_refused_by_its_name() {
    let fleet = Fleet::new().await;
    let wrong = refused(&fleet, Fleet::request().named("Other", NAME).force(true)).await;
    assert!(wrong.contains(&format!("tenant {TENANT} has another name than \"Other\"")), "{wrong}");
    assert!(!wrong.contains("Acme"), "it does not tell the name: {wrong}");
    let nobody = Request::new(Subject::new("tenant", OTHER), "ann").participants(["orders"]).named("Acme", NAME);
    assert!(refused(&fleet, nobody).await.contains(&format!("there is no tenant {OTHER}")));
    assert_eq!((count(&fleet.pool, "aftercommit.job").await, count(&fleet.pool, "aftercommit.outbox").await), (0, 0));
    assert!(operate::ask(&fleet.requester.config, Fleet::request().named("Acme", NAME)).await.unwrap().new);
    // The name is nowhere.
    for rows in [
        "aftercommit.outbox t where convert_from(payload, 'utf8') like '%Acme%'",
        "aftercommit.audit t where t::text like '%Acme%'",
        "aftercommit.job t where t::text like '%Acme%'",
    ] {
        assert_eq!(count(&fleet.pool, rows).await, 0, "{rows}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_admins_refuse_unless_it_is_forced_and_audited() {
    let fleet = Fleet::new().await;
    fleet.requester.execute(&format!("insert into admins values ('{TENANT}', 'ann'), ('{TENANT}', 'bob')")).await;
    let request = || Fleet::request().none_left("other admins", ADMINS);
    assert!(refused(&fleet, request()).await.contains("has other admins: 1; force it"));
    let nulls = refused(&fleet, Fleet::request().none_left("other admins", "select null::bigint")).await;
    assert!(nulls.contains("NULL"), "{nulls}");
    assert!(operate::ask(&fleet.requester.config, request().force(true)).await.unwrap().new);
    let forced: Vec<(String, i64)> = sqlx::query_as(
        "select who, (detail -> 'forced' ->> 'other admins')::bigint from aftercommit.audit where action = 'erasure force'",
    )
    .fetch_all(&fleet.pool)
    .await
    .unwrap();
    assert_eq!(forced, [("ann".to_string(), 1)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_request_for_an_erased_tenant_does_nothing() {
    let fleet = Fleet::new().await;
    let job = fleet.ask().await;
    let again = operate::ask(&fleet.requester.config, Fleet::request().key("another")).await.unwrap();
    assert_eq!((again.job, again.new, again.status.as_str()), (job, false, "running"));
    fleet.both_work().await;
    fleet.coordinate().await;
    fleet.both_work().await;
    fleet.coordinate().await;
    let asked = events::<Requested>(&fleet.pool).await.len();
    // The tenant is gone, so its name cannot be compared: that nothing is left to do comes first.
    fleet.requester.execute("delete from tenants").await;
    let again = operate::ask(&fleet.requester.config, Fleet::request().named("Acme", NAME)).await.unwrap();
    assert_eq!((again.job, again.new, again.status.as_str()), (job, false, "completed"));
    assert_eq!(events::<Requested>(&fleet.pool).await.len(), asked);
    // Unless it is meant.
    let again = operate::ask(&fleet.requester.config, Fleet::request().again(true)).await.unwrap();
    assert!(again.new && again.job != job);
    fleet.both_work().await;
    fleet.coordinate().await;
    let status = fleet.status(again.job).await;
    assert_eq!((status.services_completed.as_str(), status.total_items_deleted), ("2/2", Some(0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_erasure_can_be_asked_for_again() {
    let fleet = Fleet::new().await;
    let later = || Fleet::request().begin_after(Duration::from_secs(3600));
    let first = operate::ask(&fleet.requester.config, later()).await.unwrap();
    let mut tx = fleet.pool.begin().await.unwrap();
    Jobs::<Erasure>::cancel(&mut tx, first.job).await.unwrap();
    tx.commit().await.unwrap();
    fleet.both_work().await;
    fleet.coordinate().await;
    let status = fleet.status(first.job).await;
    assert_eq!((status.status.as_str(), status.verification), ("cancelled", None));
    assert_eq!(fleet.orders.count("aftercommit.erased_subject").await, 0);
    let second = operate::ask(&fleet.requester.config, later()).await.unwrap();
    assert!(second.new && second.job != first.job);
}

#[tokio::test(flavor = "multi_thread")]
async fn subjects_that_cannot_be_are_refused_by_name() {
    let fleet = Fleet::new().await;
    for (subject, told) in [
        (Subject::new("Tenant", 1), "\"Tenant\""),
        (Subject::new("", 1), "the kind of subject \"\""),
        (Subject::new("tenant", ""), "the id of a subject"),
        (Subject::new("tenant", " 1"), "no spaces around it"),
        (Subject::new("tenant", "x".repeat(201)), "1 to 200 bytes"),
    ] {
        let request = Request::new(subject, "ann").participants(["orders"]);
        let error = request.ask(&mut fleet.pool.begin().await.unwrap()).await.unwrap_err();
        assert!(error.kind() == JobErrorKind::Request && error.to_string().contains(told), "{error}");
    }
    let nobody = Request::new(Subject::new("tenant", 1), "ann");
    let error = nobody.ask(&mut fleet.pool.begin().await.unwrap()).await.unwrap_err();
    assert!(error.to_string().contains("named or registered"), "{error}");
}
