//! What JetStream is asked counts only when a leader answers. Other members of a cluster may be faster, and know nothing or
//! what was once.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::{Number, Outbox, Record, SOON, Work};
use aftercommit::config::{Naming, NatsConfig, PostgresConfig};
use aftercommit::operator;
use aftercommit::operator::doctor::DoctorConfig;
use aftercommit::subject::SubjectPrefix;
use aftercommit::testing::servers::{Nats, NatsCluster, NatsOptions, Postgres};
use aftercommit::testing::{eventually, unique_name};
use aftercommit::worker::Subscriber;
use async_nats::jetstream;
use futures_util::StreamExt;
use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio_util::task::AbortOnDropHandle;

/// The asker's questions reach JetStream, which is another account's, only through whoever listens in between.
const ACCOUNTS: &str = "accounts {
    JETSTREAM { jetstream: enabled, users: [{ user: admin, password: a }], exports: [{ service: \"$JS.API.>\" }] }
    ASKER { users: [{ user: asker, password: a }], mappings: { \"$JS.API.>\": \"asked.>\" },
        imports: [{ service: { account: JETSTREAM, subject: \"$JS.API.>\" }, to: \"leader.>\" }] } }
    no_auth_user: admin";

/// The members of a cluster: one that knows no leader always answers first, and the leader behind it, if there is one.
struct Members {
    _answering: AbortOnDropHandle<()>,
    /// So many questions more find no leader.
    leaderless: Arc<AtomicUsize>,
    /// The subjects of the questions.
    asked: Arc<Mutex<Vec<String>>>,
}

impl Members {
    async fn start(nats: &Nats) -> Self {
        let login = async_nats::ConnectOptions::with_user_and_password("asker".into(), "a".into());
        let client = login.connect(nats.url()).await.unwrap();
        let mut questions = client.subscribe("asked.>").await.unwrap();
        client.flush().await.unwrap();
        let (leaderless, asked) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(Vec::new())));
        let (left, subjects) = (Arc::clone(&leaderless), Arc::clone(&asked));
        let answering = async move {
            while let Some(question) = questions.next().await {
                let (subject, reply) = (question.subject.strip_prefix("asked.").unwrap(), question.reply.unwrap());
                subjects.lock().unwrap().push(subject.to_string());
                if let Some(answer) = stray(subject) {
                    client.publish(reply.clone(), answer.to_string().into()).await.unwrap();
                }
                if left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_err() {
                    client.publish_with_reply(format!("leader.{subject}"), reply, question.payload).await.unwrap();
                }
            }
        };
        Self { _answering: AbortOnDropHandle::new(tokio::spawn(answering)), leaderless, asked }
    }

    fn leaderless(&self, questions: usize) {
        self.leaderless.store(questions, Ordering::SeqCst);
    }

    fn times(&self, question: &str) -> usize {
        self.asked.lock().unwrap().iter().filter(|subject| subject.starts_with(question)).count()
    }
}

/// What a member without a leader answers.
fn stray(question: &str) -> Option<Value> {
    let mut words = question.split('.');
    let (what, stream) = (words.by_ref().take(2).collect::<Vec<_>>().join("."), words.next()?);
    let time = "2026-01-01T00:00:00Z";
    let cluster = json!({ "name": "test", "replicas": [] });
    match what.as_str() {
        "STREAM.MSG" => Some(json!({ "error": { "code": 503, "err_code": 10008, "description": "unavailable" } })),
        "STREAM.INFO" => Some(json!({
            "config": { "name": stream, "retention": "limits", "max_consumers": -1, "max_msgs": -1, "max_bytes": -1,
                "discard": "new", "max_age": 0, "storage": "file", "num_replicas": 3 },
            "created": time,
            "state": { "messages": 1, "bytes": 1, "first_seq": 1, "first_ts": time, "last_seq": 1, "last_ts": time,
                "consumer_count": 0 },
            "cluster": cluster,
        })),
        "CONSUMER.INFO" => Some(json!({
            "stream_name": stream, "name": words.next()?, "created": time,
            "config": { "durable_name": "reader", "ack_policy": "explicit", "deliver_policy": "all",
                "replay_policy": "instant" },
            "delivered": { "consumer_seq": 0, "stream_seq": 0 }, "ack_floor": { "consumer_seq": 0, "stream_seq": 0 },
            "num_ack_pending": 0, "num_redelivered": 0, "num_waiting": 0, "num_pending": 77,
            "cluster": cluster,
        })),
        _ => None,
    }
}

/// A stream with 20 events, a consumer that waits at its beginning, and somebody who asks through others.
struct Stage {
    _nats: Nats,
    outbox: Outbox,
    members: Members,
    asker: NatsConfig,
}

impl Stage {
    async fn new() -> Self {
        let options = NatsOptions { config: ACCOUNTS.into(), ..NatsOptions::default() };
        let nats = Nats::start(options).await.unwrap();
        let database = Postgres::shared().await.unwrap().create_database().await.unwrap();
        let work = Work::on(database, nats.url()).await;
        work.worker_with(Subscriber::new("reader").on::<Number>(Record::good())).provision().await.unwrap();
        work.send_many(&["a"], 20).await;
        let asker = NatsConfig { url: nats.url().replace("nats://", "nats://asker:a@"), ..NatsConfig::default() };
        Self { members: Members::start(&nats).await, _nats: nats, outbox: work.outbox, asker }
    }

    /// Asks all three questions.
    async fn peek(&self) -> Result<operator::peek::Peek, aftercommit::Error> {
        operator::peek::peek(&self.outbox.postgres, &self.asker, &self.outbox.naming, "reader", 100).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_leader_is_believed_and_not_who_answers_first() {
    let stage = Stage::new().await;
    for _ in 0..20 {
        let peek = stage.peek().await.unwrap();
        assert_eq!((peek.pending, peek.messages.len()), (20, 20));
        let status =
            operator::status::status(&stage.outbox.postgres, &stage.asker, &stage.outbox.naming).await.unwrap();
        assert_eq!(status.stream.map(|stream| stream.last_stream_sequence), Some(20), "{:?}", status.stream_error);
    }
}

/// The first question and the first few of those after it find nobody; a leader that is elected then answers later ones only.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_is_elected_meanwhile_is_waited_for() {
    let stage = Stage::new().await;
    stage.members.leaderless(4);
    assert_eq!(stage.peek().await.unwrap().messages.len(), 20);
    assert_eq!(stage.members.times("CONSUMER.INFO"), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_leader_there_is_no_answer_but_a_way_out() {
    let stage = Stage::new().await;
    stage.members.leaderless(usize::MAX);
    let began = Instant::now();
    let error = stage.peek().await.unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    for word in ["consumer reader", "no leader at present", "critical write error"] {
        assert!(error.report().contains(word), "{}", error.report());
    }
    let status = operator::status::status(&stage.outbox.postgres, &stage.asker, &stage.outbox.naming).await.unwrap();
    let error = status.stream_error.unwrap();
    assert!(status.stream.is_none() && error.contains("no leader at present"), "{error}");
}

/// A replica that has stopped answers with what it holds itself, as long as the cluster goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_without_a_leader_is_told_from_one_with_few_messages() {
    let cluster = NatsCluster::start(3, NatsOptions::default()).await.unwrap();
    let name = unique_name("t");
    let naming =
        Naming { stream: name.to_uppercase(), prefix: SubjectPrefix::new(name).unwrap(), source: "/test".into() };
    let postgres = PostgresConfig::new(Postgres::shared().await.unwrap().create_database().await.unwrap());
    operator::migrate(&postgres).await.unwrap();
    let client = async_nats::connect(cluster.members[0].url()).await.unwrap();
    let js = jetstream::new(client.clone());
    let config = jetstream::stream::Config {
        name: naming.stream.clone(),
        subjects: vec![naming.prefix.wildcard()],
        num_replicas: 3,
        ..Default::default()
    };
    eventually(SOON, "the stream is there", async || js.create_stream(config.clone()).await.is_ok()).await.unwrap();
    for _ in 0..3 {
        js.publish(naming.prefix.subject("a"), "{}".into()).await.unwrap().await.unwrap();
    }
    let status = async |member: usize| {
        let nats = NatsConfig { url: cluster.members[member].url(), ..NatsConfig::default() };
        operator::status::status(&postgres, &nats, &naming).await.unwrap()
    };
    for member in 0..3 {
        assert_eq!(status(member).await.stream.map(|stream| stream.last_stream_sequence), Some(3));
    }
    // From 2.14 on that stops every replica for good.
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("Nats-Expected-Last-Msg-Id", "another");
    js.publish_with_headers(naming.prefix.subject("a"), headers, "{}".into()).await.unwrap();
    let stopped = eventually(Duration::from_secs(10), "a replica tells its own state", async || {
        let look = tokio::time::timeout(Duration::from_secs(1), js.get_stream(&naming.stream));
        let cluster = look.await.ok().and_then(|stream| stream.ok()?.cached_info().cluster.clone());
        cluster.is_some_and(|cluster| cluster.leader.is_none())
    });
    if stopped.await.is_err() {
        println!("SKIPPED: nats-server {} has not stopped the stream", cluster.members[0].version());
        return;
    }
    for status in join_all((0..3).map(status)).await {
        let error = status.stream_error.unwrap_or_default();
        assert!(status.stream.is_none() && error.contains("has no leader at present"), "{:?} {error}", status.stream);
    }
    let nats = NatsConfig { url: cluster.url(), ..NatsConfig::default() };
    let report = operator::doctor::doctor(&DoctorConfig::new(postgres.clone(), nats, naming.clone())).await.unwrap();
    let check = report.checks.iter().find(|check| check.name == "stream").unwrap();
    assert!(check.finding.contains("has no leader at present"), "{check:?}");
    assert!(check.remedy.as_ref().is_some_and(|remedy| remedy.contains("A stream without a leader")), "{check:?}");
    // The way out that the documentation names.
    js.delete_stream(&naming.stream).await.unwrap();
    js.create_stream(config).await.unwrap();
    assert_eq!(status(0).await.stream.map(|stream| stream.last_stream_sequence), Some(0));
}
