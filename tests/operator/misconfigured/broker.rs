//! Mistakes with NATS: the stream, its consumers, users, and who works.

use std::time::Duration;

use aftercommit::testing::servers::Nats;
use async_nats::jetstream::consumer::{AckPolicy, pull};
use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType, SubjectTransform};

use super::system::{System, Who, names_in};
use crate::stage::{SUBSCRIBER, accounts, password, succeeded};

const STREAM: &str = "EVENTS";

/// Edits the stream as somebody with all rights does.
async fn edit(system: &System, change: impl FnOnce(&mut Config)) {
    let js = system.stage.outbox().await.js().await;
    let mut config = js.get_stream(STREAM).await.unwrap().cached_info().config.clone();
    change(&mut config);
    js.update_stream(config).await.unwrap();
}

/// The consumer's settings as they are.
async fn consumer(system: &System) -> pull::Config {
    use async_nats::jetstream::consumer::FromConsumer;
    let stream = system.stage.outbox().await.js().await.get_stream(STREAM).await.unwrap();
    pull::Config::try_from_consumer_config(stream.consumer_info(SUBSCRIBER).await.unwrap().config).unwrap()
}

async fn edit_consumer(system: &System, change: impl FnOnce(&mut pull::Config)) {
    let mut config = consumer(system).await;
    change(&mut config);
    let js = system.stage.outbox().await.js().await;
    js.create_consumer_on_stream(config, STREAM).await.unwrap();
}

/// Makes the stream anew with another setting that cannot be changed in place, and its consumer as it was.
async fn made_anew(system: &System, change: impl FnOnce(&mut Config)) {
    let js = system.stage.outbox().await.js().await;
    let durable = consumer(system).await;
    let mut config = js.get_stream(STREAM).await.unwrap().cached_info().config.clone();
    change(&mut config);
    js.delete_stream(STREAM).await.unwrap();
    js.create_stream(config).await.unwrap();
    js.create_consumer_on_stream(durable, STREAM).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_settings_of_the_stream_are_named() {
    let mut system = System::new().await;
    type Change = fn(&mut Config);
    let corrected: [(&str, Change); 6] = [
        ("discard: with a size limit and `old`, events are evicted", |config| {
            (config.discard, config.max_bytes) = (DiscardPolicy::Old, 1 << 30);
        }),
        ("retention: messages are removed when consumers acknowledge", |config| {
            config.retention = RetentionPolicy::Interest;
        }),
        ("max_msgs_per_subject: the oldest events of a type are evicted", |config| {
            (config.discard, config.max_messages_per_subject) = (DiscardPolicy::Old, 10);
        }),
        ("subject_transform: messages are stored under other subjects", |config| {
            config.subject_transform =
                Some(SubjectTransform { source: "events.>".into(), destination: "elsewhere.>".into() });
        }),
        ("subjects: orders.> do not cover events.>", |config| config.subjects = vec!["orders.>".into()]),
        ("no_ack: it does not acknowledge messages", |config| config.no_ack = true),
    ];
    for (words, change) in corrected {
        edit(&system, change).await;
        let found = system.names(Who::Operator, &["stream"], "FAIL", &[words, "`aftercommit provision`"]).await;
        system.apply(&found[0]).await;
        system.is_well().await;
    }

    // Only where others write, too, a relay relies on it.
    edit(&system, |config| config.duplicate_window = Duration::from_secs(5)).await;
    system.is_well().await;
    let shared = || {
        let mut doctor = system.doctor(Who::Operator);
        doctor.args(["--mode", "shared"]);
        doctor
    };
    let words = ["duplicate_window: 5s is shorter than the 120s", "`aftercommit provision`"];
    let found = names_in(shared, &["stream"], "FAIL", &words).await;
    system.apply(&found[0]).await;
    let output = shared().output().unwrap();
    assert!(output.status.success(), "{output:?}");

    edit(&system, |config| {
        (config.max_age, config.duplicate_window) = (Duration::from_hours(24), Duration::from_mins(10))
    })
    .await;
    let words = ["keeps events for 24 hours, the outbox for 7 days", "`nats stream edit EVENTS --max-age 168h`"];
    let found = system.names(Who::Relay, &["retention"], "WARN", &words).await;
    system.apply(&found[0]).await;
    system.is_well().await;

    // So small that the next events do not fit.
    system.sql("select aftercommit.publish('test.number', '{\"n\": 1}', 'k')").await;
    let js = system.stage.outbox().await.js().await;
    aftercommit::testing::eventually(crate::support::SOON, "it holds one event", async || {
        js.get_stream(STREAM).await.unwrap().cached_info().state.messages == 1
    })
    .await
    .unwrap();
    edit(&system, |config| config.max_messages = 1).await;
    let words = ["EVENTS has 1 of max_msgs 1", "nothing more is published", "raise max_msgs of the stream"];
    system.names(Who::Operator, &["room"], "WARN", &words).await;
    edit(&system, |config| config.max_messages = 1_000_000).await;
    system.is_well().await;

    // In memory, or a work queue. Nothing changes that in place; here the stream is made anew under its name.
    let memory: Change = |config| config.storage = StorageType::Memory;
    let queue: Change = |config| config.retention = RetentionPolicy::WorkQueue;
    for (word, change) in [("storage: messages are kept in memory", memory), ("retention: messages are removed", queue)]
    {
        made_anew(&system, change).await;
        system.names(Who::Operator, &["stream"], "FAIL", &[word, "create another stream"]).await;
        js.delete_stream(STREAM).await.unwrap();
        system.provision(&[]);
        system.is_well().await;
    }

    // The stream is another outbox's: somebody has provisioned with another database.
    let other = crate::support::Database {
        config: aftercommit::config::PostgresConfig::new(system.postgres.create_database().await.unwrap()),
    };
    aftercommit::operator::migrate(&other.config).await.unwrap();
    let adopt = |url: &str| {
        let mut provision = system.stage.command("aftercommit", "", "provisioner");
        succeeded(&provision.args(["provision", "--adopt"]).env("OUTBOX_DATABASE_URL", url).output().unwrap());
    };
    adopt(&other.config.url);
    let words =
        ["EVENTS belongs to the outbox in database", "`aftercommit provision --adopt` with OUTBOX_DATABASE_URL"];
    system.names(Who::Relay, &["owner"], "FAIL", &words).await;
    adopt(&system.stage.url_of("operator"));
    system.is_well().await;

    // A server that takes less than an event may have.
    let config = accounts(password);
    system.stage.nats.reload(format!("{config}\nmax_payload: 65536")).await.unwrap();
    let words = ["messages of up to 65536 bytes", "set max_payload in nats-server's configuration"];
    system.names(Who::Operator, &["max_payload"], "WARN", &words).await;
    system.stage.nats.reload(config).await.unwrap();
    system.is_well().await;

    // One server that acknowledges before it writes, which is nats-server's default.
    let plain = Nats::shared().await.unwrap().monitor_url();
    let asked = |monitor: Option<&str>| {
        let mut doctor = system.stage.command("aftercommit", "operator", "operator");
        doctor.args(["doctor", "--json", "--role", "operator", "--config", &system.stage.toml()]);
        doctor.args(monitor.map(|url| format!("--nats-monitor={url}")));
        doctor
    };
    let words = ["writes to the disk every 2 minutes", "sync_interval: always"];
    names_in(|| asked(Some(&plain)), &["disk", "replicas"], "WARN", &words).await;
    names_in(|| asked(None), &["disk", "replicas"], "?", &["not checked", "--nats-monitor http://host:8222"]).await;
    system.is_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_consumers_and_workers_are_named() {
    let mut system = System::new().await;

    type Change = fn(&mut pull::Config);
    let corrected: [(&str, Change); 3] = [
        ("max_deliver: 3 -> -1", |config| config.max_deliver = 3),
        ("ack_wait: 1ms -> 1s", |config| config.ack_wait = Duration::from_millis(1)),
        ("max_ack_pending: 1 -> 100000", |config| config.max_ack_pending = 1),
    ];
    for (words, change) in corrected {
        edit_consumer(&system, change).await;
        let found =
            system.names(Who::Operator, &["consumer"], "WARN", &[words, "aftercommit provision --config"]).await;
        system.apply(&found[0]).await;
        system.is_well().await;
    }
    // Without a worker.toml nobody knows what is wanted, and yet this is never meant.
    edit_consumer(&system, |config| config.ack_wait = Duration::from_millis(1)).await;
    let words = ["receipts has an ack_wait of 1ms", "with an ack_wait of seconds"];
    let found = system.names(Who::Relay, &["consumer"], "WARN", &words).await;
    system.apply(&found[0]).await;
    system.is_well().await;

    // Another database's.
    edit_consumer(&system, |config| {
        config.metadata.insert("aftercommit.owner".into(), "7412/16385/elsewhere".into());
    })
    .await;
    let words =
        ["receipts feeds the inbox of database elsewhere", "aftercommit provision --config worker.toml --adopt"];
    let found = system.names(Who::Operator, &["consumer"], "FAIL", &words).await;
    system.apply(&found[0]).await;
    system.is_well().await;

    // One that acknowledges by itself loses whatever a worker had when it died.
    let js = system.stage.outbox().await.js().await;
    let mut config = consumer(&system).await;
    js.get_stream(STREAM).await.unwrap().delete_consumer(SUBSCRIBER).await.unwrap();
    (config.ack_policy, config.max_ack_pending) = (AckPolicy::None, 0);
    js.create_consumer_on_stream(config, STREAM).await.unwrap();
    let words = ["receipts has the ack policy \"none\"", "`nats consumer rm EVENTS receipts`"];
    let found = system.names(Who::Relay, &["consumer"], "WARN", &words).await;
    system.apply(&found[0]).await;

    // The subscriber is rolled out and not provisioned. Its worker says so, too.
    let words =
        ["EVENTS has no consumer receipts: this subscriber gets nothing", "aftercommit provision --config worker.toml"];
    let found = system.names(Who::Operator, &["consumer", "workers", "subscribers"], "FAIL", &words).await;
    system.apply(found.iter().find(|line| line.name == "consumer").unwrap()).await;
    system.is_well().await;

    // Nobody serves the subscriber.
    system.worker = None;
    let words = ["subscriber receipts: no worker serves it", "start aftercommit-worker"];
    system.names(Who::Operator, &["workers"], "WARN", &words).await;
    system.start_worker();
    system.is_well().await;

    // An inbox that forgets before the last copy of an event is gone.
    let toml = crate::stage::TOML.replace("max_attempts = 2", "max_attempts = 2\ninbox_retention = \"10d\"");
    let short = system.stage.files.write("short.toml", toml).display().to_string();
    let forgetful = || {
        let mut doctor = system.doctor(Who::Operator);
        doctor.args(["--config", &short]);
        doctor
    };
    let output = forgetful().output().unwrap();
    assert_eq!(output.status.code(), Some(2), "two definitions of one subscriber: {output:?}");
    system.stage.files.write("worker.toml", std::fs::read(&short).unwrap());
    let forgetful = || {
        let mut doctor = system.stage.command("aftercommit", "operator", "operator");
        let monitor = system.stage.nats.monitor_url();
        doctor.args(["doctor", "--json", "--role", "operator", "--config", &short, "--nats-monitor", &monitor]);
        doctor
    };
    let words = ["the inbox of receipts remembers events for 10 days", "inbox_retention = \"21d\" or longer"];
    names_in(forgetful, &["inbox"], "WARN", &words).await;
    system.is_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_users_of_nats_are_named() {
    let system = System::new().await;
    let with = |user: &'static str| {
        let mut doctor = system.doctor(Who::Relay);
        doctor.env("NATS_USER", user).env("NATS_PASSWORD", password(user));
        doctor
    };
    // One that can do everything, as administrators' users can.
    let all = || {
        let mut doctor = with("vandal");
        doctor.env_remove("NATS_API_PREFIX");
        doctor
    };
    let words = ["vandal may create streams, change the stream, purge the stream, delete the stream", "accounts.conf"];
    names_in(all, &["nats user"], "WARN", &words).await;
    // One that may look at next to nothing.
    let words = ["EVENTS", "give the NATS user the right to look at the stream"];
    names_in(|| with("receipts"), &["stream"], "FAIL", &words).await;
    // The relay's own is told nothing of itself, and may not list consumers.
    let relay = || {
        let mut doctor = with("relay");
        doctor.env_remove("NATS_API_PREFIX").env("NATS_INBOX_PREFIX", "_INBOX_relay");
        doctor
    };
    let words = ["not checked", "look as its user operator"];
    names_in(relay, &["nats user", "stream"], "?", &words).await;
    system.is_well().await;
}
