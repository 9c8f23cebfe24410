//! What was forgotten is nowhere any more, whoever runs, dies or comes late meanwhile.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Output;
use std::time::Duration;

use aftercommit::erase::forget::{self, ForgetConfig, Selection};
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres};
use sqlx::PgPool;
use uuid::Uuid;

use crate::support::{NAME, Outbox, SOON, Scenario, succeeded};

/// What must not be found any more, in a payload, a header or an error.
fn canary(n: u32) -> String {
    format!("canary-{n:03}-\u{2020}sauce")
}

const PERSON: &str = "person-7";

async fn publish(outbox: &Outbox, key: &str, n: u32, secret: &str) -> Uuid {
    publish_in(&outbox.pool, key, n, secret).await
}

async fn publish_in<'c>(executor: impl sqlx::PgExecutor<'c>, key: &str, n: u32, secret: &str) -> Uuid {
    sqlx::query_scalar(
        "select aftercommit.publish('person.changed', jsonb_build_object('version', $1::int, 'secret', $2::text), $3,
                                    jsonb_build_object('x-secret', translate($2, U&'\\2020', '+')))",
    )
    .bind(n as i32)
    .bind(secret)
    .bind(key)
    .fetch_one(executor)
    .await
    .unwrap()
}

/// All that a dump of the database has.
fn dump(url: &str) -> Vec<u8> {
    let pg_dump = Postgres::program("pg_dump").unwrap();
    let output = std::process::Command::new(pg_dump).args(["--inserts", "-d", url]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// All files of a directory.
fn files(directory: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap().flatten() {
        match entry.file_type().unwrap().is_dir() {
            true => found.extend(files(&entry.path())),
            false => found.push((entry.path().display().to_string(), std::fs::read(entry.path()).unwrap_or_default())),
        }
    }
    found
}

/// Which canaries these bytes have: as text, as PostgreSQL writes bytea, and in base64.
fn found(bytes: &[u8]) -> BTreeSet<u32> {
    use base64::Engine;
    // A search of the standard library is fast also in a build for tests.
    let bytes = String::from_utf8_lossy(bytes);
    // Up to the character that has several forms; base64, which depends on what stands before, loses what is at both ends.
    let forms = |text: &str, whole: &str| {
        let hex: String = text.bytes().map(|byte| format!("{byte:02x}")).collect();
        let in_base64 = (0..3).map(|shift| {
            let padded = [vec![b' '; shift], whole.as_bytes().to_vec()].concat();
            let encoded = base64::engine::general_purpose::STANDARD.encode(padded);
            encoded[4..encoded.len() - 4].to_string()
        });
        [text.to_string(), hex].into_iter().chain(in_base64).collect::<Vec<_>>()
    };
    if !forms("canary-", "canary-").iter().any(|form| bytes.contains(form)) {
        return BTreeSet::new();
    }
    (0..100)
        .filter(|n| forms(&format!("canary-{n:03}-"), &canary(*n)).iter().any(|form| bytes.contains(form)))
        .collect()
}

async fn everything(scenario: &Scenario) -> Vec<(String, BTreeSet<u32>)> {
    let mut all = vec![
        ("publisher".to_string(), found(&dump(&scenario.outbox.postgres.url))),
        ("subscriber".to_string(), found(&dump(&scenario.database.url))),
    ];
    all.extend(files(&scenario.nats.store_directory()).into_iter().map(|(name, bytes)| (name, found(&bytes))));
    all.retain(|(_, found)| !found.is_empty());
    all
}

fn config(outbox: &Outbox) -> ForgetConfig {
    ForgetConfig::new(outbox.postgres.clone(), outbox.nats.clone(), outbox.naming.clone())
}

fn key(key: &str) -> Selection {
    Selection { key: Some(key.into()), ..Selection::default() }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

async fn count(pool: &PgPool, of: &str) -> i64 {
    sqlx::query_scalar(sqlx::AssertSqlSafe(format!("select count(*) from {of}"))).fetch_one(pool).await.unwrap()
}

/// Copies wherever events of a subscriber can have them.
async fn copy_everywhere(scenario: &Scenario, event: Uuid, secret: &str) {
    let bytes = format!("{{\"secret\": \"{secret}\"}}").into_bytes();
    for table in ["dead_letter", "redrive"] {
        let more = match table {
            "dead_letter" => ("attempts, reason, first_failed_at", "3, 'cannot read ' || $4, now()"),
            _ => ("requested_by", "'jane ' || left($4, 0)"),
        };
        sqlx::query(sqlx::AssertSqlSafe(format!(
            "insert into aftercommit.{table} (subscriber, event_id, type, version, key, source, time, headers, payload, content_type,
                                              stream, stream_seq, {})
             select 'other', $1, 'person.changed', 1, $2, '/test', now(), jsonb_build_object('x-secret', $4::text), $3,
                    'application/json', 'S', 1, {}",
            more.0, more.1
        )))
        .bind(event)
        .bind(PERSON)
        .bind(&bytes)
        .bind(secret)
        .execute(&scenario.books)
        .await
        .unwrap();
    }
    let edit = "update aftercommit.dead_letter set payload = convert_to('{\"secret\": \"' || $2 || '\"}', 'UTF8') || ' '::bytea
                 where event_id = $1";
    // An edit leaves what was in the audit trail. Of what is forgotten there is nothing to edit.
    let edited = sqlx::query(edit).bind(event).bind(secret).execute(&scenario.books).await;
    if count(&scenario.books, &format!("aftercommit.tombstone where event_id = '{event}'")).await > 0 {
        let refused = edited.unwrap_err();
        assert!(refused.to_string().contains("was forgotten: there is nothing to edit"), "{refused}");
    } else {
        edited.unwrap();
    }
    for sql in [
        "insert into aftercommit.attempt (subscriber, event_id, attempts, last_error) values ('other', $1, 1, $2)",
        "insert into aftercommit.failure (subscriber, event_id, attempt, error, retry_at) values ('other', $1, 1, $2, now())",
        "insert into aftercommit.finding (name, kind, item, event_id, detail, first_run, last_run)
         values ('inbox:other', 'x', $1::text, $1, $2, 1, 1)",
    ] {
        sqlx::query(sql).bind(event).bind(secret).execute(&scenario.books).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_left_of_what_was_forgotten() {
    let mut scenario = Scenario::start().await;
    let outbox = &scenario.outbox;
    // Handled; in copies; of a subscriber that keeps failing; and not published yet.
    let mut events = Vec::new();
    for n in 0..10 {
        events.push(publish(outbox, PERSON, n, &canary(n)).await);
        publish(outbox, "person-8", n, &canary(90)).await;
    }
    scenario.caught_up().await;
    for (n, event) in (10..14).zip(&events) {
        copy_everywhere(&scenario, *event, &canary(n)).await;
    }
    let failing = "create or replace function see(event jsonb) returns void language plpgsql as $$
        begin
            if event -> 'data' ->> 'secret' like 'canary-01_%' then raise exception 'cannot: %', event -> 'data' ->> 'secret'; end if;
            insert into effect (event_id, key, version)
            values ((event ->> 'id')::uuid, event ->> 'partitionkey', (event -> 'data' ->> 'version')::int);
        end $$";
    sqlx::raw_sql(failing).execute(&scenario.books).await.unwrap();
    for n in 14..17 {
        events.push(publish(outbox, PERSON, n, &canary(n)).await);
    }
    eventually(SOON, "an event fails", async || {
        count(&scenario.books, "aftercommit.attempt where subscriber = 'books'").await > 0
    })
    .await
    .unwrap();
    scenario.published().await;
    scenario.stop_relay().await;
    for n in 17..20 {
        events.push(publish(&scenario.outbox, PERSON, n, &canary(n)).await);
    }
    let planted: BTreeSet<u32> = everything(&scenario).await.into_iter().flat_map(|(_, found)| found).collect();
    assert_eq!(planted, (0..20).chain([90]).collect(), "all are planted");

    // Without a relay only the tables can be done.
    let outbox = &scenario.outbox;
    let refused = outbox.operator(&["forget", "--key", PERSON, "--why", "request 114"]);
    assert!(
        refused.status.code() == Some(2) && said(&refused).contains("16 events of the outbox"),
        "{}",
        said(&refused)
    );
    let waits = outbox.operator(&["forget", "--key", PERSON, "--why", "request 114", "--yes", "--patience", "1s"]);
    assert_eq!(waits.status.code(), Some(1), "{}", said(&waits));
    assert!(said(&waits).contains("waits for a relay, which has 3 events"), "{}", said(&waits));
    let doctor = said(&outbox.operator(&["doctor"]));
    assert!(doctor.contains("1 request not through"), "{doctor}");

    scenario.start_relay();
    let outbox = &scenario.outbox;
    let through = succeeded(outbox.operator(&["forget", "--resume"]));
    assert_eq!(through, "request 1: 16 events forgotten; 13 messages of the stream erased\n");
    let books = &scenario.books;
    eventually(SOON, "the subscriber has taken the tombstones", async || {
        count(books, "aftercommit.tombstone").await == 16
            && count(books, "aftercommit.attempt where subscriber = 'books'").await == 0
    })
    .await
    .unwrap();
    assert_eq!(
        everything(&scenario).await.into_iter().flat_map(|(_, found)| found).collect::<BTreeSet<u32>>(),
        [90].into()
    );
    assert_eq!(found(&std::fs::read(scenario.nats.log()).unwrap()), BTreeSet::new());

    // It stays so, whatever is compared and replayed, and the others are all there.
    let effects = count(books, "effect").await;
    assert_eq!(effects, 20, "what was forgotten before it was handled takes no effect");
    for _ in 0..2 {
        let [consumer, inbox] = scenario.reconcile_books().await;
        for summary in [scenario.reconcile_outbox().await, consumer, inbox] {
            assert_eq!((summary.found, summary.failed), (0, 0), "{summary}");
        }
    }
    assert_eq!(count(books, "aftercommit.inbox where outcome = 'erased'").await, 6);
    let replayed = replay(&scenario, &["--key", PERSON, "--again", "--yes"]);
    assert_eq!(
        said(&replayed),
        "0 events sent to books; 16 left out, because what they held was erased: see `aftercommit explain`\n"
    );
    assert_eq!(
        everything(&scenario).await.into_iter().flat_map(|(_, found)| found).collect::<BTreeSet<u32>>(),
        [90].into()
    );
    assert_eq!(count(books, "effect").await, effects);
    let story = said(&outbox.operator(&["explain", &events[15].to_string()]));
    assert!(story.contains("erased: forgotten by jane: request 114"), "{story}");
    let doctor = said(&outbox.operator(&["doctor"]));
    assert!(doctor.contains("16 events forgotten"), "{doctor}");
    // The trail says who and why, and what is left is the proof.
    let proof = "aftercommit.forget_request where who = 'jane' and why = 'request 114' and ended_at is not null and messages = 13";
    assert_eq!(count(&outbox.pool, proof).await, 1);
    let proof = "aftercommit.tombstone where length(payload_sha256) = 32 and payload_bytes > 0 and request = 1";
    assert_eq!(count(&outbox.pool, proof).await, 16);
}

fn replay(scenario: &Scenario, arguments: &[&str]) -> Output {
    let mut command = scenario.outbox.operator_command(&["replay", "--subscriber", NAME]);
    command.args(arguments).env("DATABASE_URL", &scenario.database.url).output().unwrap()
}

/// The relay has published the event and has not written that down; or it has read it with many others, and is about to.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_relay_has_in_its_hands_is_found_when_it_arrives() {
    let nats = Nats::start(NatsOptions::default()).await.unwrap();
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let outbox = Outbox::new(database, nats.url()).await;
    for n in 1..6 {
        let dies = n % 2 == 1;
        let mut tx = outbox.pool.begin().await.unwrap();
        if !dies {
            let many = "select aftercommit.publish('person.changed', '{}', 'other') from generate_series(1, 2000)";
            sqlx::query(many).execute(&mut *tx).await.unwrap();
        }
        let event = publish_in(&mut *tx, PERSON, n, &canary(n)).await;
        tx.commit().await.unwrap();
        let stored = outbox.stored().await;
        let mut relay = None;
        if dies {
            outbox.dies_at("relay-acknowledged:1").await;
            assert!(outbox.stored().await > stored, "it was published");
        } else {
            relay = Some(outbox.relay());
            eventually(SOON, "the relay is at work", async || outbox.stored().await > stored).await.unwrap();
        }
        let mut tx = outbox.pool.begin().await.unwrap();
        forget::within(&mut tx, "jane", "request 1", &key(PERSON)).await.unwrap();
        tx.commit().await.unwrap();
        let relay = relay.unwrap_or_else(|| outbox.relay());
        let all = forget::resume(&config(&outbox)).await.unwrap();
        assert!(all.len() == 1 && all[0].waits_for.is_none(), "{all:?}");
        let messages = outbox.messages().await;
        let of_it = messages.iter().filter(|message| message.headers["ce-id"] == event.to_string());
        let types: BTreeSet<&str> = of_it.map(|message| message.headers["ce-datacontenttype"].as_str()).collect();
        assert_eq!(types, [aftercommit::outbox::TOMBSTONE].into());
        for (name, bytes) in files(&nats.store_directory()) {
            assert_eq!(found(&bytes), BTreeSet::new(), "{name}");
        }
        relay.stop().await.unwrap();
    }
    let leg = aftercommit::reconciler::OutboxComparison::new(outbox.nats.clone(), outbox.naming.clone());
    let runner = aftercommit::reconciler::Runner::new(outbox.postgres.clone()).comparison(leg);
    use aftercommit::reconciler::{Mode, Scope};
    let summary = runner.run_now("outbox", Scope::Full, Mode::Repair).await.unwrap();
    assert_eq!((summary.found, summary.failed), (0, 0), "{summary}");
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_step_it_is_gone_on_with() {
    let scenario = Scenario::start().await;
    for n in 0..6 {
        publish(&scenario.outbox, PERSON, n, &canary(n)).await;
    }
    scenario.caught_up().await;
    let mut first = true;
    for fault in ["begun", "tables", "late-more", "late", "queued", "published", "erased"] {
        let arguments: &[&str] =
            if first { &["forget", "--key", PERSON, "--why", "request 1", "--yes"] } else { &["forget", "--resume"] };
        let mut command = scenario.outbox.operator_command(arguments);
        let died = command.env("AFTERCOMMIT_FAULT", format!("forget-{fault}:1")).output().unwrap();
        assert!(died.status.code().is_none(), "{fault}: {}", said(&died));
        first = false;
    }
    let through = succeeded(scenario.outbox.operator(&["forget", "--resume"]));
    assert!(through.starts_with("request 1: 6 events forgotten; "), "{through}");
    assert_eq!(succeeded(scenario.outbox.operator(&["forget", "--resume"])), "there is nothing to go on with\n");
    eventually(SOON, "the subscriber has taken the tombstones", async || {
        count(&scenario.books, "aftercommit.tombstone").await == 6
    })
    .await
    .unwrap();
    assert_eq!(everything(&scenario).await, []);
    let summary = scenario.reconcile_outbox().await;
    assert_eq!((summary.found, summary.failed), (0, 0), "{summary}");
}

/// The last message of the stream, and all of it.
#[tokio::test(flavor = "multi_thread")]
async fn an_erased_end_of_the_stream_breaks_nothing() {
    let mut scenario = Scenario::start().await;
    scenario.write(20).await;
    publish(&scenario.outbox, PERSON, 1, &canary(1)).await;
    scenario.published().await;
    // Nobody publishes a tombstone behind it.
    let last = scenario.stream().await.cached_info().state.last_sequence;
    scenario.delete([last]).await;
    scenario.kill_relay();
    scenario.kill_worker();
    scenario.write(10).await;
    scenario.published().await;
    let config = config(&scenario.outbox);
    let forgotten = forget::forget(&config, "jane", "request 1", &key(PERSON)).await.unwrap();
    assert_eq!((forgotten.events, forgotten.messages, forgotten.waits_for), (1, Some(0), None));
    // Now with everything else, tombstones at the end.
    let all = Selection { key_prefix: Some("k".into()), ..Selection::default() };
    let keys = count(&scenario.outbox.pool, "aftercommit.outbox where starts_with(key, 'k')").await;
    assert!(keys > 0);
    let forgotten = forget::forget(&config, "jane", "request 2", &all).await.unwrap();
    assert_eq!((forgotten.events, forgotten.waits_for), (keys as u64, None));
    scenario.stop_relay().await;
    scenario.start_relay();
    scenario.kill_worker();
    let before = count(&scenario.books, "effect").await;
    for n in 1..4 {
        publish(&scenario.outbox, "fresh", n, "nothing").await;
    }
    eventually(SOON, "the new ones are handled", async || count(&scenario.books, "effect").await == before + 3)
        .await
        .unwrap();
    let [consumer, inbox] = scenario.reconcile_books().await;
    for summary in [scenario.reconcile_outbox().await, consumer, inbox] {
        assert_eq!((summary.found, summary.failed), (0, 0), "{summary}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_refused_before_anything_is_written() {
    let scenario = Scenario::start().await;
    publish(&scenario.outbox, PERSON, 1, &canary(1)).await;
    scenario.caught_up().await;
    let outbox = &scenario.outbox;
    for (arguments, told) in [
        (&["forget", "--why", "x"][..], "name events with --event"),
        (&["forget", "--key", PERSON, "--yes"], "--why"),
        (&["forget", "--event", "seven", "--why", "x"], "--event"),
        (&["forget", "--key", "", "--why", "x", "--yes"], "--key"),
        (&["forget", "--key", PERSON, "--why", "x", "--yes", "--stream", "OTHER"], "give --stream"),
        (&["forget", "--resume", "--key", PERSON], "--key"),
    ] {
        let output = outbox.operator(arguments);
        assert!(output.status.code() == Some(2) && said(&output).contains(told), "{arguments:?}: {}", said(&output));
    }
    // An id with a slip of the pen is told.
    let unknown = Uuid::now_v7().to_string();
    let output = outbox.operator(&["forget", "--event", &unknown, "--why", "x"]);
    let told = format!(
        "request 1: 0 events forgotten; 0 messages of the stream erased\nnot found: {unknown}; should a copy come later, it is erased\n"
    );
    assert!(output.status.code() == Some(1) && output.stdout == told.as_bytes(), "{}", said(&output));
    let mut stream = scenario.stream().await.cached_info().config.clone();
    stream.deny_delete = true;
    let js = outbox.js().await;
    if js.update_stream(stream.clone()).await.is_err() {
        js.delete_stream(&outbox.naming.stream).await.unwrap();
        js.create_stream(stream).await.unwrap();
    }
    let output = outbox.operator(&["forget", "--key", PERSON, "--why", "x", "--yes"]);
    assert!(output.status.code() == Some(2) && said(&output).contains("has deny_delete set"), "{}", said(&output));
    assert_eq!(count(&outbox.pool, "aftercommit.forget_request").await, 1);
    assert_eq!(count(&outbox.pool, "aftercommit.tombstone").await, 1);
    assert_eq!(found(&dump(&outbox.postgres.url)), [1].into());
}

/// A service deletes and forgets in one transaction, in any language.
#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_rolls_back_forgets_nothing() {
    let scenario = Scenario::start().await;
    publish(&scenario.outbox, PERSON, 1, &canary(1)).await;
    scenario.caught_up().await;
    let pool = &scenario.outbox.pool;
    for commits in [false, true] {
        let mut tx = pool.begin().await.unwrap();
        forget::within(&mut tx, "orders", "request 1", &key(PERSON)).await.unwrap();
        if commits {
            tx.commit().await.unwrap()
        } else {
            tx.rollback().await.unwrap()
        }
        assert_eq!(found(&dump(&scenario.outbox.postgres.url)).is_empty(), commits);
    }
    sqlx::query("select aftercommit.forget('orders', 'request 2', key_prefix => 'person-')")
        .execute(pool)
        .await
        .unwrap();
    let all = forget::resume(&config(&scenario.outbox)).await.unwrap();
    assert_eq!(all.iter().map(|one| (one.request, one.events)).collect::<Vec<_>>(), [(2, 1), (3, 1)]);
    assert!(all.iter().all(|one| one.waits_for.is_none()), "{all:?}");
    assert_eq!(everything(&scenario).await, []);
}

/// What a worker writes that had the payload in memory.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_is_written_later_is_a_tombstone_too() {
    let scenario = Scenario::start().await;
    let event = publish(&scenario.outbox, PERSON, 1, &canary(1)).await;
    scenario.caught_up().await;
    let books = ForgetConfig { postgres: scenario.database.clone(), ..config(&scenario.outbox) };
    // A transaction that was open meanwhile, and did not see it.
    let mut open = scenario.books.begin().await.unwrap();
    sqlx::query(
        "insert into aftercommit.attempt (subscriber, event_id, attempts, last_error) values ('open', $1, 1, $2)",
    )
    .bind(event)
    .bind(canary(2))
    .execute(&mut *open)
    .await
    .unwrap();
    let selection = Selection { events: vec![event], ..Selection::default() };
    let impatient = ForgetConfig { patience: Duration::from_millis(500), ..books.clone() };
    let forgotten = forget::forget(&impatient, "jane", "request 1", &selection).await.unwrap();
    assert!(
        forgotten.waits_for.as_deref().is_some_and(|what| what.contains("transactions that were open")),
        "{forgotten:?}"
    );
    copy_everywhere(&scenario, event, &canary(3)).await;
    open.commit().await.unwrap();
    let all = forget::resume(&books).await.unwrap();
    assert!(all[0].waits_for.is_none() && all[0].messages.is_none(), "{all:?}");
    assert_eq!(found(&dump(&scenario.database.url)), BTreeSet::new());
    assert_eq!(found(&dump(&scenario.outbox.postgres.url)), [1].into(), "the publisher was not asked");
}

/// What the outbox has removed, and the stream still has.
#[tokio::test(flavor = "multi_thread")]
async fn events_that_only_the_stream_has_are_erased_by_their_key() {
    let scenario = Scenario::start().await;
    publish(&scenario.outbox, PERSON, 1, &canary(1)).await;
    publish(&scenario.outbox, "person-8", 2, &canary(90)).await;
    scenario.caught_up().await;
    sqlx::query("delete from aftercommit.outbox").execute(&scenario.outbox.pool).await.unwrap();
    let forgotten = forget::forget(&config(&scenario.outbox), "jane", "request 1", &key(PERSON)).await.unwrap();
    assert_eq!((forgotten.messages, forgotten.waits_for), (Some(1), None));
    assert_eq!(count(&scenario.outbox.pool, "aftercommit.tombstone").await, 1);
    let left: BTreeSet<u32> =
        files(&scenario.nats.store_directory()).iter().flat_map(|(_, bytes)| found(bytes)).collect();
    assert_eq!(left, [90].into());
}

/// Three servers each have a file of the stream; their logs of it have the payload until nats-server compacts them.
#[tokio::test(flavor = "multi_thread")]
async fn every_replica_of_the_stream_is_erased() {
    use aftercommit::testing::servers::NatsCluster;
    let cluster = NatsCluster::start(3, NatsOptions::default()).await.unwrap();
    let js = async_nats::jetstream::new(async_nats::connect(cluster.members[0].url()).await.unwrap());
    eventually(SOON, "the cluster has a leader", async || js.query_account().await.is_ok()).await.unwrap();
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let outbox = Outbox::new(database, cluster.members[0].url()).await;
    let js = outbox.js().await;
    let mut stream = js.get_stream(&outbox.naming.stream).await.unwrap().cached_info().config.clone();
    stream.num_replicas = 3;
    js.update_stream(stream).await.unwrap();
    eventually(SOON, "all servers keep the stream", async || {
        let stream = js.get_stream(&outbox.naming.stream).await.ok();
        let members = stream.and_then(|stream| stream.cached_info().cluster.clone());
        members.is_some_and(|members| members.replicas.len() == 2 && members.replicas.iter().all(|one| one.current))
    })
    .await
    .unwrap();
    let relay = outbox.relay();
    for n in 0..20 {
        publish(&outbox, PERSON, n, &canary(n)).await;
    }
    eventually(SOON, "all are stored", async || outbox.stored().await == 20).await.unwrap();
    outbox.settled().await;
    let forgotten = forget::forget(&config(&outbox), "jane", "request 1", &key(PERSON)).await.unwrap();
    assert_eq!((forgotten.events, forgotten.messages, forgotten.waits_for), (20, Some(20), None));
    eventually(SOON, "no server has a message", async || {
        cluster.members.iter().all(|member| {
            let streams = files(&member.store_directory());
            streams.iter().all(|(name, bytes)| name.contains("_js_") || found(bytes).is_empty())
        })
    })
    .await
    .unwrap();
    relay.stop().await.unwrap();
}

/// Events whose transaction was open, and so could not be seen, are meant; those that are written after the request are not.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_before_goes_and_what_comes_after_stays() {
    let mut scenario = Scenario::start().await;
    publish(&scenario.outbox, PERSON, 1, &canary(1)).await;
    scenario.caught_up().await;
    // Nobody handles what comes now.
    scenario.stop_worker().await;
    let pool = scenario.outbox.pool.clone();
    let mut open = pool.begin().await.unwrap();
    let hidden = publish_in(&mut *open, PERSON, 2, &canary(2)).await;
    let mut tx = pool.begin().await.unwrap();
    let told_before = publish_in(&mut *tx, PERSON, 3, &canary(3)).await;
    forget::within(&mut tx, "orders", "request 1", &key(PERSON)).await.unwrap();
    let told_behind = publish_in(&mut *tx, PERSON, 4, "deleted").await;
    tx.commit().await.unwrap();
    let later = publish(&scenario.outbox, PERSON, 5, "born again").await;
    scenario.published().await;
    let config = config(&scenario.outbox);
    let impatient = ForgetConfig { patience: Duration::from_millis(500), ..config.clone() };
    let waits = forget::resume(&impatient).await.unwrap();
    assert!(
        waits[0].waits_for.as_deref().is_some_and(|what| what.contains("transactions that were open")),
        "{waits:?}"
    );
    open.commit().await.unwrap();
    let all = forget::resume(&config).await.unwrap();
    assert!(all.len() == 1 && all[0].waits_for.is_none(), "{all:?}");
    assert_eq!(all[0].events, 3);
    scenario.start_worker();
    let left = "aftercommit.inbox where outcome = 'handled'";
    eventually(SOON, "the others are handled", async || count(&scenario.books, left).await == 3).await.unwrap();
    for (event, erased) in [(hidden, true), (told_before, true), (told_behind, false), (later, false)] {
        let content_type: String =
            sqlx::query_scalar("select content_type from aftercommit.outbox where event_id = $1")
                .bind(event)
                .fetch_one(&pool)
                .await
                .unwrap();
        assert_eq!(content_type == aftercommit::outbox::TOMBSTONE, erased, "{event}");
    }
    assert_eq!(everything(&scenario).await, []);
    let summary = scenario.reconcile_outbox().await;
    assert_eq!((summary.found, summary.failed), (0, 0), "{summary}");
}

/// A letter of an event that came after the request keeps what it has.
#[tokio::test(flavor = "multi_thread")]
async fn a_later_letter_with_the_key_is_not_meant() {
    let scenario = Scenario::start().await;
    let before = publish(&scenario.outbox, PERSON, 1, &canary(1)).await;
    scenario.caught_up().await;
    copy_everywhere(&scenario, before, &canary(2)).await;
    let books = ForgetConfig { postgres: scenario.database.clone(), ..config(&scenario.outbox) };
    let mut open = scenario.books.begin().await.unwrap();
    sqlx::query("select pg_current_xact_id()").execute(&mut *open).await.unwrap();
    let impatient = ForgetConfig { patience: Duration::from_millis(300), ..books.clone() };
    forget::forget(&impatient, "jane", "request 1", &key(PERSON)).await.unwrap();
    let after = Uuid::now_v7();
    copy_everywhere(&scenario, after, &canary(3)).await;
    open.commit().await.unwrap();
    let all = forget::resume(&books).await.unwrap();
    assert!(all[0].waits_for.is_none(), "{all:?}");
    assert_eq!(found(&dump(&scenario.database.url)), [3].into());
}

#[tokio::test(flavor = "multi_thread")]
async fn it_forgets_in_another_schema() {
    let nats = Nats::start(NatsOptions::default()).await.unwrap();
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let mut postgres = aftercommit::config::PostgresConfig::new(database);
    postgres.schema = "box".parse().unwrap();
    let outbox = Outbox::of(postgres, nats.url()).await;
    let relay = outbox.relay();
    let publish = "select box.publish('person.changed', '{\"secret\": \"canary-001-x\"}', 'person-7')";
    sqlx::query(publish).execute(&outbox.pool).await.unwrap();
    eventually(SOON, "it is stored", async || outbox.stored().await == 1).await.unwrap();
    let forgotten = forget::forget(&config(&outbox), "jane", "request 1", &key(PERSON)).await.unwrap();
    assert_eq!((forgotten.events, forgotten.messages, forgotten.waits_for), (1, Some(1), None));
    let messages = outbox.messages().await;
    let types: Vec<&str> = messages.iter().map(|message| message.headers["ce-datacontenttype"].as_str()).collect();
    assert_eq!(types, [aftercommit::outbox::TOMBSTONE]);
    let again = forget::find(&outbox.postgres, &key(PERSON)).await.unwrap();
    assert_eq!((again.outbox, again.dead_letters), (0, 0));
    relay.stop().await.unwrap();
}
