//! Doing what the schedule says.

use std::time::Duration;

use aftercommit::operator::{relay, worker};
use aftercommit::testing::eventually;
use async_nats::jetstream;
use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::context::GetStreamErrorKind;
use futures_util::StreamExt;
use tokio::sync::Mutex;
use uuid::Uuid;

use super::history::What;
use super::part::Part;
use super::plan::{Kind, Step, Who};
use super::publishers;
use super::subscribers;
use super::support::Way;
use super::system::System;

/// Other faults are over after that, whatever the machine does besides.
const HEALED: Duration = Duration::from_secs(600);
/// Who pauses.
const OPERATOR: &str = "the test";

/// Carries out one step, from its fault to its end.
pub async fn disturb(system: &System, step: Step) {
    let name = step.kind.name().to_string();
    let detail = format!("target {}, for {:?}", step.target, step.lasts);
    system.journal.write(What::Fault { name: name.clone(), detail });
    match step.kind {
        Kind::PublisherKilled => some(&system.publishers, step).kill(step.lasts).await,
        Kind::RelayKilled => some(&system.relays, step).kill(step.lasts).await,
        Kind::RelayStopped => some(&system.relays, step).stop(step.lasts).await,
        Kind::RelayFrozen => some(&system.relays, step).freeze(step.lasts).await,
        Kind::WorkerKilled => some(&system.workers, step).kill(step.lasts).await,
        Kind::WorkerStopped => some(&system.workers, step).stop(step.lasts).await,
        Kind::WorkerFrozen => some(&system.workers, step).freeze(step.lasts).await,
        Kind::ReconcilerKilled => {
            if let Some(part) = system.reconcilers.first() {
                part.kill(step.lasts).await;
            }
        }
        Kind::PublisherPostgresKilled => kill_postgres(&system.publisher_postgres, step.lasts).await,
        Kind::SubscriberPostgresKilled => kill_postgres(&system.subscriber_postgres, step.lasts).await,
        Kind::NatsKilled => kill_nats(system, &[step.target % system.nats.len()], step.lasts).await,
        Kind::NatsLeaderKilled => {
            let leader = leader(system).await.unwrap_or(0);
            kill_nats(system, &[leader], step.lasts).await;
        }
        Kind::NatsAllKilled => {
            let all: Vec<usize> = (0..system.nats.len()).collect();
            kill_nats(system, &all, step.lasts).await;
        }
        Kind::NatsFrozen => {
            let nats = system.nats[step.target % system.nats.len()].lock().await;
            nats.pause().unwrap();
            tokio::time::sleep(step.lasts).await;
            nats.resume().unwrap();
        }
        Kind::NatsCut(who) => on_the_way(system, who, step, false, Way::Cut).await,
        Kind::NatsDeaf(who) => on_the_way(system, who, step, false, Way::Deaf).await,
        Kind::NatsMute(who) => on_the_way(system, who, step, false, Way::Mute).await,
        Kind::NatsSlow(who) => on_the_way(system, who, step, false, Way::Slow(Duration::from_millis(50))).await,
        Kind::PostgresCut(who) => on_the_way(system, who, step, true, Way::Cut).await,
        Kind::PostgresDeaf(who) => on_the_way(system, who, step, true, Way::Deaf).await,
        Kind::LeasesTaken => {
            let take = "update aftercommit.lease set expires_at = now() - interval '1 hour'";
            let pool = if step.target.is_multiple_of(2) { &system.publisher } else { &system.subscriber };
            _ = sqlx::raw_sql(take).execute(pool).await;
        }
        Kind::TransactionHeld => _ = publishers::hold(&system.publisher, &system.journal, step.lasts).await,
        Kind::RelayPaused => {
            _ = relay::pause(&system.publisher_config, OPERATOR, None).await;
            tokio::time::sleep(step.lasts).await;
            until("the relay is resumed", async || relay::resume(&system.publisher_config, OPERATOR).await.is_ok())
                .await;
        }
        Kind::WorkerPaused => {
            let (config, which) = (&system.subscriber_config, || worker::Which::All);
            _ = worker::pause(config, which(), OPERATOR, None).await;
            tokio::time::sleep(step.lasts).await;
            until("the workers are resumed", async || worker::resume(config, which(), OPERATOR).await.is_ok()).await;
        }
        Kind::ConsumerDeleted | Kind::ConsumerPaused => consumer(system, step).await,
        Kind::MessageRepeated => _ = repeat(system, step).await,
        Kind::MessagesRemoved | Kind::StreamPurged | Kind::StreamWiped => _ = remove(system, step).await,
        Kind::StreamFull => _ = fill(system, step).await,
        Kind::StreamSettingsChanged => _ = spoil(system, step).await,
        Kind::SequenceSetBack => set_back(system).await,
        Kind::SequenceSetAhead => {
            let ahead =
                "select setval('aftercommit.outbox_id_seq', last_value + 3000000) from aftercommit.outbox_id_seq";
            _ = sqlx::raw_sql(ahead).execute(&system.publisher).await;
        }
    }
    system.journal.write(What::Healed { name });
}

/// One of several.
fn some(parts: &[Part], step: Step) -> &Part {
    &parts[step.target % parts.len()]
}

/// Waits for what cannot be done while servers are away.
async fn until(what: &str, done: impl AsyncFnMut() -> bool) {
    eventually(HEALED, what, done).await.unwrap();
}

async fn kill_postgres(postgres: &Mutex<aftercommit::testing::servers::Postgres>, pause: Duration) {
    let mut postgres = postgres.lock().await;
    postgres.kill().await.unwrap();
    tokio::time::sleep(pause).await;
    postgres.restart().await.unwrap();
}

async fn kill_nats(system: &System, which: &[usize], pause: Duration) {
    // Always in the same order, so that two who lock all of them do not wait for each other.
    let mut servers = Vec::new();
    for n in which {
        servers.push(system.nats[*n].lock().await);
    }
    for nats in &mut servers {
        nats.kill().await.unwrap();
    }
    tokio::time::sleep(pause).await;
    // None of them is ready before most of them run.
    futures_util::future::join_all(servers.iter_mut().map(|nats| nats.restart()))
        .await
        .into_iter()
        .for_each(Result::unwrap);
}

/// One server after the other, in an orderly way.
pub async fn restart_nats(system: &System) {
    for nats in &system.nats {
        let mut nats = nats.lock().await;
        nats.stop().await.unwrap();
        nats.restart().await.unwrap();
    }
}

/// The number of the server that leads the stream.
async fn leader(system: &System) -> Option<usize> {
    let leader = system.stream().await?.cached_info().cluster.clone()?.leader?;
    for (n, nats) in system.nats.iter().enumerate() {
        if nats.lock().await.name() == leader {
            return Some(n);
        }
    }
    None
}

async fn on_the_way(system: &System, who: Who, step: Step, postgres: bool, how: Way) {
    let parts = if who == Who::Relay { &system.relays } else { &system.workers };
    let part = some(parts, step);
    if let Some(ways) = if postgres { &part.postgres } else { &part.nats } {
        ways.disturb(how, step.lasts).await;
    }
}

async fn consumer(system: &System, step: Step) {
    let (name, _) = subscribers::ALL[step.target % subscribers::ALL.len()];
    let stream = &system.naming.stream;
    if step.kind == Kind::ConsumerPaused {
        let until = (chrono::Utc::now() + step.lasts).to_rfc3339();
        let request = serde_json::json!({ "pause_until": until });
        let asked = system.context.request(format!("CONSUMER.PAUSE.{stream}.{name}"), &request);
        let _: Result<serde_json::Value, _> = asked.await;
        return tokio::time::sleep(step.lasts).await;
    }
    let nothing = serde_json::json!({});
    let asked = system.context.request(format!("CONSUMER.DELETE.{stream}.{name}"), &nothing);
    let _: Result<serde_json::Value, _> = asked.await;
    tokio::time::sleep(step.lasts).await;
    system.provision().await;
}

/// The event's id in a message.
fn event_of(headers: &async_nats::HeaderMap) -> Option<Uuid> {
    headers.get("ce-id")?.as_str().parse().ok()
}

/// A stored message once more, so that the server does not take it for a repeat.
async fn repeat(system: &System, step: Step) -> Option<()> {
    let stream = system.stream().await?;
    let state = &stream.cached_info().state;
    let sequence = state.last_sequence.checked_sub(step.target as u64)?;
    let message = stream.get_raw_message(sequence).await.ok()?;
    let mut headers = async_nats::HeaderMap::new();
    for (name, values) in message.headers.iter().filter(|(name, _)| !name.to_string().starts_with("Nats-")) {
        values.iter().for_each(|value| headers.append(name.clone(), value.clone()));
    }
    let sent = system.context.publish_with_headers(message.subject, headers, message.payload).await.ok()?;
    sent.await.ok().map(drop)
}

/// Takes messages away, and writes down which.
async fn remove(system: &System, step: Step) -> Option<()> {
    if step.kind == Kind::StreamWiped {
        return wipe(system, step.lasts).await;
    }
    let stream = system.stream().await?;
    let state = stream.cached_info().state.clone();
    if step.kind == Kind::MessagesRemoved {
        for n in 0..3 {
            let sequence = state.last_sequence.checked_sub((step.target as u64 + 1) * n / 2)?;
            if let Ok(message) = stream.get_raw_message(sequence).await
                && let Some(event) = event_of(&message.headers)
            {
                system.journal.write(What::Removed { event });
                _ = stream.delete_message(sequence).await;
            }
        }
        return Some(());
    }
    // The server would take "up to message 0" for everything.
    if state.last_sequence == 0 {
        return None;
    }
    for (_, event, _) in stored(system).await? {
        system.journal.write(What::Removed { event });
    }
    _ = stream.purge().sequence(state.last_sequence + 1).await;
    system.journal.write(What::Purged);
    Some(())
}

/// Removes the stream and makes it anew. A server may be away meanwhile, and an answer may be lost.
async fn wipe(system: &System, pause: Duration) -> Option<()> {
    // Nothing is stored any more once it is sealed, so that all of what is removed is written down.
    until("the stream is sealed", async || {
        let Some(stream) = system.stream().await else { return false };
        let config = jetstream::stream::Config { sealed: true, ..stream.cached_info().config.clone() };
        stream.cached_info().config.sealed || system.context.update_stream(config).await.is_ok()
    })
    .await;
    let mut removed = None;
    until("what the stream holds is read", async || {
        removed = stored(system).await;
        removed.is_some()
    })
    .await;
    for (_, event, _) in removed? {
        system.journal.write(What::Removed { event });
    }
    let name = &system.naming.stream;
    until("the stream is gone", async || match system.context.get_stream(name).await {
        Ok(stream) if stream.cached_info().config.sealed => {
            _ = system.context.delete_stream(name).await;
            false
        }
        Ok(_) => true,
        Err(error) => matches!(error.kind(), GetStreamErrorKind::JetStream(error) if error.error_code() == ErrorCode::STREAM_NOT_FOUND),
    })
    .await;
    tokio::time::sleep(pause).await;
    system.provision().await;
    Some(())
}

/// Sets the sequence back over ids of events that are there, so that publishers meet them. Over ids that are free it would
/// put the events of a key out of order, which nobody could put right.
async fn set_back(system: &System) {
    for _ in 0..100 {
        let set: Result<Option<i64>, _> = sqlx::query_scalar(
            "select setval('aftercommit.outbox_id_seq', ids.last_value - 4) from aftercommit.outbox_id_seq as ids
              where ids.last_value > 4
                and (select count(*) from aftercommit.outbox
                      where id > ids.last_value - 4 and id <= ids.last_value) = 4",
        )
        .fetch_optional(&system.publisher)
        .await;
        if matches!(set, Ok(Some(_)) | Err(_)) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Limits the stream to little more than it holds, for a while. With less than it holds it would lose its oldest messages.
async fn fill(system: &System, step: Step) -> Option<()> {
    let info = system.stream().await?.cached_info().clone();
    // A new leader of a cluster may tell of less than there is; and a sealed one is about to go.
    if info.config.num_replicas > 1 || info.config.sealed {
        return None;
    }
    let mut config = info.config.clone();
    config.max_messages = i64::try_from(info.state.messages + 50).ok()?;
    // A server that was killed after a change of the stream may have gone back to how the stream was made.
    config.discard = jetstream::stream::DiscardPolicy::New;
    system.context.update_stream(config).await.ok()?;
    tokio::time::sleep(step.lasts).await;
    until("the stream has room again", async || {
        let Some(stream) = system.stream().await else { return false };
        let mut config = stream.cached_info().config.clone();
        config.max_messages = -1;
        system.context.update_stream(config).await.is_ok()
    })
    .await;
    Some(())
}

/// Gives the stream settings with which a relay must not publish, for a while. Their limits are out of reach, because what
/// the server would really evict nobody could write down.
async fn spoil(system: &System, step: Step) -> Option<()> {
    let mut config = system.stream().await?.cached_info().config.clone();
    if config.sealed {
        return None;
    }
    match step.target % 3 {
        0 => config.max_messages_per_subject = 100_000_000,
        1 => config.allow_rollup = true,
        _ => config.discard = jetstream::stream::DiscardPolicy::Old,
    }
    if config.discard == jetstream::stream::DiscardPolicy::Old && config.max_messages <= 0 {
        config.max_messages = 100_000_000;
    }
    system.context.update_stream(config).await.ok()?;
    tokio::time::sleep(step.lasts).await;
    until("the stream's settings are mended", async || {
        let Some(stream) = system.stream().await else { return false };
        let mut config = stream.cached_info().config.clone();
        (config.max_messages_per_subject, config.max_messages) = (-1, -1);
        config.allow_rollup = false;
        config.discard = jetstream::stream::DiscardPolicy::New;
        config.sealed || system.context.update_stream(config).await.is_ok()
    })
    .await;
    Some(())
}

/// What the stream holds: sequence, event, and what its payload comes to.
pub async fn stored(system: &System) -> Option<Vec<(u64, Uuid, u64)>> {
    use async_nats::jetstream::consumer::{AckPolicy, pull};
    let stream = system.stream().await?;
    let last = stream.cached_info().state.last_sequence;
    let config = pull::Config { ack_policy: AckPolicy::None, ..Default::default() };
    let mut found = Vec::new();
    if stream.cached_info().state.messages == 0 {
        return Some(found);
    }
    let mut consumer = stream.create_consumer(config).await.ok()?;
    let mut messages = consumer.messages().await.ok()?;
    while let Ok(Some(Ok(message))) = tokio::time::timeout(Duration::from_secs(10), messages.next()).await {
        let sequence = message.info().ok()?.stream_sequence;
        if let Some(event) = message.headers.as_ref().and_then(event_of) {
            found.push((sequence, event, fingerprint(&message.payload)));
        }
        if sequence >= last {
            return Some(found);
        }
    }
    // The last message may have been removed. How many are pending is not to be relied on before: a server that was killed
    // counts too few.
    (consumer.info().await.ok()?.num_pending == 0).then_some(found)
}

/// The same for the same bytes.
pub fn fingerprint(bytes: &[u8]) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}
