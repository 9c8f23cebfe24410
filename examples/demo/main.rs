//! The main job, end to end, on a workload that nobody here wrote: pgbench's TPC-B transactions become events, a relay
//! streams them to JetStream, a worker applies them to a projection in another database, processes are killed on the way,
//! and in the end the projection must equal pgbench's own tables to the cent.
//!
//! `scripts/demo` finds the servers and runs this.

mod programs;
mod proof;
mod secured;
mod servers;
mod show;
mod watch;

use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::{Command, ExitCode};
use std::time::Duration;

use aftercommit::testing::unique_name;
use clap::Parser;
use sqlx::{Connection, PgConnection};
use tokio::signal::unix::{SignalKind, signal};

use crate::programs::{Program, Programs};
use crate::proof::Proof;
use crate::servers::{Role, Servers};
use crate::show::{Fault, Show, grouped, milliseconds};
use crate::watch::Watch;

type Error = Box<dyn std::error::Error + Send + Sync>;
type Result<T> = std::result::Result<T, Error>;

/// How often things are looked at.
const TICK: Duration = Duration::from_millis(50);
/// How long reading the whole stream may take.
const READING: Duration = Duration::from_secs(300);
const INTERRUPTED: &str = "interrupted";

/// Runs pgbench's transactions through outbox, relay, JetStream and worker, and proves that nothing is missing
#[derive(Parser)]
#[command(name = "scripts/demo")]
struct Options {
    /// How long pgbench runs
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// How many of pgbench's clients write at the same time
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=150))]
    clients: u64,
    /// Kill nothing on the way
    #[arg(long)]
    calm: bool,
    /// Run on the shipped database roles and NATS permissions, with passwords and TLS, on servers of its own
    #[arg(long)]
    secured: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    let logs = std::env::temp_dir().join(unique_name("aftercommit-demo"));
    let outcome = demo(&options, &logs).await;
    let error = match outcome {
        Ok(proof) if proof.holds() => {
            // What is left of it is only logs.
            let _ = std::fs::remove_dir_all(&logs);
            println!(
                "PROVED: {} transactions, {} events, projection equals pgbench to the cent; {proof}",
                proof.transactions, proof.events
            );
            return ExitCode::SUCCESS;
        }
        Ok(proof) => {
            let wrong: String = proof.wrong.iter().map(|wrong| format!("; {wrong}")).collect();
            format!("{} transactions, {} events; {proof}{wrong}", proof.transactions, proof.events)
        }
        Err(error) => report(error.as_ref()),
    };
    if error == INTERRUPTED {
        let _ = std::fs::remove_dir_all(&logs);
    } else {
        println!("the logs are in {}", logs.display());
    }
    println!("FAILED: {error}");
    ExitCode::FAILURE
}

/// An error with its causes, on one line.
fn report(error: &(dyn std::error::Error + 'static)) -> String {
    if let Some(error) = error.downcast_ref::<aftercommit::Error>() {
        return error.report();
    }
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(|error| error.to_string().replace('\n', " ")).collect::<Vec<_>>().join(": ")
}

/// Waits for a signal that asks the demo to end.
async fn interrupted() -> Error {
    let wait = async |kind| match signal(kind) {
        Ok(mut signal) => drop(signal.recv().await),
        Err(_) => std::future::pending().await,
    };
    tokio::select! {
        () = wait(SignalKind::interrupt()) => {}
        () = wait(SignalKind::terminate()) => {}
        () = wait(SignalKind::hangup()) => {}
    }
    INTERRUPTED.into()
}

/// Everything but the last line. Leaves nothing behind but the logs, however it ends.
async fn demo(options: &Options, logs: &Path) -> Result<Proof> {
    std::fs::create_dir(logs)?;
    let programs = Programs::new(logs.to_path_buf())?;
    let mut interrupted = pin!(interrupted());
    let mut servers = tokio::select! {
        servers = Servers::start(options.secured, logs) => servers?,
        error = &mut interrupted => return Err(error),
    };
    println!("servers: {}", servers.describe());
    let outcome = tokio::select! {
        outcome = run(options, &programs, &mut servers) => outcome,
        error = &mut interrupted => Err(error),
    };
    servers.keep_logs(logs);
    servers.clean_up().await?;
    outcome
}

async fn run(options: &Options, programs: &Programs, servers: &mut Servers) -> Result<Proof> {
    prepare(options, programs, servers).await?;
    let mut watch = Watch::new(servers).await?;
    if !watch.commit_times {
        println!("track_commit_timestamp is off on your server, so latencies count from insert to insert");
    }
    let mut crew = start_crew(programs, servers)?;
    let mut faults = Vec::new();
    if !options.calm {
        faults = vec![Fault::Relay, Fault::Worker];
        faults.extend(servers.nats().map(|_| Fault::Nats));
    }
    println!("pgbench: TPC-B with {} clients for {} s", options.clients, options.seconds);
    let pgbench = programs.start("pgbench", pgbench(options, servers))?;
    let show = Show::new((pgbench, options.seconds), faults, servers, programs, &mut crew, &mut watch);
    let took = show.run().await?.as_secs_f64();
    // Nobody may add or remove anything while the proof looks.
    drop(crew);

    let transactions = transactions(&programs.output("pgbench")?)?;
    let proof = tokio::time::timeout(READING, proof::prove(&watch, &servers.places.stream, transactions))
        .await
        .map_err(|_| format!("the stream could not be read within {READING:?}"))??;
    let latencies = watch.all_latencies().await?;
    println!(
        "{} events in {took:.1} s, {} a second from commit to projection; commit to handled p50 {}, p99 {}, max {}",
        grouped(proof.events as u64),
        grouped((proof.events as f64 / took) as u64),
        milliseconds(latencies.percentile(0.5)),
        milliseconds(latencies.percentile(0.99)),
        milliseconds(latencies.percentile(1.0)),
    );
    Ok(proof)
}

/// Databases, schema, pgbench's tables and their trigger, stream and consumer.
async fn prepare(options: &Options, programs: &Programs, servers: &Servers) -> Result<()> {
    let places = &servers.places;
    servers.create_databases().await?;
    let admin = [&places.bank_url, &places.projection_url];
    if let Some(secured) = &places.secured {
        println!("roles.sql: the roles, and a login with a password for each process");
        admin.iter().try_for_each(|url| secured.grant(url))?;
        secured.logins(&places.bank_url).await?;
    }
    println!("aftercommit migrate, in pgbench's database and in the worker's");
    for (name, url) in ["migrate-bank", "migrate-projection"].into_iter().zip(admin) {
        let environment = places.environment(Role::Owner, &places.url_for("deploy", url));
        let mut migrate = programs.aftercommit("aftercommit", environment);
        migrate.arg("migrate");
        programs.run(name, migrate).await?;
    }
    println!(
        "pgbench --initialize, one branch for each client, and a trigger that publishes each row of pgbench_history"
    );
    let scale = options.clients.to_string();
    let initialize = Programs::pgbench(&["--initialize", "--quiet", "--scale", &scale], &places.bank_url);
    programs.run("pgbench-initialize", initialize).await?;
    for (url, sql) in admin.into_iter().zip([include_str!("bank.sql"), include_str!("projection.sql")]) {
        let mut connection = PgConnection::connect(url).await?;
        sqlx::raw_sql(sql).execute(&mut connection).await?;
    }
    if let Some(secured) = &places.secured {
        println!("roles.sql: what each role may do");
        admin.iter().try_for_each(|url| secured.grant(url))?;
        secured.grant_own_tables(admin).await?;
    }
    println!("aftercommit provision --config worker.toml");
    let mut provision = programs.aftercommit("aftercommit", places.environment(Role::Provisioner, ""));
    provision.args(["provision", "--config"]).arg(worker_config(programs)?);
    programs.run("provision", provision).await
}

/// The worker's configuration as a file.
fn worker_config(programs: &Programs) -> Result<PathBuf> {
    let path = programs.logs.join("worker.toml");
    std::fs::write(&path, include_str!("worker.toml"))?;
    Ok(path)
}

/// Two relays and two workers: one of each works, the other one stands by.
fn start_crew(programs: &Programs, servers: &Servers) -> Result<Vec<Program>> {
    let places = &servers.places;
    let config = worker_config(programs)?;
    println!("two relays and two workers, one of each standing by");
    ["relay-1", "relay-2", "worker-1", "worker-2"]
        .into_iter()
        .map(|name| {
            let command = if name.starts_with("relay") {
                let environment = places.environment(Role::Relay, &places.url_for("relay", &places.bank_url));
                programs.aftercommit("aftercommit-relay", environment)
            } else {
                let url = places.url_for("projection", &places.projection_url);
                let mut worker = programs.aftercommit("aftercommit-worker", places.environment(Role::Worker, &url));
                worker.arg("--config").arg(&config);
                worker
            };
            programs.start(name, command)
        })
        .collect()
}

/// pgbench's stock script.
fn pgbench(options: &Options, servers: &Servers) -> Command {
    let (clients, seconds) = (options.clients.to_string(), options.seconds.to_string());
    let jobs = options.clients.min(2).to_string();
    let arguments = ["--no-vacuum", "--client", &clients, "--jobs", &jobs, "--time", &seconds];
    Programs::pgbench(&arguments, &servers.places.url_for("bank", &servers.places.bank_url))
}

/// What pgbench says that it did.
fn transactions(output: &str) -> Result<usize> {
    let line = output.lines().find_map(|line| line.strip_prefix("number of transactions actually processed: "));
    let number = line.and_then(|line| line.split('/').next()).ok_or("pgbench did not say what it did")?;
    Ok(number.trim().parse()?)
}
