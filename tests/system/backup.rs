//! docs/backup.md: the databases and the stream go back in time, each alone and together, and the page's commands bring them together
//! again. In the end each event that the outbox has is in the stream and has taken effect once, in the order of its key.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use crate::support::{Directory, SOON, WorkerProcess, free_address};
use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres, PostgresOptions};

const PAGE: &str = include_str!("../../docs/backup.md");
const TOML: &str = "[[subscriber]]\nname = \"receipts\"\ntypes = [\"*\"]\nsql = { function = \"public.receipt\" }\n";
const KEYS: i64 = 5;

/// The commands below a heading of the page, block by block.
fn sh(heading: &str) -> Vec<&'static str> {
    let (_, section) = PAGE.split_once(&format!("\n## {heading}\n")).unwrap_or_else(|| panic!("no {heading}"));
    let section = section.split("\n## ").next().unwrap();
    section.split("```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect()
}

/// The program `nats`, without which a stream is not backed up.
fn nats_program() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let go = std::env::var_os("HOME").map(|home| PathBuf::from(home).join("go/bin"));
    let found = std::env::split_paths(&path).chain(go).map(|place| place.join("nats")).find(|file| file.is_file());
    if found.is_none() {
        println!("SKIPPED: backups of the stream are made with the program `nats`, which is not installed");
    }
    found
}

struct Scene {
    postgres: Postgres,
    nats: Nats,
    files: Directory,
    relay: Option<WorkerProcess>,
    worker: Option<WorkerProcess>,
    /// Where the relay tells how it is.
    health: String,
}

impl Scene {
    /// Publisher and subscriber with a database each, and a stream that belongs to the publisher; both processes run.
    async fn new() -> Self {
        let files = Directory::new();
        std::fs::create_dir(files.path().join("archive")).unwrap();
        // PostgreSQL has a user of its own, who has to get there.
        let open = |path: PathBuf| Command::new("chmod").arg("777").arg(path).status().unwrap();
        open(files.path().to_path_buf());
        open(files.path().join("archive"));
        let archive = format!("cp %p {}/%f", files.path().join("archive").display());
        let settings = vec![("archive_mode".into(), "on".into()), ("archive_command".into(), archive)];
        let postgres = Postgres::start(PostgresOptions { fsync: false, settings }).await.unwrap();
        let nats = Nats::start(NatsOptions::default()).await.unwrap();
        let mut scene = Self { postgres, nats, files, relay: None, worker: None, health: free_address() };
        scene.files.write("worker.toml", TOML);
        scene.run("createdb shop; createdb receipts");
        scene.run("DATABASE_URL=$SHOP_URL aftercommit migrate; DATABASE_URL=$RECEIPTS_URL aftercommit migrate");
        scene.sql("shop", "create table public.account (id bigint primary key, n bigint not null)").await;
        scene.sql("shop", &format!("insert into public.account select n, 0 from generate_series(1, {KEYS}) n")).await;
        let table = "create table public.receipt (id bigint generated always as identity, event_id uuid, key text)";
        scene.sql("receipts", table).await;
        let function = "create function public.receipt(event jsonb) returns void language sql as $$
            insert into public.receipt (event_id, key) values ((event ->> 'id')::uuid, event ->> 'partitionkey') $$";
        scene.sql("receipts", function).await;
        scene.run(sh("The stream")[0]);
        scene.start();
        scene.write(100).await;
        scene.settled().await;
        scene
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let (server, _) =
            self.postgres.url("").rsplit_once('/').map(|(server, rest)| (server.to_string(), rest.len())).unwrap();
        let address = server.rsplit_once('@').unwrap().1.to_string();
        let (host, port) = address.split_once(':').unwrap();
        let programs = [
            PathBuf::from(env!("CARGO_BIN_EXE_aftercommit")).parent().unwrap().to_path_buf(),
            Postgres::program("pg_dump").unwrap().parent().unwrap().to_path_buf(),
            PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join("go/bin"),
        ];
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::join_paths(programs.into_iter().chain(std::env::split_paths(&path))).unwrap();
        command
            .current_dir(self.files.path())
            .env("PATH", path)
            .envs([("PGHOST", host), ("PGPORT", port), ("PGUSER", "postgres")])
            .env("SHOP_URL", self.postgres.url("shop"))
            .env("RECEIPTS_URL", self.postgres.url("receipts"))
            .env("NATS_URL", self.nats.url())
            .env("RELAY", format!("http://{}", self.health))
            .env("RUST_LOG", "warn")
            .stdin(Stdio::null());
        command
    }

    /// Runs a block of the page.
    fn run(&self, block: &str) -> String {
        let output = self.command("bash").args(["-euc", block]).output().unwrap();
        let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "{block}\n{}{}", said(&output.stdout), said(&output.stderr));
        said(&output.stdout)
    }

    async fn connect(&self, database: &str) -> PgConnection {
        PgConnection::connect(&self.postgres.url(database)).await.unwrap()
    }

    async fn sql(&self, database: &str, sql: &str) {
        let mut connection = self.connect(database).await;
        sqlx::raw_sql(sqlx::AssertSqlSafe(sql.to_string())).execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
    }

    fn start_relay(&mut self) {
        let mut relay = self.command(env!("CARGO_BIN_EXE_aftercommit-relay"));
        relay.env("DATABASE_URL", self.postgres.url("shop")).args(["--http", &self.health]);
        self.relay = Some(WorkerProcess(relay.spawn().unwrap()));
    }

    fn start_worker(&mut self) {
        let mut worker = self.command(env!("CARGO_BIN_EXE_aftercommit-worker"));
        worker.env("DATABASE_URL", self.postgres.url("receipts")).args(["--config", "worker.toml"]);
        self.worker = Some(WorkerProcess(worker.spawn().unwrap()));
    }

    fn start(&mut self) {
        self.start_relay();
        self.start_worker();
    }

    /// So many transactions, each with one event of the key whose row it has changed.
    async fn write(&self, transactions: i64) {
        let mut connection = self.connect("shop").await;
        for n in 0..transactions {
            sqlx::query(
                "with changed as (update public.account set n = n + 1 where id = $1 returning id, n)
                 select aftercommit.publish('account.changed', to_jsonb(changed), 'account-' || id) from changed",
            )
            .bind(1 + n % KEYS)
            .execute(&mut connection)
            .await
            .unwrap();
        }
        connection.close().await.unwrap();
    }

    /// The events that the outbox has, with their keys, in its order.
    async fn committed(&self) -> Vec<(Uuid, String)> {
        let mut connection = self.connect("shop").await;
        let all = sqlx::query_as("select event_id, key from aftercommit.outbox order by id").fetch_all(&mut connection);
        let all = all.await.unwrap();
        connection.close().await.unwrap();
        all
    }

    async fn receipts(&self) -> Vec<(Uuid, String)> {
        let mut connection = self.connect("receipts").await;
        let all = sqlx::query_as("select event_id, key from public.receipt order by id").fetch_all(&mut connection);
        let all = all.await.unwrap();
        connection.close().await.unwrap();
        all
    }

    /// Waits until each event of the outbox has a receipt, then checks that it has one only, that the receipts of a key have the
    /// outbox's order, and how many receipts are for events that the outbox does not know.
    async fn proved(&self, strangers: Option<usize>) {
        let committed = self.committed().await;
        let mut lost = usize::MAX;
        eventually(SOON, "every event has its receipt", async || {
            let receipts: std::collections::HashSet<Uuid> =
                self.receipts().await.into_iter().map(|(id, _)| id).collect();
            lost = committed.iter().filter(|(id, _)| !receipts.contains(id)).count();
            // Those of events that only the stream knows come as they like.
            lost == 0 && receipts.len() >= committed.len() + strangers.unwrap_or(0)
        })
        .await
        .unwrap_or_else(|error| panic!("{error}: {lost} of {} lost", committed.len()));
        let receipts = self.receipts().await;
        let mut places: HashMap<Uuid, Vec<usize>> = HashMap::new();
        for (place, (id, _)) in receipts.iter().enumerate() {
            places.entry(*id).or_default().push(place);
        }
        assert!(places.values().all(|places| places.len() == 1), "doubled: {places:?}");
        let mut last: HashMap<&str, usize> = HashMap::new();
        for (id, key) in &committed {
            let place = places.remove(id).unwrap()[0];
            let before = last.insert(key, place);
            assert!(before < Some(place), "out of order: {key} {id}");
        }
        if let Some(strangers) = strangers {
            assert_eq!(places.len(), strangers, "receipts of events that the outbox does not know");
        }
        println!("{} events, {} the outbox has lost: lost 0, doubled 0, out of order 0", committed.len(), places.len());
    }

    /// Waits until everything that is committed is handled.
    async fn settled(&self) {
        self.proved(None).await;
    }

    /// Restores the publisher's database and starts its relay again.
    fn restore_shop(&mut self) {
        self.relay = None;
        self.run(sh("The publisher's database")[0]);
    }

    fn restore_receipts(&mut self) {
        self.worker = None;
        self.run(sh("A subscriber's database")[0]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_publishers_database_goes_back() {
    if nats_program().is_none() {
        return;
    }
    let mut scene = Scene::new().await;
    scene.run(sh("What to back up")[0]);
    scene.write(40).await;
    scene.settled().await;
    scene.restore_shop();
    // Committed by the restored service before the relay is there: with the numbers that the lost events had.
    scene.write(20).await;
    scene.start_relay();
    let found = scene.run(sh("The publisher's database")[1]);
    assert_eq!(found.lines().filter(|line| line.contains("ghost")).count(), 40, "{found}");
    scene.write(20).await;
    scene.proved(Some(40)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscribers_database_goes_back() {
    if nats_program().is_none() {
        return;
    }
    let mut scene = Scene::new().await;
    scene.run(sh("What to back up")[0]);
    scene.write(40).await;
    scene.settled().await;
    scene.restore_receipts();
    assert_eq!(scene.receipts().await.len(), 100);
    scene.write(20).await;
    scene.run(sh("A subscriber's database")[1]);
    scene.start_worker();
    scene.write(20).await;
    scene.proved(Some(0)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stream_is_lost_and_restored() {
    if nats_program().is_none() {
        return;
    }
    let mut scene = Scene::new().await;
    let [made_anew, restored, compared] = sh("The stream")[..] else { panic!("not three blocks") };
    scene.run(sh("What to back up")[0]);
    scene.write(40).await;
    scene.settled().await;

    scene.nats.stop().await.unwrap();
    std::fs::remove_dir_all(scene.nats.store_directory()).unwrap();
    scene.nats.restart().await.unwrap();
    scene.write(20).await;
    scene.run(made_anew);
    scene.run(compared);
    scene.proved(Some(0)).await;

    scene.run(restored);
    scene.write(20).await;
    scene.run(compared);
    scene.proved(Some(0)).await;
}

/// Each of the three is the oldest once.
#[tokio::test(flavor = "multi_thread")]
async fn all_three_go_back_to_different_moments() {
    if nats_program().is_none() {
        return;
    }
    let lines: Vec<&str> = sh("What to back up")[0].lines().collect();
    let line = |word: &str| *lines.iter().find(|line| line.contains(word)).unwrap();
    let (shop, receipts, stream) = (line("shop.dump"), line("receipts.dump"), line("EVENTS"));
    for order in [[shop, receipts, stream], [receipts, stream, shop], [stream, shop, receipts]] {
        let mut scene = Scene::new().await;
        scene.run("mkdir backup");
        for backup in order {
            scene.run(backup);
            scene.write(30).await;
            scene.settled().await;
        }
        (scene.relay, scene.worker) = (None, None);
        scene.run(sh("The stream")[1]);
        scene.restore_shop();
        scene.restore_receipts();
        scene.start_relay();
        scene.run(sh("All of them")[0]);
        scene.start_worker();
        scene.write(30).await;
        scene.proved(None).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_with_both_databases_goes_back_to_a_point_in_time() {
    let mut scene = Scene::new().await;
    let base = sh("To a point in time")[0];
    scene.run("mkdir backup");
    scene.run(base);
    scene.write(30).await;
    scene.settled().await;
    scene.sql("shop", "select pg_create_restore_point('before_the_mistake')").await;
    let before = scene.committed().await.len();
    scene.write(40).await;
    scene.settled().await;
    (scene.relay, scene.worker) = (None, None);
    let mut connection = scene.connect("postgres").await;
    let segment: String =
        sqlx::query_scalar("select pg_walfile_name(pg_switch_wal())").fetch_one(&mut connection).await.unwrap();
    eventually(SOON, "the log is archived", async || {
        let query = "select coalesce(last_archived_wal >= $1, false) from pg_stat_archiver";
        sqlx::query_scalar(query).bind(&segment).fetch_one(&mut connection).await.unwrap()
    })
    .await
    .unwrap();
    drop(connection);
    go_back(&mut scene).await;
    assert_eq!(scene.committed().await.len(), before);
    scene.write(20).await;
    scene.start_relay();
    let found = scene.run(sh("The publisher's database")[1]);
    assert_eq!(found.lines().filter(|line| line.contains("ghost")).count(), 40, "{found}");
    scene.run(sh("A subscriber's database")[1]);
    scene.start_worker();
    // The subscriber went back, too, and the stream has what the outbox has lost.
    scene.proved(Some(40)).await;
}

/// Puts the base backup in the place of the server's files, as the page says, and lets it recover.
async fn go_back(scene: &mut Scene) {
    let data = scene.postgres.data_directory();
    scene.postgres.stop().await.unwrap();
    let owner = std::fs::metadata(&data).unwrap();
    // The server is known by the name in its file.
    let config = std::fs::read_to_string(data.join("postgresql.conf")).unwrap();
    std::fs::remove_dir_all(&data).unwrap();
    scene.run(&format!("cp -a backup/base {}", data.display()));
    let settings = PAGE.split("```ini\n").nth(1).unwrap().split("```").next().unwrap();
    let settings = settings.replace("/archive", &scene.files.path().join("archive").display().to_string());
    std::fs::write(data.join("postgresql.conf"), format!("{config}\n{settings}")).unwrap();
    std::fs::write(data.join("recovery.signal"), "").unwrap();
    let who = format!("{}:{}", owner.uid(), owner.gid());
    scene.run(&format!("chown -R {who} {0}; chmod 700 {0}", data.display()));
    scene.postgres.restart().await.unwrap();
    eventually(SOON, "it takes writes", async || {
        let mut connection = scene.connect("postgres").await;
        !sqlx::query_scalar::<_, bool>("select pg_is_in_recovery()").fetch_one(&mut connection).await.unwrap()
    })
    .await
    .unwrap();
}
