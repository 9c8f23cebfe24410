//! Five ways of getting from the same changes to the same state.

use std::process::ExitCode;

use aftercommit::outbox::{self, RawEvent};
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use sqlx::{PgPool, PgTransaction};

use super::Error;
use super::events::SystemDeleted;
use super::repository as repo;
use super::stage::{Stage, USERS, database};

/// A mode by its name, with what it shows.
type Mode = (&'static str, &'static str, fn(Stage) -> LocalBoxFuture<'static, Result<String, Error>>);

/// All of them.
pub const MODES: [Mode; 5] = [
    ("events", "outbox, relay and worker, no reconciler", |stage| events(stage).boxed_local()),
    ("no-events", "the reconciler alone, from a state that was also spoilt", |stage| no_events(stage).boxed_local()),
    ("shuffled", "every event arrives, in any order", |stage| shuffled(stage).boxed_local()),
    ("poison", "one monitor fails for a while: its events die, the reconciler heals", |stage| {
        poison(stage).boxed_local()
    }),
    ("delete", "a system is deleted under a race, from what its event remembers", |stage| delete(stage).boxed_local()),
];

/// The system that the last of the changes deletes.
const DOOMED: &str = "s5";
/// The monitor that fails in one mode.
const POISONED: &str = "m3";

/// Runs the wanted modes, or `all-modes`, and compares the states that they end in.
pub async fn show(wanted: &[String]) -> ExitCode {
    let chosen = |name: &str| wanted.iter().any(|wanted| wanted == name || wanted == "all-modes");
    let known = |wanted: &String| wanted == "all-modes" || MODES.iter().any(|(name, ..)| wanted == name);
    if wanted.is_empty() || !wanted.iter().all(known) {
        let names: Vec<&str> = MODES.iter().map(|(name, ..)| *name).collect();
        eprintln!("usage: stewardship all-modes | {}", names.join(" | "));
        return ExitCode::from(2);
    }
    let mut hashes = Vec::new();
    for (name, shows, mode) in MODES.into_iter().filter(|(name, ..)| chosen(name)) {
        let outcome = async { mode(Stage::new().await?).await };
        match outcome.await {
            Ok(hash) => {
                println!("{name:10} {hash}  {shows}");
                hashes.push(Some(hash));
            }
            Err(error) => {
                println!("{name:10} FAIL  {shows}: {error}");
                hashes.push(None);
            }
        }
    }
    let same = hashes.iter().all(|hash| hash.is_some() && *hash == hashes[0]);
    println!("stewardship: {} in {} modes", if same { "the same state" } else { "NOT the same state" }, hashes.len());
    if same { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The hash of the stage's state, if it is right.
async fn end(stage: &Stage) -> Result<String, Error> {
    match stage.wrong().await?.as_slice() {
        [] => stage.hash().await,
        wrong => Err(format!("{} rows are wrong, such as {}", wrong.len(), wrong[0]).into()),
    }
}

/// Live: each change is made while the events of those before are on their way.
pub async fn events(stage: Stage) -> Result<String, Error> {
    let _running = (stage.relay(), stage.worker().await?);
    change(&stage.pool).await?;
    delete_doomed(&stage.pool).await?;
    if stage.drained(&stage.pool).await? > 0 {
        return Err("there are dead letters".into());
    }
    end(&stage).await
}

/// No relay runs. What is derived was right at some time, and wrong in every way since.
pub async fn no_events(stage: Stage) -> Result<String, Error> {
    change(&stage.pool).await?;
    stage.reconcile().await?;
    sqlx::raw_sql(
        "delete from monitor_steward where source = 'inherited' and user_id = 2;
         insert into monitor_steward values ('m1', 7, 'inherited', 's-never'), ('m4', 1, 'inherited', 's1')
             on conflict do nothing;
         update monitor_stat set operations = 99 where monitor_key = 'm1';
         update client set monitors = '{m1,m-gone}' where user_id in (1, 6)",
    )
    .execute(&stage.pool)
    .await?;
    delete_doomed(&stage.pool).await?;
    let summary = stage.reconcile().await?;
    if summary.repaired == 0 {
        return Err(format!("nothing was repaired: {summary}").into());
    }
    end(&stage).await
}

/// The same events come from an outbox in which they were written in another order, without keys.
pub async fn shuffled(stage: Stage) -> Result<String, Error> {
    change(&stage.pool).await?;
    delete_doomed(&stage.pool).await?;
    let sql = "select type, content_type, payload from aftercommit.outbox order by id";
    let mut written: Vec<(String, String, Vec<u8>)> = sqlx::query_as(sql).fetch_all(&stage.pool).await?;
    let mut random = Random(20_261_121);
    for at in (1..written.len()).rev() {
        written.swap(at, random.below(at + 1));
    }
    let (config, outbox) = database().await?;
    let mut tx = outbox.begin().await?;
    for (event_type, content_type, payload) in written {
        outbox::publish_raw(&mut tx, RawEvent::new(event_type, content_type, payload)).await?;
    }
    tx.commit().await?;
    let _running = (stage.relay_of(&config), stage.worker().await?);
    stage.drained(&outbox).await?;
    end(&stage).await
}

/// While one monitor cannot be written, nothing else stands still; when it can be again, the reconciler catches up.
pub async fn poison(stage: Stage) -> Result<String, Error> {
    let poison = "alter table monitor_stat add constraint poison check (monitor_key <> 'm3')";
    sqlx::raw_sql(poison).execute(&stage.pool).await?;
    let running = (stage.relay(), stage.worker().await?);
    change(&stage.pool).await?;
    delete_doomed(&stage.pool).await?;
    if stage.drained(&stage.pool).await? == 0 {
        return Err("nothing was poisoned".into());
    }
    drop(running);
    let summary = stage.reconcile().await?;
    let failed: Vec<&str> = summary.failures.iter().map(|failure| failure.item.as_str()).collect();
    if failed != [POISONED] {
        return Err(format!("failed: {failed:?} instead of {POISONED}: {summary}").into());
    }
    sqlx::raw_sql("alter table monitor_stat drop constraint poison").execute(&stage.pool).await?;
    stage.reconcile().await?;
    end(&stage).await
}

/// Everything is derived when the system goes, and somebody wants to add a steward to it at that moment.
pub async fn delete(stage: Stage) -> Result<String, Error> {
    let _running = (stage.relay(), stage.worker().await?);
    change(&stage.pool).await?;
    stage.drained(&stage.pool).await?;
    let inherited = "select count(*) from monitor_steward where source_system = $1";
    let inherited = async || sqlx::query_scalar::<_, i64>(inherited).bind(DOOMED).fetch_one(&stage.pool).await;
    if inherited().await? == 0 {
        return Err("nothing was inherited from the system".into());
    }
    let stewards = "select array_agg(user_id order by user_id) from system_steward where system_id = $1";
    let stewards: Vec<i64> = sqlx::query_scalar(stewards).bind(DOOMED).fetch_one(&stage.pool).await?;

    let mut deleting = stage.pool.begin().await?;
    let deleted = repo::delete_system(&mut deleting, DOOMED).await?;
    let late = tokio::spawn({
        let pool = stage.pool.clone();
        async move { step(&pool, async |tx| repo::add_steward(tx, DOOMED, 8).await).await }
    });
    let waits = async || {
        let sql = "select count(*) = 1 from pg_stat_activity
                    where datname = current_database() and wait_event_type = 'Lock'";
        sqlx::query_scalar(sql).fetch_one(&stage.pool).await.unwrap_or(false)
    };
    aftercommit::testing::eventually(std::time::Duration::from_secs(60), "the late one waits", waits).await?;
    deleting.commit().await?;
    match late.await? {
        Err(error) if error.to_string().contains("there is no system") => {}
        other => return Err(format!("the late steward: {other:?}").into()),
    }
    if deleted.stewards != stewards {
        return Err(format!("the event remembers {:?} instead of {stewards:?}", deleted.stewards).into());
    }
    stage.drained(&stage.pool).await?;
    if inherited().await? > 0 {
        return Err("something is still inherited from the deleted system".into());
    }
    end(&stage).await
}

async fn delete_doomed(pool: &PgPool) -> Result<SystemDeleted, Error> {
    step(pool, async |tx| repo::delete_system(tx, DOOMED).await).await
}

/// One change in a transaction of its own. Handlers lock several users at a time: one of two that wait for each other is
/// undone by PostgreSQL, and tried again, as worker and reconciler do it, too.
async fn step<T>(pool: &PgPool, change: impl AsyncFn(&mut PgTransaction<'_>) -> Result<T, Error>) -> Result<T, Error> {
    loop {
        let mut tx = pool.begin().await?;
        match change(&mut tx).await {
            Ok(done) => {
                tx.commit().await?;
                return Ok(done);
            }
            Err(error) if is_deadlock(&error) => tx.rollback().await?,
            Err(error) => return Err(error),
        }
    }
}

fn is_deadlock(error: &Error) -> bool {
    let error = error.downcast_ref().and_then(sqlx::Error::as_database_error);
    error.is_some_and(|error| error.code().as_deref() == Some("40P01"))
}

/// All changes but the last: several systems and stewards per monitor, explicit stewards beside inherited ones, flags that
/// flip, links that go, and a hundred more by chance, the same ones each time.
pub async fn change(pool: &PgPool) -> Result<(), Error> {
    for n in 1..=5 {
        let (system, connection) = (format!("s{n}"), format!("c{}", n % 4));
        step(pool, async |tx| {
            repo::create_system(tx, &system).await?;
            repo::link(tx, &system, &connection).await?;
            repo::link(tx, &system, "c1").await?;
            repo::add_steward(tx, &system, n).await?;
            repo::add_steward(tx, &system, n + 1).await
        })
        .await?;
    }
    for n in 1..=6 {
        let (monitor, connection) = (format!("m{n}"), format!("c{}", n % 4));
        step(pool, async |tx| repo::upsert_monitor(tx, &monitor, &connection, n != 4).await).await?;
        step(pool, async |tx| repo::complete_operation(tx, &monitor, "classified").await).await?;
    }
    step(pool, async |tx| {
        repo::add_explicit(tx, "m1", 2).await?;
        repo::add_explicit(tx, "m4", 8).await
    })
    .await?;
    step(pool, async |tx| repo::upsert_monitor(tx, "m2", "c2", false).await).await?;
    step(pool, async |tx| repo::upsert_monitor(tx, "m4", "c0", true).await).await?;
    step(pool, async |tx| repo::upsert_monitor(tx, "m4", "c0", false).await).await?;
    step(pool, async |tx| repo::unlink(tx, "s2", "c2").await).await?;
    let mut random = Random(7);
    for _ in 0..100 {
        chance(pool, &mut random).await?;
    }
    // So that something is inherited from the system that is deleted at the end.
    step(pool, async |tx| {
        repo::link(tx, DOOMED, "c1").await?;
        repo::add_steward(tx, DOOMED, 3).await?;
        repo::upsert_monitor(tx, "m1", "c1", true).await
    })
    .await
}

async fn chance(pool: &PgPool, random: &mut Random) -> Result<(), Error> {
    let user = 1 + i64::try_from(random.below(usize::try_from(USERS)?))?;
    let (n, what, flag) = (1 + random.below(6), random.below(6), random.below(2) == 0);
    let (system, other) = (format!("s{}", 1 + random.below(5)), format!("s{}", 1 + random.below(5)));
    let (monitor, own) = (format!("m{n}"), format!("c{}", n % 4));
    let connection = format!("c{}", random.below(4));
    step(pool, async |tx| match what {
        0 => repo::add_steward(tx, &system, user).await,
        1 => repo::remove_steward(tx, &system, user).await,
        2 => repo::replace_for_user(tx, user, &[&system, &other]).await,
        3 if flag => repo::link(tx, &system, &connection).await,
        3 => repo::unlink(tx, &system, &connection).await,
        4 => repo::upsert_monitor(tx, &monitor, &own, flag).await,
        _ => repo::complete_operation(tx, &monitor, "promoted").await,
    })
    .await
}

/// The same numbers each time (Knuth's MMIX generator).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap_or(0) % limit
    }
}
