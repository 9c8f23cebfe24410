//! The examples: each of the ways of `system_delete` ends in the same state, and `tenant_deletion` proves itself.

use std::process::Command;
use std::time::Duration;

#[expect(dead_code, reason = "the example's main is not called here")]
#[path = "../../examples/system_delete.rs"]
mod system_delete;

#[expect(dead_code, reason = "the example's main is not called here")]
#[path = "../../examples/tenant_deletion.rs"]
mod tenant_deletion;

use system_delete::{Stage, captures, hooks, reconciler};

#[tokio::test(flavor = "multi_thread")]
async fn events_alone_take_away_exactly_what_is_gone() {
    hooks(&Stage::new().await.unwrap()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raw_delete_is_told_by_captures() {
    captures(&Stage::new().await.unwrap()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_reconciler_alone_takes_away_exactly_what_is_gone() {
    reconciler(&Stage::new().await.unwrap()).await.unwrap();
}

/// A process of the tenant's deletion; the test runner has nothing to do here.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "is a process of the_tenant_is_deleted_whatever_is_disturbed"]
async fn a_service_of_the_tenant() {
    tenant_deletion::serve().await.unwrap();
}

fn this_test() -> Result<Command, tenant_deletion::Error> {
    let mut program = Command::new(std::env::current_exe()?);
    program.args(["example::a_service_of_the_tenant", "--exact", "--ignored", "--nocapture"]);
    Ok(program)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tenant_is_deleted_whatever_is_disturbed() {
    let options = tenant_deletion::options::Options::disturb(Duration::from_secs(3));
    let proof = tenant_deletion::run(&options, this_test, true).await.unwrap();
    assert!(proof.wrong.is_empty(), "{proof:#?}");
    assert_eq!((proof.completed.as_str(), proof.failed, proof.left), ("12/12", 0, 0));
}

/// What the proof is worth: it sees rows that are left, rows of others that are gone, and a service that has not answered.
#[tokio::test(flavor = "multi_thread")]
async fn the_proof_sees_what_is_wrong() {
    use tenant_deletion::{fleet::Fleet, proof};
    let fleet = Fleet::prepare(this_test).await.unwrap();
    let planted = proof::plant(&fleet).await.unwrap();
    let (left, wrong) = proof::check_rows(&fleet, &planted).await.unwrap();
    assert_eq!((left, wrong.iter().any(|wrong| wrong.contains("receipt_items"))), (13_085 + 30, true), "{wrong:#?}");
    assert!(wrong.iter().any(|wrong| wrong.contains("has 30 files, not 0")), "{wrong:#?}");
    let weather = "delete from weather where city = 'bilbao' and day = '2026-01-02'";
    sqlx::raw_sql(weather).execute(fleet.pool("external").unwrap()).await.unwrap();
    let changed = "update recipes set is_system = false where id = 2";
    sqlx::raw_sql(changed).execute(fleet.pool("recipes").unwrap()).await.unwrap();
    let (_, wrong) = proof::check_rows(&fleet, &planted).await.unwrap();
    for told in ["weather has 599 rows, of which 600 were to stay", "recipes: 41 rows of the tenant"] {
        assert!(wrong.iter().any(|wrong| wrong.contains(told)), "{told}: {wrong:#?}");
    }
    let (_, wrong) = proof::check_messages(&fleet, &planted, "a job").await.unwrap();
    assert!(wrong.len() == 13 && wrong[0].contains("alert_processor has not answered"), "{wrong:#?}");
    sqlx::raw_sql("create table new ()").execute(fleet.pool("orders").unwrap()).await.unwrap();
    assert!(proof::plant(&fleet).await.unwrap_err().to_string().contains("tables that nobody looks at"));
}

#[test]
fn the_examples_options_are_checked() {
    use tenant_deletion::options::Options;
    let parse = |line: &str| Options::parse(line.split_whitespace().map(String::from));
    let all = parse("--kill pos --fail suppliers:2 --down training:20s --kill-requester").unwrap();
    assert_eq!(all, parse("--disturb").unwrap());
    for (line, told) in [
        ("--kill nobody", "none of orders"),
        ("--kill", "needs a value"),
        ("--fail pos", "NAME:VALUE"),
        ("--fail pos:x", "no number"),
        ("--down pos:20", "such as 20s"),
        ("--wrong", "unknown"),
    ] {
        assert!(parse(line).unwrap_err().contains(told), "{line}");
    }
    assert_eq!(parse("--help").unwrap(), None);
}
