//! The whole of it: relays, workers and NATS, a requester and three services, one of them behind HTTP.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use aftercommit::erase::Verified;
use aftercommit::relay::{Mode, RelayConfig};
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions};
use aftercommit::worker::{Subscriber, Worker};
use serde_json::{Value, json};

use crate::support::{Directory, Endpoint, Outbox, Reply, RunningRelay, RunningWorker, SOON, WorkerProcess};

use super::*;

const ORDERS_TOML: &str = r#"
[[eraser]]
name = "orders"
chunk = 10
[[eraser.subject]]
kind = "tenant"
[[eraser.subject.table]]
table = "public.item_notes"
parent = { table = "public.items", column = "item_id" }
[[eraser.subject.table]]
table = "public.items"
parent = { table = "public.orders", column = "order_id", references = "id" }
[[eraser.subject.table]]
table = "public.orders"
column = "tenant_id"
[[eraser.subject.table]]
table = "public.templates"
column = "tenant_id"
keep = "is_system"
[[eraser.subject.table]]
table = "public.old_orders"
column = "tenant_id"
optional = true
"#;

/// A service behind HTTP with 25 files, of which it deletes 10 at a time. At first it is overloaded.
async fn models() -> (Endpoint, Arc<AtomicU64>) {
    let files = Arc::new(AtomicU64::new(25));
    let (left, asked) = (Arc::clone(&files), AtomicU64::new(0));
    let endpoint = Endpoint::start(move |received, _| {
        if asked.fetch_add(1, Ordering::Relaxed) == 0 {
            return Reply::Status(503);
        }
        let question: Value = serde_json::from_slice(&received.body).unwrap();
        assert_eq!(question["subject"], json!({ "kind": "tenant", "id": TENANT }));
        let now = left.load(Ordering::Relaxed);
        Reply::Body(match question["act"].as_str().unwrap() {
            "erase" => {
                let gone = now.min(10);
                left.store(now - gone, Ordering::Relaxed);
                json!({ "counts": { "files": gone }, "next": (now > gone).then_some(now - gone) }).to_string()
            }
            _ => json!({ "counts": { "files": now }, "notes": ["files of models"] }).to_string(),
        })
    })
    .await;
    (endpoint, files)
}

fn worker(outbox: &Outbox, service: &Service, file: &std::path::Path, fault: &str) -> WorkerProcess {
    let mut command = Command::new(env!("CARGO_BIN_EXE_aftercommit-worker"));
    command
        .arg("--config")
        .arg(file)
        .env("DATABASE_URL", &service.database.config.url)
        .env("NATS_URL", &outbox.nats.url)
        .env("AFTERCOMMIT_STREAM", &outbox.naming.stream)
        .env("AFTERCOMMIT_SUBJECT_PREFIX", outbox.naming.prefix.to_string())
        .env("AFTERCOMMIT_SOURCE", &outbox.naming.source)
        .env("AFTERCOMMIT_FAULT", fault)
        .env("RUST_LOG", "warn")
        .stdin(Stdio::null());
    WorkerProcess(command.spawn().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn services_that_die_are_down_or_overloaded_finish_and_are_verified() {
    let fleet = Fleet::new().await;
    let nats = Nats::start(NatsOptions::default()).await.unwrap();
    let outbox = Outbox::of(fleet.requester.config.clone(), nats.url()).await;
    let (endpoint, files) = models().await;
    let directory = Directory::new();
    let orders_file = directory.write("orders.toml", ORDERS_TOML);
    let bills_file = directory.write(
        "bills.toml",
        format!(
            "[[eraser]]\nname = 'bills'\n[[eraser.subject]]\nkind = 'tenant'\n[[eraser.subject.table]]\ntable = 'public.bills'\n\
             where = \"tenant = 'tenant:' || $1\"\n[[eraser]]\nname = 'models'\nhttp = {{ url = 'http://{}/erase' }}\n",
            endpoint.address
        ),
    );
    for (service, file) in [(&fleet.orders, &orders_file), (&fleet.bills, &bills_file)] {
        let output = outbox
            .operator_command(&["provision", "--config", file.to_str().unwrap()])
            .env("DATABASE_URL", &service.database.config.url)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let relays: Vec<RunningRelay> =
        [&fleet.requester.config, &fleet.orders.database.config, &fleet.bills.database.config]
            .into_iter()
            .map(|postgres| {
                RunningRelay::start(RelayConfig {
                    mode: Mode::Shared,
                    postgres: postgres.clone(),
                    ..outbox.relay_config()
                })
            })
            .collect();
    let coordinator = || {
        let coordinator = Coordinator::new().verify_after(Duration::from_millis(500));
        let subscriber = Subscriber::new("erasures").on::<Outcome>(coordinator);
        Worker::new(fleet.requester.config.clone(), outbox.nats.clone(), outbox.naming.clone()).subscriber(subscriber)
    };
    coordinator().provision().await.unwrap();
    let requester = RunningWorker::start(coordinator());

    let request = Fleet::request().participants(["orders", "bills", "models"]);
    let job = operate::ask(&fleet.requester.config, request).await.unwrap().job;
    // One dies behind its third chunk, the others are down.
    let mut dies = worker(&outbox, &fleet.orders, &orders_file, "job-stepped:3");
    assert!(!dies.0.wait().unwrap().success());
    let left = fleet.orders.count("aftercommit.job_work where ended_at is null and position is not null").await;
    assert_eq!(left, 1, "it was in the middle");
    // The requester's worker is killed, too.
    drop(requester);
    let orders = worker(&outbox, &fleet.orders, &orders_file, "");
    let _requester = RunningWorker::start(coordinator());
    eventually(SOON, "the orders are done", async || fleet.status(job).await.services_completed == "1/3")
        .await
        .unwrap();
    let status = fleet.status(job).await;
    assert_eq!((status.status.as_str(), status.services_silent, status.verification), ("running", 2, None));

    let _bills = worker(&outbox, &fleet.bills, &bills_file, "");
    eventually(SOON, "it is verified", async || fleet.status(job).await.status == "completed").await.unwrap();
    let status = fleet.status(job).await;
    assert_eq!((status.services_completed.as_str(), status.services_failed), ("3/3", 0));
    assert_eq!(status.total_items_deleted, Some(149 + 25));
    assert_eq!(files.load(Ordering::Relaxed), 0);
    let orders_said = status.participants.iter().find(|one| one.participant == "orders").unwrap();
    assert_eq!(orders_said.counts.as_ref().unwrap(), &all_orders());
    assert_eq!(status.verification.unwrap().status, "verified");
    assert_eq!(events::<Verified>(&fleet.pool).await.len(), 1);
    assert_eq!(
        fleet.orders.count("aftercommit.dead_letter").await + fleet.bills.count("aftercommit.dead_letter").await,
        0
    );
    assert_eq!(orders.stop(), Some(0));
    for relay in relays {
        relay.stop().await.unwrap();
    }
}
