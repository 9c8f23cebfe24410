//! The consumer comparison: what a consumer counts as acked and its subscriber has not handled is found, named, and run
//! once, in the order of its key, whatever happened to consumer, stream and database.

use std::process::Command;
use std::time::Duration;

use crate::support::{Act, Dump, Number, Outbox, Record, SOON, Work};
use aftercommit::reconciler::{ConsumerComparison, Mode, Outcome, Runner, Scope, Summary};
use aftercommit::testing::eventually;
use aftercommit::testing::servers::Postgres;
use aftercommit::worker::Subscriber;
use async_nats::jetstream::consumer::{DeliverPolicy, pull};
use futures_util::{StreamExt, TryStreamExt};

const KEYS: [&str; 4] = ["a", "b", "c", "d"];

fn subscriber() -> Subscriber {
    Subscriber::new("back").on::<Number>(Record::good())
}

fn leg(outbox: &Outbox) -> ConsumerComparison {
    ConsumerComparison::new(outbox.nats.clone(), subscriber().subscription(&outbox.naming))
}

async fn run_leg(outbox: &Outbox, leg: ConsumerComparison, scope: Scope, mode: Mode) -> Summary {
    Runner::new(outbox.postgres.clone()).comparison(leg).run_now("consumer:back", scope, mode).await.unwrap()
}

/// A run that must come to its end.
async fn ran(outbox: &Outbox, scope: Scope, mode: Mode) -> Summary {
    let summary = run_leg(outbox, leg(outbox), scope, mode).await;
    assert_eq!(summary.outcome, Outcome::Ran, "{summary}");
    summary
}

/// Kind and state of the findings, and how many there are.
async fn findings(outbox: &Outbox) -> Vec<(String, String, i64)> {
    sqlx::query_as("select kind, state, count(*) from aftercommit.finding group by kind, state order by kind, state")
        .fetch_all(&outbox.pool)
        .await
        .unwrap()
}

fn finding(kind: &str, state: &str, count: i64) -> (String, String, i64) {
    (kind.into(), state.into(), count)
}

/// Numbers from one to another of each key, in turns.
async fn send(work: &Work, numbers: std::ops::RangeInclusive<i64>) {
    for n in numbers {
        for key in KEYS {
            work.send(key, n).await;
        }
    }
}

/// Takes and acks so many messages, as somebody else does who uses the subscriber's consumer.
async fn steal(work: &Work, messages: usize) {
    let consumer = work.consumer("back").await;
    let mut batch = consumer.fetch().max_messages(messages).messages().await.unwrap();
    while let Some(message) = batch.try_next().await.unwrap() {
        message.double_ack().await.unwrap();
    }
}

async fn run_until(work: &Work, count: i64) {
    let worker = work.run(subscriber()).await;
    work.wait_for(count).await;
    work.wait_until_acked("back").await;
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_somebody_else_took_from_the_consumer_runs_in_order() {
    let work = Work::shared().await;
    send(&work, 1..=10).await;
    run_until(&work, 40).await;
    assert_eq!(ran(&work.outbox, Scope::New, Mode::Report).await.found, 0);
    send(&work, 11..=20).await;
    steal(&work, 14).await;
    let seen = ran(&work.outbox, Scope::New, Mode::Report).await;
    assert_eq!((seen.found, seen.scanned, seen.repaired), (14, 14, 0));
    assert_eq!(findings(&work.outbox).await, [finding("acked_not_handled", "open", 14)]);
    // The next runs do not look back, and a repair is about what was found before, too.
    assert_eq!(ran(&work.outbox, Scope::New, Mode::Report).await.found, 0);
    let repaired = ran(&work.outbox, Scope::New, Mode::Repair).await;
    assert_eq!((repaired.found, repaired.repaired), (0, 14));
    assert_eq!(findings(&work.outbox).await, [finding("acked_not_handled", "repairing", 14)]);
    assert_eq!(ran(&work.outbox, Scope::Full, Mode::Repair).await.found, 0, "they wait");
    run_until(&work, 80).await;
    work.assert_in_order(&KEYS, 20).await;
    assert_eq!(ran(&work.outbox, Scope::Full, Mode::Repair).await.found, 0);
    assert_eq!(findings(&work.outbox).await, [finding("acked_not_handled", "repaired", 14)]);
    let audit: (String, String, serde_json::Value) =
        sqlx::query_as("select who, action, detail from aftercommit.audit").fetch_one(&work.outbox.pool).await.unwrap();
    assert!(audit.0.starts_with("reconciler consumer:back run "), "{audit:?}");
    assert_eq!((audit.1.as_str(), &audit.2["events"]), ("reconcile repair", &serde_json::json!(14)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_goes_back_is_noticed_by_the_next_run() {
    let work = Work::shared().await;
    send(&work, 1..=10).await;
    run_until(&work, 40).await;
    ran(&work.outbox, Scope::New, Mode::Repair).await;
    let dump = Dump::of(&work.outbox.postgres.url);
    send(&work, 11..=60).await;
    run_until(&work, 240).await;
    assert_eq!(ran(&work.outbox, Scope::New, Mode::Repair).await.scanned, 200);

    let restored = Postgres::shared().await.unwrap().create_database().await.unwrap();
    dump.restore(&restored);
    let back = Work { outbox: work.outbox.moved_to(restored).await, context: work.context.clone() };
    assert_eq!(back.count().await, 40);
    back.worker_with(subscriber()).adopt().provision().await.unwrap();
    send(&back, 61..=70).await;
    let summary = ran(&back.outbox, Scope::New, Mode::Repair).await;
    assert_eq!((summary.scanned, summary.found, summary.repaired), (200, 200, 200));
    run_until(&back, 280).await;
    back.assert_in_order(&KEYS, 70).await;
    assert_eq!(ran(&back.outbox, Scope::Full, Mode::Repair).await.found, 0);
}

/// Only the tables are put back, while the worker runs.
#[tokio::test(flavor = "multi_thread")]
async fn tables_that_are_put_back_under_a_running_worker_are_noticed() {
    let work = Work::shared().await;
    let worker = work.run(subscriber()).await;
    send(&work, 1..=10).await;
    work.wait_for(40).await;
    work.wait_until_acked("back").await;
    ran(&work.outbox, Scope::New, Mode::Repair).await;
    let tables =
        ["inbox", "reconciler"].map(|table| format!("aftercommit.{table}")).into_iter().chain(["effect".into()]);
    let tables: Vec<String> = tables.collect();
    let run = async |make: &dyn Fn(&str, &str) -> String| {
        let mut tx = work.outbox.pool.begin().await.unwrap();
        for table in &tables {
            let copy = format!("copy_of_{}", table.replace('.', "_"));
            sqlx::raw_sql(sqlx::AssertSqlSafe(make(table, &copy))).execute(&mut *tx).await.unwrap();
        }
        tx.commit().await.unwrap();
    };
    run(&|table, copy| format!("create table {copy} as select * from {table}")).await;
    send(&work, 11..=30).await;
    work.wait_for(120).await;
    work.wait_until_acked("back").await;
    ran(&work.outbox, Scope::New, Mode::Repair).await;
    run(&|table, copy| {
        let overriding = if table == "effect" { " overriding system value" } else { "" };
        format!("delete from {table}; insert into {table}{overriding} select * from {copy}")
    })
    .await;
    assert_eq!(work.count().await, 40);
    assert_eq!(ran(&work.outbox, Scope::New, Mode::Repair).await.repaired, 80);
    work.wait_for(120).await;
    send(&work, 31..=40).await;
    work.wait_for(160).await;
    worker.stop().await;
    work.assert_in_order(&KEYS, 40).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_was_made_anew_at_the_end_loses_nothing() {
    let work = Work::shared().await;
    send(&work, 1..=10).await;
    run_until(&work, 40).await;
    ran(&work.outbox, Scope::New, Mode::Repair).await;
    send(&work, 11..=20).await;
    let stream = work.context.get_stream(&work.outbox.naming.stream).await.unwrap();
    stream.delete_consumer("back").await.unwrap();
    let missing = ran(&work.outbox, Scope::New, Mode::Repair).await;
    assert_eq!((missing.found, missing.repaired), (1, 0));
    assert_eq!(findings(&work.outbox).await, [finding("consumer_missing", "open", 1)]);
    let config = pull::Config {
        durable_name: Some("back".into()),
        deliver_policy: DeliverPolicy::New,
        filter_subject: work.outbox.naming.prefix.subject("test.number"),
        ..Default::default()
    };
    stream.create_consumer(config).await.unwrap();
    send(&work, 21..=25).await;
    let seen = ran(&work.outbox, Scope::New, Mode::Report).await;
    // A server of version 2.12 tells where such a consumer began only when it has delivered something.
    let began = work.consumer("back").await.cached_info().ack_floor.stream_sequence;
    let behind = if began == 0 { 0 } else { 40 };
    assert_eq!(seen.found, 2 + behind, "made anew, its settings, and the events");
    let operator = ConsumerComparison { provision: true, ..leg(&work.outbox) };
    let summary = run_leg(&work.outbox, operator, Scope::New, Mode::Repair).await;
    assert_eq!(summary.outcome, Outcome::Ran, "{summary}");
    assert_eq!(work.consumer("back").await.cached_info().config.deliver_policy, DeliverPolicy::All);
    run_until(&work, 100).await;
    work.assert_in_order(&KEYS, 25).await;
    assert_eq!(ran(&work.outbox, Scope::Full, Mode::Repair).await.found, 0);
    let open = findings(&work.outbox).await.into_iter().filter(|(_, state, _)| state == "open").count();
    assert_eq!(open, 0);
}

/// What was wrong is on record, although the process that put it right has died before it could say so.
#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_corrected_by_a_process_that_died_is_on_record() {
    let work = Work::shared().await;
    work.worker_with(subscriber()).provision().await.unwrap();
    let stream = work.context.get_stream(&work.outbox.naming.stream).await.unwrap();
    // It is found by name, as the command is not given its definition.
    send(&work, 1..=1).await;
    run_until(&work, 4).await;
    stream.delete_consumer("back").await.unwrap();
    let mut command = reconcile(&work, "consumer", &["--subscriber", "back"]);
    let died = command.env("AFTERCOMMIT_FAULT", "reconciler-consumer-made:1").output().unwrap();
    assert_eq!(died.status.code(), None, "{}", String::from_utf8_lossy(&died.stdout));
    assert_eq!(findings(&work.outbox).await, [finding("consumer_missing", "open", 1)]);
    stream.consumer_info("back").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_else_is_odd_is_named() {
    let work = Work::shared().await;
    work.worker_with(subscriber()).provision().await.unwrap();
    send(&work, 1..=1).await;
    let impatient =
        |outbox: &Outbox| ConsumerComparison { stuck_limit: Duration::ZERO, dead_limit: Duration::ZERO, ..leg(outbox) };
    let kinds = async || -> Vec<(String, String)> {
        let summary = run_leg(&work.outbox, impatient(&work.outbox), Scope::Full, Mode::Report).await;
        assert_eq!(summary.outcome, Outcome::Ran, "{summary}");
        sqlx::query_as("select kind, detail from aftercommit.finding where state = 'open' order by kind")
            .fetch_all(&work.outbox.pool)
            .await
            .unwrap()
    };
    let stuck = kinds().await;
    assert_eq!(stuck.len(), 1);
    assert!(stuck[0].0 == "stuck" && stuck[0].1.contains("4 messages wait"), "{stuck:?}");
    let bad = Subscriber::new("back")
        .on::<Number>(Record::new(|_| Act::Fail(aftercommit::worker::HandlerError::reject("no"))));
    let worker = work.run(bad).await;
    eventually(SOON, "the dead letters", async || work.dead_letters().await.len() == 4).await.unwrap();
    work.wait_until_acked("back").await;
    worker.stop().await;
    let kinds_now: Vec<String> = kinds().await.into_iter().map(|(kind, _)| kind).collect();
    assert_eq!(kinds_now, vec!["dead_letters_too_old"; 4]);
    // A message that is no event is no finding, but an inbox without its primary key is.
    work.context
        .publish(work.outbox.naming.prefix.subject("test.number"), "hello".into())
        .await
        .unwrap()
        .await
        .unwrap();
    steal(&work, 1).await;
    sqlx::raw_sql(
        "alter table aftercommit.inbox drop constraint inbox_pkey;
         insert into aftercommit.inbox (subscriber, event_id, stream_seq)
         select subscriber, event_id, stream_seq from aftercommit.inbox where stream_seq = 2",
    )
    .execute(&work.outbox.pool)
    .await
    .unwrap();
    let found = kinds().await;
    assert_eq!(found.len(), 5);
    assert!(found[4].0 == "handled_twice" && found[4].1.contains("2 times"), "{found:?}");
}

/// A type that is added later was not missed before.
#[tokio::test(flavor = "multi_thread")]
async fn a_type_that_a_subscriber_takes_on_later_is_compared_from_then_on() {
    let work = Work::shared().await;
    let mut other = work.envelope(Some("a"), 1);
    other.event_type = "test.other".into();
    work.put(&other).await;
    send(&work, 1..=2).await;
    run_until(&work, 8).await;
    assert_eq!(ran(&work.outbox, Scope::Full, Mode::Report).await.found, 0);
    let both = Subscriber::sql("back", "f", ["test.number", "test.other"]).unwrap();
    let leg = || ConsumerComparison::new(work.outbox.nats.clone(), both.subscription(&work.outbox.naming));
    for _ in 0..2 {
        let summary = run_leg(&work.outbox, leg(), Scope::Full, Mode::Report).await;
        assert_eq!((summary.outcome.clone(), summary.found), (Outcome::Ran, 1), "{summary}: its settings only");
    }
    assert_eq!(findings(&work.outbox).await, [finding("consumer_settings", "open", 1)]);
}

const TOML: &str = "[[subscriber]]\nname = \"back\"\ntypes = [\"test.number\"]\nsql = { function = \"apply\" }\n";

/// The operator's tool, as somebody runs it with the worker's file.
fn reconcile(work: &Work, leg: &str, arguments: &[&str]) -> Command {
    let file = std::env::temp_dir().join(format!("{}-reconcile.toml", work.outbox.naming.stream));
    std::fs::write(&file, TOML).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_aftercommit"));
    command.args(["reconcile", "--comparison", leg, "--repair", "--config"]).arg(file).args(arguments);
    command
        .env("DATABASE_URL", &work.outbox.postgres.url)
        .env("NATS_URL", &work.outbox.nats.url)
        .env("AFTERCOMMIT_STREAM", &work.outbox.naming.stream)
        .env("AFTERCOMMIT_SUBJECT_PREFIX", work.outbox.naming.prefix.to_string())
        .env("RUST_LOG", "off");
    command
}

/// How many rows wait of each key.
async fn waiting(work: &Work) -> Vec<(String, i64)> {
    sqlx::query_as("select key, count(*) from aftercommit.redrive group by key order by key")
        .fetch_all(&work.outbox.pool)
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_every_step_and_resumed() {
    let work = Work::shared().await;
    work.worker_with(subscriber()).provision().await.unwrap();
    send(&work, 1..=300).await;
    steal(&work, 1100).await;
    let of = |keys: &[&str]| keys.iter().map(|key| (key.to_string(), 275)).collect::<Vec<_>>();
    // Three keys fit into a transaction.
    for (step, sent) in [
        ("reconciler-begun:1", 0),
        ("reconciler-consumer-page:1", 0),
        ("reconciler-consumer-page:2", 0),
        ("reconciler-consumer-repair:1", 0),
        ("resend-sent:1", 0),
        ("resend-before-commit:1", 0),
        ("resend-committed:1", 3),
        ("resend-sent:1", 3),
        ("resend-before-commit:1", 3),
        ("resend-committed:1", 4),
        ("reconciler-done:1", 4),
        ("reconciler-recorded:1", 4),
    ] {
        let died = reconcile(&work, "consumer", &[]).env("AFTERCOMMIT_FAULT", step).output().unwrap();
        assert_eq!(died.status.code(), None, "it was to die at {step}: {}", String::from_utf8_lossy(&died.stdout));
        assert_eq!(waiting(&work).await, of(&KEYS[..sent]), "whole keys or nothing, {step}");
        work.outbox.expire_leases().await;
    }
    let events: i64 = sqlx::query_scalar("select sum((detail ->> 'events')::bigint)::bigint from aftercommit.audit")
        .fetch_one(&work.outbox.pool)
        .await
        .unwrap();
    assert_eq!(events, 1100, "each was sent once");
    assert_eq!(findings(&work.outbox).await, [finding("acked_not_handled", "repairing", 1100)]);
    let ended = reconcile(&work, "consumer", &["--subscriber", "back", "--json"]).output().unwrap();
    let summaries: serde_json::Value = serde_json::from_slice(&ended.stdout).unwrap();
    let one = &summaries.as_array().unwrap()[0];
    assert_eq!((&one["reconciler"], &one["result"]), (&"consumer:back".into(), &"ran".into()), "{one}");
    assert_eq!((&one["found"], &one["repaired"]), (&0.into(), &0.into()), "nothing is sent twice");
    run_until(&work, 1200).await;
    work.assert_in_order(&KEYS, 300).await;
    ran(&work.outbox, Scope::Full, Mode::Repair).await;
    assert_eq!(findings(&work.outbox).await, [finding("acked_not_handled", "repaired", 1100)]);
}

/// The planner's idea of the table is from a time when it was empty.
#[tokio::test(flavor = "multi_thread")]
async fn many_missing_events_of_a_key_are_read_once() {
    const EVENTS: usize = 3000;
    let work = Work::shared().await;
    work.worker_with(subscriber()).provision().await.unwrap();
    let sent = futures_util::stream::iter(1..=EVENTS).map(async |n| {
        work.put(&work.envelope(Some(KEYS[0]), i64::try_from(n).unwrap())).await;
    });
    sent.buffer_unordered(100).collect::<Vec<_>>().await;
    steal(&work, EVENTS).await;
    sqlx::raw_sql(
        "insert into aftercommit.redrive (subscriber, event_id, type, version, source, time, headers, payload, content_type,
                                          stream, stream_seq, requested_by)
         values ('other', gen_random_uuid(), 'a', 1, '/s', now(), '{}', '', 'a', 'S', 1, 'me');
         analyze aftercommit.redrive;
         delete from aftercommit.redrive",
    )
    .execute(&work.outbox.pool)
    .await
    .unwrap();
    let summary = ran(&work.outbox, Scope::New, Mode::Repair).await;
    assert_eq!((summary.found, summary.repaired), (EVENTS as u64, EVENTS as u64), "{summary}");
    // On record a while after the statements.
    let mut read = 0;
    let counted = eventually(SOON, "the rows that were read are counted", async || {
        read = sqlx::query_scalar(
            "select (coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0))::bigint from pg_stat_user_tables
              where relname = 'redrive'",
        )
        .fetch_one(&work.outbox.pool)
        .await
        .unwrap();
        read >= EVENTS as i64
    });
    counted.await.unwrap();
    assert!(read < 500_000, "{read} rows were read to send {EVENTS} back");
}

/// Keys with more missing events than fit into a transaction, a worker that is busy with later events of them, two
/// reconcilers, and one more that dies again and again.
#[tokio::test(flavor = "multi_thread")]
async fn missing_events_of_a_key_stay_together_while_the_worker_is_busy() {
    let work = Work::shared().await;
    work.worker_with(subscriber()).provision().await.unwrap();
    let missing = 1..=400;
    send(&work, missing.clone()).await;
    steal(&work, 1600).await;
    let worker = work.run(subscriber()).await;
    let stop = tokio_util::sync::CancellationToken::new();
    let mut running = tokio::task::JoinSet::new();
    for _ in 0..2 {
        let (leg, postgres, stop) = (leg(&work.outbox), work.outbox.postgres.clone(), stop.clone());
        running.spawn(async move {
            let runner = Runner::new(postgres).comparison(leg);
            while !stop.is_cancelled() {
                let summary = runner.run_now("consumer:back", Scope::New, Mode::Repair).await.unwrap();
                assert_eq!(summary.outcome, Outcome::Ran, "{summary}");
            }
        });
    }
    let dying = {
        let steps = ["reconciler-consumer-repair:1", "resend-sent:1", "resend-before-commit:1", "resend-committed:1"];
        let mut commands: Vec<Command> = steps
            .iter()
            .map(|step| {
                let mut command = reconcile(&work, "consumer", &[]);
                command.env("AFTERCOMMIT_FAULT", step);
                command
            })
            .collect();
        tokio::task::spawn_blocking(move || commands.iter_mut().for_each(|command| drop(command.output().unwrap())))
    };
    send(&work, 401..=500).await;
    dying.await.unwrap();
    work.wait_for(2000).await;
    work.wait_until_acked("back").await;
    stop.cancel();
    while let Some(ended) = running.join_next().await {
        ended.unwrap();
    }
    worker.stop().await;
    for key in KEYS {
        let numbers = work.numbers(key).await;
        let (sent, live): (Vec<i64>, Vec<i64>) = numbers.iter().partition(|n| missing.contains(*n));
        assert_eq!(sent, missing.clone().collect::<Vec<_>>(), "key {key}");
        assert_eq!(live, (401..=500).collect::<Vec<_>>(), "key {key}");
        let first = numbers.iter().position(|n| missing.contains(n)).unwrap();
        assert!(
            numbers[first..first + 400].iter().all(|n| missing.contains(n)),
            "key {key}: a live event got in between"
        );
    }
    ran(&work.outbox, Scope::Full, Mode::Repair).await;
    assert_eq!(findings(&work.outbox).await, [finding("acked_not_handled", "repaired", 1600)]);
}

/// In the worker's own process, with what it loses while it runs.
#[tokio::test(flavor = "multi_thread")]
async fn beside_the_worker_it_repairs_by_itself() {
    let work = Work::shared().await;
    work.create_apply("").await;
    let mut command = work.command(TOML);
    command.args(["--reconcile-every", "200ms"]).env("AFTERCOMMIT_RECONCILE_REPAIR", "true").env("RUST_LOG", "off");
    send(&work, 1..=5).await;
    steal(&work, 9).await;
    let worker = crate::support::WorkerProcess(command.spawn().unwrap());
    work.wait_for(20).await;
    let twice: i64 = sqlx::query_scalar("select count(*) - count(distinct event_id) from effect")
        .fetch_one(&work.outbox.pool)
        .await
        .unwrap();
    assert_eq!(twice, 0);
    assert_eq!(worker.stop(), Some(0));
}

/// Without the file the subscriber is what its consumer shows.
#[tokio::test(flavor = "multi_thread")]
async fn a_subscriber_can_be_named_without_its_definition() {
    let work = Work::shared().await;
    work.worker_with(subscriber()).provision().await.unwrap();
    send(&work, 1..=2).await;
    steal(&work, 3).await;
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_aftercommit"));
        command.args(["reconcile", "--comparison", "consumer"]).args(arguments);
        command
            .env("DATABASE_URL", &work.outbox.postgres.url)
            .env("NATS_URL", &work.outbox.nats.url)
            .env("AFTERCOMMIT_STREAM", &work.outbox.naming.stream)
            .env("AFTERCOMMIT_SUBJECT_PREFIX", work.outbox.naming.prefix.to_string())
            .env("RUST_LOG", "off");
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (status, said) = run(&["--subscriber", "back"]);
    assert!(status == Some(1) && said.contains("result=ran scanned=3 found=3 repaired=0"), "{status:?} {said}");
    let (status, said) = run(&["--subscriber", "back", "--repair"]);
    assert!(status == Some(0) && said.contains("found=0 repaired=3"), "{status:?} {said}");
    assert_eq!(run(&[]).0, Some(2), "no subscriber is meant");
    assert_eq!(run(&["--subscriber", "nobody"]).0, Some(1));
}
