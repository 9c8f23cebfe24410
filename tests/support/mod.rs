//! A private PostgreSQL for the tests of one binary, and a database for each test.
#![allow(dead_code, reason = "not every test binary uses all of it")]

use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use aftercommit::config::PostgresConfig;
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool};

/// Lives until the test process ends: then its standard input closes, and the shell around it stops the server.
struct Server {
    port: u16,
    _shell: Child,
}

static SERVER: OnceLock<Server> = OnceLock::new();

/// The directory of PostgreSQL's programs.
fn bin() -> PathBuf {
    let mut versions: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .map(|dir| dir.flatten().map(|entry| entry.path().join("bin")).collect())
        .unwrap_or_default();
    versions.sort();
    versions.pop().expect("PostgreSQL is not in /usr/lib/postgresql")
}

fn start() -> Server {
    let dir = std::env::temp_dir().join(format!("aftercommit-test-{}", std::process::id()));
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    std::fs::create_dir(&dir).unwrap();
    let mut shell = Command::new("sh");
    shell
        .args(["-c", SCRIPT, "sh"])
        .args([bin().as_os_str(), dir.as_os_str(), OsStr::new(&port.to_string())])
        .stdin(Stdio::piped())
        .current_dir(&dir);
    let is_root = Command::new("id").arg("-u").output().unwrap().stdout == b"0\n";
    if is_root {
        // PostgreSQL does not run as root.
        const NOBODY: u32 = 65534;
        std::os::unix::fs::chown(&dir, Some(NOBODY), Some(NOBODY)).unwrap();
        shell.uid(NOBODY).gid(NOBODY);
    }
    let shell = shell.spawn().unwrap();
    wait_until_ready(port, &dir);
    Server { port, _shell: shell }
}

const SCRIPT: &str = r#"
"$1/initdb" -D "$2/data" -U postgres -A trust -E UTF8 --locale=C --no-sync >"$2/log" 2>&1 || exit 1
"$1/postgres" -D "$2/data" -h 127.0.0.1 -p "$3" -k "$2" -c fsync=off -c max_connections=200 >>"$2/log" 2>&1 &
read -r _
kill -INT $!
wait $!
rm -rf "$2"
"#;

fn wait_until_ready(port: u16, dir: &Path) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    loop {
        let ready = Command::new(bin().join("pg_isready"))
            .args(["-q", "-h", "127.0.0.1", "-p", &port.to_string()])
            .status()
            .unwrap()
            .success();
        if ready {
            return;
        }
        if std::time::Instant::now() > deadline {
            panic!("{}", std::fs::read_to_string(dir.join("log")).unwrap_or_default());
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

fn server() -> &'static Server {
    SERVER.get_or_init(start)
}

/// A database of the test's own.
pub struct Database {
    pub config: PostgresConfig,
}

impl Database {
    /// An empty one.
    pub async fn empty() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("test_{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let port = server().port;
        let mut admin = PgConnection::connect(&url(port, "postgres", "postgres")).await.unwrap();
        sqlx::query(AssertSqlSafe(format!("create database {name}"))).execute(&mut admin).await.unwrap();
        Self { config: PostgresConfig { url: url(port, "postgres", &name) } }
    }

    /// One with the schema aftercommit.
    pub async fn migrated() -> Self {
        let database = Self::empty().await;
        aftercommit::admin::migrate(&database.config).await.unwrap();
        database
    }

    pub async fn pool(&self) -> PgPool {
        PgPool::connect(&self.config.url).await.unwrap()
    }

    /// The same database for another role.
    pub fn url_of(&self, role: &str) -> String {
        self.config.url.replace("//postgres@", &format!("//{role}@"))
    }

    pub async fn execute(&self, sql: &str) {
        let mut connection = PgConnection::connect(&self.config.url).await.unwrap();
        sqlx::raw_sql(AssertSqlSafe(sql.to_string())).execute(&mut connection).await.unwrap();
    }

    /// Feeds a script to psql, which stops at the first error.
    pub fn psql(&self, script: &str) -> Output {
        let mut psql = Command::new(bin().join("psql"))
            .args(["-X", "-q", "--single-transaction", "-v", "ON_ERROR_STOP=1", "-d", &self.config.url])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        psql.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
        psql.wait_with_output().unwrap()
    }

    /// What pg_dump prints, without the lines that differ from run to run.
    pub fn pg_dump(&self, options: &[&str]) -> String {
        let dump = Command::new(bin().join("pg_dump")).args(options).args(["-d", &self.config.url]).output().unwrap();
        assert!(dump.status.success(), "{}", String::from_utf8_lossy(&dump.stderr));
        let script = String::from_utf8(dump.stdout).unwrap();
        let random = |line: &&str| line.starts_with("\\restrict") || line.starts_with("\\unrestrict");
        script.lines().filter(|line| !random(line)).fold(String::new(), |script, line| script + line + "\n")
    }
}

fn url(port: u16, role: &str, database: &str) -> String {
    format!("postgres://{role}@127.0.0.1:{port}/{database}")
}

/// What psql printed, when it succeeded.
pub fn succeeded(output: Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
