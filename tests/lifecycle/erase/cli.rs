//! `aftercommit erase`.

use serde_json::Value;

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_preview_tells_errors_and_silence_from_zeros() {
    let fleet = Fleet::new().await;
    fleet.bills.database.execute("truncate bills").await;
    let arguments = ["erase", "preview", "tenant", TENANT, "--participants", "orders,bills,pos,sales", "--wait", "0s"];
    let (status, said) = cli(&fleet.requester, &arguments);
    assert!(status == Some(1) && said.contains("total_items_found: ?"), "{said}");
    // The services answer; one fails, one stays silent.
    fleet.both_work().await;
    let pos = Tables::new("pos").of("tenant", [Rows::of("public.nowhere").column("tenant_id")]);
    fleet.works(&fleet.bills, &erase::participant(pos)).await;
    fleet.coordinate().await;
    let job: uuid::Uuid = sqlx::query_scalar("select id from aftercommit.job").fetch_one(&fleet.pool).await.unwrap();
    let job = job.to_string();
    let (status, said) = cli(&fleet.requester, &["erase", "status", "--job", &job]);
    assert_eq!(status, Some(0));
    let has = |words: &[&str]| said.lines().any(|line| line.split_whitespace().collect::<Vec<_>>() == words);
    assert!(has(&["orders", "done", "public.items", "40"]) && has(&["bills", "done", "public.bills", "0"]), "{said}");
    assert!(has(&["pos", "failed", "?"]) && has(&["sales", "asked", "?"]), "{said}");
    assert!(said.contains("pos failed: the eraser pos: there is no table \"public.nowhere\""), "{said}");
    assert!(
        said.contains("services_completed: 2/4, services_failed: 1, services_silent: 1, total_items_found: ?"),
        "{said}"
    );
    let (_, json) = cli(&fleet.requester, &["erase", "status", "--job", &job, "--json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        (&json["act"], &json["total_items_found"], &json["total_items_deleted"]),
        (&"preview".into(), &Value::Null, &Value::Null)
    );
    assert_eq!((&json["participants"][0]["total"], &json["participants"][2]["total"]), (&0.into(), &Value::Null));
    assert_eq!(fleet.orders.count("orders").await, 40, "nothing is deleted");
    assert_eq!(fleet.orders.count("aftercommit.erased_subject").await, 0);
    let (_, listed) = cli(&fleet.requester, &["job", "list", "--kind", "erasure.preview"]);
    assert!(listed.contains("erasure.preview"), "{listed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_guarded_by_its_file_and_says_what_came_of_it() {
    let fleet = Fleet::new().await;
    fleet.requester.execute(&format!("insert into admins values ('{TENANT}', 'bob')")).await;
    let file = std::env::temp_dir().join(format!("erase-{}.toml", uuid::Uuid::now_v7()));
    std::fs::write(
        &file,
        "[[subject]]\nkind = 'tenant'\nparticipants = ['orders', 'bills']\nname = 'select name from public.tenants where id = $1::uuid'\n\
         due_after = '1s'\n[[subject.guard]]\nwhat = 'other admins'\ncount = 'select count(*) from public.admins where tenant_id = $1::uuid'\n",
    )
    .unwrap();
    let file = file.to_str().unwrap().to_string();
    let request = |more: &[&str]| {
        let arguments = ["erase", "request", "tenant", TENANT, "--config", &file, "--as", "ann"];
        cli(&fleet.requester, &[&arguments, more].concat())
    };
    assert_eq!(request(&[]).0, Some(2), "a name is wanted");
    let (status, said) = request(&["--name", "Other"]);
    assert!(status == Some(1) && said.contains("another name"), "{said}");
    let (status, said) = request(&["--name", "Acme"]);
    assert!(status == Some(1) && said.contains("other admins: 1"), "{said}");
    let (status, said) = cli(&fleet.requester, &["erase", "status", "tenant", TENANT]);
    assert!(status == Some(1) && said.contains("nobody has asked"), "{said}");
    let (status, said) = request(&["--name", "Acme", "--force", "--wait", "0s"]);
    assert!(status == Some(1) && said.starts_with(&format!("asked to erase tenant {TENANT}: job ")), "{said}");
    assert!(said.contains("services_completed: 0/2"), "{said}");
    for _ in 0..2 {
        fleet.both_work().await;
        fleet.coordinate().await;
    }
    let (status, said) = request(&["--name", "Acme", "--wait"]);
    assert!(
        status == Some(0) && said.contains(&format!("nothing was done: tenant {TENANT} is erased already")),
        "{said}"
    );
    assert!(
        said.contains("services_completed: 2/2, services_failed: 0") && said.contains("verification: verified"),
        "{said}"
    );
    let (_, json) = cli(&fleet.requester, &["erase", "status", "tenant", TENANT, "--json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["services_completed"], &json["total_items_deleted"]), (&"2/2".into(), &149.into()));
    assert_eq!(json["verification"]["status"], "verified");
    assert_eq!(cli(&fleet.requester, &["job", "list", "--overdue"]).1, "there are no such jobs\n");
    let (_, shown) = cli(&fleet.requester, &["job", "show", json["job"].as_str().unwrap()]);
    assert!(shown.contains("erasure.verification  completed"), "{shown}");
}
