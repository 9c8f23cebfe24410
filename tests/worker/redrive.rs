//! G4, G6: what an operator sends back to a subscriber runs there once more, in order, whatever else happens.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crate::support::{Act, Number, Record, SOON, Work};
use aftercommit::backoff::Backoff;
use aftercommit::envelope::Envelope;
use aftercommit::operator::dead::{self, Filter};
use aftercommit::operator::worker::{Which, pause, resume};
use aftercommit::testing::eventually;
use aftercommit::worker::{Delivery, HandlerError, Subscriber};
use async_nats::HeaderMap;

const KEYS: [&str; 8] = ["a", "b", "c", "d", "e", "f", "g", "h"];
const QUICK: Backoff = Backoff { first: Duration::from_millis(5), max: Duration::from_millis(50) };

/// Sends back all dead letters of a subscriber, as an operator does.
async fn send_back(work: &Work, subscriber: &str) -> usize {
    let filter = Filter { subscriber: Some(subscriber.into()), ..Filter::default() };
    dead::retry(&work.outbox.postgres, "test", &filter).await.unwrap().len()
}

/// Writes the row of an event that was redriven.
async fn put_row(work: &Work, subscriber: &str, event: &Envelope) {
    sqlx::query(
        "insert into aftercommit.redrive
                (subscriber, event_id, type, version, key, source, time, headers, payload, content_type, stream,
                 stream_seq, requested_by)
         values ($1, $2, $3, 1, $4, '/test', now(), '{}', $5, 'application/json', 'elsewhere', 7, 'test')",
    )
    .bind(subscriber)
    .bind(event.id.as_uuid())
    .bind(&event.event_type)
    .bind(&event.key)
    .bind(event.payload.as_ref())
    .execute(&work.outbox.pool)
    .await
    .unwrap();
}

/// `count` numbers of each key, in turns, from a table of their own and not from the stream.
async fn put_rows(work: &Work, subscriber: &str, keys: &[&str], count: i64) {
    sqlx::query(
        "insert into aftercommit.redrive
                (subscriber, event_id, type, version, key, source, time, headers, payload, content_type, stream,
                 stream_seq, requested_by)
         select $1, aftercommit.new_event_id(), 'test.number', 1, key, '/test', now(), '{}',
                convert_to(json_build_object('key', key, 'n', n)::text, 'UTF8'), 'application/json', 'elsewhere', 7, 'test'
           from generate_series(1, $3) as n, unnest($2::text[]) as key order by n, key",
    )
    .bind(subscriber)
    .bind(keys)
    .bind(count)
    .execute(&work.outbox.pool)
    .await
    .unwrap();
}

async fn rows_left(work: &Work) -> i64 {
    sqlx::query_scalar("select count(*) from aftercommit.redrive").fetch_one(&work.outbox.pool).await.unwrap()
}

async fn wait_until_empty(work: &Work) {
    eventually(SOON, "no row waits any more", async || rows_left(work).await == 0).await.unwrap();
}

/// Refuses everything while the switch is on.
fn refusing(refuse: &Arc<AtomicBool>) -> Record {
    let refuse = Arc::clone(refuse);
    Record::new(move |_| match refuse.load(Ordering::SeqCst) {
        true => Act::Fail(HandlerError::reject("not today")),
        false => Act::Succeed,
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redriven_event_takes_effect_once_without_nats() {
    let work = Work::shared().await;
    sqlx::raw_sql(
        "create table other (event_id uuid);
         create function note(event jsonb) returns void language sql as $$
            insert into other values ((event ->> 'id')::uuid) $$",
    )
    .execute(&work.outbox.pool)
    .await
    .unwrap();
    let event = work.envelope(Some("a"), 1);
    let send = async || {
        let mut headers = HeaderMap::new();
        for (name, value) in event.to_headers() {
            headers.append(name.as_ref(), value.as_ref());
        }
        let subject = work.outbox.naming.prefix.subject(&event.event_type);
        work.context.publish_with_headers(subject, headers, event.payload.clone()).await.unwrap().await.unwrap()
    };
    assert!(!send().await.duplicate);
    let refuse = Arc::new(AtomicBool::new(true));
    let worker = work.run(Subscriber::new("back").on::<Number>(refusing(&refuse))).await;
    let other = work.run(Subscriber::sql("other", "note", ["*"]).unwrap()).await;
    eventually(SOON, "the dead letter", async || work.dead_letters().await.len() == 1).await.unwrap();
    work.wait_until_acked("back").await;
    work.wait_until_acked("other").await;
    let before = work.consumer("back").await.cached_info().delivered.consumer_sequence;

    refuse.store(false, Ordering::SeqCst);
    assert!(send().await.duplicate, "the broker would swallow it");
    assert_eq!(send_back(&work, "back").await, 1);
    work.wait_for(1).await;
    wait_until_empty(&work).await;
    // Another redrive of the same event, as after a retry that was asked for twice.
    put_row(&work, "back", &event).await;
    wait_until_empty(&work).await;

    assert_eq!(work.effects().await, [(Some("a".into()), 1, 1)]);
    let others: i64 = sqlx::query_scalar("select count(*) from other").fetch_one(&work.outbox.pool).await.unwrap();
    assert_eq!(others, 1, "the other subscriber saw it again");
    let inbox: (String, i64) =
        sqlx::query_as("select outcome, stream_seq from aftercommit.inbox where subscriber = 'back'")
            .fetch_one(&work.outbox.pool)
            .await
            .unwrap();
    assert_eq!(inbox, ("handled".into(), 1), "the place in the stream is kept");
    work.assert_nothing_failed().await;
    assert_eq!(work.outbox.stored().await, 1);
    assert_eq!(work.consumer("back").await.cached_info().delivered.consumer_sequence, before);
    worker.stop().await;
    other.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redriven_events_run_in_order_before_live_ones_of_their_key() {
    let work = Work::shared().await;
    work.send_many(&["a", "b"], 3).await;
    let refuse = Arc::new(AtomicBool::new(true));
    let subscriber = || Subscriber::new("back").on::<Number>(refusing(&refuse));
    let worker = work.run(subscriber()).await;
    eventually(SOON, "the dead letters", async || work.dead_letters().await.len() == 6).await.unwrap();
    work.wait_until_acked("back").await;
    worker.stop().await;
    for n in 4..=40 {
        work.send("a", n).await;
        work.send("b", n).await;
    }
    refuse.store(false, Ordering::SeqCst);
    assert_eq!(send_back(&work, "back").await, 6);
    // The live events arrive while the rows cannot be read yet.
    let mut slow = work.outbox.pool.begin().await.unwrap();
    sqlx::query("lock table aftercommit.redrive in access exclusive mode").execute(&mut *slow).await.unwrap();
    let worker = work.run(subscriber().max_batch(3)).await;
    eventually(SOON, "the live events are delivered", async || {
        work.consumer("back").await.cached_info().num_ack_pending == 74
    })
    .await
    .unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    slow.rollback().await.unwrap();
    work.wait_for(80).await;
    worker.stop().await;
    work.assert_in_order(&["a", "b"], 40).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redriven_event_waits_only_for_the_running_one_of_its_key() {
    let work = Work::shared().await;
    let go = Arc::new(AtomicBool::new(false));
    let reached = Arc::new(AtomicBool::new(false));
    let (gate, seen) = (Arc::clone(&go), Arc::clone(&reached));
    let hold = move |delivery: &Delivery<Number>| match (delivery.event.n, gate.load(Ordering::SeqCst)) {
        (10, false) => {
            seen.store(true, Ordering::SeqCst);
            Act::Sleep(Duration::from_secs(2))
        }
        _ => Act::Succeed,
    };
    work.send("a", 10).await;
    let worker = work.run(Subscriber::new("back").on::<Number>(Record::new(hold))).await;
    eventually(SOON, "10 runs", async || reached.load(Ordering::SeqCst)).await.unwrap();
    work.send("a", 11).await;
    go.store(true, Ordering::SeqCst);
    put_rows(&work, "back", &["a", "b"], 2).await;
    work.wait_for(2).await;
    assert_eq!(work.numbers("b").await, [1, 2]);
    assert!(work.numbers("a").await.is_empty(), "it ran beside another one of its key");
    work.wait_for(6).await;
    assert_eq!(work.numbers("a").await, [10, 1, 2, 11]);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_redriven_during_a_pause_runs_first_after_it() {
    let work = Work::shared().await;
    let refuse = Arc::new(AtomicBool::new(true));
    let worker = work.run(Subscriber::new("back").on::<Number>(refusing(&refuse))).await;
    work.send("a", 1).await;
    eventually(SOON, "the dead letter", async || work.dead_letters().await.len() == 1).await.unwrap();
    refuse.store(false, Ordering::SeqCst);
    let subscriber = Which::Subscriber("back");
    pause(&work.outbox.postgres, subscriber, "test", None).await.unwrap();
    // It is looked at once a second.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(send_back(&work, "back").await, 1);
    work.send("a", 2).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!((work.count().await, rows_left(&work).await), (0, 1));
    resume(&work.outbox.postgres, subscriber, "test").await.unwrap();
    work.wait_for(2).await;
    work.assert_in_order(&["a"], 2).await;
    wait_until_empty(&work).await;
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redriven_event_that_fails_again_is_a_dead_letter_again() {
    let work = Work::shared().await;
    work.send_many(&["a"], 2).await;
    let runs = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&runs);
    let act = move |delivery: &Delivery<Number>| match delivery.event.n {
        1 => match counter.fetch_add(1, Ordering::SeqCst) {
            0 => Act::Fail(HandlerError::reject("not today")),
            1 => Act::Fail(HandlerError::snooze(Duration::from_millis(20))),
            2 => Act::Fail(sqlx::Error::PoolTimedOut.into()),
            _ => Act::Fail(HandlerError::retry("the printer is on fire")),
        },
        _ => Act::Succeed,
    };
    let subscriber = Subscriber::new("back").on::<Number>(Record::new(act)).max_attempts(3).max_batch(1).backoff(QUICK);
    let worker = work.run(subscriber).await;
    work.wait_for(1).await;
    assert_eq!(work.dead_letters().await, [(1, 1, "not today".into())]);
    work.wait_until_acked("back").await;
    assert_eq!(send_back(&work, "back").await, 1);
    eventually(SOON, "the second dead letter", async || !work.dead_letters().await.is_empty()).await.unwrap();
    assert_eq!(work.dead_letters().await, [(1, 3, "the printer is on fire".into())]);
    assert_eq!(runs.load(Ordering::SeqCst), 1 + 2 + 3, "snoozing and outages cost nothing");
    assert_eq!(rows_left(&work).await, 0, "both go in one statement");
    assert!(work.attempts().await.is_empty());
    let place: (String, i64) = sqlx::query_as("select stream, stream_seq from aftercommit.dead_letter")
        .fetch_one(&work.outbox.pool)
        .await
        .unwrap();
    assert_eq!(place, (work.outbox.naming.stream.clone(), 1), "where it came from at first");
    worker.stop().await;
}

/// The process dies in the middle of each step; another one goes on.
#[tokio::test(flavor = "multi_thread")]
async fn killed_at_every_step_of_a_redrive() {
    let work = Work::shared().await;
    work.create_apply("if event -> 'data' ->> 'n' = '7' then raise exception 'seven is refused'; end if;").await;
    let file = "[[subscriber]]\nname = \"steps\"\ntypes = [\"*\"]\nsql = { function = \"apply\" }\n\
                max_attempts = 3\nmax_batch = 4\nbackoff = { first = \"20ms\" }\n";
    put_rows(&work, "steps", &KEYS, 30).await;
    let steps = [
        ("worker-inserted", 5),
        ("worker-handled", 5),
        ("worker-committed", 1),
        ("worker-committed", 8),
        ("worker-answered", 6),
        ("worker-failure-counted", 3),
        ("worker-given-up", 2),
    ];
    work.dies_at_each(&steps, file).await;
    let last = work.process(file);
    wait_until_empty(&work).await;
    assert_eq!(work.count().await, 8 * 29);
    for key in KEYS {
        assert_eq!(work.numbers(key).await, (1..=30).filter(|n| *n != 7).collect::<Vec<_>>(), "key {key}");
    }
    let letters = work.dead_letters().await;
    assert!(letters.len() == 8 && letters.iter().all(|(n, attempts, _)| *n == 7 && *attempts == 3), "{letters:?}");
    assert_eq!(last.stop(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_active_instances_run_a_redriven_event_once() {
    let work = Work::shared().await;
    put_rows(&work, "back", &KEYS, 60).await;
    let subscriber = || {
        let slowly =
            |delivery: &Delivery<Number>| Act::Sleep(Duration::from_millis(20 * (delivery.event.n as u64 % 4)));
        Subscriber::new("back").on::<Number>(Record::new(slowly)).max_attempts(3)
    };
    work.run_two_at_once(subscriber, async || rows_left(&work).await == 0).await;
    work.assert_in_order(&KEYS, 60).await;
    work.assert_nothing_failed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_redriven_events_leave_room_for_other_keys() {
    let work = Work::shared().await;
    let keys: Vec<String> = (0..100).map(|n| format!("r{n}")).collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    put_rows(&work, "back", &keys, 100).await;
    work.send_many(&["a", "b"], 50).await;
    let worker = work.run(Subscriber::new("back").on::<Number>(Record::good()).concurrency(4)).await;
    eventually(SOON, "the live events", async || {
        work.numbers("a").await.len() == 50 && work.numbers("b").await.len() == 50
    })
    .await
    .unwrap();
    assert!(rows_left(&work).await > 1000, "the live events waited for nearly all of the others");
    wait_until_empty(&work).await;
    worker.stop().await;
    assert_eq!(work.count().await, 100 * 100 + 100);
    work.assert_in_order(&["a", "b"], 50).await;
    work.assert_in_order(&keys, 100).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_redriven_and_redelivered_at_once_runs_once() {
    let work = Work::shared().await;
    let runs = Arc::new(AtomicUsize::new(0));
    let running = Arc::new(AtomicUsize::new(0));
    let (counter, level) = (Arc::clone(&runs), Arc::clone(&running));
    let slow = move |_: &Delivery<Number>| {
        counter.fetch_add(1, Ordering::SeqCst);
        level.store(1, Ordering::SeqCst);
        Act::Sleep(Duration::from_millis(1500))
    };
    // Without a key, so that nothing but the rows can keep the two apart. An operator has corrected the payload.
    for _ in 0..4 {
        let event = work.envelope(None, 1);
        work.put(&event).await;
        let corrected = Envelope { payload: work.envelope(None, 2).payload, ..event };
        put_row(&work, "back", &corrected).await;
    }
    let worker = work.run(Subscriber::new("back").on::<Number>(Record::new(slow)).max_batch(1)).await;
    eventually(SOON, "a run", async || running.load(Ordering::SeqCst) == 1).await.unwrap();
    work.wait_until_acked("back").await;
    assert_eq!(work.count().await, 0, "the stream's copies waited for the others");
    work.wait_for(4).await;
    wait_until_empty(&work).await;
    worker.stop().await;
    assert_eq!(work.effects().await, vec![(None, 2, 1); 4]);
    assert_eq!(runs.load(Ordering::SeqCst), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_made_anew_while_a_row_waits_runs_nothing_twice() {
    let work = Work::shared().await;
    work.send_many(&["a"], 3).await;
    let refuse = Arc::new(AtomicBool::new(true));
    let failing = Arc::clone(&refuse);
    let act = move |delivery: &Delivery<Number>| match (delivery.event.n, failing.load(Ordering::SeqCst)) {
        (1, true) => Act::Fail(HandlerError::reject("not today")),
        (2, true) => Act::Fail(HandlerError::retry_after(Duration::from_millis(100), "later")),
        _ => Act::Succeed,
    };
    let subscriber = || Subscriber::new("back").on::<Number>(Record::new(act.clone())).max_attempts(u32::MAX);
    let worker = work.run(subscriber()).await;
    eventually(SOON, "the dead letter", async || work.dead_letters().await.len() == 1).await.unwrap();
    worker.stop().await;
    // The row waits, nobody is active, and all of the stream will come again.
    assert_eq!(send_back(&work, "back").await, 1);
    let stream = work.context.get_stream(&work.outbox.naming.stream).await.unwrap();
    stream.delete_consumer("back").await.unwrap();
    refuse.store(false, Ordering::SeqCst);
    let worker = work.run(subscriber()).await;
    work.wait_for(3).await;
    work.wait_until_acked("back").await;
    wait_until_empty(&work).await;
    worker.stop().await;
    work.assert_in_order(&["a"], 3).await;
    assert!(work.dead_letters().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_is_taken_away_at_the_last_moment_does_not_run() {
    let work = Work::shared().await;
    put_rows(&work, "back", &["a"], 2).await;
    let mut other = work.outbox.pool.begin().await.unwrap();
    sqlx::query("delete from aftercommit.redrive where id = 1").execute(&mut *other).await.unwrap();
    let worker = work.run(Subscriber::new("back").on::<Number>(Record::good())).await;
    let waits = "select count(*) from pg_stat_activity
                  where datname = current_database() and wait_event_type = 'Lock'";
    eventually(SOON, "the worker waits for the row", async || {
        sqlx::query_scalar::<_, i64>(waits).fetch_one(&work.outbox.pool).await.unwrap() > 0
    })
    .await
    .unwrap();
    other.commit().await.unwrap();
    work.wait_for(1).await;
    wait_until_empty(&work).await;
    worker.stop().await;
    assert_eq!(work.numbers("a").await, [2]);
}

/// Rows and a live event of their key come at the same moment, between two looks at the table.
#[tokio::test(flavor = "multi_thread")]
async fn a_live_event_never_overtakes_rows_that_the_session_has_not_seen() {
    let work = Work::shared().await;
    work.send("first", 1).await;
    let worker = work.run(Subscriber::new("back").on::<Number>(Record::good())).await;
    work.wait_for(1).await;
    let keys: Vec<String> = (0..40).map(|round| format!("key-{round}")).collect();
    for key in &keys {
        put_rows(&work, "back", &[key], 3).await;
        // One of the key, one of another key that is in the same batch, and one without.
        work.send(key, 4).await;
        work.put(&work.envelope(None, 4)).await;
        work.send(key, 5).await;
    }
    work.wait_for(1 + 40 * 6).await;
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    work.assert_in_order(&keys, 5).await;
    work.wait_until_acked("back").await;
    assert_eq!(rows_left(&work).await, 0);
    worker.stop().await;
}

/// What is held does not wait for the next look, nor for rows of other subscribers.
#[tokio::test(flavor = "multi_thread")]
async fn rows_of_another_subscriber_hold_nobody() {
    let work = Work::shared().await;
    put_rows(&work, "nobody", &["a"], 3).await;
    work.send("a", 1).await;
    let worker = work.run(Subscriber::new("back").on::<Number>(Record::good())).await;
    work.wait_for(1).await;
    assert_eq!(work.numbers("a").await, [1]);
    worker.stop().await;
}

/// Another subscriber has much to do again for a key that both of them have.
#[tokio::test(flavor = "multi_thread")]
async fn what_waits_at_one_subscriber_is_not_read_by_another() {
    let work = Work::shared().await;
    work.create_apply("").await;
    sqlx::raw_sql(
        "insert into aftercommit.redrive (subscriber, event_id, type, version, key, source, time, headers, payload, content_type,
                                          stream, stream_seq, requested_by)
         select 'busy', gen_random_uuid(), 'test.number', 1, 'hot', '/test', now(), '{}', '{}', 'application/json', 'S', n, 'test'
           from generate_series(1, 20000) as n;
         analyze aftercommit.redrive",
    )
    .execute(&work.outbox.pool)
    .await
    .unwrap();
    work.send_many(&["hot"], 200).await;
    let worker = work.run(Subscriber::sql("idle", "apply", ["*"]).unwrap().max_batch(1)).await;
    work.wait_for(200).await;
    worker.stop().await;
    let mut read = 0;
    eventually(SOON, "the statistics are written", async || {
        let read_of = "select s.idx_scan > 0, t.seq_tup_read + coalesce(t.idx_tup_fetch, 0)
                         from pg_stat_user_tables t, pg_stat_user_indexes s
                        where t.relname = 'redrive' and s.indexrelname = 'redrive_key'";
        let (used, rows): (bool, i64) = sqlx::query_as(read_of).fetch_one(&work.outbox.pool).await.unwrap();
        read = rows;
        used
    })
    .await
    .unwrap();
    assert!(read < 100_000, "{read} rows of the other subscriber were read");
}
