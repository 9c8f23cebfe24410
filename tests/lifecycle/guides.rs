//! The code of the guides about rows that go: each of their Rust blocks is in this file as it is there.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use aftercommit::capture::{self, Capture};
use aftercommit::config::PostgresConfig;
use aftercommit::erase::{self, Events, MasterKey, Opened, Rows, SealError, Sealed, Sealer, Subject, Tables};
use aftercommit::fanout::{
    Coordinator, JobError, JobId, JobRequest, Jobs, Kind, Outcome, Overdue, Participant, Requested, Step, Work,
};
use aftercommit::hooks::{DeleteError, DeleteHook, DeleteHooks, HookPolicy, Links, SqlSnapshot};
use aftercommit::prune::{Association, Child, Condition, Prune, PruneError, Spec};
use aftercommit::reconciler::{Mode, Runner, Scope};
use aftercommit::worker::{Delivery, Handler, HandlerError, Subscriber};
use aftercommit::{Event, outbox};
use chrono::{TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sqlx::{PgPool, PgTransaction};

use crate::support::Database;

fn system_hooks() -> Result<DeleteHooks, DeleteError> {
    let mut hooks = DeleteHooks::new("system", "public.systems");
    // Who loses access with it. Without this nobody could tell afterwards, so nothing is deleted when it fails.
    let access = SqlSnapshot::new(
        "select jsonb_agg(jsonb_build_object('monitor', monitor_id, 'user', user_id))
           from monitors join stewards using (system_id) where system_id = $1::bigint",
    );
    hooks.register("access", HookPolicy::Required, access)?;
    // Nice to have: when it fails or takes too long, the event says so, and the delete goes on.
    hooks.register("costs", HookPolicy::BestEffort, Costs)?;
    Ok(hooks)
}

struct Costs;

impl DeleteHook for Costs {
    async fn before_delete(&self, tx: &mut PgTransaction<'_>, id: &str) -> Result<Value, Box<dyn Error + Send + Sync>> {
        let cents: Option<i64> =
            sqlx::query_scalar("select sum(cents)::bigint from bills where system_id = $1::bigint")
                .bind(id)
                .fetch_one(&mut **tx)
                .await?;
        Ok(cents.into())
    }
}

async fn delete_systems(tx: &mut PgTransaction<'_>, hooks: &DeleteHooks, ids: &[i64]) -> Result<usize, DeleteError> {
    let deleted = hooks.delete_many(tx, ids).await?;
    Ok(deleted.rows.len()) // deleted.missing are those that were not there
}

async fn change_stewards(tx: &mut PgTransaction<'_>) -> Result<(), DeleteError> {
    let stewards = Links::new("system.stewards_changed", "public.stewards", "system_id", "user_id");
    stewards.add(tx, 7, ["ann", "bob"]).await?; // {"owner": "7", "added": ["ann", "bob"], "removed": []}
    stewards.add(tx, 7, ["ann"]).await?; // she is there already: nothing is told
    stewards.set(tx, 7, ["ann", "carl"]).await?; // carl was added, bob removed
    stewards.remove_everywhere(tx, "ann").await?; // one event for each system
    Ok(())
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct DeleteTenant {
    tenant: i64,
}

#[derive(Debug)]
struct TenantDeletion;

impl Kind for TenantDeletion {
    const NAME: &'static str = "tenant.deletion";
    const REQUESTED: &'static str = "tenant.deletion.requested";
    const OUTCOME: &'static str = "tenant.deletion.outcome";
    const ENDED: &'static str = "tenant.deletion.ended";
    type Request = DeleteTenant;
}

async fn request_deletion(tx: &mut PgTransaction<'_>, tenant: i64) -> Result<JobId, JobError> {
    let request = JobRequest {
        key: format!("tenant-{tenant}"),
        request: DeleteTenant { tenant },
        requested_by: "ann@example.org".into(),
        participants: ["orders", "bills"].into(),
        due_after: Some(Duration::from_secs(3600)),
        begin_after: Some(Duration::from_secs(60)), // until then it can be cancelled
        parent: None,
    };
    Ok(Jobs::<TenantDeletion>::request(tx, request).await?.job)
}

struct DeleteOrders;

impl Work<TenantDeletion> for DeleteOrders {
    async fn step(
        &self,
        tx: &mut PgTransaction<'_>,
        request: &DeleteTenant,
        _: Option<Value>,
    ) -> Result<Step, HandlerError> {
        let sql = "delete from orders where id = any(array(select id from orders where tenant = $1 limit 1000))";
        let gone = sqlx::query(sql).bind(request.tenant).execute(&mut **tx).await?.rows_affected();
        let step = Step::done([("orders", gone)]);
        Ok(if gone == 1000 { step.more(true) } else { step })
    }
}

fn orders(pool: PgPool) -> Subscriber {
    let participant = Participant::new("orders", DeleteOrders).each_step_commits(pool);
    Subscriber::new("orders-deletions").on::<Requested<TenantDeletion>>(participant)
}

fn coordinator() -> Subscriber {
    Subscriber::new("tenant-deletions").on::<Outcome<TenantDeletion>>(Coordinator::new())
}

fn reconcilers(postgres: &PostgresConfig) -> Runner {
    // Who has not answered after ten minutes is asked once more.
    Runner::new(postgres.clone()).reconciler(Overdue::<TenantDeletion>::new(Duration::from_secs(600)))
}

fn order_tables() -> Tables {
    Tables::new("orders").of(
        "tenant",
        [
            Rows::of("public.order_items").parent("order_id", "public.orders"),
            Rows::of("public.orders").column("tenant_id"),
            Rows::of("public.recipes").column("tenant_id").keep("is_system"), // these stay
            Rows::of("public.old_orders").column("tenant_id").optional(),     // it need not be there
            Rows::of("public.notes").condition("about = 'tenant:' || $1"),    // $1 is the id as text
        ],
    )
}

fn order_erasures(pool: PgPool) -> Subscriber {
    let participant = erase::participant(order_tables()).each_step_commits(pool);
    Subscriber::new("orders-erasures").on::<erase::Requested>(participant)
}

fn order_erasures_with_events(pool: PgPool) -> Subscriber {
    let eraser = Events::of(order_tables()).key("tenant", "tenant-{id}").key_prefix("tenant", "tenant-{id}/");
    Subscriber::new("orders-erasures").on::<erase::Requested>(erase::participant(eraser).each_step_commits(pool))
}

async fn erase_tenant(tx: &mut PgTransaction<'_>, tenant: &str, name: &str) -> Result<erase::Asked, JobError> {
    let month = Duration::from_secs(30 * 24 * 3600);
    erase::Request::new(Subject::new("tenant", tenant), "ann@example.org")
        .participants(["orders", "bills"])
        .named(name, "select name from public.tenants where id = $1::uuid")
        .none_left(
            "other admins",
            "select count(*) from public.admins where tenant_id = $1::uuid and leaves is not true",
        )
        .due_after(month)
        .begin_after(Duration::from_secs(3600)) // until then `aftercommit job cancel` stops it
        .ask(tx)
        .await
}

fn erasures() -> Subscriber {
    // A minute after the last answer all look once more.
    Subscriber::new("erasures").on::<erase::Outcome>(erase::Coordinator::new().verify_after(Duration::from_secs(60)))
}

fn reminder(postgres: &PostgresConfig) -> Runner {
    Runner::new(postgres.clone()).reconciler(erase::Overdue::new(Duration::from_secs(600)))
}

/// The tables of the guide about deletes.
const SYSTEMS: &str = "
create table systems (id bigint primary key);
create table monitors (monitor_id bigint primary key, system_id bigint references systems on delete cascade);
create table stewards (system_id bigint references systems on delete cascade, user_id text, primary key (system_id, user_id));
insert into systems values (7), (8);
insert into monitors values (3, 8);
insert into stewards values (8, 'ann');
";

/// One hook for each kind that a framework has, and what is told of it: a delete, a steward, a link.
#[tokio::test(flavor = "multi_thread")]
async fn the_three_shims_map_one_to_one() {
    let database = Database::migrated().await;
    database.execute(SYSTEMS).await;
    let pool = database.pool().await;
    let mut tx = pool.begin().await.unwrap();
    change_stewards(&mut tx).await.unwrap();
    assert_eq!(delete_systems(&mut tx, &system_hooks().unwrap(), &[8, 9]).await.unwrap(), 1);
    tx.commit().await.unwrap();
    let told: Vec<(String, Value)> =
        sqlx::query_as("select type, data from aftercommit.events order by id").fetch_all(&pool).await.unwrap();
    let [.., (kind, deleted)] = told.as_slice() else { panic!("{told:?}") };
    assert_eq!((told.len(), kind.as_str()), (5, "system.deleted"));
    assert_eq!(told[0].1, json!({ "owner": "7", "added": ["ann", "bob"], "removed": [] }));
    assert_eq!(told[1].1, json!({ "owner": "7", "added": ["carl"], "removed": ["bob"] }));
    // The hook that asks for a table that is not there is on record, and the delete went on.
    assert_eq!(deleted["snapshot"], json!({ "access": null }), "ann was removed everywhere before");
    assert!(deleted["failed"]["costs"].as_str().unwrap().contains("bills"), "{deleted}");
}

fn sessions() -> Spec {
    Spec::new("public.sessions", "status = 'terminated'")
        .name("sessions")
        .before_column("ended_at")
        // Rows that refer to a session go first, and before them what refers to those.
        .child(Child::new("public.kernels", "session_id").child(Child::new("public.kernel_logs", "kernel_id")))
        // Rows that name a session by type and id, as text, without a foreign key.
        .association(Association::new("public.permissions", "entity_type", "entity_id", "session"))
}

async fn remove_old_sessions(tx: &mut PgTransaction<'_>, user: i64) -> Result<u64, PruneError> {
    let sessions = sessions();
    let prune = Prune::of(&sessions)
        .before(Utc::now() - TimeDelta::days(30))
        .only(Condition::new("user_id = $1").bind(user))
        .limit(1000)
        .skip_locked();
    Ok(prune.run(tx).await?.count)
}

/// The tables of the guide.
const TABLES: &str = "
create table sessions (id bigint primary key, user_id bigint, status text, ended_at timestamptz);
create table kernels (id bigint primary key, session_id bigint references sessions);
create table kernel_logs (id bigint primary key, kernel_id bigint references kernels);
create table permissions (entity_type text, entity_id text);
insert into sessions select n, n % 2, 'terminated', now() - n * interval '10 days' from generate_series(1, 10) n;
insert into kernels select n, n from generate_series(1, 10) n;
insert into kernel_logs select n, n from generate_series(1, 10) n;
";

#[tokio::test(flavor = "multi_thread")]
async fn the_guides_pruning_removes_what_it_says() {
    let database = Database::migrated().await;
    database.execute(TABLES).await;
    let pool = database.pool().await;
    let mut tx = pool.begin().await.unwrap();
    assert_eq!(remove_old_sessions(&mut tx, 0).await.unwrap(), 4, "4, 6, 8 and 10");
    tx.commit().await.unwrap();
}

/// The guide's `prune.toml` says the same as its spec.
#[tokio::test(flavor = "multi_thread")]
async fn the_guides_file_removes_what_it_says() {
    let database = Database::migrated().await;
    database.execute(TABLES).await;
    let guide = include_str!("../../docs/guides/prune.md");
    let toml = guide.split("```toml\n").nth(1).unwrap().split("```").next().unwrap();
    let directory = crate::support::Directory::new();
    let file = directory.write("prune.toml", toml);
    let config = aftercommit::prune::file::load(&file).unwrap();
    let pruner = aftercommit::prune::Pruner::new(&database.config, config).unwrap();
    let swept = pruner.sweep(&Default::default()).await.unwrap();
    assert_eq!((swept[0].category.as_str(), swept[0].removed), ("sessions", 8), "{swept:?}");
}

async fn capture_orders(tx: &mut PgTransaction<'_>) -> Result<(), aftercommit::Error> {
    let columns = ["id", "customer_id", "state", "cents"];
    Capture::new("public.orders", "order").columns(columns).watch(["state"]).install(tx).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_capture_is_installed_in_a_transaction() {
    let database = Database::migrated().await;
    database.execute("create table orders (id int primary key, customer_id int, state text, cents int)").await;
    let pool = database.pool().await;
    let mut tx = pool.begin().await.unwrap();
    capture_orders(&mut tx).await.unwrap();
    assert_eq!(capture::list(&mut tx).await.unwrap()[0].watch, ["state"]);
}

/// The guide about jobs: it is asked, worked on in two steps, and ended.
#[tokio::test(flavor = "multi_thread")]
async fn the_guides_job_is_done() {
    let database = Database::migrated().await;
    database
        .execute("create table orders (id bigint primary key, tenant bigint); insert into orders select n, n % 2 from generate_series(1, 3000) n")
        .await;
    let pool = database.pool().await;
    let mut tx = pool.begin().await.unwrap();
    let job = request_deletion(&mut tx, 1).await.unwrap();
    tx.commit().await.unwrap();
    let payload: Vec<u8> = sqlx::query_scalar("select payload from aftercommit.outbox").fetch_one(&pool).await.unwrap();
    let mut requested: Requested<TenantDeletion> = serde_json::from_slice(&payload).unwrap();
    assert!(requested.not_before.is_some());
    requested.not_before = None;
    let participant = Participant::new("orders", DeleteOrders).each_step_commits(pool.clone());
    let mut tx = pool.begin().await.unwrap();
    participant.handle(&mut tx, &Delivery::new(requested)).await.unwrap();
    let status = Jobs::<TenantDeletion>::status(&mut tx, job).await.unwrap();
    assert_eq!(status.completed, "0/2", "the coordinator has not heard of it");
    tx.commit().await.unwrap();
    let left: i64 = sqlx::query_scalar("select count(*) from orders").fetch_one(&pool).await.unwrap();
    assert_eq!(left, 1500);
    assert_eq!((orders(pool).name(), coordinator().name()), ("orders-deletions", "tenant-deletions"));
    let summary =
        reconcilers(&database.config).run_now("job-tenant-deletion", Scope::Full, Mode::Repair).await.unwrap();
    assert_eq!(summary.repaired, 0, "nobody is late yet");
}

/// The guide about erasures: its guards, its tables, and its files say the same.
#[tokio::test(flavor = "multi_thread")]
async fn the_guides_erasure_is_asked_for_and_done() {
    const TENANT: &str = "5d0f3a52-6b5b-4b1c-9a3e-0c6d1f2a3b41";
    let database = Database::migrated().await;
    database
        .execute(&format!(
            "create table tenants (id uuid primary key, name text); create table admins (tenant_id uuid, leaves boolean);
             create table orders (id bigint primary key, tenant_id uuid);
             create table order_items (id bigint primary key, order_id bigint references orders);
             create table recipes (id bigint primary key, tenant_id uuid, is_system boolean); create table notes (about text);
             insert into tenants values ('{TENANT}', 'Acme'); insert into admins values ('{TENANT}', true);
             insert into orders values (1, '{TENANT}'), (2, null); insert into order_items values (1, 1), (2, 2);
             insert into recipes values (1, '{TENANT}', true), (2, '{TENANT}', false); insert into notes values ('tenant:{TENANT}')"
        ))
        .await;
    let pool = database.pool().await;
    let mut tx = pool.begin().await.unwrap();
    assert!(erase_tenant(&mut tx, TENANT, "Other").await.is_err());
    let job = erase_tenant(&mut tx, TENANT, "Acme").await.unwrap().job;
    tx.commit().await.unwrap();
    let payload: Vec<u8> = sqlx::query_scalar("select payload from aftercommit.outbox").fetch_one(&pool).await.unwrap();
    let mut requested: erase::Requested = serde_json::from_slice(&payload).unwrap();
    requested.not_before = None;
    let mut tx = pool.begin().await.unwrap();
    erase::participant(order_tables()).handle(&mut tx, &Delivery::new(requested)).await.unwrap();
    tx.commit().await.unwrap();
    let left: i64 = sqlx::query_scalar("select (select count(*) from orders) * 100 + (select count(*) from order_items) * 10 + (select count(*) from recipes)")
        .fetch_one(&pool).await.unwrap();
    assert_eq!(left, 111);
    assert_eq!(order_erasures_with_events(pool.clone()).name(), "orders-erasures");
    assert_eq!((order_erasures(pool).name(), erasures().name()), ("orders-erasures", "erasures"));
    let summary = reminder(&database.config).run_now("job-erasure", Scope::Full, Mode::Repair).await.unwrap();
    assert_eq!(summary.repaired, 0, "nobody is late yet");
    let guide = include_str!("../../docs/guides/erase-a-tenant-or-a-person.md");
    let files: Vec<&str> = guide.split("```toml\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    let directory = crate::support::Directory::new();
    let [erasers, coordinator, guards, events] = files.as_slice() else { panic!("{} files", files.len()) };
    let forget = events.lines().find(|line| line.starts_with("forget = ")).unwrap();
    let erasers = erasers.replacen("kind = \"tenant\"", &format!("kind = \"tenant\"\n{forget}"), 1);
    let worker = directory.write("worker.toml", format!("{erasers}\n{coordinator}"));
    let subscribers = aftercommit::worker::read_file(&worker).unwrap();
    let names: Vec<&str> = subscribers.iter().map(Subscriber::name).collect();
    assert_eq!(names, ["orders-erasures", "models-erasures", "erasures"]);
    let config = erase::file::load(&directory.write("erase.toml", guards)).unwrap();
    let request = config.request(Subject::new("tenant", TENANT), "ann", Some("Acme")).unwrap();
    assert_eq!(erase::operate::ask(&database.config, request).await.unwrap().job, job);
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct UserRegistered {
    user: i64,
    email: String,
}

impl Event for UserRegistered {
    const TYPE: &'static str = "user.registered";
}

fn sealer(master: [u8; 32]) -> Result<Sealer, SealError> {
    Sealer::new(MasterKey::new("2026-12", master))
}

async fn register(tx: &mut PgTransaction<'_>, sealer: &Sealer, user: &UserRegistered) -> Result<(), Box<dyn Error>> {
    let subject = Subject::new("user", user.user);
    let sealed = sealer.seal(tx, &subject, user).await?;
    outbox::publish_raw(tx, sealed).await?;
    Ok(())
}

struct Welcome(Arc<Sealer>);

impl Handler<Sealed<UserRegistered>> for Welcome {
    async fn handle(
        &self,
        tx: &mut PgTransaction<'_>,
        delivery: &Delivery<Sealed<UserRegistered>>,
    ) -> Result<(), HandlerError> {
        match self.0.open(&mut **tx, delivery).await? {
            Opened::Plain(user) => {
                sqlx::query("insert into mail (address) values ($1)").bind(&user.email).execute(&mut **tx).await?;
            }
            // Nothing to do for somebody who is forgotten.
            Opened::Erased => {}
        }
        Ok(())
    }
}

async fn forget_user(tx: &mut PgTransaction<'_>, user: i64) -> Result<bool, SealError> {
    Sealer::forget(tx, &Subject::new("user", user)).await
}

async fn change_master(pool: &PgPool, new: [u8; 32], old: [u8; 32]) -> Result<Sealer, SealError> {
    let sealer = Sealer::new(MasterKey::new("2027-06", new))?.earlier(MasterKey::new("2026-12", old))?;
    loop {
        let mut tx = pool.begin().await?;
        let done = sealer.rewrap(&mut tx, 1000).await?;
        tx.commit().await?;
        if done == 0 {
            return Ok(sealer); // the old one is needed no more
        }
    }
}

/// The guide about sealed events: a mail is sent, the master key changed, and the user forgotten.
#[tokio::test(flavor = "multi_thread")]
async fn the_guides_user_is_forgotten() {
    let database = Database::migrated().await;
    database.execute("create table mail (address text)").await;
    let pool = database.pool().await;
    let user = UserRegistered { user: 7, email: "ann@example.org".into() };
    let mut tx = pool.begin().await.unwrap();
    register(&mut tx, &sealer([1; 32]).unwrap(), &user).await.unwrap();
    let (id, payload): (uuid::Uuid, Vec<u8>) =
        sqlx::query_as("select event_id, payload from aftercommit.outbox").fetch_one(&mut *tx).await.unwrap();
    tx.commit().await.unwrap();
    let mut delivery = Delivery::new(serde_json::from_slice::<Sealed<UserRegistered>>(&payload).unwrap());
    delivery.id = id.into();
    let welcome = Welcome(Arc::new(change_master(&pool, [2; 32], [1; 32]).await.unwrap()));
    for expected in [1, 1] {
        let mut tx = pool.begin().await.unwrap();
        welcome.handle(&mut tx, &delivery).await.unwrap();
        let mails: i64 = sqlx::query_scalar("select count(*) from mail").fetch_one(&mut *tx).await.unwrap();
        assert_eq!(mails, expected, "the second time the user is forgotten");
        forget_user(&mut tx, 7).await.unwrap();
        tx.commit().await.unwrap();
    }
}
