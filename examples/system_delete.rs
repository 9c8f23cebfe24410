//! A system is deleted, and its cascade takes what users may see with it. Three ways to get their lists right, each checked: hooks and
//! their event, captures of the tables that the cascade empties, and a reconciler alone.
//!
//! `cargo run --features testing --example system_delete` does all three on servers that it starts for itself.

#[path = "system_delete/derived.rs"]
pub(crate) mod derived;

use std::process::ExitCode;
use std::time::Duration;

use aftercommit::config::{Naming, NatsConfig, PostgresConfig};
use aftercommit::hooks::{DeleteHooks, HookPolicy, SqlSnapshot};
use aftercommit::operator;
use aftercommit::reconciler::{Mode, Runner, Scope};
use aftercommit::relay::{Relay, RelayConfig};
use aftercommit::subject::SubjectPrefix;
use aftercommit::testing::servers::{Nats, Postgres};
use aftercommit::testing::{eventually, unique_name};
use aftercommit::worker::Worker;
use derived::Seen;
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// Whatever goes wrong ends the example.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// Long enough for a slow machine.
const SOON: Duration = Duration::from_secs(60);

/// What is written down of a system before its delete: who sees which monitor by it.
const ACCESS: &str = "select jsonb_agg(jsonb_build_object('monitor_id', monitor_id, 'user_id', user_id))
                        from watched join steward using (system_id) where system_id = $1";

/// A service's database and a stream.
pub struct Stage {
    pool: PgPool,
    config: PostgresConfig,
    nats: NatsConfig,
    naming: Naming,
}

impl Stage {
    /// A database with the tables, and a stream of its own.
    pub async fn new() -> Result<Self, Error> {
        let config = PostgresConfig::new(Postgres::shared().await?.create_database().await?);
        operator::migrate(&config).await?;
        let pool = PgPool::connect(&config.url).await?;
        sqlx::raw_sql(include_str!("system_delete/tables.sql")).execute(&pool).await?;
        let name = unique_name("systems");
        let naming =
            Naming { stream: name.to_uppercase(), prefix: SubjectPrefix::new(name)?, source: "/systems".into() };
        let nats = NatsConfig { url: Nats::shared().await?.url(), ..NatsConfig::default() };
        operator::provision(&nats, &naming).await?;
        let stage = Self { pool, config, nats, naming };
        stage.check("at the beginning").await?;
        Ok(stage)
    }

    /// A relay and a worker of this process; dropped, they are gone.
    async fn running(&self) -> Result<[AbortOnDropHandle<Result<(), aftercommit::Error>>; 2], Error> {
        let relay = Relay::new(RelayConfig::new(self.config.clone(), self.nats.clone(), self.naming.clone()));
        let worker =
            Worker::new(self.config.clone(), self.nats.clone(), self.naming.clone()).subscriber(Seen::subscriber());
        worker.provision().await?;
        Ok([
            AbortOnDropHandle::new(tokio::spawn(relay.run(CancellationToken::new()))),
            AbortOnDropHandle::new(tokio::spawn(worker.run(CancellationToken::new()))),
        ])
    }

    /// The users whose list is not what the view says.
    async fn wrong(&self) -> Result<i64, Error> {
        Ok(sqlx::query_scalar(
            "select count(*) from client c where monitors is distinct from
                 (select coalesce(array_agg(monitor_id order by monitor_id), '{}') from access a where a.user_id = c.user_id)",
        )
        .fetch_one(&self.pool)
        .await?)
    }

    async fn check(&self, when: &str) -> Result<(), Error> {
        match self.wrong().await? {
            0 => Ok(()),
            wrong => Err(format!("{when} the lists of {wrong} users are wrong").into()),
        }
    }

    async fn becomes_right(&self, when: &str) -> Result<(), Error> {
        let right = async || self.wrong().await.is_ok_and(|wrong| wrong == 0);
        Ok(eventually(SOON, when, right).await?)
    }

    async fn systems(&self) -> Result<i64, Error> {
        Ok(sqlx::query_scalar("select count(*) from system").fetch_one(&self.pool).await?)
    }
}

/// What is deleted by code has hooks: the event has the pairs that the cascade took.
pub async fn hooks(stage: &Stage) -> Result<(), Error> {
    let _running = stage.running().await?;
    let mut hooks = DeleteHooks::new("system", "public.system");
    hooks.register("access", HookPolicy::Required, SqlSnapshot::new(ACCESS))?;
    let mut tx = stage.pool.begin().await?;
    hooks.delete(&mut tx, "s1").await?;
    tx.commit().await?;
    stage.becomes_right("the lists are right after one delete").await?;
    let mut tx = stage.pool.begin().await?;
    let deleted = hooks.delete_many(&mut tx, &["s2", "s3", "gone"]).await?;
    tx.commit().await?;
    if deleted.rows.len() != 2 || deleted.missing != ["gone"] {
        return Err(format!("{deleted:?} were deleted").into());
    }
    stage.becomes_right("the lists are right after a bulk delete").await?;
    let mut tx = stage.pool.begin().await?;
    hooks.delete(&mut tx, "s4").await?;
    tx.rollback().await?;
    let events: i64 = sqlx::query_scalar("select count(*) from aftercommit.outbox").fetch_one(&stage.pool).await?;
    match (events, stage.systems().await?) {
        (3, 3) => Ok(()),
        wrong => Err(format!("{wrong:?} events and systems after a delete that was rolled back").into()),
    }
}

/// What is deleted by hand, without any code, is told by captures of the tables that the cascade empties.
pub async fn captures(stage: &Stage) -> Result<(), Error> {
    for table in ["steward", "watched"] {
        sqlx::query("select aftercommit.capture($1::regclass, type => $1, key => 'system_id', \"on\" => '{delete}')")
            .bind(table)
            .execute(&stage.pool)
            .await?;
    }
    let _running = stage.running().await?;
    sqlx::raw_sql("delete from system where id = 's1'").execute(&stage.pool).await?;
    stage.becomes_right("the lists are right after a DELETE by hand").await?;
    sqlx::raw_sql(
        "delete from system where id in ('s2', 's3'); delete from steward where system_id = 's4' and user_id = 100",
    )
    .execute(&stage.pool)
    .await?;
    stage.becomes_right("the lists are right after several").await
}

/// Without any event the reconciler repairs what is derived.
pub async fn reconciler(stage: &Stage) -> Result<(), Error> {
    sqlx::raw_sql("delete from system where id in ('s1', 's2', 's3')").execute(&stage.pool).await?;
    if stage.wrong().await? == 0 {
        return Err("nothing is wrong, so there is nothing to repair".into());
    }
    let runner = Runner::new(stage.config.clone()).reconciler(Seen);
    let summary = runner.run_now(Seen::NAME, Scope::Full, Mode::Repair).await?;
    stage.check(&format!("after {summary}")).await
}

#[tokio::main]
async fn main() -> ExitCode {
    let ran = async {
        hooks(&Stage::new().await?).await?;
        println!("hooks: the lists are right after one delete, after a bulk delete and after one that was rolled back");
        captures(&Stage::new().await?).await?;
        println!("captures: the lists are right after DELETEs by hand");
        reconciler(&Stage::new().await?).await?;
        println!("reconciler: the lists are right without any event");
        Ok::<(), Error>(())
    };
    match ran.await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
