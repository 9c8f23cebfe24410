//! What roles.sql does not let a role do: for each a list of steps that PostgreSQL refuses.

use sqlx::{AssertSqlSafe, Connection, PgConnection};

use crate::stage::Stage;

/// Nobody but the owner may do these.
const NOBODY: [&str; 15] = [
    "create table aftercommit.mine ()",
    "create function aftercommit.mine() returns int language sql as 'select 1'",
    "alter table aftercommit.outbox add column mine int",
    "alter table aftercommit.lease disable row level security",
    "create policy mine on aftercommit.lease using (true)",
    "drop table aftercommit.outbox",
    "truncate aftercommit.outbox",
    "truncate aftercommit.inbox",
    "update aftercommit.outbox set payload = ''",
    "delete from aftercommit.audit",
    "update aftercommit.audit set who = 'somebody else'",
    "delete from aftercommit.migrations",
    // Who may lock what others need stops them without changing anything.
    "lock table aftercommit.lease in share mode",
    "lock table aftercommit.reconciler in share mode",
    "lock table aftercommit.audit in share mode",
];

const PUBLISHER: [&str; 19] = [
    "select from aftercommit.outbox",
    "select from aftercommit.events",
    "delete from aftercommit.outbox",
    "update aftercommit.outbox set xid = '1'",
    "insert into aftercommit.outbox (event_id, type, payload, xid) values (gen_random_uuid(), 'a', '', '1')",
    "insert into aftercommit.outbox (event_id, type, payload, id) overriding system value values (gen_random_uuid(), 'a', '', 1)",
    "insert into aftercommit.outbox (event_id, type, payload, created_at) values (gen_random_uuid(), 'a', '', now())",
    "insert into aftercommit.outbox (event_id, type, payload) values (gen_random_uuid(), 'a', '') returning payload",
    "select nextval('aftercommit.outbox_id_seq')",
    "select setval('aftercommit.outbox_id_seq', 1)",
    "select from aftercommit.relay_log",
    "select from aftercommit.lease",
    "insert into aftercommit.pause (name) values ('relay')",
    "insert into aftercommit.inbox (subscriber, event_id, stream_seq) values ('receipts', gen_random_uuid(), 1)",
    "select from aftercommit.dead_letter",
    "insert into aftercommit.audit (who, action) values ('me', 'x')",
    "lock table aftercommit.outbox in share mode",
    "insert into aftercommit.allowed_type values (current_user, '*')",
    "alter table aftercommit.outbox disable trigger allowed_types",
];

const RELAY: [&str; 13] = [
    "insert into aftercommit.outbox (event_id, type, payload) values (gen_random_uuid(), 'a', '')",
    "select aftercommit.publish('a', '{}')",
    "update aftercommit.outbox set created_at = now()",
    "update aftercommit.outbox set type = 'another'",
    "select from aftercommit.inbox",
    "delete from aftercommit.inbox",
    "select from aftercommit.dead_letter",
    "select from aftercommit.redrive",
    "insert into aftercommit.pause (name) values ('subscriber:*')",
    "delete from aftercommit.pause",
    "update aftercommit.relay_log set epoch = 7",
    "insert into aftercommit.audit (who, action) values ('me', 'x')",
    "insert into aftercommit.lease (name, holder, epoch, expires_at) values ('subscriber:receipts', 'me', 1, now())",
];

const WORKER: [&str; 27] = [
    "select from aftercommit.outbox",
    "select from aftercommit.events",
    "delete from aftercommit.outbox",
    "select aftercommit.publish('a', '{}')",
    "select from aftercommit.relay_log",
    "insert into aftercommit.relay_status select",
    "update aftercommit.parked set state = 'released'",
    "select from aftercommit.repair",
    "insert into aftercommit.pause (name) values ('relay')",
    "delete from aftercommit.pause",
    "update aftercommit.inbox set outcome = 'handled'",
    "delete from aftercommit.dead_letter",
    "insert into aftercommit.redrive (subscriber) values ('receipts')",
    "insert into aftercommit.audit (who, action) values ('me', 'x')",
    "select from aftercommit.audit",
    "select from aftercommit.reconciler",
    "insert into aftercommit.lease (name, holder, epoch, expires_at) values ('relay', 'me', 100, now())",
    "insert into aftercommit.lease (name, holder, epoch, expires_at) values ('relay', 'me', 100, 'infinity')
         on conflict (name) do update set holder = 'me', epoch = 100, expires_at = 'infinity'",
    "delete from aftercommit.lease",
    "lock table aftercommit.lease in access exclusive mode",
    "lock table aftercommit.dead_letter in share mode",
    "update aftercommit.dead_letter set payload = ''",
    "update aftercommit.dead_letter set headers = '{}'",
    "update aftercommit.dead_letter set key = 'another'",
    "update aftercommit.dead_letter set type = 'another'",
    "insert into aftercommit.dead_letter (id, subscriber, event_id, type, version, source, time, headers, payload,
            content_type, stream, stream_seq, attempts, reason, first_failed_at) overriding system value
         values (1, 'receipts', gen_random_uuid(), 'a', 1, '', now(), '{}', '', '', '', 1, 1, '', now())",
    "update aftercommit.redrive set payload = ''",
];

const OUTBOX_RECONCILER: [&str; 15] = [
    "delete from aftercommit.outbox",
    "update aftercommit.outbox set xid = '1'",
    "insert into aftercommit.relay_log select from aftercommit.relay_log",
    "select from aftercommit.lease",
    "delete from aftercommit.repair",
    "update aftercommit.parked set state = 'released'",
    "select from aftercommit.inbox",
    "select from aftercommit.dead_letter",
    "insert into aftercommit.pause (name) values ('relay')",
    "insert into aftercommit.audit (who, action, role) values ('me', 'x', 'another')",
    "insert into aftercommit.reconciler (name) values ('inbox:receipts')",
    "insert into aftercommit.finding (name, kind, item, first_run, last_run) values ('inbox:receipts', 'x', 'x', 1, 1)",
    "lock table aftercommit.repair in share mode",
    "insert into aftercommit.reconcile_run (id, name, cause, mode, scope, holder, alive_until) overriding system value
         values (1, 'outbox', 'demand', 'report', 'new', 'me', now())",
    "insert into aftercommit.finding (id, name, kind, item, first_run, last_run) overriding system value
         values (1, 'outbox', 'x', 'x', 1, 1)",
];

const INBOX_RECONCILER: [&str; 16] = [
    "select from aftercommit.outbox",
    "select from aftercommit.relay_log",
    "select from aftercommit.repair",
    "select from aftercommit.lease",
    "delete from aftercommit.inbox",
    "insert into aftercommit.inbox (subscriber, event_id, stream_seq) values ('receipts', gen_random_uuid(), 1)",
    "delete from aftercommit.dead_letter",
    "insert into aftercommit.pause (name) values ('relay')",
    "select from aftercommit.audit",
    "insert into aftercommit.reconciler (name) values ('outbox')",
    "insert into aftercommit.reconciler (name) values ('derived')",
    "insert into aftercommit.reconcile_run (name, cause, mode, scope, holder, alive_until)
         values ('outbox', 'demand', 'report', 'new', 'me', 'infinity')",
    "insert into aftercommit.audit (who, action, role) values ('me', 'x', 'another')",
    "insert into aftercommit.audit (who, action, at) values ('me', 'x', 'yesterday')",
    "insert into aftercommit.audit (id, who, action) overriding system value values (1, 'me', 'x')",
    "insert into aftercommit.redrive (id, subscriber, event_id, type, version, source, time, headers, payload,
            content_type, stream, stream_seq, requested_by) overriding system value
         values (1, 'receipts', gen_random_uuid(), 'a', 1, '', now(), '{}', '', '', '', 1, '')",
];

const OWN_RECONCILER: [&str; 9] = [
    "select from aftercommit.outbox",
    "select from aftercommit.inbox",
    "select from aftercommit.lease",
    "insert into aftercommit.redrive (subscriber) values ('receipts')",
    "insert into aftercommit.audit (who, action) values ('me', 'x')",
    "insert into aftercommit.reconciler (name) values ('outbox')",
    "insert into aftercommit.reconciler (name) values ('consumer:receipts')",
    "insert into aftercommit.reconciler (name) values ('inbox:receipts')",
    "insert into aftercommit.finding (name, kind, item, first_run, last_run) values ('outbox', 'x', 'x', 1, 1)",
];

const PRUNER: [&str; 10] = [
    "select from aftercommit.audit",
    "select from aftercommit.outbox",
    "delete from aftercommit.outbox",
    "delete from aftercommit.inbox",
    "delete from aftercommit.dead_letter",
    "insert into aftercommit.audit (who, action) values ('me', 'x')",
    "delete from aftercommit.sweep",
    "delete from aftercommit.lease",
    "delete from aftercommit.relay_log",
    "insert into aftercommit.pause (name) values ('relay')",
];

const REQUESTER: [&str; 10] = [
    "select from aftercommit.audit",
    "delete from aftercommit.audit",
    "update aftercommit.audit set who = 'another'",
    "insert into aftercommit.erased_subject (kind, id, job) values ('a', 'a', gen_random_uuid())",
    "select from aftercommit.outbox",
    "delete from aftercommit.job",
    "update aftercommit.job set requested_by = 'another'",
    "update aftercommit.job set request = '{}'",
    "delete from aftercommit.job_participant",
    "select from aftercommit.job_work",
];

const ERASER: [&str; 9] = [
    "select payload from aftercommit.outbox",
    "select headers from aftercommit.dead_letter",
    "update aftercommit.outbox set payload = ''",
    "delete from aftercommit.tombstone",
    "insert into aftercommit.tombstone (event_id) values (gen_random_uuid())",
    "update aftercommit.forget_request set ended_at = now()",
    "select detail from aftercommit.audit",
    "select aftercommit.take_tombstones('receipts', '{}', '{}')",
    "select aftercommit.forget_copies('{}', 'me')",
];

const READER: [&str; 16] = [
    "select aftercommit.capture_remove('aftercommit.outbox')",
    "delete from aftercommit.failure",
    "insert into aftercommit.outbox (event_id, type, payload) values (gen_random_uuid(), 'a', '')",
    "select aftercommit.publish('a', '{}')",
    "delete from aftercommit.outbox",
    "delete from aftercommit.dead_letter",
    "update aftercommit.dead_letter set payload = ''",
    "insert into aftercommit.redrive (subscriber) values ('receipts')",
    "delete from aftercommit.inbox",
    "insert into aftercommit.pause (name) values ('relay')",
    "delete from aftercommit.pause",
    "update aftercommit.parked set state = 'released'",
    "update aftercommit.lease set holder = 'me'",
    "insert into aftercommit.audit (who, action) values ('me', 'x')",
    "delete from aftercommit.finding",
    "update aftercommit.reconciler set last_success_at = now()",
];

const OPERATOR: [&str; 23] = [
    "select aftercommit.capture_remove('aftercommit.outbox')",
    "update aftercommit.pause set name = 'relay'",
    "delete from aftercommit.worker_status",
    "insert into aftercommit.outbox (event_id, type, payload) values (gen_random_uuid(), 'a', '')",
    "select aftercommit.publish('a', '{}')",
    "delete from aftercommit.outbox",
    "insert into aftercommit.relay_log select from aftercommit.relay_log",
    "delete from aftercommit.relay_log",
    "insert into aftercommit.parked select from aftercommit.parked",
    "delete from aftercommit.parked",
    "update aftercommit.lease set holder = 'me'",
    "insert into aftercommit.lease (name, holder, epoch, expires_at) values ('relay', 'me', 100, now())",
    "delete from aftercommit.finding",
    "update aftercommit.reconciler set last_success_at = now()",
    "insert into aftercommit.audit (who, action, role) values ('me', 'x', 'another')",
    "insert into aftercommit.audit (who, action, at) values ('me', 'x', 'yesterday')",
    "insert into aftercommit.audit (id, who, action) overriding system value values (1, 'me', 'x')",
    "update aftercommit.dead_letter set key = 'another'",
    "update aftercommit.dead_letter set type = 'another'",
    "insert into aftercommit.dead_letter (subscriber) values ('receipts')",
    "insert into aftercommit.pause (name, paused_by) values ('relay', 'another')",
    "update aftercommit.parked set reason = 'another'",
    "lock table aftercommit.parked in share mode",
];

/// Statements that run, and change no row of another role: row-level security hides it.
const HIDDEN: [(&str, &str); 8] = [
    ("pruner", "update aftercommit.lease set expires_at = '-infinity' where name = 'relay'"),
    ("worker", "update aftercommit.lease set expires_at = '-infinity' where name = 'relay'"),
    ("relay", "update aftercommit.lease set expires_at = '-infinity' where name like 'subscriber:%'"),
    ("outbox_reconciler", "update aftercommit.reconciler set position = '{\"to\": 7}' where name <> 'outbox'"),
    (
        "inbox_reconciler",
        "update aftercommit.reconciler set position = '{\"to\": 7}' where name in ('outbox', 'derived')",
    ),
    ("inbox_reconciler", "delete from aftercommit.reconcile_run where name = 'outbox'"),
    ("own_reconciler", "update aftercommit.reconciler set position = '{\"to\": 7}' where name <> 'derived'"),
    ("own_reconciler", "delete from aftercommit.finding"),
];

async fn connect(stage: &Stage, role: &str) -> PgConnection {
    PgConnection::connect(&stage.url_of(role)).await.unwrap()
}

/// How PostgreSQL answers; the transaction is undone.
async fn attempt(connection: &mut PgConnection, sql: &str) -> Result<u64, String> {
    let mut tx = connection.begin().await.unwrap();
    let answer = sqlx::query(AssertSqlSafe(sql.to_string())).execute(&mut *tx).await;
    tx.rollback().await.unwrap();
    match answer {
        Ok(done) => Ok(done.rows_affected()),
        Err(error) => {
            Err(error.as_database_error().and_then(|error| Some(error.code()?.into_owned())).unwrap_or_default())
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_step_beyond_is_refused_by_postgresql() {
    let stage = Stage::new().await;
    let steps: [(&str, &[&str]); 11] = [
        ("publisher", &PUBLISHER),
        ("relay", &RELAY),
        ("worker", &WORKER),
        ("outbox_reconciler", &OUTBOX_RECONCILER),
        ("inbox_reconciler", &INBOX_RECONCILER),
        ("own_reconciler", &OWN_RECONCILER),
        ("pruner", &PRUNER),
        ("requester", &REQUESTER),
        ("eraser", &ERASER),
        ("reader", &READER),
        ("operator", &OPERATOR),
    ];
    let mut owner = PgConnection::connect(&stage.database.config.url).await.unwrap();
    for (role, refused) in steps {
        let mut connection = connect(&stage, role).await;
        for sql in refused.iter().chain(&NOBODY) {
            let answer = attempt(&mut connection, sql).await;
            assert_eq!(answer, Err("42501".into()), "{role}: {sql}");
            // It is the role that is refused, and not a statement that nobody could run.
            let answer = attempt(&mut owner, sql).await;
            assert!(!matches!(&answer, Err(code) if code.starts_with("42")), "{sql}: {answer:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_other_roles_are_out_of_reach() {
    let stage = Stage::new().await;
    stage
        .database
        .execute(
            "insert into aftercommit.lease values ('relay', 'r', 1, now()), ('subscriber:receipts', 'w', 1, now());
             insert into aftercommit.reconciler (name) values ('outbox'), ('inbox:receipts'), ('consumer:receipts'), ('derived');
             insert into aftercommit.reconcile_run (name, cause, mode, scope, holder, alive_until)
             select name, 'demand', 'report', 'new', 'me', now() from aftercommit.reconciler;
             insert into aftercommit.finding (name, kind, item, first_run, last_run) values ('outbox', 'x', 'x', 1, 1)",
        )
        .await;
    let mut owner = PgConnection::connect(&stage.database.config.url).await.unwrap();
    for (role, sql) in HIDDEN {
        assert_eq!(attempt(&mut connect(&stage, role).await, sql).await, Ok(0), "{role}: {sql}");
        assert_ne!(attempt(&mut owner, sql).await, Ok(0), "{sql}");
    }
    let leases = "select from aftercommit.lease";
    for (role, seen) in [("relay", 1), ("worker", 1), ("pruner", 0), ("reader", 2), ("operator", 2)] {
        assert_eq!(attempt(&mut connect(&stage, role).await, leases).await, Ok(seen), "{role}");
    }
}

/// Rights that somebody added, or that an older version of the file gave, are gone after it has run again.
#[tokio::test(flavor = "multi_thread")]
async fn running_it_again_takes_away_what_is_too_much() {
    let stage = Stage::new().await;
    let dump = |stage: &Stage| stage.database.pg_dump(&["--schema-only", "--schema", "aftercommit"]);
    let before = dump(&stage);
    let worker = format!("{}worker", stage.roles.0);
    stage
        .database
        .execute(&format!(
            "grant select on aftercommit.outbox to {worker}; grant insert (payload) on aftercommit.outbox to {worker};
             grant all on schema aftercommit to public; grant all on aftercommit.lease to public;
             grant execute on function aftercommit.publish to {worker};
             alter policy {worker} on aftercommit.lease using (true)"
        ))
        .await;
    assert_ne!(dump(&stage), before);
    stage.roles.grant(&stage.database);
    assert_eq!(dump(&stage), before);
}

/// `aftercommit doctor --role` tells what a login lacks and what it may do besides.
#[tokio::test(flavor = "multi_thread")]
async fn doctor_compares_a_login_with_its_role() {
    let stage = Stage::provisioned().await;
    let grants = |login: &str, roles: &str| {
        let output = stage.run("aftercommit", login, "operator", &["doctor", "--json", "--role", roles]);
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let checks = report["checks"].as_array().unwrap().iter().filter(|check| check["name"] == "grants");
        checks.map(|check| format!("{} {} {}", check["status"], check["finding"], check["remedy"])).collect::<Vec<_>>()
    };
    for (login, roles) in [
        ("publisher", "publisher"),
        ("relay", "relay"),
        ("leader", "relay,outbox_reconciler"),
        ("worker", "worker"),
        ("active", "worker,inbox_reconciler"),
        ("outbox_reconciler", "outbox_reconciler"),
        ("inbox_reconciler", "inbox_reconciler"),
        ("own_reconciler", "own_reconciler"),
        ("pruner", "pruner"),
        ("requester", "requester"),
        ("eraser", "eraser"),
        ("reader", "reader"),
        ("operator", "operator"),
    ] {
        let found = grants(login, roles);
        assert!(found.len() == 1 && found[0].starts_with("\"OK\""), "{login}: {found:#?}");
    }
    let found = grants("worker", "relay").join("\n");
    for part in [
        "grant delete, select, update (xid) on aftercommit.outbox",
        "may do more than relay needs: delete, insert, select on aftercommit.inbox",
    ] {
        assert!(found.contains(part), "{part}: {found}");
    }
    let worker = stage.login("worker");
    stage
        .database
        .execute(&format!(
            "grant select (payload) on aftercommit.outbox to {worker}; grant create on schema aftercommit to {worker}"
        ))
        .await;
    let found = grants("worker", "worker").join("\n");
    assert!(
        found.contains("select (payload) on aftercommit.outbox") && found.contains("create on schema aftercommit"),
        "{found}"
    );
    // Rights that were granted by hand are of no use where row-level security knows no role of the login.
    let stranger = stage.login("stranger");
    stage
        .database
        .execute(&format!(
            "create role {stranger} login; grant usage on schema aftercommit to {stranger};
        grant all on all tables in schema aftercommit to {stranger}"
        ))
        .await;
    let found = grants("stranger", "worker").join("\n");
    assert!(found.contains("row-level security of aftercommit.lease knows no other"), "{found}");
    let owner = grants("owner", "relay").join("\n");
    assert!(owner.starts_with("\"WARN\"") && owner.contains("may do everything"), "{owner}");
}
