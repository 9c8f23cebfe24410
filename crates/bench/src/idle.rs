//! What a relay and a worker cost while there is nothing to do (figure 13).

use std::time::{Duration, Instant};

use crate::bench::Bench;
use crate::child::Child;
use crate::figure::{Goal, Row, Series};
use crate::postgres::work as bench_work;
use crate::scratch::Scratch;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::postgres;
use aftercommit_core::postgres::session::Session;
use aftercommit_worker::{Subscriber, Worker};

/// What a worker's file says for a subscriber that has nothing to do.
const FILE: &str = "[[subscriber]]\nname = \"idle\"\ntypes = [\"*\"]\nsql = { function = \"bench_apply\" }\n";

/// What a process costs for a while.
#[derive(Debug, Clone, Copy)]
struct Cost {
    /// Queries a second.
    queries: f64,
    /// Percent of a core; none where the system does not tell.
    cpu: Option<f64>,
}

/// Figure 13: a relay on one database and a worker on another, at the same time.
pub(crate) async fn idle(bench: &Bench) -> Result<Vec<Row>, Error> {
    let nats = &bench.config.nats;
    let of_relay = bench.scratch(nats, async |outbox| {
        let of_worker = bench.scratch(nats, async |inbox| measure(bench, outbox, inbox).await);
        Box::pin(of_worker).await
    });
    let costs = Box::pin(of_relay).await?;
    let mut rows = Vec::new();
    for (arm, name) in ["relay", "worker"].into_iter().enumerate() {
        let queries = costs.iter().map(|round| round[arm].queries).collect();
        let cpu: Vec<f64> = costs.iter().filter_map(|round| round[arm].cpu).collect();
        let most = |goal| Some(Goal::AtMost(goal));
        rows.push(Row::absolute(13, &format!("idle {name}: queries"), most(50.0), Series::new(name, "/s", queries)));
        let cpu = Series::new(name, "% of a core", cpu);
        rows.push(Row::absolute(13, &format!("idle {name}: processor"), most(1.0), cpu));
    }
    Ok(rows)
}

/// What both processes cost, window by window.
async fn measure(bench: &Bench, outbox: &Scratch, inbox: &Scratch) -> Result<Vec<[Cost; 2]>, Error> {
    let mut session = postgres::connect(&inbox.postgres, "aftercommit-bench").await?;
    bench_work::create_effects(&mut session).await?;
    let subscriber = Subscriber::sql("idle", "bench_apply", ["*"])?;
    let worker = Worker::new(inbox.postgres.clone(), inbox.nats.clone(), inbox.naming.clone()).subscriber(subscriber);
    worker.provision().await?;
    let file = File::write()?;
    let names = [outbox, inbox].map(async |scratch| {
        let mut session = postgres::connect(&scratch.postgres, "aftercommit-bench").await?;
        bench_work::database(&mut session).await
    });
    let [relay_database, worker_database] = names;
    let databases = [relay_database.await?, worker_database.await?];
    drop(session);
    let path = file.0.display().to_string();
    let mut children = [
        Child::start("aftercommit-relay", &[], outbox)?,
        Child::start("aftercommit-worker", &["--config", &path], inbox)?,
    ];
    let mut server = postgres::connect(&bench.config.postgres, "aftercommit-bench").await?;
    // A lease, a stream and a consumer are looked for first; a second later nothing is new any more.
    bench.say("idle: the processes come to rest");
    tokio::time::sleep(bench.size(Duration::from_secs(5), Duration::from_secs(2))).await;
    let windows = bench.rounds("idle", ["both"], async |_| {
        let mut costs = Vec::new();
        let before = look(&mut server, &databases, &mut children).await?;
        let started = Instant::now();
        tokio::time::sleep(bench.size(Duration::from_secs(6), Duration::from_secs(2))).await;
        let after = look(&mut server, &databases, &mut children).await?;
        let seconds = started.elapsed().as_secs_f64();
        for ((queries, cpu), (queries_then, cpu_then)) in before.into_iter().zip(after) {
            let cpu = cpu.zip(cpu_then).map(|(before, after)| (after - before).as_secs_f64() / seconds * 100.0);
            costs.push(Cost { queries: (queries_then - queries) as f64 / seconds, cpu });
        }
        <[Cost; 2]>::try_from(costs).map_err(|_| Error::new(ErrorKind::Integrity, "two processes have two costs"))
    });
    let [windows] = Box::pin(windows).await?;
    for child in children {
        child.kill().await?;
    }
    Ok(windows)
}

/// The queries that each database has seen, and the processor time that each process has taken. Each query of the two is a
/// transaction of its own.
async fn look(
    server: &mut Session,
    databases: &[String; 2],
    children: &mut [Child; 2],
) -> Result<Vec<(u64, Option<Duration>)>, Error> {
    let mut looks = Vec::new();
    for (database, child) in databases.iter().zip(children) {
        child.check()?;
        looks.push((bench_work::transactions(server, database).await?, child.cpu()));
    }
    Ok(looks)
}

/// A file that disappears with this value.
struct File(std::path::PathBuf);

impl File {
    fn write() -> Result<Self, Error> {
        let path = std::env::temp_dir().join(format!("aftercommit-bench-{}.toml", uuid::Uuid::now_v7().simple()));
        std::fs::write(&path, FILE).map_err(|error| {
            Error::with_source(ErrorKind::Config, format!("cannot write {}", path.display()), error)
        })?;
        Ok(Self(path))
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // It is a few bytes in the system's temporary directory.
        _ = std::fs::remove_file(&self.0);
    }
}
