//! `aftercommit-worker`.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use tokio_util::sync::CancellationToken;

use super::http::{self, HttpArgs};
use super::log::LogArgs;
use super::reconciling::{self, ReconcileArgs};
use super::servers::Servers;
use super::{fail, parse, run_role, systemd};
use aftercommit_core::config::{Naming, NatsConfig, PostgresConfig, Schema};
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::runner::{Mode, Runner, Scope};
use aftercommit_reconciler::with_comparisons;
use aftercommit_worker::{MAX_CONNECTIONS, Queues, Registry, Worker};

const NAME: &str = "aftercommit-worker";
/// The interval of what runs on demand only.
const NO_MATTER: Duration = Duration::from_mins(5);

/// Runs the subscribers of a worker.toml: calls an SQL function for each event, in order per key
#[derive(Parser)]
#[command(name = NAME, version, after_help = "Example:\n  aftercommit-worker --config worker.toml --http 127.0.0.1:9101")]
struct Cli {
    /// The file that names the subscribers
    #[arg(long, value_name = "FILE", default_value = "worker.toml")]
    config: PathBuf,
    #[command(flatten)]
    queues: QueueArgs,
    #[command(flatten)]
    connections: ConnectionArgs,
    #[command(flatten)]
    servers: Servers,
    #[command(flatten)]
    reconcile: ReconcileArgs,
    #[command(flatten)]
    http: HttpArgs,
    #[command(flatten)]
    log: LogArgs,
}

impl Cli {
    fn worker(&self) -> Result<(Worker, NatsConfig), Error> {
        let remedy = format!("run `aftercommit provision --config {}`", self.config.display());
        let (postgres, nats, naming) = servers(&self.servers)?;
        let registry = crate::erasers::read_registry(&self.config, &postgres)?;
        let worker = Worker::new(postgres, nats.clone(), naming).remedy(remedy);
        let worker = worker.unhealthy_after(self.http.unhealthy_after).max_connections(self.connections.most);
        Ok((worker.queues(self.queues.config()?).registry(registry), nats))
    }
}

/// The servers of a worker, whose handlers publish into the schema that it is for.
fn servers(servers: &Servers) -> Result<(PostgresConfig, NatsConfig, Naming), Error> {
    let (postgres, nats, naming) = servers.config()?;
    if postgres.schema != Schema::default() {
        aftercommit_outbox::set_schema(postgres.schema.name())
            .map_err(|error| Error::with_source(ErrorKind::Config, "--schema cannot be used", error))?;
    }
    Ok((postgres, nats, naming))
}

/// How many connections it opens.
#[derive(clap::Args)]
struct ConnectionArgs {
    /// The most connections to PostgreSQL for all subscribers together; reconcilers have their own
    #[arg(long = "max-connections", env = "AFTERCOMMIT_MAX_CONNECTIONS", value_name = "N", default_value_t = MAX_CONNECTIONS.get())]
    #[arg(value_parser = clap::value_parser!(u32).range(4..))]
    most: u32,
}

/// Which subscribers this process serves; all of them when nothing is said.
#[derive(clap::Args)]
struct QueueArgs {
    /// Serve only the subscribers of this queue; may be given several times, or separated by commas
    #[arg(long = "queue", env = "AFTERCOMMIT_QUEUES", value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// Serve the subscribers of all queues but this one; may be given several times, or separated by commas
    #[arg(long = "except-queue", env = "AFTERCOMMIT_EXCEPT_QUEUES", value_name = "NAME", value_delimiter = ',')]
    except: Vec<String>,
}

impl QueueArgs {
    fn config(&self) -> Result<Queues, Error> {
        // An empty variable is as good as none.
        let given = |names: &[String]| names.iter().filter(|name| !name.is_empty()).cloned().collect::<Vec<_>>();
        match (given(&self.only), given(&self.except)) {
            (only, except) if !only.is_empty() && !except.is_empty() => Err(Error::new(
                ErrorKind::Config,
                "AFTERCOMMIT_QUEUES (--queue) and AFTERCOMMIT_EXCEPT_QUEUES (--except-queue) are both set: take one of them away",
            )),
            (only, _) if !only.is_empty() => Ok(Queues::Only(only)),
            (_, except) if !except.is_empty() => Ok(Queues::Except(except)),
            _ => Ok(Queues::All),
        }
    }
}

/// Runs the subscribers of this program
#[derive(Parser)]
#[command(version)]
struct Service {
    /// Create or correct the JetStream consumers, print what was changed, and end
    #[arg(long, conflicts_with = "reconcile_now")]
    provision: bool,
    /// Take consumers over from another database, and narrow those that deliver more than is wanted
    #[arg(long, requires = "provision")]
    adopt: bool,
    /// Run this reconciler now, print what came of it, and end: one of the program's own, or consumer:<subscriber> or
    /// inbox:<subscriber>
    #[arg(long = "reconcile", value_name = "NAME")]
    reconcile_now: Option<String>,
    /// Reconcile only this item; may be given several times
    #[arg(long = "key", value_name = "KEY", requires = "reconcile_now", conflicts_with = "full")]
    keys: Vec<String>,
    /// Reconcile everything, from the beginning
    #[arg(long, requires = "reconcile_now")]
    full: bool,
    /// Only report what is found
    #[arg(long, requires = "reconcile_now")]
    report: bool,
    #[command(flatten)]
    queues: QueueArgs,
    #[command(flatten)]
    connections: ConnectionArgs,
    #[command(flatten)]
    servers: Servers,
    #[command(flatten)]
    reconcile: ReconcileArgs,
    #[command(flatten)]
    http: HttpArgs,
    #[command(flatten)]
    log: LogArgs,
}

/// See [`crate::worker::main`].
pub(crate) fn serve(registry: Registry, arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli: Service = parse(arguments);
    cli.log.choose();
    let worker = || -> Result<(Worker, NatsConfig), Error> {
        let (postgres, nats, naming) = servers(&cli.servers)?;
        let worker = Worker::new(postgres, nats.clone(), naming);
        let worker = worker.remedy("run this program with --provision".into());
        let worker = worker.unhealthy_after(cli.http.unhealthy_after);
        let worker = worker.max_connections(cli.connections.most);
        let worker = if cli.adopt { worker.adopt() } else { worker };
        Ok((worker.queues(cli.queues.config()?).registry(registry), nats))
    };
    let (worker, nats) = match worker() {
        Ok(made) => made,
        Err(error) => return fail(NAME, &error),
    };
    if let Some(name) = cli.reconcile_now {
        let mode = if cli.report { Mode::Report } else { Mode::Repair };
        let scope = match cli.keys {
            keys if !keys.is_empty() => Scope::Keys(keys),
            _ if cli.full => Scope::Full,
            _ => Scope::New,
        };
        return reconciling::run_now(NAME, &reconcilers(&worker, &nats, NO_MATTER, mode), &name, scope, mode);
    }
    if cli.provision {
        return run_role(NAME, async |_| {
            for change in worker.provision().await? {
                println!("{change}");
            }
            Ok(())
        });
    }
    run_role(NAME, |shutdown| run((worker, nats), cli.reconcile, cli.http, shutdown))
}

/// The reconcilers of the registry, and the comparisons of the subscribers that the worker serves.
fn reconcilers(worker: &Worker, nats: &NatsConfig, every: Duration, mode: Mode) -> Runner {
    with_comparisons(worker.own_reconcilers(), nats, worker.subscriptions(), every, mode)
}

async fn run(
    (worker, nats): (Worker, NatsConfig),
    reconcile: ReconcileArgs,
    http: HttpArgs,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let server = http.open().await?;
    let runner = match reconcile.schedule() {
        Some((every, mode)) => reconcilers(&worker, &nats, every, mode),
        None => worker.own_reconcilers(),
    };
    let (checks, running) =
        reconciling::start(worker.monitor(), Some(runner).filter(|runner| !runner.is_empty()), &shutdown);
    let (checks, run) = (Arc::new(checks), worker.run(shutdown.clone()));
    let run = systemd::beside(Arc::clone(&checks), shutdown, run);
    let result = Box::pin(http::beside(server, checks, run)).await;
    running.end().await;
    result
}

/// The command line, for its manual page and completions.
pub(super) fn command() -> clap::Command {
    <Cli as clap::CommandFactory>::command()
}

/// Runs the worker of this process until a signal ends it. The exit status is 0 after an orderly stop, 2 when the
/// command line, the file or a setting is at fault, 1 when the stop was a hard one.
pub fn main() -> ExitCode {
    let cli: Cli = parse(env::args_os());
    cli.log.choose();
    match cli.worker() {
        Ok((worker, nats)) => run_role(NAME, |shutdown| run((worker, nats), cli.reconcile, cli.http, shutdown)),
        Err(error) => fail(NAME, &error),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::tests::assert_empty_variables_do_not_count;

    #[test]
    fn verify_cli() {
        Cli::command().debug_assert();
        Service::command().debug_assert();
    }

    #[test]
    fn a_variable_that_is_set_to_nothing_does_not_count() {
        assert_empty_variables_do_not_count(Cli::command());
        assert_empty_variables_do_not_count(Service::command());
    }

    #[test]
    fn queues_come_one_by_one_or_separated_by_commas() {
        let queues = |arguments: &[&str]| {
            Cli::try_parse_from(["test"].iter().chain(arguments)).unwrap_or_else(|e| panic!("{e}")).queues.config()
        };
        let names = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        assert_eq!(queues(&[]).unwrap(), Queues::All);
        assert_eq!(queues(&["--queue", ""]).unwrap(), Queues::All);
        assert_eq!(queues(&["--queue", "a,b", "--queue", "c"]).unwrap(), Queues::Only(names(&["a", "b", "c"])));
        assert_eq!(queues(&["--except-queue", "a"]).unwrap(), Queues::Except(names(&["a"])));
        let error = queues(&["--queue", "a", "--except-queue", "b"]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.to_string().contains("--except-queue"), "{error}");
    }
}
