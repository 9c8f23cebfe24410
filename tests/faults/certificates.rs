//! Certificates that run out and are replaced, authorities that change, and servers that offer no TLS any more, while
//! everybody is connected. A process that is refused says so, and goes on as soon as the files are right, without a
//! restart.

use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres, PostgresOptions};
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool};

use super::live::{Live, start};
use super::support::{Authority, Directory, RelayProcess, SOON, Writers, complains, free_address};

/// How long the first certificate is good.
const SHORT: Duration = Duration::from_secs(6);

/// Relay and worker, whose words are listened to.
struct Clients<'a> {
    live: &'a Live,
    clients: [Client; 2],
}

struct Client {
    name: &'static str,
    /// Where it tells about itself.
    address: String,
    /// How much of its log was there when it was listened to.
    heard: usize,
    _process: RelayProcess,
}

impl<'a> Clients<'a> {
    fn start(live: &'a Live, settings: impl Fn(&mut Command, &str)) -> Self {
        let clients = ["relay", "worker"].map(|name| {
            let address = free_address();
            let mut command = if name == "relay" { live.relay(name) } else { live.worker(name) };
            command.env("AFTERCOMMIT_HTTP", &address).env("AFTERCOMMIT_UNHEALTHY_AFTER", "1s");
            settings(&mut command, name);
            Client { name, address, heard: 0, _process: start(command) }
        });
        Self { live, clients }
    }

    /// From here on.
    fn listen(&mut self) {
        for client in &mut self.clients {
            client.heard = self.live.log(client.name).len();
        }
    }

    /// Waits until the relay has said the first of that in its log since it was listened to, and both say all of it when
    /// asked for their health.
    async fn say(&self, words: &[&str]) {
        for Client { name, address, heard, .. } in &self.clients {
            // The worker logs the first trouble of an outage only, which may be that it was cut off.
            let said = async || *name == "worker" || self.live.log(name).split_off(*heard).contains(words[0]);
            let waited = eventually(SOON, "the refusal is told", said).await;
            assert!(waited.is_ok(), "{name} does not say {words:?}:\n{}", self.live.log(name).split_off(*heard));
            complains(address, words).await;
        }
    }

    /// Nothing gets through, whatever is written meanwhile.
    async fn are_stuck(&self, writers: &Writers) {
        let seen = async || {
            sqlx::query_scalar::<_, i64>("select count(*) from seen").fetch_one(&self.live.books).await.unwrap()
        };
        let (before, heard) = (seen().await, self.live.log("relay").len());
        writers.more(20).await;
        let tried = async || self.live.log("relay").len() > heard;
        eventually(SOON, "the relay has tried again and was refused", tried).await.unwrap();
        assert_eq!(seen().await, before, "nothing comes through");
    }
}

/// A NATS server that has TLS, or has not, with the certificate in its files.
struct Secured {
    nats: Nats,
    files: Directory,
}

impl Secured {
    async fn new() -> Self {
        let files = Directory::new();
        files.write("tls.conf", "");
        // An included file is looked for beside the server's own.
        let config = format!("include \"../{}/tls.conf\"", files.path().file_name().unwrap().display());
        Self { nats: Nats::start(NatsOptions { config, ..NatsOptions::default() }).await.unwrap(), files }
    }

    fn with_tls(&self, with: bool) {
        let file = |name: &str| self.files.path().join(name).display().to_string();
        let block = format!("tls {{ cert_file: \"{}\", key_file: \"{}\" }}", file("server.crt"), file("server.key"));
        self.files.write("tls.conf", if with { block } else { String::new() });
    }

    fn certificate(&self, (certificate, key): (String, String)) {
        self.files.write("server.crt", certificate);
        self.files.write("server.key", key);
    }

    /// As `nats-server --signal reload` does.
    fn reload(&self) {
        let pid = std::fs::read_to_string(self.nats.store_directory().parent().unwrap().join("pid")).unwrap();
        assert!(Command::new("kill").args(["-HUP", pid.trim()]).status().unwrap().success());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_of_nats_run_out_and_are_replaced_under_all() {
    let (old, new, mut server) = (Authority::new(), Authority::new(), Secured::new().await);
    let postgres = Postgres::shared().await.unwrap();
    let (outbox, books) = (postgres.create_database().await.unwrap(), postgres.create_database().await.unwrap());
    let live = Live::new(outbox, books, server.nats.url()).await;
    let ca = live.files.write("ca.crt", &old.certificate);
    server.certificate(old.issue_for("server", SHORT));
    let runs_out = Instant::now() + SHORT + Duration::from_secs(1);
    server.with_tls(true);
    server.nats.restart().await.unwrap();
    let url = server.nats.url().replace("nats://", "tls://");
    let mut clients = Clients::start(&live, |command, _| _ = command.env("NATS_URL", &url).env("NATS_CA", &ca));
    let writers = Writers::start(&live.outbox.pool, 1, 6).await;
    live.goes_on(&writers, 20).await;

    // Who is connected stays so; who comes back is refused until there is a new one.
    tokio::time::sleep_until(runs_out.into()).await;
    live.goes_on(&writers, 20).await;
    clients.listen();
    server.nats.restart().await.unwrap();
    clients.say(&["expired", "NATS_CA"]).await;
    clients.are_stuck(&writers).await;
    server.certificate(old.issue("server"));
    server.reload();
    live.goes_on(&writers, 20).await;

    // Another authority: those who trust the old one are refused until they have the new one's certificate.
    server.certificate(new.issue("server"));
    clients.listen();
    server.nats.restart().await.unwrap();
    clients.say(&["peer certificate", "NATS_CA"]).await;
    clients.are_stuck(&writers).await;
    std::fs::write(&ca, &new.certificate).unwrap();
    live.goes_on(&writers, 20).await;

    // No TLS any more: nobody goes on without.
    server.with_tls(false);
    clients.listen();
    server.nats.restart().await.unwrap();
    clients.say(&["TLS", "demand"]).await;
    clients.are_stuck(&writers).await;
    server.with_tls(true);
    server.nats.restart().await.unwrap();
    live.goes_on(&writers, 20).await;

    writers.stop().await;
    live.handled(SOON).await;
    // For our own look at the stream.
    server.with_tls(false);
    server.nats.restart().await.unwrap();
    live.assert_whole().await;
}

/// Gives the server a certificate, which counts from the next connection on.
async fn certify(postgres: &Postgres, pool: &PgPool, (certificate, key): (String, String), trusted: &Path) {
    let data = postgres.data_directory();
    let owner = std::fs::metadata(&data).unwrap();
    for (name, text) in [("server.crt", certificate), ("server.key", key)] {
        let path = data.join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        use std::os::unix::fs::MetadataExt;
        chown(&path, Some(owner.uid()), Some(owner.gid())).unwrap();
    }
    tls(pool, true).await;
    // The server reads its files some time after it was told to.
    let url = secured(&postgres.url("postgres"), trusted);
    let counts = async || PgConnection::connect(&url).await.is_ok();
    eventually(SOON, "the certificate counts", counts).await.unwrap();
}

/// Lets the server offer TLS, or not.
async fn tls(pool: &PgPool, on: bool) {
    let setting = format!("alter system set ssl = {on}");
    for sql in [setting.as_str(), "select pg_reload_conf()"] {
        sqlx::query(AssertSqlSafe(sql)).execute(pool).await.unwrap();
    }
    eventually(SOON, "it is so in new sessions", async || {
        let show = "select setting::boolean from pg_settings where name = 'ssl'";
        sqlx::query_scalar::<_, bool>(show).fetch_one(pool).await.unwrap() == on
    })
    .await
    .unwrap();
}

impl Clients<'_> {
    /// Ends the sessions of relay and worker until they say why they do not come back.
    async fn are_refused(&mut self, pool: &PgPool, words: &[&str]) {
        self.listen();
        let end = "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'aftercommit-%'";
        // A session that was just being made is not seen at first.
        let cut_off = async {
            loop {
                sqlx::query(end).execute(pool).await.unwrap();
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::select! {
            () = self.say(words) => {}
            () = cut_off => {}
        }
    }
}

fn secured(url: &str, ca: &Path) -> String {
    format!("{url}?sslmode=verify-full&sslrootcert={}", ca.display())
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_of_postgresql_run_out_and_are_replaced_under_all() {
    let (old, new) = (Authority::new(), Authority::new());
    let postgres = Postgres::start(PostgresOptions { fsync: false, settings: Vec::new() }).await.unwrap();
    let (outbox, books) = (postgres.create_database().await.unwrap(), postgres.create_database().await.unwrap());
    let live = Live::new(outbox, books, Nats::shared().await.unwrap().url()).await;
    let pool = PgPool::connect(&postgres.url("postgres")).await.unwrap();
    let ca = live.files.write("ca.crt", &old.certificate);
    certify(&postgres, &pool, old.issue_for("server", SHORT), &ca).await;
    let runs_out = Instant::now() + SHORT + Duration::from_secs(1);
    let mut clients = Clients::start(&live, |command, name| {
        let url = if name == "relay" { &live.outbox.postgres.url } else { &live.database.url };
        command.env("DATABASE_URL", secured(url, &ca));
    });
    let writers = Writers::start(&live.outbox.pool, 1, 6).await;
    live.goes_on(&writers, 20).await;

    tokio::time::sleep_until(runs_out.into()).await;
    clients.are_refused(&pool, &["expired", "sslrootcert"]).await;
    clients.are_stuck(&writers).await;
    certify(&postgres, &pool, old.issue("server"), &ca).await;
    live.goes_on(&writers, 20).await;

    let trusted = live.files.write("new-ca.crt", &new.certificate);
    certify(&postgres, &pool, new.issue("server"), &trusted).await;
    clients.are_refused(&pool, &["peer certificate", "sslrootcert"]).await;
    clients.are_stuck(&writers).await;
    std::fs::write(&ca, &new.certificate).unwrap();
    live.goes_on(&writers, 20).await;

    tls(&pool, false).await;
    let url = secured(&postgres.url("postgres"), &ca);
    let refused = async || PgConnection::connect(&url).await.is_err();
    eventually(SOON, "the server has no TLS", refused).await.unwrap();
    clients.are_refused(&pool, &["TLS", "demand"]).await;
    clients.are_stuck(&writers).await;
    tls(&pool, true).await;
    live.goes_on(&writers, 20).await;
    writers.stop().await;
    live.assert_whole().await;
}
