//! One look for what is wrong, or will be: each check ends as OK, `?`, WARN or FAIL, with what to do.

mod broker;
mod connections;
mod consumers;
mod database;
mod ids;
mod login;
mod report;
mod upkeep;
mod work;

use std::time::Duration;

use chrono::{TimeDelta, Utc};

use super::status::{self, Status};
use aftercommit_core::config::{Naming, NatsConfig, PostgresConfig};
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::jetstream::consumer::ConsumerSpec;
use aftercommit_core::jetstream::rights::{Rights, rights as rights_of_user};
use aftercommit_core::jetstream::{self, doctor as nats, monitoring};
use aftercommit_core::owner::Owner;
use aftercommit_core::postgres::forget::Totals;
use aftercommit_core::postgres::session::Session;
use aftercommit_core::postgres::{
    self, capture, database_error, doctor as facts, forget, identity, job, migrate, parked, pause, relay_log, rights,
    sequence, status as positions,
};
use aftercommit_core::relay::{LEASE, Mode};
use aftercommit_core::subscription::Subscription;
pub(super) use aftercommit_core::text::span;
pub use report::{CHECKS, Check, Report, Severity};

/// The roles that may see dead letters.
const READERS_OF_LETTERS: [Role; 4] = [Role::Worker, Role::InboxReconciler, Role::Reader, Role::Operator];
/// The roles that may see captures.
const READERS_OF_CAPTURES: [Role; 3] = [Role::Publisher, Role::Reader, Role::Operator];
/// How long a server may take to answer everything.
const DEADLINE: Duration = Duration::from_secs(30);

/// What to look at. The fields that the relay has too must be as the relay's are.
#[derive(Debug, Clone)]
pub struct DoctorConfig {
    /// Whether others write to the stream, too. Defaults to [`Mode::Exclusive`].
    pub mode: Mode,
    /// Stream, subjects and source.
    pub naming: Naming,
    /// The NATS servers.
    pub nats: NatsConfig,
    /// The HTTP monitoring port of a NATS server, such as `http://127.0.0.1:8222`. Only there a server tells when it
    /// writes to the disk. Defaults to none.
    pub nats_monitor: Option<String>,
    /// The outbox's database, with the relay's role: its rights are checked. With [`DoctorConfig::roles`] any database
    /// with the schema, with a login that has them.
    pub postgres: PostgresConfig,
    /// How long events stay in the outbox. Defaults to 7 days.
    pub retention: Duration,
    /// The roles of `deploy/postgres/roles.sql` whose rights the database login is to have, all of them and no others.
    /// Defaults to none: then those of a relay must be there, and what there is besides is left alone.
    pub roles: Vec<Role>,
    /// The subscribers that are to be there, as `worker::Registry::subscriptions` has them. Defaults to none: then consumers
    /// are judged by themselves, and one that is missing is not missed.
    pub subscribers: Vec<Subscription>,
}

/// A role of `deploy/postgres/roles.sql`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A service that publishes.
    Publisher,
    /// The relay.
    Relay,
    /// The worker, and services with handlers.
    Worker,
    /// Who compares outbox and stream.
    OutboxReconciler,
    /// Who compares stream and outbox with an inbox.
    InboxReconciler,
    /// A service with reconcilers of its own.
    OwnReconciler,
    /// Who runs `aftercommit prune run`.
    Pruner,
    /// A service that asks others to do a job, and the worker that writes their answers down.
    Requester,
    /// Who erases what events hold.
    Eraser,
    /// An operator who looks.
    Reader,
    /// An operator who acts.
    Operator,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Publisher,
        Self::Relay,
        Self::Worker,
        Self::OutboxReconciler,
        Self::InboxReconciler,
        Self::OwnReconciler,
        Self::Pruner,
        Self::Requester,
        Self::Eraser,
        Self::Reader,
        Self::Operator,
    ];

    /// Its name in the script, without the prefix.
    pub fn name(self) -> &'static str {
        match self {
            Self::Publisher => "publisher",
            Self::Relay => "relay",
            Self::Worker => "worker",
            Self::OutboxReconciler => "outbox_reconciler",
            Self::InboxReconciler => "inbox_reconciler",
            Self::OwnReconciler => "own_reconciler",
            Self::Pruner => "pruner",
            Self::Requester => "requester",
            Self::Eraser => "eraser",
            Self::Reader => "reader",
            Self::Operator => "operator",
        }
    }
}

impl DoctorConfig {
    /// The defaults for an outbox and its stream.
    pub fn new(postgres: PostgresConfig, nats: NatsConfig, naming: Naming) -> Self {
        let retention = Duration::from_hours(7 * 24);
        Self {
            mode: Mode::Exclusive,
            naming,
            nats,
            nats_monitor: None,
            postgres,
            retention,
            roles: Vec::new(),
            subscribers: Vec::new(),
        }
    }
}

impl DoctorConfig {
    /// Whether the login is to have any of these roles, or nobody has said which it is to have.
    fn does(&self, roles: &[Role]) -> bool {
        self.roles.is_empty() || self.roles.iter().any(|role| roles.contains(role))
    }
}

/// Looks at database and broker. It changes nothing. When one of the two does not answer, that is a check that fails,
/// and the other is looked at all the same.
///
/// # Errors
/// [`ErrorKind::Config`] when a setting is missing or malformed.
pub async fn doctor(config: &DoctorConfig) -> Result<Report, Error> {
    let database = within(Box::pin(look_at_database(config)));
    let broker = within(Box::pin(look_at_broker(config)));
    let workers = Box::pin(look_at_workers(config));
    let (database, broker, sync, workers) = tokio::join!(database, broker, look_at_sync(config), workers);
    // Without the database or its schema there is nothing to add to what is said of that.
    let publisher = database.as_ref().ok().and_then(DatabaseFacts::publisher).cloned();
    let has_schema = database.as_ref().is_ok_and(|seen| seen.tables.outbox);
    let here = database.as_ref().ok().map(|seen| consumers::Here {
        owner: seen.owner.clone(),
        remembered: seen.upkeep.remembered.clone().unwrap_or_default(),
    });
    let mut checks = match unless_config(database)? {
        Ok(seen) => database::judge(&seen, config),
        Err(error) => vec![database::unreachable(&error)],
    };
    match unless_config(broker)? {
        Ok(seen) => {
            let sync = unless_config(sync.transpose())?.transpose();
            checks.extend(broker::judge(&seen, sync.as_ref(), config));
            checks.extend(broker::owner(&seen, publisher.as_ref(), config));
            let status = workers.as_ref().and_then(|workers| workers.as_ref().ok());
            checks.extend(consumers::judge(&seen, here.as_ref(), status, config));
        }
        Err(error) => checks.push(broker::unreachable(&error)),
    }
    if let Some(workers) = workers.filter(|_| has_schema) {
        checks.extend(work::judge(&unless_config(workers)?));
    }
    for (servers, remedy) in [
        (facts::in_clear(&config.postgres)?, "set sslmode=verify-full in DATABASE_URL, and sslrootcert if need be"),
        (jetstream::in_clear(&config.nats)?, "write tls:// in NATS_URL, and set NATS_CA if need be"),
    ] {
        checks.extend(encryption(&servers, remedy));
    }
    let status = checks.iter().map(|check| check.status).max().unwrap_or(Severity::Ok);
    Ok(Report { status, checks })
}

/// `in_clear` are servers elsewhere to which the configuration does not demand TLS.
fn encryption(in_clear: &[String], remedy: &str) -> Option<Check> {
    let finding = format!("the connection to {} may be neither encrypted nor verified", in_clear.join(", "));
    (!in_clear.is_empty()).then(|| Check::warn("encryption", finding, remedy))
}

async fn within<T>(work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let late = || Error::new(ErrorKind::NotReady, format!("no answer within {DEADLINE:?}"));
    tokio::time::timeout(DEADLINE, work).await.unwrap_or_else(|_| Err(late()))
}

/// A wrong setting ends everything; any other error is something to report.
fn unless_config<T>(result: Result<T, Error>) -> Result<Result<T, Error>, Error> {
    match result {
        Err(error) if error.kind() == ErrorKind::Config => Err(error),
        result => Ok(result),
    }
}

/// What the database says.
#[derive(Debug)]
struct DatabaseFacts {
    server: facts::Server,
    configured_ports: Vec<u16>,
    /// How far the server's clock is ahead of ours.
    clock_ahead: TimeDelta,
    /// How long the question took: the difference is no better known than that.
    round_trip: TimeDelta,
    connections: facts::Connections,
    prepared: Option<facts::Prepared>,
    longest: Option<facts::Transaction>,
    tables: facts::Tables,
    /// None when there is no record, or the role may not read it.
    migrations: Option<migrate::Difference>,
    /// None when the role owns the schema or is a superuser.
    rights: Option<rights::Difference>,
    /// Which database this is; none when the role may not ask.
    owner: Option<Owner>,
    upkeep: upkeep::Upkeep,
    /// None without schema, or when it is not the login's business.
    work: Option<Result<Work, Error>>,
    dead_letters: Option<Result<Vec<(String, i64)>, Error>>,
    /// How many jobs of each kind run, and are overdue. None when it is not the login's business.
    jobs: Option<Vec<(String, i64, i64)>>,
    /// Empty when it is not the login's business.
    captures: Vec<capture::Checked>,
    forgotten: Option<Totals>,
}

/// Where the work is.
#[derive(Debug)]
struct Work {
    leader: Option<positions::Leader>,
    backlog: positions::Backlog,
    paused: Vec<pause::Pause>,
    parked: i64,
    oldest_event: Option<Duration>,
    sequence: sequence::Sequence,
}

impl DatabaseFacts {
    /// Which outbox this is, when there are events in it: a database with subscribers alone has an empty one.
    fn publisher(&self) -> Option<&Owner> {
        let work = self.work.as_ref()?.as_ref().ok()?;
        work.oldest_event.and(self.owner.as_ref())
    }
}

async fn look_at_database(config: &DoctorConfig) -> Result<DatabaseFacts, Error> {
    let failed = |error| database_error("asking PostgreSQL failed", error);
    let mut connection = postgres::connect(&config.postgres, "aftercommit-doctor").await?;
    let before = Utc::now();
    let server = facts::server(&mut connection).await.map_err(failed)?;
    let round_trip = Utc::now() - before;
    let tables = facts::tables(&mut connection).await.map_err(failed)?;
    let migrations = match tables.readable {
        true => Some(migrate::difference(&mut connection).await.map_err(failed)?),
        false => None,
    };
    let does = |roles: &[Role]| config.does(roles);
    let mut work = None;
    if tables.outbox && does(&[Role::Relay, Role::Reader, Role::Operator]) {
        work = Some(look_at_work(&mut connection).await);
    }
    let mut dead_letters = None;
    if tables.outbox && does(&READERS_OF_LETTERS) {
        let letters = positions::dead_letters(&mut connection).await;
        dead_letters = Some(letters.map_err(|error| database_error("the dead letters cannot be read", error)));
    }
    let mut jobs = None;
    if tables.outbox && does(&[Role::Requester, Role::Reader, Role::Operator]) {
        // Rights that are missing are told by themselves.
        jobs = job::running(&mut connection).await.ok();
    }
    let mut captures = Vec::new();
    if tables.outbox && does(&READERS_OF_CAPTURES) {
        captures = look_at_captures(&mut connection).await.map_err(failed)?;
    }
    let mut forgotten = None;
    if tables.outbox && does(&[Role::Eraser, Role::Reader, Role::Operator]) {
        // A role that nobody named may lack the right, and a schema the table; both are told elsewhere.
        forgotten = forget::totals(&mut connection).await.ok();
    }
    let roles: Vec<&str> = match config.roles.as_slice() {
        [] => vec![Role::Relay.name()],
        roles => roles.iter().map(|role| role.name()).collect(),
    };
    let rights = match facts::unlimited(&mut connection).await.map_err(failed)? {
        true => None,
        false => Some(rights::difference(&mut connection, &rights::of(&roles)).await.map_err(failed)?),
    };
    Ok(DatabaseFacts {
        configured_ports: facts::configured_ports(&config.postgres)?,
        clock_ahead: server.clock - (before + round_trip / 2),
        round_trip,
        connections: facts::connections(&mut connection).await.map_err(failed)?,
        prepared: facts::prepared(&mut connection).await.map_err(failed)?,
        longest: facts::longest_transaction(&mut connection).await.map_err(failed)?,
        rights,
        owner: identity::owner(&mut connection).await.ok(),
        upkeep: upkeep::look(&mut connection, tables.outbox).await.map_err(failed)?,
        server,
        tables,
        migrations,
        work,
        dead_letters,
        jobs,
        captures,
        forgotten,
    })
}

async fn look_at_captures(connection: &mut Session) -> Result<Vec<capture::Checked>, sqlx::Error> {
    let schema = connection.schema().clone();
    let mut tx = connection.begin().await?;
    match capture::can_check(tx.for_others(), &schema).await? {
        true => capture::check(tx.for_others(), &schema).await,
        false => Ok(Vec::new()),
    }
}

async fn look_at_work(connection: &mut Session) -> Result<Work, Error> {
    let failed = |error| database_error("the state of the relay cannot be read", error);
    let state = relay_log::newest(connection).await.map_err(failed)?;
    let leader = positions::leader(connection, LEASE).await.map_err(failed)?;
    let last_id = leader.as_ref().and_then(|leader| leader.last_id).unwrap_or(0);
    Ok(Work {
        backlog: positions::backlog(connection, &state, last_id).await.map_err(failed)?,
        leader,
        paused: pause::list(&mut *connection).await.map_err(failed)?,
        parked: parked::count(connection).await.map_err(failed)?,
        oldest_event: facts::oldest_event(connection).await.map_err(failed)?,
        sequence: sequence::read(connection).await.map_err(failed)?,
    })
}

/// What NATS says.
#[derive(Debug)]
struct BrokerFacts {
    server: nats::Server,
    stream: Result<nats::Stream, Error>,
    /// None when the server does not tell.
    rights: Option<Rights>,
}

async fn look_at_broker(config: &DoctorConfig) -> Result<BrokerFacts, Error> {
    let connection = jetstream::connect(&config.nats, "aftercommit-doctor", "_INBOX_operator").await?;
    let wanted: Vec<ConsumerSpec> = config.subscribers.iter().map(|one| one.spec.clone()).collect();
    let stream = nats::stream(&connection, &config.naming, config.mode == Mode::Shared, &wanted).await;
    let stream = stream.map_err(|error| match connection.complaint() {
        Some(complaint) => Error::with_source(error.kind(), error.report(), complaint),
        None => error,
    });
    // Last, because the server complains of who may not ask.
    let rights = rights_of_user(&connection, &config.naming).await;
    Ok(BrokerFacts { server: nats::server(&connection), stream, rights })
}

/// None when it is not the login's business.
async fn look_at_workers(config: &DoctorConfig) -> Option<Result<Status, Error>> {
    if !config.does(&[Role::Reader, Role::Operator]) {
        return None;
    }
    Some(within(Box::pin(status::status(&config.postgres, &config.nats, &config.naming))).await)
}

async fn look_at_sync(config: &DoctorConfig) -> Option<Result<monitoring::Sync, Error>> {
    match &config.nats_monitor {
        Some(url) => Some(monitoring::sync(url).await),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_in_clear_is_told_with_its_server() {
        assert_eq!(encryption(&[], "use TLS"), None);
        let check = encryption(&["db:5432".into(), "db:5433".into()], "use TLS").unwrap();
        assert!(check.status == Severity::Warn && check.finding.contains("db:5432, db:5433"), "{check:?}");
    }
}
