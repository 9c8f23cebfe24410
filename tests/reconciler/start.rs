//! A subscriber that does not start with the oldest event gets none of those before, from its consumer or from a reconciler,
//! and all of those behind, however often its consumer is made.

use crate::inbox::{Apart, KEYS, ran, runner, subscriber};
use aftercommit::reconciler::{Mode, Scope};
use aftercommit::worker::Start;

/// Both comparisons of the subscriber find this many events.
async fn reconcilers_find(apart: &Apart, expected: u64) {
    let work = &apart.work;
    let consumer = runner(&work.outbox, &work.outbox.nats).run_now("consumer:back", Scope::Full, Mode::Repair).await;
    let consumer = consumer.unwrap();
    let inbox = ran(work, Scope::Full, Mode::Repair).await;
    assert_eq!(consumer.found + inbox.found, expected, "{consumer} {inbox}");
}

async fn handled(apart: &Apart) -> Vec<i64> {
    sqlx::query_scalar("select distinct n from effect order by n").fetch_all(&apart.work.outbox.pool).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscriber_that_starts_with_what_is_new_gets_nothing_else() {
    let apart = Apart::shared().await;
    let work = &apart.work;
    let relay = apart.publisher.relay();
    apart.publish(1..=5).await;
    let new = || work.worker_with(subscriber().start(Start::New));
    assert_eq!(new().provision().await.unwrap().len(), 1);
    apart.publish(6..=10).await;
    apart.run_worker_until(20).await;
    assert_eq!(handled(&apart).await, (6..=10).collect::<Vec<_>>());
    reconcilers_find(&apart, 0).await;

    // What is published while there is no consumer lies behind its start.
    apart.stream().await.delete_consumer("back").await.unwrap();
    apart.publish(11..=15).await;
    new().provision().await.unwrap();
    apart.run_worker_until(40).await;
    assert_eq!(handled(&apart).await, (6..=15).collect::<Vec<_>>());
    // Whatever the definition says by now.
    assert_eq!(work.worker_with(subscriber()).provision().await.unwrap(), [""; 0]);
    // That the consumer was made anew is all.
    reconcilers_find(&apart, 1).await;
    reconcilers_find(&apart, 0).await;
    for key in KEYS {
        assert_eq!(work.numbers(key).await, (6..=15).collect::<Vec<_>>(), "{key}");
    }
    relay.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscriber_starts_with_a_sequence_or_a_time() {
    let apart = Apart::shared().await;
    let work = &apart.work;
    let relay = apart.publisher.relay();
    apart.publish(1..=5).await;
    work.worker_with(subscriber().start(Start::Sequence(9))).provision().await.unwrap();
    apart.run_worker_until(12).await;
    assert_eq!(handled(&apart).await, [3, 4, 5]);
    reconcilers_find(&apart, 0).await;

    // Long before the first event.
    let past = "2026-01-01T00:00:00Z".parse().unwrap();
    let other = || aftercommit::worker::Subscriber::sql("other", "see", ["*"]).unwrap();
    work.worker_with(other().start(past)).provision().await.unwrap();
    let info = work.consumer("other").await;
    assert_eq!(info.cached_info().num_pending, 20);
    // One that is still to come says nothing of where that will be.
    let future = "2126-01-01T00:00:00Z".parse().unwrap();
    let later = aftercommit::worker::Subscriber::sql("later", "see", ["*"]).unwrap().start(future);
    let error = work.worker_with(later).provision().await.unwrap_err().to_string();
    assert!(error.contains("still to come"), "{error}");
    relay.stop().await.unwrap();
}

/// A consumer that somebody else made to skip events is refused as ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_is_not_on_record_is_refused() {
    let apart = Apart::shared().await;
    let work = &apart.work;
    let relay = apart.publisher.relay();
    apart.publish(1..=2).await;
    let config = async_nats::jetstream::consumer::pull::Config {
        durable_name: Some("back".into()),
        deliver_policy: async_nats::jetstream::consumer::DeliverPolicy::ByStartSequence { start_sequence: 5 },
        ..Default::default()
    };
    apart.stream().await.create_consumer(config).await.unwrap();
    let error = work.worker_with(subscriber().start(Start::Sequence(5))).provision().await.unwrap_err().to_string();
    assert!(error.contains("has the deliver policy"), "{error}");
    relay.stop().await.unwrap();
}
