//! Sessions that have ended are removed with their kernels and permissions, and subscribers learn which; then two pruners share a
//! large backlog, and an application goes on beside a sweep.
//!
//! `cargo run --release --features testing --example prune_sessions -- 1000000` does it on a server that it starts for itself, checks
//! what came of it, and prints how long it took.

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use aftercommit::config::PostgresConfig;
use aftercommit::operator;
use aftercommit::prune::{Association, Child, Policy, Prune, PruneConfig, Pruned, Pruner, RowsPruned, Spec};
use aftercommit::testing::servers::Postgres;
use chrono::Utc;
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use tokio_util::sync::CancellationToken;

/// Whatever goes wrong ends the example.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// Five sessions have ended, three of them two hours ago; three are active. Each has two kernels and a permission.
const TABLES: &str = "
create table sessions (id bigint primary key, status text not null, ended_at timestamptz);
create index sessions_ended on sessions (ended_at) where status = 'terminated';
create table kernels (id bigint primary key, session_id bigint not null references sessions);
create index kernels_session on kernels (session_id);
create table permissions (entity_type text, entity_id text, user_id bigint, primary key (entity_type, entity_id, user_id));
insert into sessions
select n, case when n <= 5 then 'terminated' else 'active' end,
       case when n <= 3 then now() - interval '2 hours' when n <= 5 then now() - interval '1 minute' end
  from generate_series(1, 8) n;
insert into kernels select n, (n + 1) / 2 from generate_series(1, 16) n;
insert into permissions select kind, n::text, 1 from generate_series(1, 8) n, unnest(array['session', 'folder']) kind;
";

/// How many sessions one transaction removes.
const BATCH: u32 = 1000;

/// What may be removed, and what goes with it. Callers can only narrow it.
pub fn sessions() -> Spec {
    Spec::new("public.sessions", "status = 'terminated'")
        .name("sessions")
        .before_column("ended_at")
        .child(Child::new("public.kernels", "session_id"))
        .association(Association::new("public.permissions", "entity_type", "entity_id", "session"))
}

async fn database() -> Result<PgPool, Error> {
    let url = Postgres::shared().await?.create_database().await?;
    operator::migrate(&PostgresConfig::new(url.clone())).await?;
    let pool = PgPoolOptions::new().max_connections(8).connect(&url).await?;
    sqlx::raw_sql(TABLES).execute(&pool).await?;
    Ok(pool)
}

async fn count(pool: &PgPool, rows: &'static str) -> Result<i64, Error> {
    Ok(sqlx::query_scalar(rows).fetch_one(pool).await?)
}

/// One batch, in a transaction of its own.
async fn batch(pool: &PgPool, prune: &Prune<'_>) -> Result<Pruned, Error> {
    let mut tx = pool.begin().await?;
    let pruned = prune.run(&mut tx).await?;
    tx.commit().await?;
    Ok(pruned)
}

fn check(right: bool, what: &str) -> Result<(), Error> {
    if right { Ok(()) } else { Err(format!("it is not as it should be: {what}").into()) }
}

/// The eight sessions: those that ended an hour ago or earlier go, then the other two.
pub async fn small() -> Result<(), Error> {
    let (pool, spec) = (database().await?, sessions());
    let old = Prune::of(&spec).before(Utc::now() - Duration::from_secs(3600));
    let plan = old.plan(&mut *pool.acquire().await?).await?;
    check(plan.count == 3 && plan.children["public.kernels"] == 6 && plan.warnings.is_empty(), "the plan")?;
    let pruned = batch(&pool, &old).await?;
    check(pruned.ids == ["1", "2", "3"] && pruned.children["public.kernels"] == 6, "what went first")?;
    check(batch(&pool, &Prune::of(&spec)).await?.ids == ["4", "5"], "what went then")?;
    check(count(&pool, "select count(*) from sessions where status = 'active'").await? == 3, "active sessions stay")?;
    check(count(&pool, "select count(*) from kernels").await? == 6, "their kernels stay")?;
    check(
        count(&pool, "select count(*) from permissions where entity_type = 'folder'").await? == 8,
        "folders' permissions stay",
    )?;
    check(count(&pool, "select count(*) from permissions where entity_type = 'session'").await? == 3, "permissions")?;
    check(told(&pool).await?.len() == 5, "the events tell which")
}

/// The ids that events tell of; an error when one is told twice.
async fn told(pool: &PgPool) -> Result<BTreeSet<String>, Error> {
    let events: Vec<serde_json::Value> =
        sqlx::query_scalar("select data from aftercommit.events where type = 'rows.pruned'").fetch_all(pool).await?;
    let mut ids = BTreeSet::new();
    for event in events {
        for id in serde_json::from_value::<RowsPruned>(event)?.ids {
            check(ids.insert(id), "an id is told twice")?;
        }
    }
    Ok(ids)
}

/// Removes what there is with this many pruners at once, and says how many sessions each of them removed.
async fn together(pool: &PgPool, pruners: usize) -> Result<Vec<u64>, Error> {
    let mut running = Vec::new();
    for _ in 0..pruners {
        let pool = pool.clone();
        running.push(tokio::spawn(async move {
            let (spec, mut removed, mut place) = (sessions(), 0, None);
            loop {
                let mut prune = Prune::of(&spec).limit(BATCH).skip_locked();
                if let Some(place) = &place {
                    prune = prune.from(String::clone(place));
                }
                let pruned = batch(&pool, &prune).await?;
                removed += pruned.count;
                // What the other one held lies before the place, so the last look is from the start.
                if !pruned.more && place.is_none() {
                    return Ok::<u64, Error>(removed);
                }
                place = pruned.next;
            }
        }));
    }
    let mut removed = Vec::new();
    for running in running {
        removed.push(running.await??);
    }
    Ok(removed)
}

/// A backlog of this many sessions, each with a kernel, removed by one pruner and then by two: how long each took.
pub async fn backlog(rows: i64) -> Result<(Duration, Duration), Error> {
    let mut took = Vec::new();
    for pruners in [1, 2] {
        let pool = database().await?;
        sqlx::raw_sql("truncate sessions, kernels, permissions").execute(&pool).await?;
        for fill in [
            "insert into sessions select n, 'terminated', now() - n * interval '1 ms' from generate_series(1, $1) n",
            "insert into kernels select n, n from generate_series(1, $1) n",
        ] {
            sqlx::query(fill).bind(rows).execute(&pool).await?;
        }
        sqlx::raw_sql("analyze; checkpoint").execute(&pool).await?;
        let started = Instant::now();
        let removed = together(&pool, pruners).await?;
        took.push(started.elapsed());
        check(removed.iter().sum::<u64>() == rows.unsigned_abs(), "nothing is removed twice, and nothing is left out")?;
        check(removed.iter().all(|removed| *removed > 0), "both had their share")?;
        check(count(&pool, "select count(*) from sessions").await? == 0, "no session is left")?;
        check(count(&pool, "select count(*) from kernels").await? == 0, "no kernel is left")?;
        check(told(&pool).await?.len() as i64 == rows, "each is told once")?;
    }
    Ok((took[0], took[1]))
}

/// What one session costs the application: it begins, and ends.
async fn live(pool: &PgPool, id: i64) -> Result<Duration, Error> {
    let started = Instant::now();
    let mut tx = pool.begin().await?;
    sqlx::query("insert into sessions values ($1, 'active')").bind(id).execute(&mut *tx).await?;
    sqlx::query("insert into kernels values ($1, $1)").bind(id).execute(&mut *tx).await?;
    sqlx::query("update sessions set ended_at = now() where id = $1").bind(id).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(started.elapsed())
}

/// The 99th of a hundred of the application's transactions, while nothing is swept and while a sweep runs as it does by default,
/// in turn: the median ratio of some rounds.
pub async fn beside(rows: i64, rounds: usize) -> Result<f64, Error> {
    let url = Postgres::shared().await?.create_database().await?;
    let config = PostgresConfig::new(url.clone());
    operator::migrate(&config).await?;
    let pool = PgPoolOptions::new().max_connections(8).connect(&url).await?;
    sqlx::raw_sql(TABLES).execute(&pool).await?;
    let (mut ratios, mut next) = (Vec::new(), 1_000_000_000);
    for _ in 0..rounds {
        let mut late = Vec::new();
        for sweeping in [false, true] {
            sqlx::raw_sql("truncate sessions, kernels").execute(&pool).await?;
            let fill = "insert into sessions select n, 'terminated', now() - n * interval '1 ms' from generate_series(1, $1) n";
            sqlx::query(fill).bind(rows).execute(&pool).await?;
            sqlx::raw_sql("analyze; checkpoint").execute(&pool).await?;
            let policies = if sweeping { vec![Policy::new(sessions(), None)] } else { Vec::new() };
            let pruner = Pruner::new(&config, PruneConfig { policies, ..PruneConfig::default() })?;
            let stop = CancellationToken::new();
            let sweep = tokio::spawn({
                let stop = stop.clone();
                async move { pruner.sweep(&stop).await }
            });
            let mut times = Vec::new();
            for _ in 0..3000 {
                next += 1;
                times.push(live(&pool, next).await?);
                tokio::time::sleep(Duration::from_micros(500)).await;
            }
            let left = count(&pool, "select count(*) from sessions where status = 'terminated'").await?;
            check(!sweeping || (left > 0 && left < rows), "the sweep runs all the time")?;
            stop.cancel();
            sweep.await??;
            times.sort();
            late.push(times[times.len() * 99 / 100]);
        }
        ratios.push(late[1].as_secs_f64() / late[0].as_secs_f64());
    }
    ratios.sort_by(f64::total_cmp);
    Ok(ratios[ratios.len() / 2])
}

#[tokio::main]
async fn main() -> ExitCode {
    let rows = std::env::args().nth(1).map_or(Ok(100_000), |rows| rows.parse());
    let ran = async {
        let rows = rows.map_err(|_| "the argument is how many sessions the backlog has, such as 1000000")?;
        small().await?;
        println!("three old sessions went, then two more, with their kernels and permissions; five ids were told");
        let (one, two) = backlog(rows).await?;
        let ratio = one.as_secs_f64() / two.as_secs_f64();
        println!("{rows} sessions: one pruner {one:.1?}, two pruners {two:.1?}, {ratio:.2} times as fast");
        let ratio = beside(rows, 5).await?;
        println!("99 % of the application's transactions beside a sweep: {ratio:.2} times as long as without");
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
