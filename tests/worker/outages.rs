//! G9: an outage is never a failure of an event. G5: after it the backlog drains by itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crate::support::{Act, Number, Proxy, Record, RunningWorker, SOON, Work};
use aftercommit::backoff::Backoff;
use aftercommit::config::NatsConfig;
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres, PostgresOptions};
use aftercommit::worker::{Delivery, HandlerError, Subscriber, Worker};
use async_nats::jetstream::consumer::{FromConsumer, pull};
use futures_util::StreamExt;

const KEYS: [&str; 4] = ["a", "b", "c", "d"];

/// Takes some milliseconds per event and gives up after the first failure.
fn strict(name: &str) -> Subscriber {
    let slowly = |delivery: &Delivery<Number>| Act::Sleep(Duration::from_millis(1 + delivery.event.n as u64 % 3));
    Subscriber::new(name).on::<Number>(Record::new(slowly)).max_attempts(1)
}

async fn assert_unharmed(work: &Work, count: i64) {
    work.assert_in_order(&KEYS, count).await;
    assert_eq!(work.dead_letters().await, []);
    assert!(work.attempts().await.is_empty());
    assert_eq!(work.count().await, count * KEYS.len() as i64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_crashes_costs_no_attempt() {
    let mut postgres = Postgres::start(PostgresOptions::default()).await.unwrap();
    let database = postgres.create_database().await.unwrap();
    let work = Work::on(database, Nats::shared().await.unwrap().url()).await;
    work.send_many(&KEYS, 100).await;
    let worker = work.run(strict("outage")).await;
    for round in 1..=3 {
        work.wait_for(round * 50).await;
        postgres.kill().await.unwrap();
        postgres.restart().await.unwrap();
    }
    work.wait_for(400).await;
    assert_unharmed(&work, 100).await;
    worker.stop().await;
}

/// Handlers are in the middle when it begins, and it lasts many times as long as all the waits of three attempts.
#[tokio::test(flavor = "multi_thread")]
async fn outages_longer_than_all_backoffs_give_nothing_up() {
    let mut postgres = Postgres::start(PostgresOptions::default()).await.unwrap();
    let mut nats = Nats::start(NatsOptions::default()).await.unwrap();
    let work = Work::on(postgres.create_database().await.unwrap(), nats.url()).await;
    let runs = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&runs);
    let handler = Record::new(move |_| {
        counter.fetch_add(1, Ordering::SeqCst);
        Act::Sleep(Duration::from_millis(400))
    });
    let backoff = Backoff { first: Duration::from_millis(10), max: Duration::from_millis(50) };
    let subscriber = Subscriber::new("long").on::<Number>(handler).max_attempts(3).backoff(backoff).max_batch(2);
    let worker = work.run(subscriber.ack_wait(Duration::from_secs(1))).await;
    let next_runs = async || {
        let before = runs.load(Ordering::SeqCst);
        eventually(SOON, "handlers run", async || runs.load(Ordering::SeqCst) >= before + 4).await.unwrap();
    };
    let length = Duration::from_secs(4);
    work.send_many(&KEYS, 16).await;
    next_runs().await;
    nats.kill().await.unwrap();
    tokio::time::sleep(length).await;
    nats.restart().await.unwrap();
    next_runs().await;
    postgres.kill().await.unwrap();
    tokio::time::sleep(length).await;
    postgres.restart().await.unwrap();
    next_runs().await;
    tokio::join!(async { nats.kill().await.unwrap() }, async { postgres.kill().await.unwrap() });
    tokio::time::sleep(length).await;
    postgres.restart().await.unwrap();
    nats.restart().await.unwrap();
    work.wait_for(64).await;
    work.wait_until_acked("long").await;
    assert_unharmed(&work, 16).await;
    let crashes: i64 = sqlx::query_scalar("select count(*) from aftercommit.attempt where crashes > 0")
        .fetch_one(&work.outbox.pool)
        .await
        .unwrap();
    assert_eq!(crashes, 0);
    worker.stop().await;
}

/// An outage in which PostgreSQL itself does not stop, so what it knows of running events stays.
#[tokio::test(flavor = "multi_thread")]
async fn lost_connections_leave_no_suspicion_behind_an_orderly_stop() {
    let mut work = Work::shared().await;
    let direct = work.outbox.postgres.url.clone();
    let server = direct.rsplit(['@', '/']).nth(1).unwrap();
    let proxy = Proxy::to(server).await;
    work.outbox.postgres.url = direct.replace(server, &proxy.address);
    let hurry = Arc::new(AtomicBool::new(false));
    let (switch, runs) = (Arc::clone(&hurry), Arc::new(AtomicUsize::new(0)));
    let counter = Arc::clone(&runs);
    let handler = Record::new(move |_| {
        counter.fetch_add(1, Ordering::SeqCst);
        match switch.load(Ordering::SeqCst) {
            true => Act::Fail(HandlerError::snooze(Duration::from_secs(600))),
            false => Act::Sleep(Duration::from_secs(2)),
        }
    });
    // Afterwards one executor looks whether the outage is over, then three of the four have something to do.
    let subscriber = Subscriber::new("cut").on::<Number>(handler).concurrency(4).max_attempts(1).max_batch(1);
    let worker = work.run(subscriber).await;
    work.send_many(&KEYS, 1).await;
    eventually(SOON, "all run", async || runs.load(Ordering::SeqCst) == 4).await.unwrap();
    hurry.store(true, Ordering::SeqCst);
    proxy.cut().await;
    eventually(SOON, "all were snoozed", async || runs.load(Ordering::SeqCst) >= 8).await.unwrap();
    worker.stop().await;
    let left: i64 =
        sqlx::query_scalar("select count(*) from aftercommit.running").fetch_one(&work.outbox.pool).await.unwrap();
    assert_eq!(left, 0);
    assert_unharmed(&work, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_comes_up_late_is_waited_for() {
    let mut postgres = Postgres::start(PostgresOptions::default()).await.unwrap();
    let database = postgres.create_database().await.unwrap();
    let work = Work::on(database, Nats::shared().await.unwrap().url()).await;
    work.send_many(&KEYS, 10).await;
    work.worker_with(strict("late")).provision().await.unwrap();
    postgres.stop().await.unwrap();
    let worker = RunningWorker::start(work.worker_with(strict("late")));
    tokio::time::sleep(Duration::from_millis(500)).await;
    postgres.restart().await.unwrap();
    work.wait_for(40).await;
    assert_unharmed(&work, 10).await;
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nats_server_that_crashes_costs_nothing() {
    let mut nats = Nats::start(NatsOptions::default()).await.unwrap();
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let work = Work::on(database, nats.url()).await;
    work.send_many(&KEYS, 100).await;
    let worker = work.run(strict("nats").ack_wait(Duration::from_secs(2))).await;
    for round in 1..=3 {
        work.wait_for(round * 50).await;
        nats.kill().await.unwrap();
        nats.restart().await.unwrap();
    }
    work.wait_for(400).await;
    work.wait_until_acked("nats").await;
    assert_unharmed(&work, 100).await;
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_handler_needs_may_be_away() {
    let work = Work::shared().await;
    let away = Arc::new(AtomicBool::new(true));
    let (switch, asked) = (Arc::clone(&away), Arc::new(AtomicUsize::new(0)));
    let counter = Arc::clone(&asked);
    let handler = Record::new(move |delivery| {
        if delivery.key.as_deref() == Some("a") && switch.load(Ordering::SeqCst) {
            counter.fetch_add(1, Ordering::SeqCst);
            // As a repository would wrap it.
            let lost = sqlx::Error::Io(std::io::Error::from(std::io::ErrorKind::ConnectionReset));
            return Act::Fail(std::io::Error::other(lost).into());
        }
        Act::Succeed
    });
    work.send_many(&KEYS, 10).await;
    let worker = work.run(Subscriber::new("needs").on::<Number>(handler).max_attempts(1)).await;
    work.wait_for(30).await;
    eventually(SOON, "some tries", async || asked.load(Ordering::SeqCst) > 4).await.unwrap();
    assert!(work.numbers("a").await.is_empty());
    away.store(false, Ordering::SeqCst);
    work.wait_for(40).await;
    assert_unharmed(&work, 10).await;
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_orderly_stop_costs_no_attempt_and_hands_over_at_once() {
    let work = Work::shared().await;
    work.send_many(&KEYS, 50).await;
    let first = work.run(strict("stop")).await;
    let second = RunningWorker::start(work.worker_with(strict("stop")));
    work.wait_for(20).await;
    first.stop().await;
    let stopped = std::time::Instant::now();
    let before = work.count().await;
    work.wait_for(before + 1).await;
    assert!(stopped.elapsed() < Duration::from_secs(2), "took over after {:?}", stopped.elapsed());
    work.wait_for(200).await;
    // What the first one gave back did not have to wait for 30 seconds.
    work.wait_until_acked("stop").await;
    assert!(stopped.elapsed() < Duration::from_secs(20), "acked after {:?}", stopped.elapsed());
    assert_unharmed(&work, 50).await;
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_consumer_is_missed_until_it_is_provisioned_again() {
    let work = Work::shared().await;
    work.send_many(&KEYS, 50).await;
    let worker = work.run(strict("deleted")).await;
    for round in 1..=2 {
        work.wait_for(round * 30).await;
        let stream = work.context.get_stream(&work.outbox.naming.stream).await.unwrap();
        stream.delete_consumer("deleted").await.unwrap();
        let changes = work.worker_with(strict("deleted")).provision().await.unwrap();
        assert_eq!(changes.len(), 1, "{changes:?}");
    }
    work.wait_for(200).await;
    work.wait_until_acked("deleted").await;
    assert_unharmed(&work, 50).await;
    worker.stop().await;
}

/// The server takes only small pull requests; it would answer larger ones with an error, for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_takes_small_requests_only_is_asked_for_less() {
    let jetstream = "limits { max_request_batch: 100 }".into();
    let nats = Nats::start(NatsOptions { jetstream, ..NatsOptions::default() }).await.unwrap();
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let work = Work::on(database, nats.url()).await;
    let worker = work.run(strict("small")).await;
    work.send_many(&KEYS, 150).await;
    work.wait_for(600).await;
    work.wait_until_acked("small").await;
    assert_unharmed(&work, 150).await;
    worker.stop().await;
}

/// What the server says when it does not deliver is in the health report, until it does again.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_refuses_to_deliver_is_quoted() {
    let work = Work::shared().await;
    let worker = work.run(strict("refused")).await;
    work.send("a", 1).await;
    work.wait_for(1).await;
    let stream = work.context.get_stream(&work.outbox.naming.stream).await.unwrap();
    let config = work.consumer("refused").await.cached_info().config.clone();
    let config = pull::Config::try_from_consumer_config(config).unwrap();
    let limited = pull::Config { max_expires: Duration::from_secs(1), ..config.clone() };
    let told = || {
        let health = &worker.report().subscribers[0].health;
        health.contains("the server does not deliver: 409 Exceeded MaxRequestExpires")
    };
    stream.update_consumer(limited).await.unwrap();
    work.send("a", 2).await;
    eventually(SOON, "it quotes the server", async || told()).await.unwrap();
    stream.update_consumer(config).await.unwrap();
    work.wait_for(2).await;
    eventually(SOON, "it is well again", async || !told()).await.unwrap();
    worker.stop().await;
}

/// A server that is a leaf of others names a cluster and says nothing of leaders, and those of a domain have an API of
/// their own.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_a_leaf_and_has_a_domain_is_one_like_any_other() {
    let (config, jetstream) = ("leafnodes { remotes: [ { url: \"nats://127.0.0.1:1\" } ] }", "domain: hub");
    let options = NatsOptions { config: config.into(), jetstream: jetstream.into(), ..NatsOptions::default() };
    let nats = Nats::start(options).await.unwrap();
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let mut work = Work::on(database, nats.url()).await;
    for api_prefix in [None, Some("$JS.hub.API".to_string())] {
        work.outbox.nats.api_prefix = api_prefix;
        let before = work.count().await;
        let worker = work.run(strict("leaf")).await;
        for key in KEYS {
            work.send(key, before + 1).await;
        }
        work.wait_for(before + 4).await;
        work.wait_until_acked("leaf").await;
        worker.stop().await;
    }
    assert_eq!(work.dead_letters().await, []);
    let relay = work.outbox.relay_command().arg("--once").env("NATS_DOMAIN", "hub").output().unwrap();
    assert!(relay.status.success(), "{}", String::from_utf8_lossy(&relay.stderr));
    let refused = work.outbox.relay_command().arg("--once").env("NATS_DOMAIN", "hub.API").output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(refused.status.code() == Some(2) && said.contains("NATS_DOMAIN"), "{said}");
}

/// A server whose user `worker` may do what a subscriber named `limited` must, and no more.
async fn limits_its_worker() -> (Work, NatsConfig, Nats) {
    let permissions = r#"publish: ["$JS.API.CONSUMER.INFO.*.limited", "$JS.API.CONSUMER.MSG.NEXT.*.limited",
        "$JS.API.STREAM.MSG.GET.*", "$JS.ACK.*.limited.>"], subscribe: ["_INBOX_worker.>"]"#;
    let config = format!(
        "no_auth_user: admin, authorization {{ users: [ {{ user: admin, password: a }}, \
         {{ user: worker, password: w, permissions: {{ {permissions} }} }} ] }}"
    );
    let nats = Nats::start(NatsOptions { config, ..NatsOptions::default() }).await.unwrap();
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let work = Work::on(database, nats.url()).await;
    let limited = NatsConfig { url: nats.url().replace("nats://", "nats://worker:w@"), ..NatsConfig::default() };
    (work, limited, nats)
}

/// With the permissions that a subscriber has the worker does all that it has to: it takes over what was left
/// unacked, handles, and answers. Of many types, too, although it may not read the stream in batches.
#[tokio::test(flavor = "multi_thread")]
async fn few_permissions_are_enough() {
    let many = || Subscriber::sql("limited", "apply", ["test.number", "test.b", "test.c"]).unwrap().max_attempts(1);
    for subscriber in [|| strict("limited"), many] {
        let (work, limited, _nats) = limits_its_worker().await;
        work.create_apply("").await;
        work.worker_with(subscriber()).provision().await.unwrap();
        work.send_many(&KEYS, 10).await;
        let left = work.consumer("limited").await.fetch().max_messages(7).messages().await.unwrap().count().await;
        assert_eq!(left, 7);
        let (postgres, naming) = (work.outbox.postgres.clone(), work.outbox.naming.clone());
        let worker = RunningWorker::start(Worker::new(postgres, limited, naming).subscriber(subscriber()));
        work.wait_for(40).await;
        let unacked = async || work.consumer("limited").await.cached_info().num_ack_pending;
        eventually(SOON, "acks", async || unacked().await == 7).await.unwrap();
        assert_unharmed(&work, 10).await;
        worker.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn provisioning_corrects_what_differs_and_is_quiet_otherwise() {
    let work = Work::shared().await;
    let provision = async |subscriber| work.worker_with(subscriber).provision().await;
    let changes = provision(strict("drift")).await.unwrap();
    assert!(changes.len() == 1 && changes[0].starts_with("created the consumer drift"), "{changes:?}");
    assert_eq!(provision(strict("drift")).await.unwrap(), Vec::<String>::new());
    let changes = provision(strict("drift").ack_wait(Duration::from_secs(5))).await.unwrap();
    assert!(changes.len() == 1 && changes[0].contains("ack_wait: 30s -> 5s"), "{changes:?}");
    let all = || Subscriber::sql("drift", "apply", ["*"]).unwrap();
    let changes = provision(all()).await.unwrap();
    assert!(changes.iter().any(|change| change.contains("subjects")), "{changes:?}");
    assert_eq!(provision(all()).await.unwrap(), Vec::<String>::new());
    let many = || Subscriber::sql("drift", "apply", ["a", "b.c"]).unwrap();
    assert_eq!(work.worker_with(many()).adopt().provision().await.unwrap().len(), 1);
    assert_eq!(provision(many()).await.unwrap(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn subscribers_that_contradict_each_other_are_refused() {
    let work = Work::shared().await;
    let run = |worker: Worker| worker.run(tokio_util::sync::CancellationToken::new());
    let twice = Subscriber::new("twice").on::<Number>(Record::good()).on::<Number>(Record::good());
    let error = run(work.worker_with(twice)).await.unwrap_err().to_string();
    assert!(error.contains("twice") && error.contains("test.number") && error.contains("Record"), "{error}");
    let other = strict("same").max_attempts(7);
    let error = run(work.worker_with(strict("same")).subscriber(other)).await.unwrap_err().to_string();
    assert!(error.contains("two subscribers are called same"), "{error}");
    let error = run(work.worker_with(Subscriber::new("a.b"))).await.unwrap_err().to_string();
    assert!(error.contains("not a subscriber name"), "{error}");
}
