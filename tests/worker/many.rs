//! A worker with many subscribers has a bounded number of connections, and serves all of them.

use std::time::Duration;

use crate::support::{RunningWorker, SOON, Work};
use aftercommit::testing::eventually;
use aftercommit::worker::{Subscriber, Worker};

const SUBSCRIBERS: usize = 100;
const EVENTS: usize = 10;
const MOST: u32 = 20;

/// The connections of the worker.
async fn connections(work: &Work) -> i64 {
    let count = "select count(*) from pg_stat_activity
                  where datname = current_database() and application_name = 'aftercommit-worker'";
    sqlx::query_scalar(count).fetch_one(&work.outbox.pool).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_subscribers_share_a_bounded_number_of_connections() {
    let work = Work::shared().await;
    let functions = "create function slowly(event jsonb) returns void language sql as $$
                         select pg_sleep(0.02);
                         insert into effect (event_id, key, n)
                         values ((event ->> 'id')::uuid, event ->> 'partitionkey', (event -> 'data' ->> 'n')::bigint) $$";
    sqlx::raw_sql(functions).execute(&work.outbox.pool).await.unwrap();
    let (postgres, nats, naming) = (&work.outbox.postgres, &work.outbox.nats, &work.outbox.naming);
    let worker = Worker::new(postgres.clone(), nats.clone(), naming.clone()).max_connections(MOST);
    let worker = (0..SUBSCRIBERS).fold(worker, |worker, n| {
        worker.subscriber(Subscriber::sql(format!("many-{n}"), "slowly", [format!("many.t{n}")]).unwrap())
    });
    worker.provision().await.unwrap();
    for n in 0..SUBSCRIBERS {
        for event in 0..EVENTS {
            let mut envelope = work.envelope(Some(&format!("key-{event}")), 1);
            envelope.event_type = format!("many.t{n}");
            work.put(&envelope).await;
        }
    }
    let running = RunningWorker::start(worker);
    let all = i64::try_from(SUBSCRIBERS * EVENTS).unwrap();
    let mut most = 0;
    eventually(Duration::from_secs(120), "everything is handled", async || {
        most = most.max(connections(&work).await);
        work.count().await == all
    })
    .await
    .unwrap();
    // Some may be on their way out while their successors are there already.
    println!("{all} events of {SUBSCRIBERS} subscribers through {most} connections at most");
    assert!(most <= i64::from(MOST + MOST / 2), "{most} connections");
    // An event of one at rest is handled at once.
    let mut envelope = work.envelope(None, 2);
    envelope.event_type = "many.t99".into();
    work.put(&envelope).await;
    eventually(SOON, "the last one too", async || work.count().await == all + 1).await.unwrap();
    running.stop().await;
}
