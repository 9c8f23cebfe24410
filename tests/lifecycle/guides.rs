//! The code of the guides about rows that go: each of their Rust blocks is in this file as it is there.

use aftercommit::prune::{Association, Child, Condition, Prune, PruneError, Spec};
use chrono::{TimeDelta, Utc};
use sqlx::PgTransaction;

use crate::support::Database;

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
