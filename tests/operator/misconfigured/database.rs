//! Mistakes with PostgreSQL: rights, schema, server, tables.

use std::process::Command;

use aftercommit::testing::servers::PgBouncer;

use super::system::{System, Who, names_in};
use crate::support::{Authority, standby_of};

/// The same doctor with another database URL.
fn at(system: &System, who: Who, url: &str) -> Command {
    let mut doctor = system.doctor(who);
    doctor.env("DATABASE_URL", url);
    doctor
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_rights_are_named() {
    let system = System::new().await;
    let (stage, prefix) = (&system.stage, &system.stage.roles.0);
    let login = stage.login("leader");

    // The relay with the superuser's login.
    let superuser = || at(&system, Who::Relay, &stage.database.config.url);
    names_in(
        superuser,
        &["grants"],
        "WARN",
        &["postgres", "superuser", "login with a role of deploy/postgres/roles.sql"],
    )
    .await;
    system.is_well().await;

    // A login that has the worker's role as well.
    system.sql(&format!("grant {prefix}worker to {login}")).await;
    let words =
        ["may do more", "aftercommit.inbox", "roles.sql again", "granted to the login itself or by other roles"];
    system.names(Who::Relay, &["grants"], "WARN", &words).await;
    system.sql(&format!("revoke {prefix}worker from {login}")).await;
    system.is_well().await;

    // The wrong role: the relay's login has another one. It cannot look at the relay's work either.
    system.sql(&format!("revoke {prefix}relay from {login};; grant {prefix}pruner to {login}")).await;
    let lacks = ["lacks a right that relay with outbox_reconciler needs", "grant ", &login];
    let found = system.names(Who::Relay, &["grants", "relay"], "FAIL", &lacks).await;
    assert!(found.iter().any(|line| line.status == "WARN" && line.finding.contains("may do more")), "{found:#?}");
    system.sql(&format!("revoke {prefix}pruner from {login};; grant {prefix}relay to {login}")).await;
    system.is_well().await;

    // A right that is missing after an upgrade.
    system.sql(&format!("revoke delete on aftercommit.outbox from {prefix}relay")).await;
    let words = ["lacks a right", "grant delete on aftercommit.outbox to", &login];
    let found = system.names(Who::Relay, &["grants"], "FAIL", &words).await;
    system.apply(&found[0]).await;
    stage.roles.grant(&stage.database);
    system.sql(&format!("revoke delete on aftercommit.outbox from {login}")).await;
    system.is_well().await;

    // A service that may not publish.
    let publisher = || {
        let mut doctor = stage.command("aftercommit", "publisher", "operator");
        doctor.args(["doctor", "--json", "--role", "publisher", "--nats-monitor", &stage.nats.monitor_url()]);
        doctor
    };
    let unknown = ["inbox", "reconcilers", "schema", "transactions"];
    names_in(publisher, &unknown, "?", &["not checked"]).await;
    system.sql(&format!("revoke execute on function aftercommit.publish from {prefix}publisher")).await;
    let with_grants: Vec<&str> = ["grants"].into_iter().chain(unknown).collect();
    let words = ["lacks a right that publisher needs", "grant execute on function aftercommit.publish"];
    names_in(publisher, &with_grants, "FAIL", &words).await;
    stage.roles.grant(&stage.database);
    names_in(publisher, &unknown, "?", &["not checked"]).await;
    system.is_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_of_another_version_is_named() {
    let system = System::new().await;
    let stage = &system.stage;

    // Programs that are newer than the schema, after which roles.sql was forgotten.
    system
        .sql(
            "drop table aftercommit.data_key, aftercommit.forgotten_key;; drop function aftercommit.forget_data_key;;
             delete from aftercommit.migrations where version >= 24",
        )
        .await;
    let found =
        system.names(Who::Relay, &["schema"], "FAIL", &["migrations are missing: 0024", "aftercommit migrate"]).await;
    system.apply(&found[0]).await;
    system.is_well().await;
    let worker = || {
        let mut doctor = stage.command("aftercommit", "worker", "operator");
        doctor.args(["doctor", "--json", "--role", "worker", "--nats-monitor", &stage.nats.monitor_url()]);
        doctor
    };
    let unknown = ["reconcilers", "transactions"];
    let with_grants: Vec<&str> = ["grants"].into_iter().chain(unknown).collect();
    let found = names_in(worker, &with_grants, "FAIL", &["lacks a right that worker needs", "grant select"]).await;
    assert!(found.iter().any(|line| line.remedy.contains("aftercommit.data_key")), "{found:#?}");
    stage.roles.grant(&stage.database);
    names_in(worker, &unknown, "?", &["not checked"]).await;

    // A schema that is newer than the programs.
    system
        .sql("insert into aftercommit.migrations select 9000, 'later', now(), true, checksum, 1 from aftercommit.migrations where version = 1")
        .await;
    let words = ["[9000]", "only a newer version knows", "update the programs"];
    system.names(Who::Operator, &["schema"], "WARN", &words).await;
    system.sql("delete from aftercommit.migrations where version = 9000").await;
    system.is_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_of_the_server_are_named() {
    let mut system = System::new().await;
    let login = system.stage.login("leader");

    for (setting, status, words) in [
        ("fsync", "FAIL", ["can lose commits", "set `fsync = on`"]),
        ("full_page_writes", "WARN", ["torn pages", "set `full_page_writes = on`"]),
        ("autovacuum", "WARN", ["off for the whole server", "set `autovacuum = on`"]),
    ] {
        system.set(&format!("set {setting} = off")).await;
        system.names(Who::Relay, &[setting], status, &words).await;
        system.set(&format!("set {setting} = on")).await;
        system.is_well().await;
    }

    system.sql(&format!("alter role {login} set synchronous_commit = off")).await;
    system.names(Who::Relay, &["synchronous_commit"], "WARN", &["off for this role", "alter role … reset"]).await;
    system.sql(&format!("alter role {login} reset synchronous_commit")).await;
    system.is_well().await;

    // A standby that was taken away, whose slot stays.
    system.sql("select pg_create_physical_replication_slot('old_standby', true)").await;
    let words = ["nobody reads from the replication slot old_standby", "until the disk is full"];
    let found = system.names(Who::Operator, &["slots"], "WARN", &words).await;
    let drop = found[0].remedy.split('`').nth(1).unwrap();
    system.sql(drop).await;
    system.is_well().await;

    // Too few connections for everybody.
    system.sql("alter system set max_connections = 30").await;
    system.postgres.restart().await.unwrap();
    let limit: String =
        sqlx::query_scalar("show max_connections").fetch_one(&system.stage.database.pool().await).await.unwrap();
    assert_eq!(limit, "30");
    // The programs are back, and so many others that hardly anybody can log in.
    let mut held = vec![system.stage.database.pool().await];
    let used = "select count(usesysid) from pg_stat_activity where datid is not null";
    while sqlx::query_scalar::<_, i64>(used).fetch_one(&held[0]).await.unwrap() < 22 {
        held.push(system.stage.database.pool().await);
    }
    let words = ["connections are in use", "soon nobody else can log in", "raise max_connections"];
    system.names(Who::Operator, &["connections"], "WARN", &words).await;
    drop_all(held).await;
    system.sql("alter system reset max_connections").await;
    system.postgres.restart().await.unwrap();
    system.is_well().await;
}

async fn drop_all(pools: Vec<sqlx::PgPool>) {
    for pool in pools {
        pool.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_do_to_our_tables_is_named() {
    let mut system = System::new().await;

    system
        .sql(
            "create function public.stamp() returns trigger language plpgsql as $$
             begin new.headers = new.headers || '{\"X-Region\": \"eu\"}'; return new; end $$;;
             create trigger stamp before insert on aftercommit.outbox for each row execute function public.stamp()",
        )
        .await;
    let words = ["the trigger stamp on aftercommit.outbox is not ours", "drop trigger \"stamp\" on aftercommit.outbox"];
    let found = system.names(Who::Operator, &["tables"], "WARN", &words).await;
    system.apply(&found[0]).await;
    system.is_well().await;

    system.sql("create rule quiet as on insert to aftercommit.finding do instead nothing").await;
    let found = system.names(Who::Relay, &["tables"], "WARN", &["the rule quiet on aftercommit.finding"]).await;
    system.apply(&found[0]).await;
    system.is_well().await;

    system.sql("alter table aftercommit.outbox set (autovacuum_enabled = false)").await;
    let words = ["off for aftercommit.outbox", "alter table aftercommit.outbox reset (autovacuum_enabled)"];
    let found = system.names(Who::Relay, &["autovacuum"], "WARN", &words).await;
    system.apply(&found[0]).await;
    system.is_well().await;

    // An audit tool of the company secures whatever table it finds.
    system.sql("alter table aftercommit.inbox_pruned enable row level security").await;
    let words = ["row security on aftercommit.inbox_pruned hides rows", "run deploy/postgres/roles.sql again"];
    system.names(Who::Relay, &["tables"], "FAIL", &words).await;
    system.stage.roles.grant(&system.stage.database);
    system.is_well().await;

    // Somebody has read that a cache makes sequences faster. The relay does not lead then.
    system.sql("alter sequence aftercommit.outbox_id_seq cache 50").await;
    let found = system.names(Who::Relay, &["ids", "relay"], "FAIL", &["CACHE 50", "aftercommit migrate"]).await;
    system.apply(found.iter().find(|line| line.name == "ids").unwrap()).await;
    system.is_well().await;

    // The relay was given another retention than doctor, and the events stay.
    system.relay = None;
    system.sql("update aftercommit.outbox set created_at = now() - interval '30 days'").await;
    system.start_relay(&[("AFTERCOMMIT_RETENTION_DAYS", "365")]);
    let words = ["the oldest event in the outbox is 30 days old", "the same --retention-days"];
    system.names(Who::Relay, &["pruning"], "WARN", &words).await;
    system.relay = None;
    system.start_relay(&[]);
    system.is_well().await;

    // Nobody compares outbox and stream.
    system.relay = None;
    system.start_relay(&[("AFTERCOMMIT_RECONCILE_EVERY", "")]);
    system.sql("delete from aftercommit.reconciler where name = 'outbox'").await;
    let words = ["outbox and stream have never been compared", "AFTERCOMMIT_RECONCILE_EVERY=5m"];
    system.names(Who::Operator, &["reconcilers"], "WARN", &words).await;
    system
        .sql("insert into aftercommit.reconciler (name, last_success_at) values ('outbox', now() - interval '9 days')")
        .await;
    system.names(Who::Relay, &["reconcilers"], "WARN", &["outbox last succeeded 9 days ago"]).await;
    system.relay = None;
    system.start_relay(&[]);
    system.is_well().await;

    // A pause that was forgotten.
    let reason = ["relay", "pause", "--reason", "maintenance"];
    crate::stage::succeeded(&system.stage.run("aftercommit", "operator", "", &reason));
    let found = system.names(Who::Operator, &["paused"], "WARN", &["maintenance", "aftercommit relay resume"]).await;
    system.apply(&found[0]).await;
    system.is_well().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_way_to_the_server_is_named() {
    let system = System::new().await;
    let url = system.stage.url_of("leader");

    // A standby's address.
    let standby = standby_of(&system.postgres).await;
    let (_, database) = url.rsplit_once('/').unwrap();
    let there = standby.url(database).replace("//postgres@", &format!("//{}@", system.stage.login("leader")));
    let words = ["it is a standby, which takes no writes", "let DATABASE_URL name the primary"];
    // The helper's standby does not wait for its disk either.
    names_in(|| at(&system, Who::Relay, &there), &["postgres", "fsync"], "FAIL", &words).await;
    drop(standby);
    system.is_well().await;

    // PgBouncer in transaction mode, and nobody said so; also one that swallows what it does not know.
    let login = system.stage.login("leader");
    for (settings, word) in [
        (&[][..], "unsupported startup parameter"),
        (
            &[("ignore_startup_parameters", "extra_float_digits,options")],
            "does not have the startup option search_path",
        ),
    ] {
        let bouncer = PgBouncer::start(&system.postgres, 5, settings).await.unwrap();
        let through = bouncer.url(database).replace("//postgres@", &format!("//{login}@"));
        let behind = || at(&system, Who::Relay, &through);
        names_in(behind, &["postgres"], "FAIL", &[word, "if it is PgBouncer, say so: --pgbouncer"]).await;
        let output = behind().arg("--pgbouncer").output().unwrap();
        // The helper's logs in as the superuser, which is told.
        let wrong =
            super::system::lines(&output).into_iter().filter(|line| line.status != "OK" && line.name != "grants");
        assert!(wrong.count() == 0 && output.status.success(), "{output:?}");
    }

    // TLS that the server offers and the URL refuses.
    let authority = Authority::new();
    let (certificate, key) = authority.issue("localhost");
    for (name, text) in [("server.crt", certificate), ("server.key", key)] {
        let file = system.postgres.data_directory().join(name);
        std::fs::write(&file, text).unwrap();
        Command::new("chown").arg("--reference").arg(system.postgres.data_directory()).arg(&file).status().unwrap();
        Command::new("chmod").arg("600").arg(&file).status().unwrap();
    }
    system.set("set ssl = on").await;
    system.is_well().await;
    let clear = format!("{url}?sslmode=disable");
    let words = ["PostgreSQL offers TLS, and this connection does not use it", "sslmode=verify-full"];
    names_in(|| at(&system, Who::Relay, &clear), &["encryption"], "WARN", &words).await;
    system.is_well().await;

    clocks(&system).await;
}

/// The clock of doctor's machine is an hour off.
async fn clocks(system: &System) {
    let found = Command::new("sh")
        .args(["-c", "ls /usr/lib/*/faketime/libfaketime.so.1 /usr/lib/faketime/libfaketime.so.1"])
        .output();
    let found = String::from_utf8(found.unwrap().stdout).unwrap();
    let Some(library) = found.lines().next() else {
        println!("SKIPPED: a wrong clock: Debian, Ubuntu: apt-get install faketime");
        return;
    };
    let wrong = || {
        let mut doctor = system.doctor(Who::Relay);
        doctor.env("LD_PRELOAD", library).env("FAKETIME", "+1h").env("DONT_FAKE_MONOTONIC", "1");
        doctor
    };
    let words = ["PostgreSQL's clock is 3", "behind this machine's", "run a time service"];
    names_in(wrong, &["clock"], "WARN", &words).await;
    system.is_well().await;
}
