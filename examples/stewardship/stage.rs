//! A service's database with its tables, a stream, and the programs around them.

use std::time::Duration;

use aftercommit::config::{Naming, NatsConfig, PostgresConfig};
use aftercommit::operator;
use aftercommit::reconciler::{Mode, Outcome, Runner, Scope, Summary};
use aftercommit::relay::{Relay, RelayConfig};
use aftercommit::subject::SubjectPrefix;
use aftercommit::testing::servers::{Nats, Postgres};
use aftercommit::testing::{eventually, unique_name};
use aftercommit::worker::Worker;
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::Error;
use super::derived::{Stats, Stewardship};

/// Long enough for a slow machine, short enough to tell that something hangs.
const SOON: Duration = Duration::from_secs(60);
/// How many users there are.
pub const USERS: i64 = 8;

/// A relay or a worker of this process. Dropped, it is gone.
pub type Running = AbortOnDropHandle<Result<(), aftercommit::Error>>;

/// A service on servers that all stages of this process share.
pub struct Stage {
    pub pool: PgPool,
    pub config: PostgresConfig,
    pub nats: NatsConfig,
    pub naming: Naming,
}

impl Stage {
    pub async fn new() -> Result<Self, Error> {
        let (config, pool) = database().await?;
        sqlx::raw_sql(include_str!("tables.sql")).execute(&pool).await?;
        let users = "insert into client (user_id) select generate_series(1, $1)";
        sqlx::query(users).bind(USERS).execute(&pool).await?;
        let name = unique_name("stewardship");
        let stream = name.to_uppercase();
        let naming = Naming { stream, prefix: SubjectPrefix::new(name)?, source: "/stewardship".into() };
        let nats = NatsConfig { url: Nats::shared().await?.url(), ..NatsConfig::default() };
        operator::provision(&nats, &naming).await?;
        Ok(Self { pool, config, nats, naming })
    }

    /// The relay of this service's outbox.
    pub fn relay(&self) -> Running {
        self.relay_of(&self.config)
    }

    /// The relay of another outbox, to the same stream.
    pub fn relay_of(&self, outbox: &PostgresConfig) -> Running {
        let config = RelayConfig::new(outbox.clone(), self.nats.clone(), self.naming.clone());
        AbortOnDropHandle::new(tokio::spawn(Relay::new(config).run(CancellationToken::new())))
    }

    pub async fn worker(&self) -> Result<Running, Error> {
        let worker = Worker::new(self.config.clone(), self.nats.clone(), self.naming.clone());
        let worker = worker.subscriber(Stewardship::subscriber()).subscriber(Stats::subscriber());
        worker.provision().await?;
        Ok(AbortOnDropHandle::new(tokio::spawn(worker.run(CancellationToken::new()))))
    }

    pub fn runner(&self) -> Runner {
        Runner::new(self.config.clone()).reconciler(Stewardship)
    }

    /// One sweep of the reconciler over everything.
    pub async fn reconcile(&self) -> Result<Summary, Error> {
        let summary = self.runner().run_now(Stewardship::NAME, Scope::Full, Mode::Repair).await?;
        match summary.outcome {
            Outcome::Ran => Ok(summary),
            _ => Err(summary.to_string().into()),
        }
    }

    /// Waits until every event of the outbox was handled or given up, and returns how many were given up.
    pub async fn drained(&self, outbox: &PgPool) -> Result<i64, Error> {
        let count = async |sql, pool| sqlx::query_scalar::<_, i64>(sql).fetch_one(pool).await;
        let events = count("select count(*) from aftercommit.outbox", outbox).await?;
        let ended = "select count(*) from (
            select event_id from aftercommit.inbox union select event_id from aftercommit.dead_letter) as ended";
        let all = async || count(ended, &self.pool).await.is_ok_and(|ended| ended >= events);
        eventually(SOON, &format!("{events} events are handled"), all).await?;
        Ok(count("select count(*) from aftercommit.dead_letter", &self.pool).await?)
    }

    /// The derived state in short.
    pub async fn hash(&self) -> Result<String, Error> {
        Ok(sqlx::query_scalar(
            "select md5(concat_ws('|',
                (select string_agg(s::text, ',' order by s::text collate \"C\") from monitor_steward s),
                (select string_agg(s::text, ',' order by s::text collate \"C\") from monitor_stat s),
                (select string_agg(c::text, ',' order by c::text collate \"C\") from client c)))",
        )
        .fetch_one(&self.pool)
        .await?)
    }

    /// What is wrong, found by other means than [`super::derived::converge`].
    pub async fn wrong(&self) -> Result<Vec<String>, Error> {
        Ok(sqlx::query_scalar(
            "with inherited as (
                select monitor_key, user_id, source_system from monitor_steward where source = 'inherited'),
             listed as (select user_id, unnest(monitors) as monitor_key from client),
             held as (select distinct user_id, monitor_key from monitor_steward),
             counted as (select monitor_key, count(*) as operations from operation group by 1)
             select 'missing: ' || m from (select * from inheritance except select * from inherited) m
             union all select 'stale: ' || m from (select * from inherited except select * from inheritance) m
             union all select 'not listed: ' || m from (select * from held except select * from listed) m
             union all select 'listed: ' || m from (select * from listed except select * from held) m
             union all select 'not counted: ' || m from (select * from counted except select * from monitor_stat) m
             union all select 'counted: ' || m from (select * from monitor_stat except select * from counted) m",
        )
        .fetch_all(&self.pool)
        .await?)
    }
}

/// A new database with the schema aftercommit.
pub async fn database() -> Result<(PostgresConfig, PgPool), Error> {
    let config = PostgresConfig::new(Postgres::shared().await?.create_database().await?);
    operator::migrate(&config).await?;
    let pool = PgPool::connect(&config.url).await?;
    Ok((config, pool))
}
