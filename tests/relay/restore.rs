//! G1, G3 over a restore of the outbox's database: nothing is lost, nothing is published again that the stream still
//! holds, every key keeps its order, and what the database has forgotten is named.

use std::collections::HashSet;
use std::fs::File;
use std::process::Command;

use crate::support::{Copy, Dump, Message, Outbox, RelayProcess, SOON, Writers, raise_transaction_ids};
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, Postgres, PostgresOptions};
use sqlx::PgPool;

async fn cluster() -> Postgres {
    Postgres::start(PostgresOptions { fsync: false, ..PostgresOptions::default() }).await.unwrap()
}

async fn outbox(postgres: &Postgres) -> Outbox {
    let outbox = Outbox::new(postgres.create_database().await.unwrap(), Nats::shared().await.unwrap().url()).await;
    outbox.forget_message_ids().await;
    outbox
}

/// A transaction that has written an event and stays open.
async fn open(pool: &PgPool, event_type: &str) -> sqlx::PgTransaction<'static> {
    let mut tx = pool.begin().await.unwrap();
    sqlx::query("select aftercommit.publish($1, '{}')").bind(event_type).execute(&mut *tx).await.unwrap();
    tx
}

async fn events(pool: &PgPool, events: i32) {
    sqlx::query("select aftercommit.publish('bulk', '{}') from generate_series(1, $1)")
        .bind(events)
        .execute(pool)
        .await
        .unwrap();
}

fn count(messages: &[Message], event_type: &str) -> usize {
    messages.iter().filter(|message| message.headers["ce-type"] == event_type).count()
}

/// The relay dies in the middle of a window; a transaction that was open all the time commits then, another one is
/// still open when the dump is made; the service writes to the new cluster before the relay comes up there, and has a
/// transaction open, too.
async fn survives_dump_and_restore(old_epoch: u32, new_epoch: u32) {
    let mut old = cluster().await;
    let mut new = cluster().await;
    for (postgres, epoch) in [(&mut old, old_epoch), (&mut new, new_epoch)] {
        if epoch > 0 {
            raise_transaction_ids(postgres, epoch).await;
        }
    }
    let outbox = outbox(&old).await;
    let held = open(&outbox.pool, "held.committed").await;
    let lost = open(&outbox.pool, "held.lost").await;
    let relay = outbox.relay_process();
    let writers = Writers::start(&outbox.pool, 8, 10).await;
    writers.more(200).await;
    writers.stop().await;
    outbox.assert_complete().await;
    outbox.settled().await;
    outbox.kill(relay).await;
    events(&outbox.pool, 100).await;
    outbox.dies_at("relay-acknowledged:30").await;
    held.commit().await.unwrap();
    let writers = Writers::start(&outbox.pool, 8, 10).await;
    writers.more(100).await;
    writers.stop().await;
    let dump = Dump::of(&outbox.postgres.url);
    let published = outbox.stored().await;
    drop(lost);

    let url = new.create_database().await.unwrap();
    dump.restore(&url);
    let outbox = outbox.moved_to(url).await;
    let writers = Writers::start(&outbox.pool, 8, 10).await;
    writers.more(50).await;
    let early = open(&outbox.pool, "new.early").await;
    writers.more(50).await;
    assert_eq!(outbox.stored().await, published, "no relay has been here yet");
    // Every step of the move can be the last one of a relay.
    outbox.dies_at("relay-restamped:1").await;
    outbox.dies_at("relay-after-barrier:1").await;
    outbox.dies_at("relay-acknowledged:20").await;
    outbox.dies_at("relay-window-done:1").await;
    let relay = outbox.relay_process();
    writers.more(300).await;
    writers.stop().await;
    let messages = outbox.assert_complete().await;
    assert_eq!((count(&messages, "held.committed"), count(&messages, "held.lost")), (1, 0));
    assert_eq!(count(&messages, "new.early"), 0);
    early.commit().await.unwrap();
    let messages = outbox.assert_complete().await;
    assert_eq!(count(&messages, "new.early"), 1);
    outbox.settled().await;
    outbox.kill(relay).await;
    assert_eq!(outbox.assert_complete().await.len(), messages.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dump_goes_into_a_cluster_with_lower_transaction_ids() {
    survives_dump_and_restore(3, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dump_goes_into_a_cluster_with_higher_transaction_ids() {
    survives_dump_and_restore(0, 3).await;
}

/// The numbers of the dumped rows are given out again by the new cluster.
#[tokio::test(flavor = "multi_thread")]
async fn a_dump_goes_into_a_cluster_with_the_same_transaction_ids() {
    survives_dump_and_restore(0, 0).await;
}

/// Old numbers are given out again to transactions that are open while windows are opened: what they write is published
/// once they end, and the old events with the same numbers are not published again.
#[tokio::test(flavor = "multi_thread")]
async fn open_transactions_have_the_numbers_of_old_events() {
    let burn = "do $$ begin for n in 1..3000 loop perform pg_current_xact_id(); commit; end loop; end $$";
    let (old, new) = (cluster().await, cluster().await);
    let outbox = outbox(&old).await;
    sqlx::raw_sql(burn).execute(&outbox.pool).await.unwrap();
    let relay = outbox.relay_process();
    for _ in 0..300 {
        events(&outbox.pool, 1).await;
    }
    outbox.assert_complete().await;
    outbox.settled().await;
    outbox.kill(relay).await;
    let dump = Dump::of(&outbox.postgres.url);
    let url = new.create_database().await.unwrap();
    dump.restore(&url);
    let outbox = outbox.moved_to(url).await;
    let relay = outbox.relay();
    let number = async || -> i64 {
        let query =
            "select max(xid::text::bigint) from aftercommit.outbox where xid = pg_snapshot_xmax(pg_current_snapshot())";
        sqlx::query_scalar::<_, Option<i64>>(query).fetch_one(&outbox.pool).await.unwrap().unwrap_or(0)
    };
    let mut met = 0;
    let one = "do $$ begin perform pg_current_xact_id(); end $$";
    for _ in 0..4000 {
        if number().await == 0 {
            sqlx::raw_sql(one).execute(&outbox.pool).await.unwrap();
            continue;
        }
        // The next transaction of this cluster gets the number of an old event.
        let held = open(&outbox.pool, "held").await;
        events(&outbox.pool, 1).await;
        outbox.assert_complete().await;
        held.commit().await.unwrap();
        outbox.assert_complete().await;
        met += 1;
        if met == 10 {
            break;
        }
    }
    assert_eq!(met, 10);
    outbox.settled().await;
    outbox.assert_complete().await;
    relay.stop().await.unwrap();
}

/// The old cluster went on and published after the dump was made.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_dump_is_restored() {
    let old = cluster().await;
    let outbox = outbox(&old).await;
    let relay = outbox.relay_process();
    events(&outbox.pool, 50).await;
    outbox.assert_complete().await;
    let straggler = open(&outbox.pool, "straggler").await;
    events(&outbox.pool, 50).await;
    outbox.assert_complete().await;
    outbox.settled().await;
    let dump = Dump::of(&outbox.postgres.url);
    events(&outbox.pool, 30).await;
    straggler.commit().await.unwrap();
    outbox.assert_complete().await;
    outbox.kill(relay).await;

    let url = Postgres::shared().await.unwrap().create_database().await.unwrap();
    dump.restore(&url);
    let outbox = outbox.moved_to(url).await;
    events(&outbox.pool, 20).await;
    let _relay = outbox.relay();
    holds_with_ghosts(&outbox, 31).await;
}

/// The id sequence does not come along: its next ids are those of events that were published and pruned.
#[tokio::test(flavor = "multi_thread")]
async fn the_id_sequence_is_not_restored() {
    let old = cluster().await;
    let outbox = outbox(&old).await;
    let relay = outbox.relay_process();
    events(&outbox.pool, 50).await;
    outbox.assert_complete().await;
    outbox.settled().await;
    outbox.kill(relay).await;
    sqlx::query("delete from aftercommit.outbox where id <= 30").execute(&outbox.pool).await.unwrap();
    let dump = Dump::of(&outbox.postgres.url);
    let url = Postgres::shared().await.unwrap().create_database().await.unwrap();
    dump.restore(&url);
    let outbox = outbox.moved_to(url).await;
    sqlx::query("select setval('aftercommit.outbox_id_seq', 1, false)").execute(&outbox.pool).await.unwrap();
    events(&outbox.pool, 10).await;
    let _relay = outbox.relay();
    holds_with_ghosts(&outbox, 30).await;
    events(&outbox.pool, 10).await;
    holds_with_ghosts(&outbox, 30).await;
}

/// A backlog that takes several steps to move, and a relay that dies on the way more than once: each step is done once.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_backlog_moves_into_another_cluster_in_durable_steps() {
    let mut old = cluster().await;
    raise_transaction_ids(&mut old, 3).await;
    let outbox = outbox(&old).await;
    events(&outbox.pool, 45_000).await;
    let dump = Dump::of(&outbox.postgres.url);
    let url = Postgres::shared().await.unwrap().create_database().await.unwrap();
    dump.restore(&url);
    let outbox = outbox.moved_to(url).await;
    let moved = async || -> i64 {
        sqlx::query_scalar(
            "select count(*) from aftercommit.outbox where pg_visible_in_snapshot(xid, pg_current_snapshot())",
        )
        .fetch_one(&outbox.pool)
        .await
        .unwrap()
    };
    assert_eq!(moved().await, 0);
    outbox.dies_at("relay-restamp-step:1").await;
    assert_eq!(moved().await, 10_000);
    // The first step of the next one finds nothing to do, and the second does the next.
    outbox.dies_at("relay-restamp-step:2").await;
    assert_eq!(moved().await, 20_000);
    let distinct: i64 = sqlx::query_scalar("select count(distinct xid) from aftercommit.outbox where id <= 20000")
        .fetch_one(&outbox.pool)
        .await
        .unwrap();
    assert_eq!(distinct, 2, "each step in a transaction of its own, and none twice");
    outbox.dies_at("relay-restamped:1").await;
    assert_eq!(moved().await, 45_000);
    let _relay = outbox.relay();
    outbox.assert_complete().await;
}

/// Waits until every committed event is in the stream, then checks that each is there once, beside so many others.
async fn holds_with_ghosts(outbox: &Outbox, ghosts: usize) -> Vec<Message> {
    let committed = outbox.committed().await;
    eventually(SOON, "every committed event is in the stream", async || {
        outbox.stored().await >= (committed.len() + ghosts) as u64
    })
    .await
    .unwrap();
    let messages = outbox.messages().await;
    let ids: HashSet<&String> = messages.iter().map(|message| &message.headers["ce-id"]).collect();
    let lost = committed.iter().filter(|id| !ids.contains(id)).count();
    assert_eq!(
        (lost, messages.len() - ids.len(), ids.len() - committed.len()),
        (0, 0, ghosts),
        "lost, doubled, ghosts"
    );
    messages
}

/// A copy of the cluster's files is put back after the relay has published more.
async fn survives_going_back(mid_window: bool, forgets: bool) {
    let mut postgres = cluster().await;
    let outbox = outbox(&postgres).await;
    let relay = outbox.relay_process();
    let mut held = Some(open(&outbox.pool, "held").await);
    let writers = Writers::start(&outbox.pool, 8, 10).await;
    writers.more(200).await;
    writers.stop().await;
    outbox.assert_complete().await;
    outbox.settled().await;
    outbox.kill(relay).await;
    if mid_window {
        events(&outbox.pool, 100).await;
        outbox.dies_at("relay-acknowledged:30").await;
        held.take().unwrap().commit().await.unwrap();
    }
    // Committed at the time of the copy, published after it.
    events(&outbox.pool, 50).await;
    drop(held);
    postgres.stop().await.unwrap();
    let copy = Copy::of(&postgres.data_directory());
    postgres.restart().await.unwrap();

    let relay = outbox.relay_process();
    if forgets {
        let writers = Writers::start(&outbox.pool, 8, 10).await;
        writers.more(100).await;
        writers.stop().await;
    }
    let before: HashSet<String> = outbox.committed().await.into_iter().collect();
    outbox.assert_complete().await;
    outbox.kill(relay).await;
    postgres.stop().await.unwrap();
    copy.replace(&postgres.data_directory());
    postgres.restart().await.unwrap();

    let kept: HashSet<String> = outbox.committed().await.into_iter().collect();
    let ghosts = before.difference(&kept).count();
    assert!((ghosts > 50) == forgets && kept.iter().all(|id| before.contains(id)));
    // These get the ids that the forgotten ones had.
    events(&outbox.pool, 150).await;
    outbox.dies_at("relay-acknowledged:10").await;
    let log = std::env::temp_dir().join(format!("{}.log", outbox.naming.stream));
    let mut command: Command = outbox.relay_command();
    command.stdout(File::create(&log).unwrap()).stderr(File::options().append(true).open(&log).unwrap());
    let relay = RelayProcess(command.spawn().unwrap());
    holds_with_ghosts(&outbox, ghosts).await;
    events(&outbox.pool, 50).await;
    holds_with_ghosts(&outbox, ghosts).await;
    outbox.settled().await;
    outbox.kill(relay).await;
    let said = std::fs::read_to_string(&log).unwrap();
    std::fs::remove_file(&log).unwrap();
    assert_eq!(said.contains("the stream has an event that the outbox does not have"), forgets, "{said}");
    assert!(said.contains(&format!("ghosts={ghosts}")), "{ghosts} were forgotten: {said}");
    assert_eq!(before.difference(&kept).any(|id| said.contains(&format!("event_id={id}"))), forgets, "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_cluster_goes_back_to_a_closed_window() {
    survives_going_back(false, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_cluster_goes_back_to_an_open_window() {
    survives_going_back(true, true).await;
}

/// Only the relay's progress is forgotten.
#[tokio::test(flavor = "multi_thread")]
async fn the_same_cluster_goes_back_and_forgets_no_event() {
    survives_going_back(false, false).await;
    survives_going_back(true, false).await;
}
