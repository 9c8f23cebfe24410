//! Faults that the schedules leave out, because they need servers of their own or happen once in a lifetime.

use std::path::PathBuf;
use std::time::Duration;

use aftercommit::operator;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres, PostgresOptions};
use aftercommit::testing::{eventually, unique_name};
use aftercommit::worker::Subscriber;
use async_nats::jetstream::stream;
use sqlx::PgPool;

use super::plan::Plan;
use super::support::{Outbox, RelayProcess, SOON, Work, Writers, complains, cut_off, free_address, standby_of};
use super::{assert_clean, play};

/// Plays a schedule with these faults only.
async fn only(seed: u64, names: &[&str]) {
    let names: Vec<String> = names.iter().map(|name| (*name).into()).collect();
    assert_clean(&play([Plan::new(seed, Duration::from_secs(12), &names)], 1).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_loses_its_leader_one_member_and_all_members() {
    only(2, &["nats-leader-killed", "nats-killed", "nats-all-killed", "nats-frozen"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn publishers_and_their_database_die_at_any_moment() {
    only(5, &["publisher-killed", "publisher-postgres-killed", "transaction-held"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ways_break_in_one_direction_and_in_both() {
    let ways = ["cut", "deaf", "mute"].into_iter().flat_map(|how| {
        ["relay-nats", "worker-nats", "relay-postgres", "worker-postgres"].map(|way| format!("{way}-{how}"))
    });
    let ways: Vec<String> = ways.filter(|name| super::plan::names().any(|known| known == name)).collect();
    only(7, &ways.iter().map(String::as_str).collect::<Vec<_>>()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_of_the_stream_change_under_load() {
    only(11, &["stream-settings-changed", "relay-killed", "nats-killed"]).await;
}

/// A relay that tells about itself, and is soon called stuck; its address, and its log.
pub(super) fn relay(outbox: &Outbox) -> (RelayProcess, String, PathBuf) {
    let (address, log) = (free_address(), std::env::temp_dir().join(unique_name("log")));
    let mut command = outbox.relay_command();
    command.env("AFTERCOMMIT_HTTP", &address).env("AFTERCOMMIT_UNHEALTHY_AFTER", "1s").env("RUST_LOG", "warn");
    command.stderr(std::fs::File::create(&log).unwrap());
    (RelayProcess(command.spawn().unwrap()), address, log)
}

pub(super) async fn publish(pool: &PgPool, events: i32) -> Result<(), sqlx::Error> {
    let some = "select aftercommit.publish('some', to_jsonb(repeat('x', 2000))) from generate_series(1, $1)";
    sqlx::query(some).bind(events).execute(pool).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prepared_transaction_holds_up_nobody() {
    let settings = vec![("max_prepared_transactions".to_string(), "5".to_string())];
    let mut postgres = Postgres::start(PostgresOptions { fsync: false, settings }).await.unwrap();
    let outbox = Outbox::new(postgres.create_database().await.unwrap(), Nats::shared().await.unwrap().url()).await;
    let _relay = outbox.relay();
    let prepare = "begin; select aftercommit.publish('prepared', '{}'); prepare transaction 'p'";
    sqlx::raw_sql(prepare).execute(&outbox.pool).await.unwrap();
    let writers = Writers::start(&outbox.pool, 4, 5).await;
    writers.more(300).await;
    // It survives a crash, and is still neither committed nor rolled back.
    postgres.kill().await.unwrap();
    postgres.restart().await.unwrap();
    writers.more(300).await;
    writers.stop().await;
    let before = outbox.assert_complete().await;
    assert!(before.iter().all(|message| message.headers["ce-type"] != "prepared"));
    sqlx::raw_sql("commit prepared 'p'").execute(&outbox.pool).await.unwrap();
    let after = outbox.assert_complete().await;
    assert_eq!(after.len(), before.len() + 1);
    assert_eq!(after.last().unwrap().headers["ce-type"], "prepared");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sealed_stream_is_named_and_its_successor_gets_everything() {
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let outbox = Outbox::new(database, Nats::shared().await.unwrap().url()).await;
    let (_relay, address, _) = relay(&outbox);
    publish(&outbox.pool, 50).await.unwrap();
    outbox.assert_complete().await;
    let context = outbox.js().await;
    let mut config = context.get_stream(&outbox.naming.stream).await.unwrap().cached_info().config.clone();
    config.sealed = true;
    context.update_stream(config).await.unwrap();
    publish(&outbox.pool, 50).await.unwrap();
    complains(&address, &["seal"]).await;
    // Nothing opens it again.
    context.delete_stream(&outbox.naming.stream).await.unwrap();
    operator::provision(&outbox.nats, &outbox.naming).await.unwrap();
    outbox.assert_complete().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nats_is_upgraded_under_a_busy_system() {
    let newest = Nats::shared().await.unwrap().version().to_string();
    let old = NatsOptions { version: Some("2.12.8".into()), ..NatsOptions::default() };
    let mut nats = Nats::start(old).await.unwrap();
    let work = Work::on(Postgres::shared().await.unwrap().create_database().await.unwrap(), nats.url()).await;
    let outbox = &work.outbox;
    let seen = "create table seen (id bigint generated always as identity, event_id text);
                create function see(event jsonb) returns void language sql as
                $$ insert into seen (event_id) values (event ->> 'id') $$";
    sqlx::raw_sql(seen).execute(&outbox.pool).await.unwrap();
    let _relay = outbox.relay();
    let worker = work.run(Subscriber::sql("seen", "see", ["*"]).unwrap()).await;
    let writers = Writers::start(&outbox.pool, 4, 5).await;
    writers.more(200).await;
    nats.change_version(&newest).await.unwrap();
    writers.more(200).await;
    writers.stop().await;
    let messages = outbox.assert_complete().await;
    eventually(SOON, "everything is handled", async || {
        let seen: i64 = sqlx::query_scalar("select count(*) from seen").fetch_one(&outbox.pool).await.unwrap();
        seen as usize >= messages.len()
    })
    .await
    .unwrap();
    let distinct: i64 =
        sqlx::query_scalar("select count(distinct event_id) from seen").fetch_one(&outbox.pool).await.unwrap();
    let all: i64 = sqlx::query_scalar("select count(*) from seen").fetch_one(&outbox.pool).await.unwrap();
    assert_eq!((distinct as usize, all), (messages.len(), distinct));
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_lacks_commits_is_promoted() {
    let mut primary = Postgres::start(PostgresOptions { fsync: false, settings: Vec::new() }).await.unwrap();
    let nats = Nats::shared().await.unwrap();
    let outbox = Outbox::new(primary.create_database().await.unwrap(), nats.url()).await;
    let standby = standby_of(&primary).await;
    let relay = outbox.relay();
    let writers = Writers::start(&outbox.pool, 4, 5).await;
    writers.more(200).await;
    // From here on the standby gets nothing.
    let other = PgPool::connect(&standby.url("postgres")).await.unwrap();
    cut_off(&other).await;
    writers.more(200).await;
    writers.stop().await;
    let before = outbox.assert_complete().await;
    relay.stop().await.unwrap();
    primary.kill().await.unwrap();
    sqlx::raw_sql("select pg_promote()").execute(&other).await.unwrap();

    let name = outbox.postgres.url.rsplit('/').next().unwrap().to_string();
    let outbox = outbox.moved_to(standby.url(&name)).await;
    let survived = outbox.committed().await;
    assert!(survived.len() < before.len(), "some commits were lost");
    let log = std::env::temp_dir().join(unique_name("log"));
    let mut command = outbox.relay_command();
    command.stderr(std::fs::File::create(&log).unwrap());
    let relay = RelayProcess(command.spawn().unwrap());
    let writers = Writers::start(&outbox.pool, 4, 5).await;
    writers.more(300).await;
    writers.stop().await;
    // Everything that is committed now is in the stream once, although ids and transaction ids came again.
    let committed = outbox.committed().await;
    eventually(SOON, "what is committed is in the stream", async || {
        let messages = outbox.messages().await;
        let ids: Vec<&String> = messages.iter().map(|message| &message.headers["ce-id"]).collect();
        committed.iter().all(|id| ids.iter().filter(|one| **one == id).count() == 1)
    })
    .await
    .unwrap();
    // What the database has forgotten is named.
    let ghosts: Vec<String> =
        before.iter().map(|message| message.headers["ce-id"].clone()).filter(|id| !survived.contains(id)).collect();
    drop(relay);
    let log = std::fs::read_to_string(&log).unwrap();
    assert!(ghosts.iter().any(|id| log.contains(id.as_str())), "none of {} ghosts is named: {log}", ghosts.len());
}

/// The same while every few events one is parked. Whatever the promoted database has committed is in the stream or parked
/// afterwards, and nothing of it twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_standby_is_promoted_while_events_are_parked() {
    let mut primary = Postgres::start(PostgresOptions { fsync: false, settings: Vec::new() }).await.unwrap();
    let nats = Nats::start(NatsOptions { config: "max_payload: 4096".into(), ..NatsOptions::default() }).await.unwrap();
    let outbox = Outbox::new(primary.create_database().await.unwrap(), nats.url()).await;
    let standby = standby_of(&primary).await;
    let other = PgPool::connect(&standby.url("postgres")).await.unwrap();
    let relay = outbox.relay();
    let write = "select aftercommit.publish('some', to_jsonb(repeat('x', case n % 5 when 0 then 5000 else 1 end)), 'k-' || n % 7)
                   from generate_series(1, 10) n";
    for round in 0..60 {
        sqlx::raw_sql(write).execute(&outbox.pool).await.unwrap();
        if round == 40 {
            // In the middle of a window, most often.
            cut_off(&other).await;
        }
    }
    // The first large event of a key, and what waits behind it.
    let parked = "select count(*) from aftercommit.parked";
    eventually(SOON, "events are parked", async || {
        sqlx::query_scalar::<_, i64>(parked).fetch_one(&outbox.pool).await.unwrap() >= 100
    })
    .await
    .unwrap();
    drop(relay);
    primary.kill().await.unwrap();
    sqlx::raw_sql("select pg_promote()").execute(&other).await.unwrap();

    let name = outbox.postgres.url.rsplit('/').next().unwrap().to_string();
    let outbox = outbox.moved_to(standby.url(&name)).await;
    outbox.expire_leases().await;
    let _relay = outbox.relay();
    sqlx::raw_sql(write).execute(&outbox.pool).await.unwrap();
    let committed = outbox.committed().await;
    let mut lost = Vec::new();
    eventually(SOON, "everything is in the stream or parked", async || {
        let parked: Vec<String> =
            sqlx::query_scalar("select event_id::text from aftercommit.parked").fetch_all(&outbox.pool).await.unwrap();
        let stored = outbox.messages().await;
        let times = |id: &String| stored.iter().filter(|message| message.headers["ce-id"] == *id).count();
        assert!(committed.iter().all(|id| times(id) <= 1), "an event is in the stream twice");
        lost = committed.iter().filter(|id| times(id) == 0 && !parked.contains(id)).cloned().collect();
        lost.is_empty()
    })
    .await
    .unwrap_or_else(|error| panic!("{error}: {lost:?}"));
}

/// Many events are in flight, and the stream has no room for a large one among them. Returns which events are not in the
/// stream when there is room again.
async fn refused_amid_others(broken: &str, stored_beside_it: u64) -> Vec<String> {
    let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
    let outbox = Outbox::new(database, Nats::shared().await.unwrap().url()).await;
    let js = outbox.js().await;
    let room = js.get_stream(&outbox.naming.stream).await.unwrap().cached_info().config.clone();
    js.update_stream(stream::Config { max_bytes: 20_000, ..room.clone() }).await.unwrap();
    let write = "select aftercommit.publish('some', to_jsonb(repeat('x', case n when 6 then 30000 else 1 end)))
                   from generate_series(1, 26) n";
    sqlx::raw_sql(write).execute(&outbox.pool).await.unwrap();
    let mut command = outbox.relay_command();
    let _relay = RelayProcess(command.env("AFTERCOMMIT_BROKEN", broken).env("RUST_LOG", "off").spawn().unwrap());
    eventually(SOON, "what fits is stored", async || outbox.stored().await == stored_beside_it).await.unwrap();
    js.update_stream(room).await.unwrap();
    outbox.publish("last", "{}", None).await;
    let mut missing = Vec::new();
    eventually(SOON, "the last event is stored", async || {
        let stored: Vec<String> =
            outbox.messages().await.into_iter().map(|message| message.headers["ce-id"].clone()).collect();
        let committed = outbox.committed().await;
        let last = stored.contains(committed.last().unwrap());
        missing = committed.into_iter().filter(|id| !stored.contains(id)).collect();
        last
    })
    .await
    .unwrap();
    missing
}

/// The schedules seldom meet the moment that shows what the chain is for.
#[tokio::test(flavor = "multi_thread")]
async fn the_chain_is_missed_when_one_of_many_events_is_refused() {
    assert_eq!(refused_amid_others("", 5).await, Vec::<String>::new());
    assert_eq!(refused_amid_others("chain", 25).await.len(), 1, "without it the refused event is overtaken and lost");
}
