//! The servers of `--secured`: with TLS and passwords, the roles of deploy/postgres/roles.sql and the users and
//! permissions of deploy/nats/accounts.conf.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use aftercommit::testing::eventually;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres, PostgresOptions};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use uuid::Uuid;

use crate::Result;
use crate::servers::{Role, split_password};

const ROLES: &str = include_str!("../../deploy/postgres/roles.sql");
const ACCOUNTS: &str = include_str!("../../deploy/nats/accounts.conf");
const SOON: Duration = Duration::from_secs(30);

/// Only TLS, only with a password, the superuser too.
const ACCESS: &str = "hostssl all all 127.0.0.1/32 scram-sha-256\n";

/// The proof reads the whole stream, for which none of the users of accounts.conf has the right.
const READER: &str = r#"users: [
      { user: proof, password: $AFTERCOMMIT_PROOF_PASSWORD, permissions: {
          publish: [ "$JS.API.STREAM.INFO.EVENTS", "$JS.API.CONSUMER.CREATE.EVENTS", "$JS.API.CONSUMER.CREATE.EVENTS.>", "$JS.API.CONSUMER.*.EVENTS.*", "$JS.API.CONSUMER.MSG.NEXT.EVENTS.*" ]
          subscribe: [ "_INBOX.>" ]
      } }"#;

/// The logins, each with its roles.
const LOGINS: [(&str, &[&str]); 5] = [
    ("deploy", &["owner"]),
    ("bank", &["publisher"]),
    ("relay", &["relay", "outbox_reconciler"]),
    ("projection", &["worker", "inbox_reconciler"]),
    ("ops", &["reader"]),
];

/// What the service needs besides its role: pgbench's own tables.
const BANK_GRANTS: &str =
    "grant select, insert, update on pgbench_accounts, pgbench_tellers, pgbench_branches, pgbench_history to bank;
    grant usage on schema demo to bank";
/// And what the worker's handler needs.
const PROJECTION_GRANTS: &str = "grant usage on schema demo to projection;
    grant select, insert, update on all tables in schema demo to projection";

/// Secrets that are made anew for each run, and the certificate of the authority.
pub struct Secured {
    passwords: BTreeMap<String, String>,
    pub ca: PathBuf,
    directory: PathBuf,
}

impl Secured {
    /// Makes certificates and passwords below `directory`.
    pub fn new(directory: &Path) -> Result<(Self, [String; 2])> {
        let directory = directory.join("secured");
        fs::create_dir(&directory)?;
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o700))?;
        let mut authority = CertificateParams::new(Vec::new())?;
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.distinguished_name.push(DnType::CommonName, "the demo's authority");
        let key = KeyPair::generate()?;
        let certificate = authority.self_signed(&key)?.pem();
        let server_key = KeyPair::generate()?;
        let params = CertificateParams::new(vec!["localhost".into(), "127.0.0.1".into()])?;
        let server = params.signed_by(&server_key, &Issuer::new(authority, key))?.pem();
        let ca = directory.join("ca.crt");
        fs::write(&ca, certificate)?;
        let users = ["postgres", "provisioner", "relay", "branch_balance", "operator", "proof", "system"];
        let rest = ["outbox_reconciler", "receipts", "receipts_reconciler", "deploy", "bank", "projection", "ops"];
        // They begin with a letter, so that nats-server takes none for a number.
        let password = |name: &str| (name.to_string(), format!("p{}", Uuid::new_v4().simple()));
        let passwords = users.into_iter().chain(rest).map(password).collect();
        Ok((Self { passwords, ca, directory }, [server, server_key.serialize_pem()]))
    }

    pub fn password(&self, name: &str) -> &str {
        self.passwords.get(&name.replace('-', "_")).map_or("", String::as_str)
    }

    /// The URL of a database for a login; `server` is that of the superuser without a password.
    pub fn database_url(&self, server: &str, login: &str) -> String {
        let address = server.replace("//postgres@127.0.0.1", &format!("//{login}:{}@localhost", self.password(login)));
        format!("{address}?sslmode=verify-full&sslrootcert={}", self.ca.display())
    }

    /// The superuser's URL of a database for another login.
    pub fn as_login(&self, admin_url: &str, login: &str) -> String {
        let superuser = format!("//postgres:{}@", self.password("postgres"));
        admin_url.replace(&superuser, &format!("//{login}:{}@", self.password(login)))
    }

    /// The environment with which a program logs in at NATS.
    pub fn nats(&self, role: Role) -> Vec<(&'static str, String)> {
        let user = match role {
            Role::Owner => return Vec::new(),
            Role::Provisioner => "provisioner",
            Role::Relay => "relay",
            Role::Worker => "branch-balance",
            Role::Operator => "operator",
        };
        let mut settings = vec![
            ("NATS_USER", user.to_string()),
            ("NATS_PASSWORD", self.password(user).to_string()),
            ("NATS_CA", self.ca.display().to_string()),
        ];
        // Another login of the caller's would contradict this one.
        let others = ["NATS_CREDS", "NATS_NKEY", "NATS_TOKEN", "NATS_TOKEN_FILE", "NATS_PASSWORD_FILE"];
        settings.extend(others.map(|name| (name, String::new())));
        // These have accounts of their own, and import JetStream under this name.
        if let Role::Worker | Role::Operator = role {
            settings.push(("NATS_API_PREFIX", "JS.API".into()));
        }
        settings
    }

    /// A PostgreSQL that lets nobody in without TLS and password. Returns it with the superuser's URL.
    pub async fn postgres(
        &self,
        options: PostgresOptions,
        [certificate, key]: &[String; 2],
    ) -> Result<(Postgres, String)> {
        let postgres = Postgres::start(options).await?;
        let (url, data) = (postgres.url("postgres"), postgres.data_directory());
        let owner = fs::metadata(&data)?;
        for (name, text) in [("server.crt", certificate.as_str()), ("server.key", key), ("pg_hba.conf", ACCESS)] {
            let path = data.join(name);
            fs::write(&path, text)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
            chown(&path, Some(owner.uid()), Some(owner.gid()))?;
        }
        let mut connection = PgConnection::connect(&url).await?;
        let password = format!("alter role postgres password '{}'", self.password("postgres"));
        for sql in [
            "set password_encryption = 'scram-sha-256'",
            &password,
            "alter system set ssl = on",
            "select pg_reload_conf()",
        ] {
            sqlx::query(AssertSqlSafe(sql.to_string())).execute(&mut connection).await?;
        }
        let secured = self.database_url(&url, "postgres");
        eventually(SOON, "PostgreSQL has TLS", async || PgConnection::connect(&secured).await.is_ok()).await?;
        Ok((postgres, url))
    }

    /// A nats-server with the users and permissions of accounts.conf, and TLS.
    pub async fn nats_server(&self, [certificate, key]: &[String; 2]) -> Result<Nats> {
        let (certificate_file, key_file) = (self.directory.join("nats.crt"), self.directory.join("nats.key"));
        fs::write(&certificate_file, certificate)?;
        fs::write(&key_file, key)?;
        // Defined in the file, which only this user can read; elsewhere they come from the environment.
        let accounts =
            ACCOUNTS.replacen("jetstream: enabled\n    users: [", &format!("jetstream: enabled\n    {READER}"), 1);
        let mut config = String::new();
        for (name, password) in &self.passwords {
            let variable = format!("AFTERCOMMIT_{}_PASSWORD", name.to_uppercase());
            if accounts.contains(&variable) {
                config += &format!("{variable}: \"{password}\"\n");
            }
        }
        config +=
            &format!("tls {{ cert_file: \"{}\", key_file: \"{}\" }}\n", certificate_file.display(), key_file.display());
        config += &accounts;
        Ok(Nats::start(NatsOptions { config, ..Default::default() }).await?)
    }

    /// Makes the roles in a database, or brings them up to date with its tables.
    pub fn grant(&self, url: &str) -> Result<()> {
        let script = self.directory.join("roles.sql");
        fs::write(&script, ROLES)?;
        let mut psql = Command::new(Postgres::program("psql")?);
        psql.env("PGPASSWORD", self.password("postgres"))
            .args(["--no-psqlrc", "--file"])
            .arg(script)
            .args(["--dbname", &split_password(url).0]);
        let output = psql.output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.success() { Ok(()) } else { Err(format!("roles.sql failed: {said}").into()) }
    }

    /// Makes the logins.
    pub async fn logins(&self, url: &str) -> Result<()> {
        let mut connection = PgConnection::connect(url).await?;
        for (login, roles) in LOGINS {
            let roles: Vec<String> = roles.iter().map(|role| format!("aftercommit_{role}")).collect();
            let sql =
                format!("create role {login} login password '{}' in role {}", self.password(login), roles.join(", "));
            sqlx::query(AssertSqlSafe(sql)).execute(&mut connection).await?;
        }
        Ok(())
    }

    /// What the service and the handler need on their own tables.
    pub async fn grant_own_tables(&self, [bank, projection]: [&String; 2]) -> Result<()> {
        for (url, sql) in [(bank, BANK_GRANTS), (projection, PROJECTION_GRANTS)] {
            sqlx::raw_sql(sql).execute(&mut PgConnection::connect(url).await?).await?;
        }
        Ok(())
    }
}
