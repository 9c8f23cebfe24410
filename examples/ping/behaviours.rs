//! What the ping example promises, each promise from the repository's call through outbox, relay, JetStream and worker
//! to the handler's effect.
//!
//! That something does not happen is shown by what comes behind it: an event that was committed later has arrived, and
//! nothing else has.

use std::process::{Command, ExitCode};
use std::time::Duration;

use aftercommit::config::{Naming, NatsConfig, PostgresConfig};
use aftercommit::operator;
use aftercommit::outbox::RawEvent;
use aftercommit::relay::{Relay, RelayConfig};
use aftercommit::subject::SubjectPrefix;
use aftercommit::testing::coverage::Coverage;
use aftercommit::testing::servers::{Nats, Postgres};
use aftercommit::testing::{eventually, pending_of, unique_name};
use aftercommit::worker::Worker;
use async_nats::jetstream;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use sqlx::types::Uuid;
use sqlx::{Connection, PgPool};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::{Error, PingEvent, PingRepository, Pong};

type Outcome = Result<(), Error>;

/// Long enough for a slow machine, short enough to tell that something hangs.
const SOON: Duration = Duration::from_secs(60);

/// The argument that makes this program the publisher that dies in [`crash_after_commit`].
pub const SEND_AND_DIE: &str = "send-and-die";

/// A behaviour by its name, with what it shows.
type Behaviour = (&'static str, &'static str, fn(Stage) -> LocalBoxFuture<'static, Outcome>);

/// All of them.
const ALL: [Behaviour; 10] = [
    ("commit", "an event is handled after the commit, not before", |stage| commit(stage).boxed_local()),
    ("rollback", "an event of a rolled-back transaction never existed", |stage| rollback(stage).boxed_local()),
    ("savepoint", "nor one of a rolled-back savepoint; the rest of its transaction does", |stage| {
        savepoint(stage).boxed_local()
    }),
    ("order", "events of one key are handled in the order in which they were published", |stage| {
        order(stage).boxed_local()
    }),
    ("pre_commit_assertion", "a test can look at the events of its open transaction", |stage| {
        pre_commit_assertion(stage).boxed_local()
    }),
    ("kill_switch", "while the relay is paused nothing is handled and nothing is lost", |stage| {
        kill_switch(stage).boxed_local()
    }),
    ("marker", "what the repository publishes is declared, and a check finds what is not", |stage| {
        marker(stage).boxed_local()
    }),
    ("event_id", "all subscribers see the id that the publisher got", |stage| event_id(stage).boxed_local()),
    ("no_subscriber", "an event that nobody subscribes to waits in the stream", |stage| {
        no_subscriber(stage).boxed_local()
    }),
    ("crash_after_commit", "a publisher that dies after the commit loses nothing", |stage| {
        crash_after_commit(stage, this_program()).boxed_local()
    }),
];

/// Shows the wanted behaviours, or `all`; says which there are when it knows none of that name.
pub async fn show(wanted: &[String]) -> ExitCode {
    let chosen = |name: &str| wanted.iter().any(|wanted| wanted == name || wanted == "all");
    let known = |wanted: &String| wanted == "all" || ALL.iter().any(|(name, ..)| wanted == name);
    if wanted.is_empty() || !wanted.iter().all(known) {
        let names: Vec<&str> = ALL.iter().map(|(name, ..)| *name).collect();
        eprintln!("usage: ping all | {}", names.join(" | "));
        return ExitCode::from(2);
    }
    let (mut passed, mut ran) = (0, 0);
    for (name, shows, behaviour) in ALL.into_iter().filter(|(name, ..)| chosen(name)) {
        ran += 1;
        let outcome = async { behaviour(Stage::new().await?).await };
        match outcome.await {
            Ok(()) => {
                passed += 1;
                println!("PASS  {name:20}  {shows}");
            }
            Err(error) => println!("FAIL  {name:20}  {shows}: {error}"),
        }
    }
    println!("ping: {passed}/{ran} {}", if passed == ran { "PASS" } else { "FAIL" });
    if passed == ran { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn this_program() -> Result<Command, Error> {
    let mut program = Command::new(std::env::current_exe()?);
    program.arg(SEND_AND_DIE);
    Ok(program)
}

/// A publisher's and a subscriber's database with their tables, and an empty stream between them.
pub struct Stage {
    publisher: PgPool,
    subscriber: PgPool,
    publisher_config: PostgresConfig,
    subscriber_config: PostgresConfig,
    nats: NatsConfig,
    naming: Naming,
}

/// A relay or a worker of this process.
struct Running {
    stop: CancellationToken,
    task: AbortOnDropHandle<Result<(), aftercommit::Error>>,
}

impl Running {
    async fn stop(self) -> Outcome {
        self.stop.cancel();
        Ok(self.task.await??)
    }
}

impl Stage {
    /// On servers that all stages of this process share.
    pub async fn new() -> Result<Self, Error> {
        let (postgres, nats) = (Postgres::shared().await?, Nats::shared().await?);
        let name = unique_name("ping");
        let [publisher, subscriber] = [postgres.create_database().await?, postgres.create_database().await?];
        let stage = Self {
            publisher: PgPool::connect(&publisher).await?,
            subscriber: PgPool::connect(&subscriber).await?,
            publisher_config: PostgresConfig::new(publisher),
            subscriber_config: PostgresConfig::new(subscriber),
            nats: NatsConfig { url: nats.url(), ..NatsConfig::default() },
            naming: Naming { stream: name.to_uppercase(), prefix: SubjectPrefix::new(name)?, source: "/ping".into() },
        };
        operator::migrate(&stage.publisher_config).await?;
        operator::migrate(&stage.subscriber_config).await?;
        operator::provision(&stage.nats, &stage.naming).await?;
        sqlx::query(PingRepository::TABLE).execute(&stage.publisher).await?;
        sqlx::query(Pong::TABLE).execute(&stage.subscriber).await?;
        Ok(stage)
    }

    fn relay(&self) -> Running {
        let config = RelayConfig::new(self.publisher_config.clone(), self.nats.clone(), self.naming.clone());
        let stop = CancellationToken::new();
        let task = AbortOnDropHandle::new(tokio::spawn(Relay::new(config).run(stop.clone())));
        Running { stop, task }
    }

    /// A worker with a subscriber of each name.
    async fn worker(&self, names: &[&str]) -> Result<Running, Error> {
        let worker = Worker::new(self.subscriber_config.clone(), self.nats.clone(), self.naming.clone());
        let worker = names.iter().fold(worker, |worker, name| worker.subscriber(Pong::subscriber(name)));
        worker.provision().await?;
        let stop = CancellationToken::new();
        let task = AbortOnDropHandle::new(tokio::spawn(worker.run(stop.clone())));
        Ok(Running { stop, task })
    }

    /// One transaction with a ping to `host` for each message.
    async fn send(&self, host: &str, messages: &[&str]) -> Outcome {
        let mut tx = self.publisher.begin().await?;
        for message in messages {
            PingRepository::send(&mut tx, host, message).await?;
        }
        Ok(tx.commit().await?)
    }

    /// The messages that took effect, in that order.
    async fn handled(&self) -> Result<Vec<String>, Error> {
        Ok(sqlx::query_scalar("select message from pong order by id").fetch_all(&self.subscriber).await?)
    }

    async fn wait_until_handled(&self, count: usize) -> Outcome {
        let handled = async || self.handled().await.is_ok_and(|handled| handled.len() >= count);
        Ok(eventually(SOON, &format!("{count} pings are handled"), handled).await?)
    }

    async fn stream(&self) -> Result<jetstream::stream::Stream, Error> {
        let context = jetstream::new(async_nats::connect(&self.nats.url).await?);
        Ok(context.get_stream(&self.naming.stream).await?)
    }

    /// How many messages the stream holds.
    async fn stored(&self) -> Result<u64, Error> {
        Ok(self.stream().await?.cached_info().state.messages)
    }

    async fn wait_until_stored(&self, count: u64) -> Outcome {
        let stored = async || self.stored().await.is_ok_and(|stored| stored >= count);
        Ok(eventually(SOON, &format!("{count} pings are in the stream"), stored).await?)
    }

    /// Waits for two more reports of the leading relay, and that they say so.
    async fn wait_until_paused(&self) -> Outcome {
        for _ in 0..2 {
            let now: String = sqlx::query_scalar("select clock_timestamp()::text").fetch_one(&self.publisher).await?;
            let paused = async || {
                sqlx::query_scalar(
                    "select state like 'paused%' and updated_at > $1::timestamptz from aftercommit.relay_status",
                )
                .bind(&now)
                .fetch_optional(&self.publisher)
                .await
                .is_ok_and(|paused| paused == Some(true))
            };
            eventually(SOON, "the leading relay says that it is paused", paused).await?;
        }
        Ok(())
    }
}

fn expect<T: PartialEq + std::fmt::Debug>(what: &str, found: T, expected: T) -> Outcome {
    if found == expected { Ok(()) } else { Err(format!("{what}: {found:?} instead of {expected:?}").into()) }
}

fn texts(messages: &[&str]) -> Vec<String> {
    messages.iter().map(ToString::to_string).collect()
}

pub async fn commit(stage: Stage) -> Outcome {
    let _running = (stage.relay(), stage.worker(&["pong"]).await?);
    let mut tx = stage.publisher.begin().await?;
    PingRepository::send(&mut tx, "a", "open").await?;
    stage.send("b", &["committed"]).await?;
    stage.wait_until_handled(1).await?;
    expect("stored before the commit", stage.stored().await?, 1)?;
    expect("handled before the commit", stage.handled().await?, texts(&["committed"]))?;
    tx.commit().await?;
    stage.wait_until_handled(2).await?;
    expect("handled", stage.handled().await?, texts(&["committed", "open"]))
}

pub async fn rollback(stage: Stage) -> Outcome {
    let _running = (stage.relay(), stage.worker(&["pong"]).await?);
    let mut tx = stage.publisher.begin().await?;
    PingRepository::send(&mut tx, "a", "rolled back").await?;
    tx.rollback().await?;
    let mut tx = stage.publisher.begin().await?;
    PingRepository::send(&mut tx, "a", "dropped").await?;
    drop(tx);
    // The same connections go on, and nothing of before comes along.
    stage.send("a", &["kept"]).await?;
    stage.send("a", &["kept too"]).await?;
    stage.wait_until_handled(2).await?;
    expect("stored", stage.stored().await?, 2)?;
    expect("handled", stage.handled().await?, texts(&["kept", "kept too"]))
}

pub async fn savepoint(stage: Stage) -> Outcome {
    let _running = (stage.relay(), stage.worker(&["pong"]).await?);
    let mut tx = stage.publisher.begin().await?;
    let mut released = tx.begin().await?;
    PingRepository::send(&mut released, "a", "released, but its transaction was rolled back").await?;
    released.commit().await?;
    tx.rollback().await?;

    let mut tx = stage.publisher.begin().await?;
    PingRepository::send(&mut tx, "a", "before").await?;
    let mut undone = tx.begin().await?;
    PingRepository::send(&mut undone, "a", "undone").await?;
    let mut nested = undone.begin().await?;
    PingRepository::send(&mut nested, "a", "released within the undone").await?;
    nested.commit().await?;
    undone.rollback().await?;
    let mut released = tx.begin().await?;
    PingRepository::send(&mut released, "a", "released").await?;
    released.commit().await?;
    PingRepository::send(&mut tx, "a", "after").await?;
    tx.commit().await?;

    stage.wait_until_handled(3).await?;
    expect("stored", stage.stored().await?, 3)?;
    expect("handled", stage.handled().await?, texts(&["before", "released", "after"]))
}

pub async fn order(stage: Stage) -> Outcome {
    let _running = (stage.relay(), stage.worker(&["pong"]).await?);
    let mut sent = Vec::new();
    for transaction in 0..10 {
        let mut tx = stage.publisher.begin().await?;
        for n in 0..5 {
            sent.push(format!("{transaction}.{n}"));
            PingRepository::send(&mut tx, "a", &format!("{transaction}.{n}")).await?;
            PingRepository::send(&mut tx, &format!("other-{n}"), "noise").await?;
        }
        tx.commit().await?;
    }
    stage.wait_until_handled(100).await?;
    let mut handled = stage.handled().await?;
    handled.retain(|message| message != "noise");
    expect("handled", handled, sent)
}

pub async fn pre_commit_assertion(stage: Stage) -> Outcome {
    let _running = (stage.relay(), stage.worker(&["pong"]).await?);
    stage.send("a", &["of another transaction"]).await?;
    let mut tx = stage.publisher.begin().await?;
    let id = PingRepository::send(&mut tx, "b", "pending").await?;
    let event = PingEvent { host: "b".into(), n: 1, message: "pending".into() };
    let pending = pending_of::<PingEvent>(&mut tx).await?;
    let pending = pending.into_iter().map(|published| (published.id, published.event)).collect();
    expect("pending", pending, vec![(id, event)])?;
    tx.rollback().await?;
    stage.send("b", &["afterwards"]).await?;
    stage.wait_until_handled(2).await?;
    expect("stored", stage.stored().await?, 2)
}

pub async fn kill_switch(stage: Stage) -> Outcome {
    let (relay, _worker) = (stage.relay(), stage.worker(&["pong"]).await?);
    stage.send("a", &["1"]).await?;
    stage.wait_until_handled(1).await?;

    operator::relay::pause(&stage.publisher_config, "ping", Some("an incident")).await?;
    stage.wait_until_paused().await?;
    stage.send("a", &["2", "3"]).await?;
    stage.send("a", &["4"]).await?;
    stage.wait_until_paused().await?;
    expect("stored while paused", stage.stored().await?, 1)?;
    // It is written down, so another relay keeps to it.
    relay.stop().await?;
    let _relay = stage.relay();
    stage.wait_until_paused().await?;
    expect("stored while paused, after a restart", stage.stored().await?, 1)?;
    expect("handled while paused", stage.handled().await?, texts(&["1"]))?;

    operator::relay::resume(&stage.publisher_config, "ping").await?;
    stage.wait_until_handled(4).await?;
    expect("handled", stage.handled().await?, texts(&["1", "2", "3", "4"]))
}

pub async fn marker(stage: Stage) -> Outcome {
    stage.send("a", &["declared"]).await?;
    let mut connection = stage.publisher.acquire().await?;
    let coverage = || Coverage::new().subscribers(Pong::subscriber("pong"));
    let declared = || coverage().publishers([PingRepository::publisher()]);
    declared().published_in(&mut connection).await?.check()?;
    for undeclared in [coverage(), coverage().published_in(&mut connection).await?] {
        let error = undeclared.check().err().ok_or("an event that nobody declares was not found")?.to_string();
        expect("the event is named", error.contains(<PingEvent as aftercommit::Event>::TYPE), true)?;
    }
    operator::publish(&stage.publisher_config, RawEvent::new("ping.undeclared", "text/plain", "")).await?;
    let error = declared().published_in(&mut connection).await?.check().err();
    let error = error.ok_or("a publish without declaration was not found")?.to_string();
    expect(
        "it is named, and nothing else",
        (error.contains("ping.undeclared"), error.contains("ping.sent")),
        (true, false),
    )
}

pub async fn event_id(stage: Stage) -> Outcome {
    let _running = (stage.relay(), stage.worker(&["pong", "audit"]).await?);
    let mut tx = stage.publisher.begin().await?;
    let id = PingRepository::send(&mut tx, "a", "hello").await?;
    tx.commit().await?;
    stage.wait_until_handled(2).await?;
    let handled: Vec<Uuid> = sqlx::query_scalar("select event_id from pong").fetch_all(&stage.subscriber).await?;
    expect("what the handlers saw", handled, vec![id.as_uuid(); 2])?;
    let inbox: Vec<(String, Uuid)> =
        sqlx::query_as("select subscriber, event_id from aftercommit.inbox order by subscriber")
            .fetch_all(&stage.subscriber)
            .await?;
    expect("the inbox", inbox, vec![("audit".into(), id.as_uuid()), ("pong".into(), id.as_uuid())])?;
    let message = stage.stream().await?.get_raw_message(1).await?;
    for header in ["ce-id", "Nats-Msg-Id"] {
        expect(header, message.headers.get(header).map(ToString::to_string), Some(id.to_string()))?;
    }
    Ok(())
}

pub async fn no_subscriber(stage: Stage) -> Outcome {
    let _relay = stage.relay();
    stage.send("a", &["1", "2"]).await?;
    stage.wait_until_stored(2).await?;
    expect("handled without a subscriber", stage.handled().await?, texts(&[]))?;
    let worker = stage.worker(&["pong"]).await?;
    stage.wait_until_handled(2).await?;
    expect("handled by a later subscriber", stage.handled().await?, texts(&["1", "2"]))?;
    worker.stop().await?;
    // They are still there for another one.
    expect("stored", stage.stored().await?, 2)?;
    let _worker = stage.worker(&["audit"]).await?;
    stage.wait_until_handled(4).await?;
    expect("handled by both", stage.handled().await?, texts(&["1", "2", "1", "2"]))
}

/// `publisher` is a program that calls [`send_and_die`]. Neither relay nor worker run until it is dead.
pub async fn crash_after_commit(stage: Stage, publisher: Result<Command, Error>) -> Outcome {
    let died = publisher?.env("DATABASE_URL", &stage.publisher_config.url).output()?;
    if died.status.success() {
        let said = String::from_utf8_lossy(&died.stderr);
        return Err(format!("the publisher was to die, and did not: {said}").into());
    }
    let _running = (stage.relay(), stage.worker(&["pong"]).await?);
    stage.wait_until_handled(1).await?;
    stage.send("a", &["of another process"]).await?;
    stage.wait_until_handled(2).await?;
    expect("handled", stage.handled().await?, texts(&["committed", "of another process"]))?;
    expect("stored", stage.stored().await?, 2)
}

/// Commits one ping to the database that `DATABASE_URL` names, leaves another one uncommitted, and dies.
pub async fn send_and_die() -> ExitCode {
    let sent = async {
        let pool = PgPool::connect(&std::env::var("DATABASE_URL")?).await?;
        let mut open = pool.begin().await?;
        PingRepository::send(&mut open, "b", "never").await?;
        let mut tx = pool.begin().await?;
        PingRepository::send(&mut tx, "a", "committed").await?;
        tx.commit().await?;
        std::process::abort();
    };
    let Err::<std::convert::Infallible, Error>(error) = sent.await;
    eprintln!("cannot send: {error}");
    ExitCode::SUCCESS
}
