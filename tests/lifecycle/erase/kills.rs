//! Processes that die on the way.

use super::*;

/// A process of a test that works, and perhaps dies on the way.
#[tokio::test]
#[ignore = "a process of a test"]
async fn child() {
    let (Ok(requester), Ok(service)) = (std::env::var("CHILD_REQUESTER"), std::env::var("CHILD_DATABASE")) else {
        return;
    };
    let requester = PgPool::connect(&requester).await.unwrap();
    let service = PgPool::connect(&service).await.unwrap();
    let mut event = events::<Requested>(&requester).await.pop().unwrap();
    event.not_before = None;
    let participant = erase::participant(orders().chunk(10)).each_step_commits(service.clone());
    hand(&service, &participant, event, 1).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_chunk_it_goes_on_and_counts_right() {
    let fleet = Fleet::new().await;
    let job = fleet.ask().await;
    let mut died = 0;
    // Before and behind the commit of each chunk: one kill after the other.
    for fault in (1..=4).flat_map(|n| [format!("job-step:{n}"), format!("job-stepped:{n}")]) {
        let run = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "erase::kills::child", "--ignored"])
            .env("CHILD_REQUESTER", &fleet.requester.config.url)
            .env("CHILD_DATABASE", &fleet.orders.database.config.url)
            .env("AFTERCOMMIT_FAULT", &fault)
            .output()
            .unwrap();
        died += usize::from(!run.status.success());
    }
    assert!(died >= 6, "only {died} died");
    fleet
        .works(&fleet.orders, &erase::participant(orders().chunk(10)).each_step_commits(fleet.orders.pool.clone()))
        .await;
    fleet.works(&fleet.bills, &erase::participant(bills())).await;
    fleet.coordinate().await;
    let status = fleet.status(job).await;
    let orders = status.participants.iter().find(|one| one.participant == "orders").unwrap();
    assert_eq!(orders.counts.as_ref().unwrap(), &all_orders());
    assert_eq!(status.total_items_deleted, Some(149));
}
