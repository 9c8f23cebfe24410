//! From the request to the proof.

use std::time::Duration;

use aftercommit::erase::{Ended, Verified};
use aftercommit::fanout::operate as jobs;
use aftercommit::reconciler::{Mode, Runner, Scope};
use aftercommit::testing::eventually;
use metrics_exporter_prometheus::PrometheusBuilder;

use crate::support::SOON;

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn an_erasure_ends_when_nothing_is_left_anywhere() {
    let fleet = Fleet::new().await;
    let job = fleet.ask().await;
    fleet.both_work().await;
    fleet.coordinate().await;
    fleet.coordinate().await;
    let status = fleet.status(job).await;
    assert_eq!(
        (status.status.as_str(), status.services_completed.as_str()),
        ("running", "2/2"),
        "it is not proven yet"
    );
    let verification = status.verification.unwrap();
    assert_eq!((verification.status.as_str(), verification.left.len()), ("verifying", 2));
    let asked = events::<Requested>(&fleet.pool).await;
    assert_eq!(asked.len(), 2, "answers that come again ask nothing again");
    let wait = asked[1].not_before.unwrap() - chrono::Utc::now();
    assert!((30..=60).contains(&wait.num_seconds()), "{wait}");

    fleet.both_work().await;
    fleet.coordinate().await;
    fleet.coordinate().await;
    let status = fleet.status(job).await;
    let verification = status.verification.clone().unwrap();
    assert_eq!((status.status.as_str(), verification.status.as_str()), ("completed", "verified"));
    assert_eq!((verification.left.len(), verification.late.len()), (0, 0));
    assert_eq!((status.total_items_deleted, status.services_failed, status.services_silent), (Some(149), 0, 0));
    let orders = status.participants.iter().find(|one| one.participant == "orders").unwrap();
    assert_eq!(orders.counts.as_ref().unwrap(), &all_orders());
    assert_eq!(orders.notes, ["there is no table public.old_orders: skipped"]);
    assert!(orders.duration_seconds.is_some_and(|took| took >= 0.0) && orders.attempts == Some(1));
    let verified = events::<Verified>(&fleet.pool).await;
    let [verified] = verified.as_slice() else { panic!("{verified:?}") };
    assert_eq!(
        (verified.job, verified.status.as_str(), &verified.subject),
        (job.0, "verified", &Subject::new("tenant", TENANT))
    );
    let ended: Vec<(uuid::Uuid, String)> =
        events::<Ended>(&fleet.pool).await.into_iter().map(|ended| (ended.job, ended.status)).collect();
    assert_eq!(ended, [(verification.job.0, "completed".into()), (job.0, "completed".into())]);
    assert_eq!(fleet.orders.count("orders").await + fleet.bills.count("bills").await, 25, "another tenant's stay");
    // The trail outlives the tenant: the requests, and an answer of each service to each.
    let acts: Vec<(String, Option<String>, String)> =
        sqlx::query_as("select action, detail ->> 'participant', who from aftercommit.audit order by id")
            .fetch_all(&fleet.pool)
            .await
            .unwrap();
    let acts: Vec<(&str, Option<&str>)> =
        acts.iter().inspect(|act| assert_eq!(act.2, "ann")).map(|act| (act.0.as_str(), act.1.as_deref())).collect();
    assert_eq!(acts.iter().filter(|act| act.0 == "job request").count(), 2, "{acts:?}");
    assert_eq!(acts.iter().filter(|act| **act == ("job answer", Some("orders"))).count(), 2, "{acts:?}");
    assert_eq!(acts.iter().filter(|act| **act == ("job answer", Some("bills"))).count(), 2, "{acts:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_came_late_are_swept_and_counted_as_late() {
    let fleet = Fleet::new().await;
    let job = fleet.ask().await;
    fleet.both_work().await;
    fleet.coordinate().await;
    fleet
        .orders
        .database
        .execute(&format!("insert into orders values (100, '{TENANT}'); insert into items values (100, 100)"))
        .await;
    fleet.both_work().await;
    fleet.coordinate().await;
    let status = fleet.status(job).await;
    let verification = status.verification.unwrap();
    assert_eq!((status.status.as_str(), verification.status.as_str()), ("completed", "verified"));
    let late: Vec<(&str, u64)> = verification.late["orders"].iter().map(|(t, n)| (t.as_str(), *n)).collect();
    assert_eq!(late, [("public.items", 1), ("public.orders", 1)]);
    assert_eq!(status.total_items_deleted, Some(151));
    assert_eq!(fleet.orders.count(&format!("orders where tenant_id = '{TENANT}'")).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_verification_that_fails_names_service_and_table() {
    let fleet = Fleet::new().await;
    let job = fleet.ask().await;
    fleet.both_work().await;
    fleet.coordinate().await;
    // A row came late, and cannot go.
    fleet
        .bills
        .database
        .execute(&format!(
            "insert into bills values (100, 'tenant:{TENANT}');
         create function refuse() returns trigger language plpgsql as $$ begin
             raise exception 'bills are kept for ten years'; end $$;
         create trigger refuse before delete on bills for each row execute function refuse()"
        ))
        .await;
    let bills = erase::participant(super::bills()).attempts(1);
    fleet.works(&fleet.orders, &erase::participant(orders())).await;
    fleet.works(&fleet.bills, &bills).await;
    fleet.coordinate().await;
    let status = fleet.status(job).await;
    let verification = status.verification.unwrap();
    assert_eq!((status.status.as_str(), verification.status.as_str()), ("partial", "verification_failed"));
    let [left] = verification.left.as_slice() else { panic!("{verification:?}") };
    assert!(left.participant == "bills" && left.reason.contains("public.bills"), "{left:?}");
    let verified = events::<Verified>(&fleet.pool).await;
    assert_eq!((verified.len(), verified[0].status.as_str()), (1, "verification_failed"));
    assert_eq!(verified[0].left[0].participant, "bills");

    // The way out: what keeps the rows goes, and the service is asked anew.
    fleet.bills.database.execute("drop trigger refuse on bills").await;
    jobs::retry(&fleet.requester.config, "ann", verification.job, None).await.unwrap();
    assert_eq!(fleet.status(job).await.status, "running", "it waits for its verification again");
    fleet.works(&fleet.bills, &bills).await;
    fleet.coordinate().await;
    let status = fleet.status(job).await;
    assert_eq!((status.status.as_str(), status.verification.unwrap().status.as_str()), ("completed", "verified"));
    let words: Vec<String> = events::<Verified>(&fleet.pool).await.into_iter().map(|event| event.status).collect();
    assert_eq!(words, ["verification_failed", "verified"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_fails_is_not_verified_before_it_is_done() {
    let fleet = Fleet::new().await;
    let job = fleet.ask().await;
    fleet.bills.database.execute("alter table bills rename to old_bills").await;
    fleet.both_work().await;
    fleet.coordinate().await;
    let status = fleet.status(job).await;
    assert_eq!(
        (status.status.as_str(), status.services_completed.as_str(), status.verification),
        ("partial", "1/2", None)
    );
    let bills = &status.participants[0];
    assert!(bills.error.as_ref().unwrap().contains("there is no table \"public.bills\""), "{bills:?}");
    fleet.bills.database.execute("alter table old_bills rename to bills").await;
    jobs::retry(&fleet.requester.config, "ann", job, None).await.unwrap();
    fleet.works(&fleet.bills, &erase::participant(super::bills())).await;
    fleet.coordinate().await;
    assert_eq!(fleet.status(job).await.verification.unwrap().status, "verifying");
    fleet.both_work().await;
    fleet.coordinate().await;
    assert_eq!(fleet.status(job).await.status, "completed");
}

/// Rows of an erased subject are refused where the owner of the table wants it.
#[tokio::test(flavor = "multi_thread")]
async fn late_rows_of_an_erased_tenant_can_be_refused() {
    let fleet = Fleet::new().await;
    fleet
        .orders
        .database
        .execute(
            "create trigger refuse_erased before insert or update of tenant_id on orders
            for each row execute function aftercommit.refuse_erased('tenant', 'tenant_id')",
        )
        .await;
    let insert = async |id: i64, tenant: &str| {
        sqlx::query("insert into orders values ($1, $2::uuid)").bind(id).bind(tenant).execute(&fleet.orders.pool).await
    };
    insert(100, TENANT).await.unwrap();
    fleet.ask().await;
    fleet.works(&fleet.orders, &erase::participant(orders())).await;
    let error = insert(101, TENANT).await.unwrap_err().to_string();
    assert!(error.contains("the tenant of this row is erased: public.orders"), "{error}");
    insert(102, OTHER).await.unwrap();
    let moved = sqlx::query("update orders set tenant_id = $1::uuid where id = 102")
        .bind(TENANT)
        .execute(&fleet.orders.pool)
        .await;
    assert!(moved.is_err());
    let erased: (bool, bool) =
        sqlx::query_as("select aftercommit.is_erased('tenant', $1), aftercommit.is_erased('tenant', $2)")
            .bind(TENANT)
            .bind(OTHER)
            .fetch_one(&fleet.orders.pool)
            .await
            .unwrap();
    assert_eq!(erased, (true, false));
    // A column that is not there is an error, not silence.
    fleet
        .bills
        .database
        .execute(
            "create trigger refuse_erased before insert on bills
            for each row execute function aftercommit.refuse_erased('tenant', 'tenant_id')",
        )
        .await;
    let wrong = sqlx::query("insert into bills values (100, 'x')").execute(&fleet.bills.pool).await.unwrap_err();
    assert!(wrong.to_string().contains("needs the kind of subject and a column"), "{wrong}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_verification_the_last_answer_ends_it() {
    let fleet = Fleet::new().await;
    let job = fleet.ask().await;
    fleet.both_work().await;
    let believes = Coordinator::new().without_verification();
    for service in [&fleet.orders, &fleet.bills] {
        for outcome in events::<Outcome>(&service.pool).await {
            hand(&fleet.pool, &believes, outcome, 1).await.unwrap();
        }
    }
    let status = fleet.status(job).await;
    assert_eq!((status.status.as_str(), status.verification), ("completed", None));
}

/// Whoever does not answer is asked again, for a preview only as long as somebody may wait for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_silent_service_is_asked_again_but_not_for_an_old_preview() {
    let fleet = Fleet::new().await;
    let preview = operate::preview(&fleet.requester.config, Fleet::request()).await.unwrap();
    let job = fleet.ask().await;
    let runner = Runner::new(fleet.requester.config.clone()).reconciler(erase::Overdue::new(Duration::from_secs(60)));
    let run = async || {
        fleet
            .requester
            .execute("update aftercommit.job_participant set asked_at = asked_at - interval '2 minutes'")
            .await;
        runner.run_now("job-erasure", Scope::Full, Mode::Repair).await.unwrap().repaired
    };
    assert_eq!(run().await, 4);
    fleet.requester.execute("update aftercommit.job set requested_at = requested_at - interval '2 hours'").await;
    assert_eq!(run().await, 2);
    let last = events::<Requested>(&fleet.pool).await.pop().unwrap();
    assert!(last.job == job.0 && last.job != preview.0);
}

/// What is past the time it was due is a number for alerts, and a line of doctor.
#[test]
fn overdue_erasures_are_counted_for_alerts() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let rendered = recorder.handle();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    metrics::with_local_recorder(&recorder, || {
        runtime.block_on(async {
            let fleet = Fleet::new().await;
            let request = Fleet::request().due_after(Duration::from_millis(1));
            let job = operate::ask(&fleet.requester.config, request).await.unwrap().job;
            let listed = cli(&fleet.requester, &["job", "list", "--overdue"]).1;
            assert!(listed.contains(&job.to_string()) && listed.contains("running, overdue"), "{listed}");
            let doctor = cli(&fleet.requester, &["doctor", "--nats-url", "nats://127.0.0.1:1"]).1;
            assert!(doctor.contains("jobs are past the time they were due: erasure 1"), "{doctor}");
            let runner =
                Runner::new(fleet.requester.config.clone()).reconciler(erase::Overdue::new(Duration::from_secs(60)));
            let stop = tokio_util::sync::CancellationToken::new();
            let running = tokio::spawn(runner.run(stop.clone()));
            let counted = |count| format!("aftercommit_jobs_overdue{{kind=\"erasure\"}} {count}");
            let seen = async |count: u64| rendered.render().contains(&counted(count));
            eventually(SOON, "it is counted", async || seen(1).await).await.unwrap();
            fleet.requester.execute("update aftercommit.job set due_at = now() + interval '1 hour'").await;
            eventually(SOON, "it goes back to zero", async || seen(0).await).await.unwrap();
            stop.cancel();
            running.await.unwrap().unwrap();
        });
    });
}

/// A service's events are part of its erasure: counted, forgotten after its rows, and the proof waits for the stream.
#[tokio::test(flavor = "multi_thread")]
async fn the_events_of_a_subject_go_with_its_rows() {
    use aftercommit::erase::Events;
    use aftercommit::erase::forget::{self, ForgetConfig};

    let fleet = Fleet::new().await;
    let nats = aftercommit::testing::servers::Nats::shared().await.unwrap();
    let pool = &fleet.orders.pool;
    let outbox = crate::support::Outbox::of(fleet.orders.database.config.clone(), nats.url()).await;
    let relay = outbox.relay();
    for key in [format!("tenant-{TENANT}"), format!("tenant-{TENANT}/order-1"), format!("tenant-{OTHER}")] {
        sqlx::query("select aftercommit.publish('order.placed', '{\"secret\": 1}', $1)")
            .bind(key)
            .execute(pool)
            .await
            .unwrap();
    }
    outbox.settled().await;
    let eraser = || Events::of(orders()).key("tenant", "tenant-{id}").key_prefix("tenant", "tenant-{id}/");
    let participant = || erase::participant(eraser()).each_step_commits(pool.clone());
    let job = fleet.ask().await;
    fleet.works(&fleet.orders, &participant()).await;
    fleet.works(&fleet.bills, &erase::participant(bills())).await;
    fleet.coordinate().await;
    let counts = fleet
        .status(job)
        .await
        .participants
        .iter()
        .find_map(|one| (one.participant == "orders").then(|| one.counts.clone().unwrap()));
    assert_eq!(counts.unwrap()["aftercommit.events"], 2);
    let left = "aftercommit.outbox where type = 'order.placed' and content_type = 'application/json'";
    assert_eq!(count(pool, left).await, 1);

    // Nobody has erased the stream yet, so there is no proof, and no failure either.
    let verify = async |attempt| {
        let mut asked = events::<Requested>(&fleet.pool).await.pop().unwrap();
        asked.not_before = None;
        hand(pool, &participant(), asked, attempt).await
    };
    let waits = verify(1).await.unwrap_err();
    assert!(matches!(waits, HandlerError::Snooze(_)), "{waits:?}");
    let config = ForgetConfig::new(outbox.postgres.clone(), outbox.nats.clone(), outbox.naming.clone());
    let through = forget::resume(&config).await.unwrap();
    assert!(through.len() == 2 && through.iter().all(|one| one.waits_for.is_none()), "{through:?}");
    verify(2).await.unwrap();
    relay.stop().await.unwrap();
}
