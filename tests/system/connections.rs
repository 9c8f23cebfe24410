//! How the parts connect: TLS, certificates and every kind of login, against real servers. G8: no secret is shown.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Stdio;

use crate::support::{Authority, Directory, RelayProcess, RunningRelay, SOON};
use aftercommit::config::{ClientCertificate, Naming, NatsAuth, NatsConfig, NatsTls, PostgresConfig, Secret};
use aftercommit::outbox::RawEvent;
use aftercommit::relay::RelayConfig;
use aftercommit::testing::servers::{Nats, NatsOptions, Postgres};
use aftercommit::testing::{eventually, unique_name};
use aftercommit::{Error, ErrorKind, operator};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use nkeys::KeyPair;
use serde_json::json;
use sqlx::{AssertSqlSafe, Connection, PgConnection};

async fn database() -> PostgresConfig {
    PostgresConfig::new(Postgres::shared().await.unwrap().create_database().await.unwrap())
}

async fn nats(config: impl Into<String>) -> Nats {
    Nats::start(NatsOptions { config: config.into(), ..Default::default() }).await.unwrap()
}

fn naming() -> Naming {
    let name = unique_name("t");
    Naming {
        stream: name.to_uppercase(),
        prefix: aftercommit::subject::SubjectPrefix::new(name).unwrap(),
        source: "/test".into(),
    }
}

async fn refused(nats: &NatsConfig) -> Error {
    operator::provision(nats, &naming()).await.expect_err("it must not connect")
}

/// Everything that connects, connects this way: the tool makes the stream, a relay fills it, the tool looks at it.
async fn an_event_arrives(postgres: PostgresConfig, nats: NatsConfig) {
    let naming = naming();
    operator::migrate(&postgres).await.unwrap();
    operator::provision(&nats, &naming).await.unwrap_or_else(|error| panic!("{}", error.report()));
    let relay = RunningRelay::start(RelayConfig::new(postgres.clone(), nats.clone(), naming.clone()));
    publish_and_see(&postgres, &nats, &naming, 1).await;
    relay.stop().await.unwrap();
}

async fn publish_and_see(postgres: &PostgresConfig, nats: &NatsConfig, naming: &Naming, messages: u64) {
    operator::publish(postgres, RawEvent::new("order.placed", "application/json", "{}")).await.unwrap();
    eventually(SOON, "the event is in the stream", async || {
        let status = operator::status::status(postgres, nats, naming).await;
        status.is_ok_and(|status| status.stream.is_some_and(|stream| stream.messages == messages))
    })
    .await
    .unwrap();
}

/// A server's TLS block, its authority's certificate and a client's certificate, in files.
struct Tls {
    block: String,
    files: Directory,
    url: String,
}

impl Tls {
    fn new(more: &str) -> Self {
        let (files, authority) = (Directory::new(), Authority::new());
        let (certificate, key) = authority.issue("server");
        let path = |name: &str, text: String| files.write(name, text).display().to_string();
        let block = format!(
            "tls {{ cert_file: \"{}\", key_file: \"{}\", ca_file: \"{}\", {more} }}",
            path("server.crt", certificate),
            path("server.key", key),
            path("ca.crt", authority.certificate.clone()),
        );
        let (certificate, key) = authority.issue("relay");
        files.write("relay.crt", certificate);
        files.write("relay.key", key);
        files.write("other-ca.crt", Authority::new().certificate);
        Self { block, files, url: String::new() }
    }

    async fn start(&mut self) -> Nats {
        let nats = nats(&self.block).await;
        self.url = nats.url().replace("nats://", "tls://");
        nats
    }

    fn config(&self, ca: &str, certificate: bool, first: bool) -> NatsConfig {
        let file = |name: &str| self.files.path().join(name);
        let certificate =
            certificate.then(|| ClientCertificate { certificate: file("relay.crt"), key: file("relay.key") });
        let tls = NatsTls { ca: Some(file(ca)), certificate, first };
        NatsConfig { url: self.url.clone(), tls, ..Default::default() }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nats_over_tls_with_a_client_certificate() {
    let mut tls = Tls::new("verify: true");
    let _nats = tls.start().await;
    an_event_arrives(database().await, tls.config("ca.crt", true, false)).await;

    let error = refused(&tls.config("other-ca.crt", true, false)).await;
    assert!(error.report().contains("certificate"), "{}", error.report());
    refused(&tls.config("ca.crt", false, false)).await;
    refused(&NatsConfig { url: tls.url.clone(), ..Default::default() }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nats_with_tls_before_the_greeting() {
    let mut tls = Tls::new("handshake_first: true");
    let _nats = tls.start().await;
    an_event_arrives(database().await, tls.config("ca.crt", false, true)).await;
    refused(&tls.config("other-ca.crt", false, true)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_tls_is_refused_when_tls_is_asked_for() {
    let plain = Nats::shared().await.unwrap().url();
    refused(&NatsConfig { url: plain.replace("nats://", "tls://"), ..Default::default() }).await;
    let tls = Tls::new("");
    refused(&NatsConfig { url: plain, ..tls.config("ca.crt", false, false) }).await;
}

#[tokio::test]
async fn files_that_are_missing_are_named_with_their_setting() {
    let nowhere = || "/nowhere/file".into();
    let config = |auth, tls| NatsConfig { auth, tls, ..Default::default() };
    let certificate = ClientCertificate { certificate: nowhere(), key: nowhere() };
    for (nats, setting) in [
        (config(NatsAuth::Credentials(nowhere()), NatsTls::default()), "NATS_CREDS"),
        (config(NatsAuth::Nkey(Secret::File(nowhere())), NatsTls::default()), "NATS_NKEY"),
        (config(NatsAuth::Token(Secret::File(nowhere())), NatsTls::default()), "NATS_TOKEN_FILE"),
        (config(NatsAuth::Url, NatsTls { ca: Some(nowhere()), ..Default::default() }), "NATS_CA"),
        (config(NatsAuth::Url, NatsTls { certificate: Some(certificate), ..Default::default() }), "NATS_CERT"),
    ] {
        let error = refused(&nats).await;
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.report().contains("/nowhere/file") && error.report().contains(setting), "{}", error.report());
    }
    for parameter in ["sslrootcert", "sslcert", "sslkey"] {
        let url = format!("postgres://postgres@127.0.0.1:1/db?sslmode=verify-full&{parameter}=%2Fnowhere%2Ffile");
        let error = operator::migrate(&PostgresConfig::new(url)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.report().contains("/nowhere/file") && error.report().contains(parameter), "{}", error.report());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nats_with_a_token() {
    let (nats, files) = (nats("authorization { token: \"s3cr3t\" }").await, Directory::new());
    let config = |auth| NatsConfig { url: nats.url(), auth, ..Default::default() };
    an_event_arrives(database().await, config(NatsAuth::Token(Secret::File(files.write("token", "s3cr3t\n"))))).await;
    operator::provision(&config(NatsAuth::Token(Secret::Text("s3cr3t".into()))), &naming()).await.unwrap();
    let url = nats.url().replace("nats://", "nats://s3cr3t@");
    operator::provision(&NatsConfig { url, ..Default::default() }, &naming()).await.unwrap();
    refused(&config(NatsAuth::Token(Secret::Text("wrong".into())))).await;
    refused(&config(NatsAuth::Url)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nats_with_user_and_password() {
    let nats = nats("authorization { user: me, password: \"p@ss word\" }").await;
    let password = |text: &str| NatsAuth::UserPassword { user: "me".into(), password: Secret::Text(text.into()) };
    let config = |auth| NatsConfig { url: nats.url(), auth, ..Default::default() };
    an_event_arrives(database().await, config(password("p@ss word"))).await;
    let url = nats.url().replace("nats://", "nats://me:p%40ss%20word@");
    operator::provision(&NatsConfig { url, ..Default::default() }, &naming()).await.unwrap();
    refused(&config(password("wrong"))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nats_with_an_nkey() {
    let (user, stranger) = (KeyPair::new_user(), KeyPair::new_user());
    let nats = nats(format!("authorization {{ users: [ {{ nkey: {} }} ] }}", user.public_key())).await;
    let files = Directory::new();
    let config = |name: &str, pair: &KeyPair| NatsConfig {
        url: nats.url(),
        auth: NatsAuth::Nkey(Secret::File(files.write(name, format!("{}\n", pair.seed().unwrap())))),
        ..Default::default()
    };
    an_event_arrives(database().await, config("user.nk", &user)).await;
    refused(&config("stranger.nk", &stranger)).await;
}

/// A JWT as NATS understands it.
fn jwt(issuer: &KeyPair, subject: &KeyPair, name: &str, mut claims: serde_json::Value) -> String {
    claims["version"] = json!(2);
    let body = json!({
        "jti": name, "iat": 1_700_000_000, "iss": issuer.public_key(), "sub": subject.public_key(), "name": name,
        "nats": claims,
    });
    let encode = |value: serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let text = format!("{}.{}", encode(json!({ "typ": "JWT", "alg": "ed25519-nkey" })), encode(body));
    let signature = URL_SAFE_NO_PAD.encode(issuer.sign(text.as_bytes()).unwrap());
    format!("{text}.{signature}")
}

#[tokio::test(flavor = "multi_thread")]
async fn nats_with_a_credentials_file() {
    let (operator, account, user) = (KeyPair::new_operator(), KeyPair::new_account(), KeyPair::new_user());
    let limits = json!({
        "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true, "conn": -1,
        "leaf": -1, "mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1,
    });
    let account_claims = json!({ "type": "account", "limits": limits });
    let user_claims = json!({ "type": "user", "subs": -1, "data": -1, "payload": -1 });
    let system = KeyPair::new_account();
    let nats = nats(format!(
        "operator: {}\nsystem_account: {}\nresolver: MEMORY\nresolver_preload: {{ {}: {}, {}: {} }}",
        jwt(&operator, &operator, "operator", json!({ "type": "operator" })),
        system.public_key(),
        account.public_key(),
        jwt(&operator, &account, "account", account_claims),
        system.public_key(),
        jwt(&operator, &system, "system", json!({ "type": "account", "limits": { "subs": -1, "conn": -1 } })),
    ))
    .await;
    let creds = |user_jwt: &str, user: &KeyPair| {
        let line = "-".repeat(5);
        format!(
            "{line}BEGIN NATS USER JWT{line}\n{user_jwt}\n{line}-END NATS USER JWT{line}-\n\n\
             {line}BEGIN USER NKEY SEED{line}\n{}\n{line}-END USER NKEY SEED{line}-\n",
            user.seed().unwrap()
        )
    };
    let files = Directory::new();
    let user_jwt = jwt(&account, &user, "relay", user_claims);
    let good = files.write("relay.creds", creds(&user_jwt, &user));
    let stolen = files.write("stolen.creds", creds(&user_jwt, &KeyPair::new_user()));
    let config =
        |file: &Path| NatsConfig { url: nats.url(), auth: NatsAuth::Credentials(file.into()), ..Default::default() };
    an_event_arrives(database().await, config(&good)).await;
    refused(&config(&stolen)).await;
}

/// A changed password counts from the next connection on, without a restart of the relay.
#[tokio::test(flavor = "multi_thread")]
async fn a_password_can_be_changed_while_a_relay_runs() {
    let files = Directory::new();
    let change = |password: &str| {
        files.write("auth.conf", format!("authorization {{ user: me, password: {password} }}"));
        files.write("password", password)
    };
    let password = Secret::File(change("first"));
    // An included file is looked for beside the server's own.
    let include = format!("include \"../{}/auth.conf\"", files.path().file_name().unwrap().display());
    let mut server = nats(include).await;
    let auth = NatsAuth::UserPassword { user: "me".into(), password };
    let nats = NatsConfig { url: server.url(), auth, ..Default::default() };
    let (postgres, naming) = (database().await, naming());
    operator::migrate(&postgres).await.unwrap();
    operator::provision(&nats, &naming).await.unwrap();
    let relay = RunningRelay::start(RelayConfig::new(postgres.clone(), nats.clone(), naming.clone()));
    publish_and_see(&postgres, &nats, &naming, 1).await;
    change("second");
    server.restart().await.unwrap();
    publish_and_see(&postgres, &nats, &naming, 2).await;
    relay.stop().await.unwrap();
}

/// A PostgreSQL that lets `tls` in with a certificate and `pw` with a password, both only over TLS.
async fn secured_postgres(authority: &Authority) -> Postgres {
    let postgres = Postgres::start(Default::default()).await.unwrap();
    let mut connection = PgConnection::connect(&postgres.url("postgres")).await.unwrap();
    let data: String = sqlx::query_scalar("show data_directory").fetch_one(&mut connection).await.unwrap();
    let owner = fs::metadata(&data).unwrap();
    let (certificate, key) = authority.issue("server");
    for (name, text) in [
        ("server.crt", certificate.as_str()),
        ("server.key", &key),
        ("ca.crt", &authority.certificate),
        (
            "pg_hba.conf",
            "host all postgres 127.0.0.1/32 trust\n\
             hostssl all tls 127.0.0.1/32 cert\n\
             hostssl all pw 127.0.0.1/32 scram-sha-256\n",
        ),
    ] {
        let path = Path::new(&data).join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        chown(&path, Some(owner.uid()), Some(owner.gid())).unwrap();
    }
    for sql in [
        "set password_encryption = 'scram-sha-256'",
        "create role tls login superuser",
        "create role pw login superuser password 'canary-database-password'",
        "alter system set ssl_ca_file = 'ca.crt'",
        "alter system set ssl = on",
        "select pg_reload_conf()",
    ] {
        sqlx::query(AssertSqlSafe(sql)).execute(&mut connection).await.unwrap();
    }
    eventually(SOON, "the server has TLS", async || {
        let mut connection = PgConnection::connect(&postgres.url("postgres")).await.unwrap();
        sqlx::query_scalar::<_, String>("show ssl").fetch_one(&mut connection).await.unwrap() == "on"
    })
    .await
    .unwrap();
    postgres
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_over_tls_with_a_client_certificate() {
    let (authority, files) = (Authority::new(), Directory::new());
    let postgres = secured_postgres(&authority).await;
    let (certificate, key) = authority.issue("tls");
    let path = |name: &str, text: &str| files.write(name, text).display().to_string();
    let (certificate, key) = (path("client.crt", &certificate), path("client.key", &key));
    let database = postgres.create_database().await.unwrap().replace("//postgres@", "//tls@");
    let url = |ca: &str| format!("{database}?sslmode=verify-full&sslrootcert={ca}&sslcert={certificate}&sslkey={key}");
    let good = url(&path("ca.crt", &authority.certificate));
    let nats = NatsConfig { url: Nats::shared().await.unwrap().url(), ..Default::default() };
    an_event_arrives(PostgresConfig::new(good.clone()), nats).await;

    let wrong_ca = url(&path("other-ca.crt", &Authority::new().certificate));
    let without_certificate = good.split("&sslcert").next().unwrap().to_string();
    for url in [wrong_ca, without_certificate] {
        let error = operator::migrate(&PostgresConfig::new(url)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Database, "{}", error.report());
    }
}

/// What the relay's program prints at the most talkative level, and its command line, hold no secret and no payload.
#[tokio::test(flavor = "multi_thread")]
async fn no_secret_and_no_payload_is_shown() {
    let (authority, files) = (Authority::new(), Directory::new());
    let postgres = secured_postgres(&authority).await;
    let ca = files.write("ca.crt", &authority.certificate).display().to_string();
    let tls = format!("?sslmode=verify-full&sslrootcert={ca}");
    let passwords = files.write("pgpass", "canary-malformed-line\n127.0.0.1:*:*:pw:canary-database-password\n");
    fs::set_permissions(&passwords, fs::Permissions::from_mode(0o600)).unwrap();
    let mut databases = Vec::new();
    for _ in 0..3 {
        databases.push(postgres.create_database().await.unwrap());
    }
    let url = |run: usize, user: &str| databases[run].replace("//postgres@", &format!("//{user}@")) + &tls;
    let with_password = "pw:canary-database-password";
    let url_file = files.write("url", url(0, with_password));

    let user = KeyPair::new_user();
    let seed = user.seed().unwrap();
    let (token, password) = ("canary-token".to_string(), "canary-nats-password".to_string());
    let with_nkey = format!("authorization {{ users: [ {{ nkey: {} }} ] }}", user.public_key());
    let with_user = format!("authorization {{ user: me, password: {password} }}");
    let with_token = format!("authorization {{ token: {token} }}");
    type Settings = Vec<(&'static str, String)>;
    let runs: [(&str, NatsAuth, &str, Settings, Settings); 3] = [
        (
            "nkey",
            NatsAuth::Nkey(Secret::Text(seed.clone())),
            &with_nkey,
            vec![("NATS_NKEY", files.write("seed", &seed).display().to_string())],
            vec![("DATABASE_URL_FILE", url_file.display().to_string())],
        ),
        (
            "user in the URL",
            NatsAuth::UserPassword { user: "me".into(), password: Secret::Text(password.clone()) },
            &with_user,
            vec![("NATS_URL", format!("nats://me:{password}@"))],
            vec![("DATABASE_URL", url(1, with_password))],
        ),
        (
            "token",
            NatsAuth::Token(Secret::Text(token.clone())),
            &with_token,
            vec![("NATS_TOKEN", token.clone())],
            vec![("DATABASE_URL", url(2, "pw")), ("PGPASSFILE", passwords.display().to_string())],
        ),
    ];
    for ((run, auth, server, nats_settings, postgres_settings), plain) in runs.into_iter().zip(&databases) {
        let mut server = nats(server).await;
        let nats = NatsConfig { url: server.url(), auth, ..Default::default() };
        let postgres = PostgresConfig::new(plain.clone());
        let (naming, log) = (naming(), files.path().join("log"));
        operator::migrate(&postgres).await.unwrap();
        operator::provision(&nats, &naming).await.unwrap();
        let start = || {
            let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_aftercommit-relay"));
            command.env("NATS_URL", server_url(&server, &nats_settings));
            command.envs(nats_settings.iter().filter(|(name, _)| *name != "NATS_URL").cloned());
            command.envs(postgres_settings.iter().cloned());
            command.env("AFTERCOMMIT_STREAM", &naming.stream).env("RUST_LOG", "trace");
            command.env("AFTERCOMMIT_SUBJECT_PREFIX", naming.prefix.to_string());
            let log = fs::File::options().create(true).append(true).open(&log).unwrap();
            command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
            RelayProcess(command.spawn().unwrap())
        };
        let mut relay = start();
        let payload = "canary-payload".to_string();
        let published = async |messages: u64| {
            operator::publish(&postgres, RawEvent::new("order.placed", "text/plain", payload.clone())).await.unwrap();
            eventually(SOON, "the event is in the stream", async || {
                let status = operator::status::status(&postgres, &nats, &naming).await;
                status.is_ok_and(|status| status.stream.is_some_and(|stream| stream.messages == messages))
            })
            .await
            .unwrap_or_else(|error| panic!("{run}: {error}\n{}", tail(&log)));
        };
        published(1).await;
        let command_line = fs::read(format!("/proc/{}/cmdline", relay.0.id())).unwrap();
        // The next relay finds the window open and reads the last message back.
        relay.kill();
        relay = start();
        published(2).await;
        server.restart().await.unwrap();
        eventually(SOON, "the relay is connected again", async || {
            fs::read_to_string(&log).unwrap().matches("connected to nats").count() >= 3
        })
        .await
        .unwrap();
        relay.kill();
        let shown = fs::read_to_string(&log).unwrap() + &String::from_utf8_lossy(&command_line);
        assert!(shown.contains(" DEBUG "), "{run}: the log is talkative");
        for secret in ["canary", seed.as_str(), &STANDARD.encode("canary-payload")[4..16]] {
            let found = shown.lines().find(|line| line.contains(secret));
            assert_eq!(found, None, "{run}");
        }
        fs::remove_file(&log).unwrap();
    }
}

/// The server's URL, with the login that a setting has in front.
fn server_url(server: &Nats, settings: &[(&str, String)]) -> String {
    match settings.iter().find(|(name, _)| *name == "NATS_URL") {
        Some((_, login)) => server.url().replace("nats://", login),
        None => server.url(),
    }
}

fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

/// `--help` is often pasted somewhere.
#[tokio::test]
async fn help_does_not_show_what_the_environment_holds() {
    for program in [env!("CARGO_BIN_EXE_aftercommit-relay"), env!("CARGO_BIN_EXE_aftercommit")] {
        let mut command = std::process::Command::new(program);
        if program.ends_with("aftercommit") {
            command.arg("status");
        }
        for name in ["DATABASE_URL", "NATS_URL", "NATS_TOKEN", "NATS_PASSWORD"] {
            command.env(name, "canary");
        }
        let output = command.arg("--help").output().unwrap();
        assert!(output.status.success());
        assert!(!String::from_utf8_lossy(&output.stdout).contains("canary"));
    }
}
