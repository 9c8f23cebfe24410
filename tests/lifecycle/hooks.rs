//! Hooks before a delete: systems with stewards and monitors, whose rows go with them by ON DELETE CASCADE.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use aftercommit::hooks::{DeleteErrorKind, DeleteHook, DeleteHooks, HookPolicy, SqlSnapshot};
use aftercommit::prune::PruneErrorKind;
use serde_json::{Value, json};
use sqlx::{PgPool, PgTransaction};
use tokio::sync::Notify;

use crate::support::{Database, SOON};

const TABLES: &str = "
create table systems (id bigint primary key, name text not null default '');
create table stewards (system_id bigint references systems on delete cascade, user_id text, primary key (system_id, user_id));
insert into systems select generate_series(1, 5);
insert into stewards select n, u from generate_series(1, 5) n, unnest(array['ann', 'bob']) u;
";

const SNAPSHOT: &str = "select jsonb_agg(user_id order by user_id) from stewards where system_id = $1::bigint";

async fn systems() -> (Database, PgPool) {
    let database = Database::migrated().await;
    database.execute(TABLES).await;
    let pool = database.pool().await;
    (database, pool)
}

fn hooks() -> DeleteHooks {
    let mut hooks = DeleteHooks::new("system", "public.systems");
    hooks.register("stewards", HookPolicy::Required, SqlSnapshot::new(SNAPSHOT)).unwrap();
    hooks
}

/// The payloads of `system.deleted`, in order.
async fn told(pool: &PgPool) -> Vec<Value> {
    let events = "select data from aftercommit.events where type = 'system.deleted' order by id";
    sqlx::query_scalar(events).fetch_all(pool).await.unwrap()
}

async fn count(pool: &PgPool, rows: &str) -> i64 {
    let sql = sqlx::AssertSqlSafe(format!("select count(*) from {rows}"));
    sqlx::query_scalar(sql).fetch_one(pool).await.unwrap()
}

type Answer = Result<Value, Box<dyn Error + Send + Sync>>;

/// Calls of hooks: the hook's name, the row, and how many stewards it still had.
type Calls = Arc<std::sync::Mutex<Vec<(&'static str, String, i64)>>>;

/// Writes down that it was called.
struct Called(&'static str, Calls);

impl DeleteHook for Called {
    async fn before_delete(&self, tx: &mut PgTransaction<'_>, id: &str) -> Answer {
        let there = sqlx::query_scalar("select count(*) from stewards where system_id = $1::bigint");
        let there: i64 = there.bind(id).fetch_one(&mut **tx).await?;
        self.1.lock().unwrap().push((self.0, id.into(), there));
        Ok(Value::Null)
    }
}

/// Writes something and panics.
struct Panics;

impl DeleteHook for Panics {
    async fn before_delete(&self, tx: &mut PgTransaction<'_>, _: &str) -> Answer {
        sqlx::query("insert into stewards values (5, 'ghost')").execute(&mut **tx).await?;
        panic!("by mistake")
    }
}

/// Swallows an error of a statement, which leaves the transaction aborted.
struct Swallows;

impl DeleteHook for Swallows {
    async fn before_delete(&self, tx: &mut PgTransaction<'_>, _: &str) -> Answer {
        _ = sqlx::query("select nowhere").execute(&mut **tx).await;
        Ok(json!("fine"))
    }
}

/// Says that it was called, and waits until somebody lets it go on.
struct Waits {
    called: Arc<Notify>,
    go_on: Arc<Notify>,
}

impl DeleteHook for Waits {
    async fn before_delete(&self, _: &mut PgTransaction<'_>, _: &str) -> Answer {
        self.called.notify_one();
        self.go_on.notified().await;
        Ok(Value::Null)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_event_holds_what_the_cascade_took() {
    let (_database, pool) = systems().await;
    let mut tx = pool.begin().await.unwrap();
    let deleted = hooks().delete(&mut tx, 3).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!((deleted.rows.len(), deleted.rows[0].0.as_str(), deleted.missing.len()), (1, "3", 0));
    assert_eq!(
        told(&pool).await,
        [json!({ "entity": "system", "id": "3", "snapshot": { "stewards": ["ann", "bob"] }, "failed": {} })]
    );
    let (id, key): (uuid::Uuid, String) =
        sqlx::query_as("select event_id, key from aftercommit.outbox").fetch_one(&pool).await.unwrap();
    assert_eq!((id, key.as_str()), (deleted.rows[0].1.as_uuid(), "3"));
    assert_eq!(count(&pool, "stewards where system_id = 3").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn hooks_run_in_order_before_the_delete_once_per_row() {
    let (_database, pool) = systems().await;
    let calls = Calls::default();
    let mut hooks = DeleteHooks::new("system", "systems");
    for name in ["first", "second"] {
        hooks.register(name, HookPolicy::Required, Called(name, Arc::clone(&calls))).unwrap();
    }
    let mut tx = pool.begin().await.unwrap();
    let deleted = hooks.delete_many(&mut tx, &[4, 2, 99, 2]).await.unwrap();
    tx.commit().await.unwrap();
    let ids: Vec<&str> = deleted.rows.iter().map(|(id, _)| id.as_str()).collect();
    assert_eq!((ids, deleted.missing), (vec!["2", "4"], vec!["99".to_string()]));
    let calls: Vec<(&str, String, i64)> = calls.lock().unwrap().clone();
    let expected = [("first", "2"), ("second", "2"), ("first", "4"), ("second", "4")];
    assert_eq!(calls, expected.map(|(hook, id)| (hook, id.to_string(), 2)));
    assert_eq!(told(&pool).await.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_registry_deletes_and_tells() {
    let (_database, pool) = systems().await;
    let hooks = DeleteHooks::new("system", "systems");
    let mut tx = pool.begin().await.unwrap();
    let deleted = hooks.delete_many(&mut tx, &["1", "01", "x7"][..2]).await.unwrap();
    assert_eq!((deleted.rows.len(), deleted.missing.len()), (1, 0), "the same row in two spellings");
    tx.commit().await.unwrap();
    assert_eq!(told(&pool).await, [json!({ "entity": "system", "id": "1", "snapshot": {}, "failed": {} })]);
    let error = hooks.delete(&mut pool.begin().await.unwrap(), "x7").await.unwrap_err();
    assert_eq!(error.kind(), DeleteErrorKind::Refused(PruneErrorKind::Database), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hook_that_fails_stops_nothing_unless_it_is_required() {
    let (_database, pool) = systems().await;
    let failing: [(&str, &str); 2] = [("sql", "select nowhere"), ("late", "select pg_sleep(60)::text::jsonb")];
    let mut all = DeleteHooks::new("system", "systems");
    for (name, sql) in failing {
        all.register_within(Duration::from_millis(300), name, HookPolicy::BestEffort, SqlSnapshot::new(sql)).unwrap();
    }
    all.register("panics", HookPolicy::BestEffort, Panics).unwrap();
    all.register("swallows", HookPolicy::BestEffort, Swallows).unwrap();
    all.register("stewards", HookPolicy::Required, SqlSnapshot::new(SNAPSHOT)).unwrap();
    let mut tx = pool.begin().await.unwrap();
    sqlx::query("set local statement_timeout = '7s'").execute(&mut *tx).await.unwrap();
    assert_eq!(all.delete(&mut tx, 1).await.unwrap().rows.len(), 1);
    let limit: String = sqlx::query_scalar("show statement_timeout").fetch_one(&mut *tx).await.unwrap();
    assert_eq!(limit, "7s", "as it was");
    tx.commit().await.unwrap();
    let event = told(&pool).await.remove(0);
    assert_eq!(event["snapshot"], json!({ "stewards": ["ann", "bob"] }));
    let failed = event["failed"].as_object().unwrap();
    let said: Vec<(&str, &str)> = failed.iter().map(|(name, text)| (name.as_str(), text.as_str().unwrap())).collect();
    let [(_, late), (_, panics), (_, sql), (_, swallows)] = said.as_slice() else { panic!("{said:?}") };
    assert!(late.contains("longer than 300ms") || late.contains("statement timeout"), "{late}");
    assert_eq!(*panics, "it panicked: by mistake");
    assert!(sql.contains("nowhere") && swallows.contains("aborted"), "{sql} {swallows}");
    assert_eq!(count(&pool, "stewards where user_id = 'ghost'").await, 0, "what it did is undone");

    for (name, sql) in failing {
        let mut required = hooks();
        required
            .register_within(Duration::from_millis(300), name, HookPolicy::Required, SqlSnapshot::new(sql))
            .unwrap();
        let mut tx = pool.begin().await.unwrap();
        let error = required.delete_many(&mut tx, &[2, 3]).await.unwrap_err();
        assert_eq!(error.kind(), DeleteErrorKind::Hook);
        assert!(error.to_string().contains(&format!("system 2 was not deleted: the hook {name:?} failed")), "{error}");
        sqlx::query("insert into systems values ($1)").bind(100 + name.len() as i64).execute(&mut *tx).await.unwrap();
        tx.commit().await.unwrap();
    }
    assert_eq!((count(&pool, "systems").await, told(&pool).await.len()), (6, 1), "nothing else was deleted or told");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolled_back_delete_tells_nobody() {
    let (database, pool) = systems().await;
    let mut tx = pool.begin().await.unwrap();
    hooks().delete(&mut tx, 1).await.unwrap();
    tx.rollback().await.unwrap();
    assert_eq!((count(&pool, "systems").await, told(&pool).await.len()), (5, 0));
    database
        .execute("create table orders (id int primary key, system_id bigint constraint of_system references systems)")
        .await;
    database.execute("insert into orders values (1, 2)").await;
    let mut tx = pool.begin().await.unwrap();
    let error = hooks().delete_many(&mut tx, &[1, 2]).await.unwrap_err();
    assert_eq!(error.kind(), DeleteErrorKind::Refused(PruneErrorKind::ForeignKey));
    assert_eq!(error.constraint(), Some("of_system"));
    tx.commit().await.unwrap();
    assert_eq!((count(&pool, "systems").await, told(&pool).await.len()), (5, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_is_too_large_is_refused_and_nothing_goes() {
    let (_database, pool) = systems().await;
    let mut hooks = DeleteHooks::new("system", "systems");
    let large = SqlSnapshot::new("select to_jsonb(repeat('x', 2000000))");
    hooks.register("large", HookPolicy::BestEffort, large).unwrap();
    let mut tx = pool.begin().await.unwrap();
    let error = hooks.delete(&mut tx, 1).await.unwrap_err();
    assert_eq!(error.kind(), DeleteErrorKind::Refused(PruneErrorKind::Event), "{error}");
    tx.commit().await.unwrap();
    assert_eq!(count(&pool, "systems").await, 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_a_trigger_keeps_is_missing_and_not_told() {
    let (database, pool) = systems().await;
    database
        .execute(
            "create function keep() returns trigger language plpgsql as $$ begin
                 if old.id = 2 then return null; end if; return old; end $$;
             create trigger keep before delete on systems for each row execute function keep()",
        )
        .await;
    let mut tx = pool.begin().await.unwrap();
    let deleted = hooks().delete_many(&mut tx, &[1, 2]).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!((deleted.rows.len(), deleted.missing, told(&pool).await.len()), (1, vec!["2".to_string()], 1));
}

/// Adds a steward in a transaction of its own, and says whether the database took it.
async fn add(pool: PgPool, system: i64, user: &'static str) -> bool {
    sqlx::query("insert into stewards values ($1, $2)").bind(system).bind(user).execute(&pool).await.is_ok()
}

/// D9: the original looks in a session of its own, before the delete begins. Whoever adds a steward in between is in no snapshot,
/// and gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_steward_added_meanwhile_is_in_the_snapshot_or_refused() {
    let (_database, pool) = systems().await;
    // As the original does it.
    let snapshot: Value = sqlx::query_scalar(SNAPSHOT).bind("1").fetch_one(&pool).await.unwrap();
    assert!(add(pool.clone(), 1, "carl").await);
    sqlx::query("delete from systems where id = 1").execute(&pool).await.unwrap();
    assert_eq!(snapshot, json!(["ann", "bob"]), "carl is lost: neither in the snapshot nor in the table");

    // Here: whoever comes before the lock is in the snapshot, and whoever comes after it is refused.
    assert!(add(pool.clone(), 2, "carl").await);
    let (looked, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let mut hooks = hooks();
    let waits = Waits { called: Arc::clone(&looked), go_on: Arc::clone(&go_on) };
    hooks.register_within(SOON, "waits", HookPolicy::Required, waits).unwrap();
    let deleting = tokio::spawn({
        let pool = pool.clone();
        async move {
            let mut tx = pool.begin().await.unwrap();
            hooks.delete(&mut tx, 2).await.unwrap();
            tx.commit().await.unwrap();
        }
    });
    looked.notified().await;
    let adding = tokio::spawn(add(pool.clone(), 2, "dora"));
    let waiting = async || {
        count(&pool, "pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'").await == 1
    };
    aftercommit::testing::eventually(SOON, "dora waits for the lock", waiting).await.unwrap();
    go_on.notify_one();
    deleting.await.unwrap();
    assert!(!adding.await.unwrap(), "the foreign key refuses her");
    assert_eq!(told(&pool).await[0]["snapshot"]["stewards"], json!(["ann", "bob", "carl"]));
}

/// D10: the original's hooks ask the database from within the event loop and block it.
#[tokio::test(flavor = "current_thread")]
async fn a_slow_hook_blocks_nobody_else() {
    let (_database, pool) = systems().await;
    let ticks = Arc::new(AtomicUsize::new(0));
    let ticking = tokio::spawn({
        let ticks = Arc::clone(&ticks);
        async move {
            loop {
                tokio::time::sleep(Duration::from_millis(5)).await;
                ticks.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    // As the original does it: nothing else runs on this thread meanwhile.
    let before = ticks.load(Ordering::Relaxed);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(ticks.load(Ordering::Relaxed), before);
    let mut hooks = DeleteHooks::new("system", "systems");
    let slow = SqlSnapshot::new("select to_jsonb(pg_sleep(0.3)::text)");
    hooks.register("slow", HookPolicy::Required, slow).unwrap();
    let mut tx = pool.begin().await.unwrap();
    let before = ticks.load(Ordering::Relaxed);
    hooks.delete(&mut tx, 1).await.unwrap();
    tx.commit().await.unwrap();
    assert!(ticks.load(Ordering::Relaxed) > before + 10, "others went on");
    ticking.abort();
}

/// D11: the original follows up in the process that deleted, which a crash or a deploy ends. Here the follow-up is committed.
#[tokio::test(flavor = "multi_thread")]
async fn the_follow_up_survives_the_process_that_deleted() {
    let (_database, pool) = systems().await;
    let done = Arc::new(AtomicUsize::new(0));
    // As the original does it.
    sqlx::query("delete from systems where id = 1").execute(&pool).await.unwrap();
    let background = tokio::spawn({
        let done = Arc::clone(&done);
        async move {
            tokio::time::sleep(SOON).await;
            done.fetch_add(1, Ordering::Relaxed);
        }
    });
    background.abort();
    assert!(background.await.unwrap_err().is_cancelled());
    assert_eq!((done.load(Ordering::Relaxed), told(&pool).await.len()), (0, 0), "gone with the process");

    let mut tx = pool.begin().await.unwrap();
    hooks().delete(&mut tx, 2).await.unwrap();
    tx.commit().await.unwrap();
    // From here on no code of this process is needed: whoever reads the outbox finds it.
    pool.close().await;
    let again = PgPool::connect(&_database.config.url).await.unwrap();
    assert_eq!(told(&again).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_refused_by_name() {
    let (database, pool) = systems().await;
    database
        .execute("create table pairs (a int, b int, primary key (a, b)); create view looks as select 1 as id")
        .await;
    for (table, kind, told) in [
        ("nowhere", PruneErrorKind::Spec, "no table \"nowhere\""),
        ("looks", PruneErrorKind::Spec, "public.looks is no table"),
        ("pairs", PruneErrorKind::CompositePrimaryKey, "2 columns (a, b)"),
    ] {
        let error = DeleteHooks::new("x", table).delete(&mut pool.begin().await.unwrap(), 1).await.unwrap_err();
        assert_eq!(error.kind(), DeleteErrorKind::Refused(kind));
        assert!(error.to_string().contains(told), "{error}");
    }
    let error =
        DeleteHooks::new("no such type", "systems").delete(&mut pool.begin().await.unwrap(), 1).await.unwrap_err();
    assert_eq!(error.kind(), DeleteErrorKind::Refused(PruneErrorKind::Event), "{error}");
}

/// A process of a test that deletes a system and perhaps dies on the way.
#[tokio::test]
#[ignore = "a process of a test"]
async fn child() {
    let Ok(url) = std::env::var("CHILD_DATABASE") else { return };
    let pool = PgPool::connect(&url).await.unwrap();
    let mut tx = pool.begin().await.unwrap();
    let deleted = hooks().delete_many(&mut tx, &[1, 2]).await.unwrap();
    let dies_at = |step| {
        if std::env::var("AFTERCOMMIT_FAULT").unwrap() == step {
            std::process::abort();
        }
    };
    dies_at("before-commit:1");
    tx.commit().await.unwrap();
    dies_at("after-commit:1");
    assert_eq!(deleted.rows.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_every_step_it_is_all_or_nothing() {
    for (step, gone) in [
        ("delete-locked:1", false),
        ("delete-asked:1", false),
        ("delete-asked:2", false),
        ("delete-deleted:1", false),
        ("delete-told:1", false),
        ("before-commit:1", false),
        ("after-commit:1", true),
        ("none:1", true),
    ] {
        let (database, pool) = systems().await;
        let died = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "hooks::child", "--ignored"])
            .env("CHILD_DATABASE", &database.config.url)
            .env("AFTERCOMMIT_FAULT", step)
            .output()
            .unwrap();
        assert_eq!(died.status.success(), step == "none:1", "{step}");
        let (left, events) = if gone { (3, 2) } else { (5, 0) };
        let ended = async || {
            count(&pool, "pg_stat_activity where datname = current_database() and state like '%in transaction%'").await
                == 0
        };
        aftercommit::testing::eventually(SOON, "the server knows that it is gone", ended).await.unwrap();
        assert_eq!((count(&pool, "systems").await, told(&pool).await.len()), (left, events), "{step}");
        assert_eq!(count(&pool, "stewards").await, left * 2, "{step}");
    }
}
