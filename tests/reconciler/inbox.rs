//! The inbox comparison: what the publisher's outbox has and a subscriber's inbox has not, although its consumer has
//! passed it, runs at the subscriber once and in order, from the outbox and whatever became of the stream. Publisher and
//! subscriber have databases of their own.

use std::process::Command;
use std::time::Duration;

use crate::support::{Act, Copy, Database, Dump, Number, Outbox, Record, Roles, SOON, Work};
use aftercommit::config::NatsConfig;
use aftercommit::reconciler::{
    ConsumerComparison, InboxComparison, Mode, OutboxComparison, Outcome, Runner, Scope, Summary,
};
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres};
use aftercommit::worker::Subscriber;
use futures_util::TryStreamExt;

pub const KEYS: [&str; 4] = ["a", "b", "c", "d"];

/// A publisher, and a subscriber in another database.
pub struct Apart {
    pub publisher: Outbox,
    pub work: Work,
}

impl Apart {
    pub async fn on(url: String) -> Self {
        let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
        let publisher = Outbox::new(database, url).await;
        Self { work: Work::beside(&publisher).await, publisher }
    }

    pub async fn shared() -> Self {
        Self::on(Nats::shared().await.unwrap().url()).await
    }

    /// Publishes numbers of each key, in turns, and waits until they are in the stream.
    pub async fn publish(&self, numbers: std::ops::RangeInclusive<i64>) {
        sqlx::query(
            "select aftercommit.publish('test.number', jsonb_build_object('key', key, 'n', n), key)
               from generate_series($1, $2) as n, unnest($3::text[]) as key order by n, key",
        )
        .bind(*numbers.start())
        .bind(*numbers.end())
        .bind(KEYS.as_slice())
        .execute(&self.publisher.pool)
        .await
        .unwrap();
        eventually(SOON, "everything is published", async || {
            sqlx::query_scalar(
                "select settled_id >= (select max(id) from aftercommit.outbox) and target is null
                   from aftercommit.relay_log order by seq desc limit 1",
            )
            .fetch_one(&self.publisher.pool)
            .await
            .unwrap()
        })
        .await
        .unwrap();
    }

    pub async fn run_worker_until(&self, count: i64) {
        run_worker_until(&self.work, count).await;
    }

    pub async fn stream(&self) -> async_nats::jetstream::stream::Stream {
        self.work.context.get_stream(&self.publisher.naming.stream).await.unwrap()
    }

    /// Compares outbox and stream, in the publisher's database.
    async fn repair_stream(&self) -> Summary {
        let leg = OutboxComparison::new(self.publisher.nats.clone(), self.publisher.naming.clone());
        let runner = Runner::new(self.publisher.postgres.clone()).comparison(leg);
        runner.run_now("outbox", Scope::Full, Mode::Repair).await.unwrap()
    }
}

pub fn subscriber() -> Subscriber {
    Subscriber::new("back").on::<Number>(Record::good())
}

async fn run_worker_until(work: &Work, count: i64) {
    let worker = work.run(subscriber()).await;
    work.wait_for(count).await;
    work.wait_until_acked("back").await;
    eventually(SOON, "no row waits", async || rows_left(work).await == 0).await.unwrap();
    worker.stop().await;
}

pub async fn rows_left(work: &Work) -> i64 {
    sqlx::query_scalar("select count(*) from aftercommit.redrive").fetch_one(&work.outbox.pool).await.unwrap()
}

pub fn runner(outbox: &Outbox, nats: &NatsConfig) -> Runner {
    let subscription = subscriber().subscription(&outbox.naming);
    Runner::new(outbox.postgres.clone())
        .comparison(ConsumerComparison::new(nats.clone(), subscription.clone()))
        .comparison(InboxComparison::new(nats.clone(), subscription))
}

/// A run of the inbox comparison that must come to its end.
pub async fn ran(work: &Work, scope: Scope, mode: Mode) -> Summary {
    let summary = runner(&work.outbox, &work.outbox.nats).run_now("inbox:back", scope, mode).await.unwrap();
    assert_eq!(summary.outcome, Outcome::Ran, "{summary}");
    summary
}

pub async fn findings(work: &Work) -> Vec<(String, String, i64)> {
    sqlx::query_as("select kind, state, count(*) from aftercommit.finding group by kind, state order by kind, state")
        .fetch_all(&work.outbox.pool)
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_stream_removed_unhandled_runs_from_the_outbox() {
    let apart = Apart::shared().await;
    let work = &apart.work;
    let relay = apart.publisher.relay();
    apart.publish(1..=10).await;
    apart.run_worker_until(40).await;
    assert_eq!(ran(work, Scope::New, Mode::Report).await.found, 0);
    apart.publish(11..=40).await;
    // As if its retention had run out for all but the last messages, while no worker ran.
    apart.stream().await.purge().sequence(150).await.unwrap();
    let seen = ran(work, Scope::New, Mode::Report).await;
    assert_eq!((seen.found, seen.repaired), (109, 0), "those behind the floor and still there are not missed");
    assert_eq!(findings(work).await, [("not_handled".into(), "open".into(), 109)]);
    let repaired = ran(work, Scope::New, Mode::Repair).await;
    assert_eq!((repaired.found, repaired.repaired), (109, 109), "what was reported before is still so");
    assert_eq!(ran(work, Scope::Full, Mode::Repair).await.found, 0, "it waits");
    apart.run_worker_until(160).await;
    work.assert_in_order(&KEYS, 40).await;
    let last = ran(work, Scope::Full, Mode::Repair).await;
    assert_eq!(last.found, 0);
    assert_eq!(findings(work).await, [("not_handled".into(), "repaired".into(), 109)]);
    let up_to: Option<bool> = sqlx::query_scalar(
        "select reconciled_up_to > clock_timestamp() - interval '1 minute' from aftercommit.reconciler where name = 'inbox:back'",
    )
    .fetch_one(&work.outbox.pool)
    .await
    .unwrap();
    assert_eq!(up_to, Some(true));
    relay.stop().await.unwrap();
}

/// The stream has lost messages that the restored inbox lacks, too: both comparisons together bring back all in order.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_goes_back_behind_a_stream_with_holes() {
    let apart = Apart::shared().await;
    let relay = apart.publisher.relay();
    apart.publish(1..=10).await;
    apart.run_worker_until(40).await;
    ran(&apart.work, Scope::New, Mode::Repair).await;
    let dump = Dump::of(&apart.work.outbox.postgres.url);
    apart.publish(11..=50).await;
    apart.run_worker_until(200).await;
    ran(&apart.work, Scope::New, Mode::Repair).await;
    for sequence in (50..190).step_by(7) {
        apart.stream().await.delete_message(sequence).await.unwrap();
    }
    let restored = Postgres::shared().await.unwrap().create_database().await.unwrap();
    dump.restore(&restored);
    let back = Work::moved(&apart.publisher, restored).await;
    back.worker_with(subscriber()).adopt().provision().await.unwrap();
    apart.publish(51..=60).await;
    let nats = &back.outbox.nats;
    let from_stream = runner(&back.outbox, nats).run_now("consumer:back", Scope::New, Mode::Repair).await.unwrap();
    assert_eq!((from_stream.found, from_stream.repaired), (140, 140), "{from_stream}");
    let from_outbox = ran(&back, Scope::New, Mode::Repair).await;
    assert_eq!((from_outbox.found, from_outbox.repaired), (20, 20), "{from_outbox}");
    run_worker_until(&back, 240).await;
    back.assert_in_order(&KEYS, 60).await;
    assert_eq!(ran(&back, Scope::Full, Mode::Repair).await.found, 0);
    relay.stop().await.unwrap();
}

/// Messages are removed before the subscriber has seen them. The relay can only put them behind the others; the
/// subscriber still gets each key in order.
#[tokio::test(flavor = "multi_thread")]
async fn messages_removed_before_the_subscriber_saw_them_keep_their_place() {
    let apart = Apart::shared().await;
    let work = &apart.work;
    let relay = apart.publisher.relay();
    apart.publish(1..=5).await;
    apart.run_worker_until(20).await;
    apart.publish(6..=30).await;
    for sequence in [30, 31, 47, 48, 49, 80, 120] {
        apart.stream().await.delete_message(sequence).await.unwrap();
    }
    assert_eq!(apart.repair_stream().await.repaired, 7);
    apart.publish(31..=40).await;
    assert_eq!(ran(work, Scope::Full, Mode::Report).await.found, 0, "the stream still has them for the subscriber");
    eventually(SOON, "the relay tells of them", async || ran(work, Scope::New, Mode::Repair).await.repaired > 0)
        .await
        .unwrap();
    apart.run_worker_until(160).await;
    work.assert_in_order(&KEYS, 40).await;
    assert_eq!(ran(work, Scope::Full, Mode::Repair).await.found, 0);
    relay.stop().await.unwrap();
}

/// The store goes back to an older copy while the subscriber is ahead; the relay fills the stream again.
async fn the_stream_loses_its_end_under_a_consumer_that_is_ahead(version: Option<&str>) -> bool {
    let version = version.map(str::to_string);
    let mut nats = Nats::start(NatsOptions { version, ..NatsOptions::default() }).await.unwrap();
    let apart = Apart::on(nats.url()).await;
    apart.publisher.forget_message_ids().await;
    let work = &apart.work;
    let relay = apart.publisher.relay();
    apart.publish(1..=10).await;
    apart.run_worker_until(40).await;
    let consumer =
        async || runner(&work.outbox, &work.outbox.nats).run_now("consumer:back", Scope::New, Mode::Repair).await;
    assert_eq!(consumer().await.unwrap().outcome, Outcome::Ran);
    nats.stop().await.unwrap();
    let store = nats.store_directory();
    let copy = Copy::of(&store);
    nats.restart().await.unwrap();
    apart.publish(11..=20).await;
    apart.run_worker_until(80).await;
    assert_eq!(consumer().await.unwrap().outcome, Outcome::Ran);
    relay.stop().await.unwrap();
    nats.stop().await.unwrap();
    // Only the messages go back; what the consumer knows stays.
    let streams = store.join("jetstream").join("$G").join("streams").join(&apart.publisher.naming.stream);
    let obs = streams.join("obs");
    let newer = Copy::of(&obs);
    copy.replace(&store);
    newer.replace(&obs);
    nats.restart().await.unwrap();
    let ahead = work.consumer("back").await.cached_info().delivered.stream_sequence > 40;
    consumer().await.unwrap();
    let named: Vec<String> = sqlx::query_scalar("select kind from aftercommit.finding where name = 'consumer:back'")
        .fetch_all(&work.outbox.pool)
        .await
        .unwrap();
    assert_eq!(named.contains(&"consumer_ahead".into()), ahead, "{named:?}");
    let relay = apart.publisher.relay();
    // New events come into the places of old ones.
    apart.publish(21..=30).await;
    let worker = work.run(subscriber()).await;
    eventually(SOON, "everything is handled", async || {
        assert_eq!(consumer().await.unwrap().outcome, Outcome::Ran);
        ran(work, Scope::Full, Mode::Repair).await;
        work.count().await == 120
    })
    .await
    .unwrap();
    worker.stop().await;
    let mut effects: Vec<_> = work.effects().await.into_iter().map(|(key, n, _)| (key, n)).collect();
    effects.sort();
    effects.dedup();
    assert_eq!(effects.len(), 120, "something ran twice");
    relay.stop().await.unwrap();
    ahead
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_has_lost_its_end() {
    the_stream_loses_its_end_under_a_consumer_that_is_ahead(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_stream_end_on_a_server_that_skips_new_messages() {
    assert!(the_stream_loses_its_end_under_a_consumer_that_is_ahead(Some("2.12.8")).await, "it puts consumers right");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_inbox_may_have_forgotten_is_left_alone() {
    let apart = Apart::shared().await;
    let work = &apart.work;
    let relay = apart.publisher.relay();
    apart.publish(1..=5).await;
    apart.run_worker_until(20).await;
    sqlx::raw_sql("update aftercommit.outbox set created_at = created_at - interval '40 days' where id <= 12;")
        .execute(&apart.publisher.pool)
        .await
        .unwrap();
    sqlx::raw_sql("delete from aftercommit.inbox").execute(&work.outbox.pool).await.unwrap();
    let seen = ran(work, Scope::Full, Mode::Report).await;
    assert_eq!(seen.found, 8, "{seen}");
    let too_old: i64 = sqlx::query_scalar("select (detail ->> 'too_old')::bigint from aftercommit.reconcile_run")
        .fetch_one(&work.outbox.pool)
        .await
        .unwrap();
    assert_eq!(too_old, 12);
    relay.stop().await.unwrap();
}

/// A worker has pruned with a short retention. A reconciler that is told of a longer one, or of none and so takes the default,
/// still knows what was forgotten: none of it runs twice.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_pruned_under_a_shorter_retention_does_not_run_again() {
    let apart = Apart::shared().await;
    let work = &apart.work;
    let relay = apart.publisher.relay();
    apart.publish(1..=5).await;
    apart.run_worker_until(20).await;
    sqlx::raw_sql("update aftercommit.inbox set handled_at = handled_at - interval '2 days' where sequence <= 12")
        .execute(&work.outbox.pool)
        .await
        .unwrap();
    sqlx::raw_sql("update aftercommit.outbox set created_at = created_at - interval '2 days' where id <= 12")
        .execute(&apart.publisher.pool)
        .await
        .unwrap();
    apart.stream().await.purge().sequence(13).await.unwrap();
    work.without_max_age().await;
    let worker = work.run(subscriber().inbox_retention(Duration::from_hours(24))).await;
    eventually(SOON, "the inbox is pruned", async || {
        let rows: i64 =
            sqlx::query_scalar("select count(*) from aftercommit.inbox").fetch_one(&work.outbox.pool).await.unwrap();
        rows == 8
    })
    .await
    .unwrap();
    worker.stop().await;
    let seen = ran(work, Scope::Full, Mode::Repair).await;
    assert_eq!((seen.found, seen.repaired), (0, 0), "{seen}");
    apart.run_worker_until(20).await;
    // What comes later counts as ever.
    sqlx::raw_sql("delete from aftercommit.inbox where sequence > 15").execute(&work.outbox.pool).await.unwrap();
    assert_eq!(ran(work, Scope::Full, Mode::Report).await.found, 5);
    relay.stop().await.unwrap();
}

/// The subscriber's database is its own, and the role may do no more there than what roles.sql grants.
#[tokio::test(flavor = "multi_thread")]
async fn the_rights_of_its_role_suffice() {
    let apart = Apart::shared().await;
    let relay = apart.publisher.relay();
    apart.publish(1..=5).await;
    apart.run_worker_until(20).await;
    apart.publish(6..=10).await;
    let consumer = apart.work.consumer("back").await;
    let mut batch = consumer.fetch().max_messages(20).messages().await.unwrap();
    while let Some(message) = batch.try_next().await.unwrap() {
        message.double_ack().await.unwrap();
    }
    apart.stream().await.delete_message(24).await.unwrap();

    let database = Database { config: apart.work.outbox.postgres.clone() };
    let role = Roles::of(&database).login(&database, "back", &["inbox_reconciler"]).await;
    let restricted = apart.work.outbox.moved_to(database.url_of(&role)).await;
    for (leg, found) in [("consumer:back", 19), ("inbox:back", 1)] {
        let summary = runner(&restricted, &restricted.nats).run_now(leg, Scope::Full, Mode::Repair).await.unwrap();
        assert_eq!((&summary.outcome, summary.found, summary.repaired), (&Outcome::Ran, found, found), "{summary}");
    }
    apart.run_worker_until(40).await;
    apart.work.assert_in_order(&KEYS, 10).await;
    relay.stop().await.unwrap();
}

/// An event that came from the outbox has no place in the stream, so its range differs for good.
#[tokio::test(flavor = "multi_thread")]
async fn a_range_that_differs_for_good_is_gone_through_once() {
    let apart = Apart::shared().await;
    let work = &apart.work;
    let relay = apart.publisher.relay();
    apart.publish(1..=10).await;
    apart.run_worker_until(40).await;
    let forget = async |n: i64| {
        sqlx::query("delete from aftercommit.inbox where event_id = (select event_id from effect order by id offset $1 limit 1)")
            .bind(n)
            .execute(&work.outbox.pool)
            .await
            .unwrap();
    };
    forget(7).await;
    assert_eq!(ran(work, Scope::Full, Mode::Repair).await.found, 1);
    apart.run_worker_until(41).await;
    let pages = async || {
        let summary = ran(work, Scope::Full, Mode::Report).await;
        let pages: i64 = sqlx::query_scalar(
            "select (detail ->> 'pages')::bigint from aftercommit.reconcile_run order by id desc limit 1",
        )
        .fetch_one(&work.outbox.pool)
        .await
        .unwrap();
        (pages > 0, summary.found, summary.scanned)
    };
    assert_eq!(pages().await, (true, 0, 40));
    assert_eq!(pages().await, (false, 0, 40), "nothing has changed");
    forget(20).await;
    assert_eq!(pages().await, (true, 1, 40));
    assert_eq!(pages().await, (true, 1, 40), "what is missing is no settled difference");
    relay.stop().await.unwrap();
}

/// The operator's tool, as somebody runs it without the worker's file.
pub fn reconcile_command(work: &Work, fault: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_aftercommit"));
    command
        .args(["reconcile", "--comparison", "inbox", "--repair", "--subscriber", "back"])
        .env("DATABASE_URL", &work.outbox.postgres.url)
        .env("NATS_URL", &work.outbox.nats.url)
        .env("AFTERCOMMIT_STREAM", &work.outbox.naming.stream)
        .env("AFTERCOMMIT_SUBJECT_PREFIX", work.outbox.naming.prefix.to_string())
        .env("AFTERCOMMIT_FAULT", fault)
        .env("RUST_LOG", "off");
    command
}

fn reconcile(work: &Work, fault: &str) -> Option<i32> {
    reconcile_command(work, fault).output().unwrap().status.code()
}

/// Some events the stream has removed, others were missing and are behind the end now; the process dies at each step.
#[tokio::test(flavor = "multi_thread")]
async fn killed_at_every_step_and_resumed() {
    let apart = Apart::shared().await;
    let work = &apart.work;
    let relay = apart.publisher.relay();
    apart.publish(1..=5).await;
    apart.run_worker_until(20).await;
    apart.publish(6..=200).await;
    apart.publish(201..=500).await;
    apart.stream().await.purge().sequence(1500).await.unwrap();
    for sequence in [1600, 1601, 1700] {
        apart.stream().await.delete_message(sequence).await.unwrap();
    }
    let consumer = work.consumer("back").await;
    // The floor passes what was purged.
    eventually(SOON, "the floor is there", async || {
        work.consumer("back").await.cached_info().ack_floor.stream_sequence >= 1499
    })
    .await
    .unwrap();
    drop(consumer);
    assert_eq!(apart.repair_stream().await.repaired, 1499 + 3);
    eventually(SOON, "the relay tells of what it repaired", async || {
        sqlx::query_scalar("select min(queued_at) < clock_timestamp() - interval '2 seconds' from aftercommit.repair")
            .fetch_one(&apart.publisher.pool)
            .await
            .unwrap()
    })
    .await
    .unwrap();
    for step in [
        "reconciler-begun:1",
        "reconciler-inbox-page:1",
        "reconciler-inbox-page:3",
        "reconciler-inbox-saved:1",
        "reconciler-inbox-repair:1",
        "resend-sent:1",
        "resend-before-commit:1",
        "resend-committed:1",
        "resend-sent:1",
        "resend-before-commit:1",
        "resend-committed:1",
        "reconciler-done:1",
        "reconciler-recorded:1",
    ] {
        let before = rows_left(work).await;
        assert_eq!(reconcile(work, step), None, "it was to die at {step}");
        let split: Vec<(String, i64)> = sqlx::query_as(
            "select key, count(*) from aftercommit.redrive group by key
               having count(*) <> case key when 'a' then 396 when 'd' then 420 else 370 end",
        )
        .fetch_all(&work.outbox.pool)
        .await
        .unwrap();
        assert_eq!(split, [], "a key in parts, {step}");
        assert!(rows_left(work).await >= before);
        // As if so much time had passed that a run without a sign of life is taken for dead.
        sqlx::raw_sql("update aftercommit.reconcile_run set alive_until = '-infinity' where ended_at is null")
            .execute(&work.outbox.pool)
            .await
            .unwrap();
    }
    assert_eq!(reconcile(work, ""), Some(0));
    let events: i64 = sqlx::query_scalar("select sum((detail ->> 'events')::bigint)::bigint from aftercommit.audit")
        .fetch_one(&work.outbox.pool)
        .await
        .unwrap();
    assert_eq!(events, rows_left(work).await, "each was sent once");
    apart.run_worker_until(2000).await;
    work.assert_in_order(&KEYS, 500).await;
    assert_eq!(ran(work, Scope::Full, Mode::Repair).await.found, 0);
    let states: Vec<(String, String, i64)> = findings(work).await;
    assert_eq!(states.iter().map(|(_, state, _)| state.as_str()).collect::<Vec<_>>(), ["repaired"], "{states:?}");
    relay.stop().await.unwrap();
}

/// A busy worker, somebody who takes its messages, somebody who removes some, and two of each reconciler.
#[tokio::test(flavor = "multi_thread")]
async fn reconcilers_race_each_other_and_a_busy_worker() {
    let apart = Apart::shared().await;
    let work = &apart.work;
    let relay = apart.publisher.relay();
    let worker = work.run(subscriber()).await;
    let stop = tokio_util::sync::CancellationToken::new();
    let mut running = tokio::task::JoinSet::new();
    for name in ["consumer:back", "consumer:back", "inbox:back", "inbox:back"] {
        let (runner, stop) = (runner(&work.outbox, &work.outbox.nats), stop.clone());
        running.spawn(async move {
            while !stop.is_cancelled() {
                let summary = runner.run_now(name, Scope::New, Mode::Repair).await.unwrap();
                assert_eq!(summary.outcome, Outcome::Ran, "{summary}");
            }
        });
    }
    for round in 0..8 {
        let first = 1 + round * 25;
        apart.publish(first..=first + 24).await;
        let consumer = work.consumer("back").await;
        let mut batch = consumer.fetch().max_messages(20).expires(Duration::from_millis(50)).messages().await.unwrap();
        while let Ok(Some(message)) = batch.try_next().await {
            message.ack().await.unwrap();
        }
        let last = apart.stream().await.cached_info().state.last_sequence;
        let _ = apart.stream().await.delete_message(last - 3).await;
    }
    let summary = async || ran(work, Scope::Full, Mode::Repair).await;
    eventually(SOON, "everything is handled", async || {
        summary().await;
        work.count().await == 800
    })
    .await
    .unwrap();
    stop.cancel();
    while let Some(ended) = running.join_next().await {
        ended.unwrap();
    }
    eventually(SOON, "no row waits", async || rows_left(work).await == 0).await.unwrap();
    worker.stop().await;
    let twice: i64 = sqlx::query_scalar("select count(*) - count(distinct event_id) from effect")
        .fetch_one(&work.outbox.pool)
        .await
        .unwrap();
    assert_eq!((work.count().await, twice), (800, 0));
    relay.stop().await.unwrap();
}

/// What is published while a run compares lies behind the consumer, and will be delivered: to send it back would put it in
/// front of what waits.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_busy_relay_publishes_meanwhile_is_not_missed() {
    let apart = Apart::shared().await;
    let work = &apart.work;
    let relay = apart.publisher.relay();
    let stuck = |delivery: &aftercommit::worker::Delivery<Number>| match &delivery.key {
        Some(key) if key == "a" && delivery.event.n >= 10 => {
            Act::Fail(aftercommit::worker::HandlerError::snooze(Duration::from_secs(3600)))
        }
        _ => Act::Succeed,
    };
    // The consumer's floor stays in the middle of what one transaction published.
    let worker = work.run(Subscriber::new("back").on::<Number>(Record::new(stuck))).await;
    apart.publish(1..=25).await;
    work.wait_for(84).await;
    worker.stop().await;
    let pool = apart.publisher.pool.clone();
    let busy = tokio::spawn(async move {
        for n in 26.. {
            let one = "select aftercommit.publish('test.number', jsonb_build_object('key', 'a', 'n', $1::int), 'a')";
            sqlx::query(one).bind(n).execute(&pool).await.unwrap();
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    let runner = runner(&work.outbox, &work.outbox.nats);
    for _ in 0..15 {
        let summary = runner.run_now("inbox:back", Scope::New, Mode::Report).await.unwrap();
        assert_eq!((&summary.outcome, summary.found), (&Outcome::Ran, 0), "{summary}");
    }
    busy.abort();
    relay.stop().await.unwrap();
}
