//! docs/guides/move-to-aftercommit.md: an old outbox is moved to aftercommit, back, and again, under writers that never stop. The SQL is
//! the page's. What consumers did is counted in the end: nothing lost, nothing doubled, every key in its order.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::consumer::{AckPolicy, PullConsumer, pull};
use async_nats::jetstream::{self, stream};
use futures_util::StreamExt;
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, PgPool, Row};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::support::{SOON, Work, WorkerProcess};
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, Postgres, PostgresOptions};

const PAGE: &str = include_str!("../../docs/guides/move-to-aftercommit.md");
const KEYS: i64 = 8;
const WRITERS: i64 = 4;
/// Effects that each side makes before the next step.
const MANY: i64 = 150;

/// The SQL below a heading of the page, block by block.
fn sql(heading: &str) -> Vec<&'static str> {
    let (_, section) = PAGE.split_once(&format!("\n## {heading}\n")).unwrap_or_else(|| panic!("no {heading}"));
    let section = section.split("\n## ").next().unwrap();
    section.split("```sql\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect()
}

/// An old system, as far as the move is concerned.
struct Old {
    /// The statements of the page.
    tables: Vec<&'static str>,
    cut: &'static str,
    published: &'static str,
    back: &'static str,
    /// What a writer does beside updating `account`; none when that is the event.
    insert: Option<&'static str>,
    /// What the consumer asks before it handles a message with a place in the log.
    ours: Option<&'static str>,
    /// The subjects that the old consumer reads.
    subject: &'static str,
    /// What the new handler takes for key and number.
    new_handler: &'static str,
}

/// The new side's handler: one row for each event.
fn handler(key: &str, n: &str) -> String {
    format!(
        "create function public.receipt(event jsonb) returns void language sql as $$
             insert into public.effect (key, n, via) values ({key}, {n}, 'new') $$"
    )
}

struct Scene {
    _postgres: Postgres,
    work: Work,
    old: Old,
    consumer: PullConsumer,
    stop: CancellationToken,
    writers: Vec<JoinHandle<()>>,
    writing: Arc<AtomicBool>,
}

impl Scene {
    /// Publisher, old stream, old tables; the subscriber is provisioned and its worker is not there.
    async fn new(old: Old) -> Self {
        let settings = vec![("wal_level".into(), "logical".into())];
        let postgres = Postgres::start(PostgresOptions { fsync: false, settings }).await.unwrap();
        let database = postgres.create_database().await.unwrap();
        let work = Work::on(database, Nats::shared().await.unwrap().url()).await;
        let pool = &work.outbox.pool;
        run(pool, "create table public.account (id bigint primary key, n bigint not null)").await.ok();
        for table in &old.tables {
            // The page of Sequin has the table itself.
            if table.contains("create table public.account") {
                run(pool, "drop table public.account").await.unwrap();
            }
            run(pool, table).await.unwrap();
        }
        run(pool, &format!("insert into public.account select n, 0 from generate_series(1, {KEYS}) n")).await.unwrap();
        run(
            pool,
            "drop table public.effect;
             create table public.effect (id bigint generated always as identity, key text, n bigint, via text);
             create table public.old_done (sequence bigint primary key)",
        )
        .await
        .unwrap();
        run(pool, old.new_handler).await.unwrap();
        let name = format!("OLD_{}", work.outbox.naming.stream);
        let subjects = vec![format!("{name}.>")];
        let stream = work.context.create_stream(stream::Config { name: name.clone(), subjects, ..Default::default() });
        let config = pull::Config {
            durable_name: Some("old".into()),
            ack_policy: AckPolicy::Explicit,
            filter_subject: format!("{name}.{}", old.subject),
            ..Default::default()
        };
        let consumer = stream.await.unwrap().create_consumer(config).await.unwrap();
        let writing = Arc::new(AtomicBool::new(true));
        Self { _postgres: postgres, work, old, consumer, stop: CancellationToken::new(), writers: Vec::new(), writing }
    }

    fn pool(&self) -> &PgPool {
        &self.work.outbox.pool
    }

    fn old_stream(&self) -> String {
        format!("OLD_{}", self.work.outbox.naming.stream)
    }

    /// Writers that go on until the end, and the old system with its consumer.
    fn start(&mut self) {
        for writer in 0..WRITERS {
            let (pool, writing, insert) = (self.pool().clone(), self.writing.clone(), self.old.insert);
            self.writers.push(tokio::spawn(async move {
                let mut turn = writer;
                while writing.load(Ordering::Relaxed) {
                    turn += 1;
                    write(&pool, 1 + turn % KEYS, insert).await;
                    // A pace at which the old system keeps up on a busy machine.
                    tokio::time::sleep(Duration::from_millis(30)).await;
                }
            }));
        }
    }

    /// The old consumer: one message after the other, each once, in its order.
    fn consume(&self) -> (CancellationToken, JoinHandle<()>) {
        let stop = CancellationToken::new();
        let (consumer, pool, ours, stopped) = (self.consumer.clone(), self.pool().clone(), self.old.ours, stop.clone());
        let task = tokio::spawn(async move {
            let mut messages = consumer.messages().await.unwrap();
            loop {
                let message = tokio::select! {
                    () = stopped.cancelled() => return,
                    message = messages.next() => message.unwrap().unwrap(),
                };
                handle(&pool, &message, ours).await;
                message.ack().await.unwrap();
            }
        });
        (stop, task)
    }

    async fn count(&self, via: &str) -> i64 {
        let query = "select count(*) from public.effect where via = $1";
        sqlx::query_scalar(query).bind(via).fetch_one(self.pool()).await.unwrap()
    }

    /// Waits until this side has handled many more.
    async fn more(&self, via: &str) {
        let enough = self.count(via).await + MANY;
        eventually(SOON, via, async || self.count(via).await >= enough).await.unwrap();
    }

    /// Runs a cut, again when somebody holds the table for too long, as the page says.
    async fn cut(&self, statement: &str) {
        eventually(SOON, "the lock is free for a moment", async || match run(self.pool(), statement).await {
            Ok(()) => true,
            Err(error) if error.as_database_error().is_some_and(|error| error.code().as_deref() == Some("55P03")) => {
                run(self.pool(), "rollback").await.ok();
                false
            }
            Err(error) => panic!("{error}"),
        })
        .await
        .unwrap();
    }

    /// Waits until the old side has published and handled what was committed before the cut.
    async fn drain_old(&self) {
        eventually(SOON, "the old side is published", async || {
            sqlx::query_scalar::<_, Option<bool>>(AssertSqlSafe(self.old.published))
                .fetch_one(self.pool())
                .await
                .unwrap()
                .unwrap_or(false)
        })
        .await
        .unwrap();
        let stream = self.work.context.get_stream(&self.old_stream()).await.unwrap();
        let subject = format!("{}.{}", self.old_stream(), self.old.subject);
        let last = stream.get_last_raw_message_by_subject(&subject).await.unwrap().sequence;
        self.acknowledged(&self.old_stream(), "old", last).await;
    }

    /// Waits until everything that is committed is published, and the subscriber has acknowledged the last of it.
    async fn drain_new(&self) {
        eventually(SOON, "the new side is published", async || {
            let output = self.work.outbox.operator(&["status", "--json"]);
            let status: Value = serde_json::from_slice(&output.stdout).unwrap();
            status["backlog"]["events"] == 0
        })
        .await
        .unwrap();
        let stream = self.work.outbox.naming.stream.clone();
        let last = self.work.context.get_stream(&stream).await.unwrap().cached_info().state.last_sequence;
        self.acknowledged(&stream, "receipts", last).await;
    }

    /// How many messages wait the server tells a moment late, so it goes by the floor.
    async fn acknowledged(&self, stream: &str, consumer: &str, last: u64) {
        let stream = self.work.context.get_stream(stream).await.unwrap();
        let mut floor = 0;
        eventually(SOON, consumer, async || {
            floor = stream.consumer_info(consumer).await.unwrap().ack_floor.stream_sequence;
            floor >= last
        })
        .await
        .unwrap_or_else(|error| panic!("{error}: at {floor} of {last}"));
    }

    /// The page's command.
    fn aftercommit(&self, command: &str) {
        let console =
            PAGE.lines().find_map(|line| line.strip_prefix("$ aftercommit ").filter(|rest| rest.starts_with(command)));
        let command = console.unwrap_or_else(|| in_a_sentence(command)).replace("\"back to the old consumer\"", "back");
        let output = self.work.outbox.operator(&command.split(' ').collect::<Vec<_>>());
        assert!(output.status.success(), "{output:?}");
    }

    /// Forth, back and forth; then the writers stop, and everything is counted.
    async fn moves(&mut self) {
        let toml = PAGE.split("```toml\n").nth(1).unwrap().split("```").next().unwrap();
        let relay = self.work.outbox.relay();
        self.start();
        let mut consumer = Some(self.consume());
        let mut worker: Option<WorkerProcess> = None;
        self.more("old").await;
        for round in 0..2 {
            self.cut(self.old.cut).await;
            self.drain_old().await;
            let (stop, task) = consumer.take().unwrap();
            stop.cancel();
            task.await.unwrap();
            match &worker {
                None => worker = Some(self.work.process(toml)),
                Some(_) => self.aftercommit("worker resume"),
            }
            self.more("new").await;
            if round == 1 {
                break;
            }
            self.cut(self.old.back).await;
            self.drain_new().await;
            self.aftercommit("worker pause");
            consumer = Some(self.consume());
            self.more("old").await;
        }
        self.writing.store(false, Ordering::Relaxed);
        for writer in self.writers.drain(..) {
            writer.await.unwrap();
        }
        self.drain_new().await;
        self.stop.cancel();
        relay.stop().await.unwrap();
        self.assert_each_once_in_order().await;
    }

    async fn assert_each_once_in_order(&self) {
        let written: Vec<(i64, i64)> =
            sqlx::query_as("select id, n from public.account").fetch_all(self.pool()).await.unwrap();
        let effects: Vec<(String, i64)> =
            sqlx::query_as("select key, n from public.effect order by id").fetch_all(self.pool()).await.unwrap();
        let mut of_key: BTreeMap<String, Vec<i64>> = BTreeMap::new();
        for (key, n) in effects {
            of_key.entry(key).or_default().push(n);
        }
        for (key, last) in &written {
            let numbers = of_key.remove(&key.to_string()).unwrap_or_default();
            assert_eq!(numbers, Vec::from_iter(1..=*last), "account {key}: each of {last} events once and in order");
        }
        assert!(of_key.is_empty(), "{of_key:?}");
        let total: i64 = written.iter().map(|(_, last)| last).sum();
        println!("{total} events: lost 0, doubled 0, out of order 0");
        assert!(total >= 4 * MANY);
    }
}

/// A command that the page has within its text.
fn in_a_sentence(command: &str) -> &'static str {
    let text = format!("`aftercommit {command}");
    let at = PAGE.find(&text).unwrap_or_else(|| panic!("the page has no {text}"));
    PAGE[at + "`aftercommit ".len()..].split('`').next().unwrap()
}

/// Several statements at once, as psql sends them.
async fn run(pool: &PgPool, statements: &str) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(AssertSqlSafe(statements.to_string())).execute(pool).await.map(drop)
}

/// One transaction: the key's row first, as the contract wants it, then the event.
async fn write(pool: &PgPool, key: i64, insert: Option<&'static str>) {
    let mut tx = pool.begin().await.unwrap();
    let n: i64 = sqlx::query_scalar("update public.account set n = n + 1 where id = $1 returning n")
        .bind(key)
        .fetch_one(&mut *tx)
        .await
        .unwrap();
    if let Some(insert) = insert {
        let done = sqlx::query(insert).bind(key).bind(n).execute(&mut *tx).await.unwrap();
        assert_eq!(done.rows_affected(), 1, "what the service hears of its insert");
    }
    tx.commit().await.unwrap();
}

/// Writes the effect of an old message, unless it was there or is the new side's.
async fn handle(pool: &PgPool, message: &jetstream::Message, ours: Option<&'static str>) {
    let body: Value = serde_json::from_slice(&message.payload).unwrap();
    let mut tx = pool.begin().await.unwrap();
    let sequence = i64::try_from(message.info().unwrap().stream_sequence).unwrap();
    let new = sqlx::query("insert into public.old_done values ($1) on conflict do nothing").bind(sequence);
    let mut handles = new.execute(&mut *tx).await.unwrap().rows_affected() == 1;
    if let Some(ours) = ours {
        let place = body["metadata"]["commit_lsn"].as_i64().unwrap();
        let ours = AssertSqlSafe(format!("{ours}::numeric"));
        handles &= sqlx::query_scalar::<_, bool>(ours).bind(place).fetch_one(&mut *tx).await.unwrap();
    }
    if handles {
        // Sequin's messages have the row.
        let row = if body["record"].is_object() { &body["record"] } else { &body };
        sqlx::query("insert into public.effect (key, n, via) values ($1, $2, 'old')")
            .bind(row["id"].to_string())
            .bind(row["n"].as_i64().unwrap())
            .execute(&mut *tx)
            .await
            .unwrap();
    }
    tx.commit().await.unwrap();
}

/// A poller as people write them: rows in the order of their ids, a batch in a transaction.
async fn poll(pool: PgPool, context: jetstream::Context, stream: String, stop: CancellationToken) {
    while !stop.is_cancelled() {
        let mut tx = pool.begin().await.unwrap();
        let rows = sqlx::query(
            "select id, topic, payload::text from public.outbox where published_at is null order by id limit 50 for update skip locked",
        )
        .fetch_all(&mut *tx)
        .await
        .unwrap();
        for row in &rows {
            let subject = format!("{stream}.{}", row.get::<String, _>(1));
            context.publish(subject, row.get::<String, _>(2).into()).await.unwrap().await.unwrap();
            let done = sqlx::query("update public.outbox set published_at = now() where id = $1");
            done.bind(row.get::<i64, _>(0)).execute(&mut *tx).await.unwrap();
        }
        tx.commit().await.unwrap();
        if rows.is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// A row as `test_decoding` writes it: `table public.account: UPDATE: id[bigint]:1 n[bigint]:7`.
struct Change {
    table: String,
    action: String,
    columns: BTreeMap<String, String>,
}

fn change(data: &str) -> Option<Change> {
    let mut parts = data.strip_prefix("table ")?.splitn(3, ": ");
    let (table, action, rest) = (parts.next()?.to_string(), parts.next()?.to_lowercase(), parts.next()?);
    let mut columns = BTreeMap::new();
    let mut rest = rest.trim_start();
    while let Some((name, tail)) = rest.split_once('[') {
        let (_, tail) = tail.split_once("]:")?;
        let (value, tail) = match tail.strip_prefix('\'') {
            Some(quoted) => quoted.split_once('\'')?,
            None => tail.split_once(' ').unwrap_or((tail, "")),
        };
        columns.insert(name.to_string(), value.to_string());
        rest = tail.trim_start();
    }
    Some(Change { table, action, columns })
}

/// Reads the write-ahead log in the order of commits, and publishes what `message` makes of a change and the place of its
/// commit: headers, subject, payload. The slot is moved once everything is published.
async fn decode(
    pool: PgPool,
    context: jetstream::Context,
    slot: &'static str,
    message: impl Fn(&Change, i64) -> Option<(String, String, Value)>,
    stop: CancellationToken,
) {
    while !stop.is_cancelled() {
        let end: String = sqlx::query_scalar("select pg_current_wal_flush_lsn()::text").fetch_one(&pool).await.unwrap();
        let rows = sqlx::query(
            "select (lsn - '0/0')::bigint, data from pg_logical_slot_peek_changes($1, $2::text::pg_lsn, null, 'include-xids', 'off', 'skip-empty-xacts', 'on')",
        )
        .bind(slot)
        .bind(&end)
        .fetch_all(&pool)
        .await
        .unwrap();
        let mut transaction: Vec<String> = Vec::new();
        for row in rows {
            let (place, data): (i64, String) = (row.get(0), row.get(1));
            if data != "COMMIT" {
                transaction.push(data);
                continue;
            }
            for (id, subject, payload) in
                transaction.drain(..).filter_map(|data| change(&data)).filter_map(|change| message(&change, place))
            {
                let mut headers = HeaderMap::new();
                headers.insert("Nats-Msg-Id", id);
                let body = payload.to_string().into();
                context.publish_with_headers(subject, headers, body).await.unwrap().await.unwrap();
            }
        }
        let moved = sqlx::query("select pg_replication_slot_advance($1, $2::text::pg_lsn)").bind(slot).bind(&end);
        moved.execute(&pool).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// False where PostgreSQL was installed without its contrib modules.
async fn slot(pool: &PgPool, name: &str) -> bool {
    let made = run(pool, &format!("select pg_create_logical_replication_slot('{name}', 'test_decoding')")).await;
    if let Err(error) = &made {
        println!(
            "SKIPPED: a stand-in reads the write-ahead log with test_decoding, which comes with PostgreSQL: {error}"
        );
    }
    made.is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hand_written_outbox_is_moved_back_and_moved_again() {
    let [table, function, cut, published] = sql("From an outbox with a poller")[..] else { panic!("not four blocks") };
    let receipt = handler("event -> 'data' ->> 'id'", "(event -> 'data' ->> 'n')::bigint");
    let mut scene = Scene::new(Old {
        tables: vec![table, function],
        cut,
        published,
        back: sql("Back")[0],
        insert: Some(
            "insert into public.outbox (topic, key, payload)
             values ('account.changed', 'account-' || $1::bigint, jsonb_build_object('id', $1::bigint, 'n', $2::bigint))",
        ),
        ours: None,
        subject: "account.changed",
        new_handler: receipt.leak(),
    })
    .await;
    let system = poll(scene.pool().clone(), scene.work.context.clone(), scene.old_stream(), scene.stop.clone());
    let system = tokio::spawn(system);
    scene.moves().await;
    system.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn debezium_s_outbox_is_moved_back_and_moved_again() {
    let [table, function, cut, published] = sql("From Debezium's outbox event router")[..] else {
        panic!("not four blocks")
    };
    let receipt = handler("event -> 'data' ->> 'id'", "(event -> 'data' ->> 'n')::bigint");
    let mut scene = Scene::new(Old {
        tables: vec![table, function],
        cut,
        published,
        back: sql("Back")[1],
        insert: Some(
            "insert into public.outboxevent (id, aggregatetype, aggregateid, type, payload)
             values (gen_random_uuid(), 'Account', $1::bigint::text, 'Changed', jsonb_build_object('id', $1::bigint, 'n', $2::bigint))",
        ),
        ours: None,
        subject: "outbox.event.Account",
        new_handler: receipt.leak(),
    })
    .await;
    if !slot(scene.pool(), "debezium").await {
        return;
    }
    let stream = scene.old_stream();
    // Topic and header of the message, the payload as its value.
    let routed = move |change: &Change, _| {
        let inserted = change.table == "public.outboxevent" && change.action == "insert";
        let column = |name: &str| change.columns[name].as_str();
        inserted.then(|| {
            let payload = serde_json::from_str(column("payload")).unwrap();
            (column("id").to_string(), format!("{stream}.outbox.event.{}", column("aggregatetype")), payload)
        })
    };
    let system = decode(scene.pool().clone(), scene.work.context.clone(), "debezium", routed, scene.stop.clone());
    let system = tokio::spawn(system);
    scene.moves().await;
    system.await.unwrap();
    let ids: i64 =
        sqlx::query_scalar("select count(*) from aftercommit.outbox o join public.outboxevent e on e.id = o.event_id")
            .fetch_one(scene.pool())
            .await
            .unwrap();
    assert!(ids >= MANY, "events keep their ids");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_sequin_reads_is_moved_back_and_moved_again() {
    let [table, cut, ours, published] = sql("From Sequin")[..] else { panic!("not four blocks") };
    let receipt = handler("event -> 'data' -> 'new' ->> 'id'", "(event -> 'data' -> 'new' ->> 'n')::bigint");
    let mut scene = Scene::new(Old {
        tables: vec![table],
        cut,
        published,
        back: sql("Back")[2],
        insert: None,
        ours: Some(ours.trim_end()),
        subject: "sequin.changes.shop.public.account.update",
        new_handler: receipt.leak(),
    })
    .await;
    if !slot(scene.pool(), "sequin").await {
        return;
    }
    let stream = scene.old_stream();
    let shaped = move |change: &Change, place: i64| {
        let number = |name: &str| change.columns[name].parse::<i64>().unwrap();
        (change.table == "public.account").then(|| {
            let key = format!("{place}-{}", change.columns["id"]);
            let message = json!({
                "record": { "id": number("id"), "n": number("n") },
                "changes": { "n": number("n") - 1 },
                "action": change.action,
                "metadata": {
                    "table_schema": "public", "table_name": "account", "idempotency_key": key, "commit_lsn": place,
                },
            });
            (key, format!("{stream}.sequin.changes.shop.public.account.{}", change.action), message)
        })
    };
    let system = decode(scene.pool().clone(), scene.work.context.clone(), "sequin", shaped, scene.stop.clone());
    let system = tokio::spawn(system);
    scene.moves().await;
    system.await.unwrap();
}
