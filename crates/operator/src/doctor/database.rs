//! What the facts about the database mean.

use std::time::Duration;

use chrono::{SecondsFormat, TimeDelta};

use super::{Check, DatabaseFacts, DoctorConfig, Work, connections, login, span};
use aftercommit_core::config::Schema;
use aftercommit_core::error::Error;
use aftercommit_core::postgres::capture::Checked;
use aftercommit_core::postgres::doctor::{Prepared, Server, Transaction};
use aftercommit_core::postgres::forget::Totals;
use aftercommit_core::postgres::pause::Pause;
use aftercommit_core::postgres::quoted;
use aftercommit_core::postgres::status::{Backlog, Leader};
use aftercommit_core::postgres::time;
use aftercommit_core::relay::LEASE;
use aftercommit_core::text::counted;

/// The oldest PostgreSQL that has what the schema uses.
const OLDEST: i32 = 140_000;
/// A difference of the clocks that a time service would not leave.
const SKEW: TimeDelta = TimeDelta::seconds(5);
const LONG_PREPARED: Duration = Duration::from_mins(1);
const LONG_TRANSACTION: Duration = Duration::from_mins(5);
/// A relay that works has a backlog of milliseconds.
const LONG_BACKLOG: f64 = 60.0;
/// What a relay says that works.
const WORKS: [&str; 2] = ["idle", "publishing"];
/// A backlog that is younger says nothing yet.
const FRESH: f64 = 5.0;

pub(super) fn unreachable(error: &Error) -> Check {
    let report = error.report();
    let remedy = match report.contains("--pgbouncer") {
        true => {
            "if it is PgBouncer, say so: --pgbouncer (AFTERCOMMIT_PGBOUNCER=true), to the relay and the worker, too"
        }
        false => "start PostgreSQL, or set DATABASE_URL as docs/connections.md says",
    };
    Check::fail("postgres", report, remedy)
}

pub(super) fn judge(facts: &DatabaseFacts, config: &DoctorConfig) -> Vec<Check> {
    let mut checks = vec![server(&facts.server)];
    checks.extend(durability(&facts.server));
    checks.push(clock(facts.clock_ahead, facts.round_trip));
    checks.extend(pooler(facts.server.port, &facts.configured_ports, config.postgres.pooled));
    checks.push(connections::judge(&facts.connections));
    checks.extend(prepared(facts.prepared.as_ref()));
    checks.push(transactions(facts.longest.as_ref(), &facts.server));
    checks.push(login::schema(facts.tables, facts.migrations.as_ref(), &facts.server.role, &config.postgres.schema));
    if facts.tables.outbox {
        checks.extend(login::grants(facts.rights.as_ref(), &facts.server.role, &config.roles));
    }
    match &facts.work {
        Some(Ok(found)) => checks.extend(work(found, config)),
        Some(Err(error)) => checks.push(Check::fail(
            "relay",
            error.report(),
            "grant what is missing (see grants), or run `aftercommit migrate`",
        )),
        None => {}
    }
    match &facts.dead_letters {
        Some(Ok(letters)) => checks.extend(dead_letters(letters)),
        Some(Err(error)) => checks.push(Check::unknown(
            "dead letters",
            error.report(),
            format!(
                "look as a role that may read {}.dead_letter, in the subscriber's database",
                config.postgres.schema
            ),
        )),
        None => {}
    }
    checks.extend(jobs(facts.jobs.as_deref().unwrap_or_default()));
    checks.extend(captures(&facts.captures));
    checks.extend(facts.forgotten.as_ref().and_then(forgotten));
    let leader = facts.work.as_ref().and_then(|work| work.as_ref().ok()?.leader.as_ref());
    checks.extend(super::upkeep::judge(&facts.upkeep, leader.is_some(), config));
    checks
}

fn server(server: &Server) -> Check {
    let Server { version, role, .. } = server;
    if server.version_number < OLDEST {
        return Check::fail("postgres", format!("PostgreSQL {version} is too old"), "update to PostgreSQL 14 or newer");
    }
    if server.standby {
        return Check::fail(
            "postgres",
            "it is a standby, which takes no writes",
            "let DATABASE_URL name the primary, for example with its virtual address",
        );
    }
    Check::ok("postgres", format!("PostgreSQL {version} answers, role {role}"))
}

fn durability(server: &Server) -> [Check; 3] {
    let edit = |setting: &str| format!("set `{setting} = on` in postgresql.conf");
    [
        if server.fsync {
            Check::ok("fsync", "on")
        } else {
            Check::fail(
                "fsync",
                "off: a power cut or a crash of the machine can lose commits and destroy the whole database",
                edit("fsync"),
            )
        },
        if server.full_page_writes {
            Check::ok("full_page_writes", "on")
        } else {
            Check::warn(
                "full_page_writes",
                "off: a power cut can leave torn pages, unless the file system writes pages whole",
                edit("full_page_writes"),
            )
        },
        match server.synchronous_commit.as_str() {
            "off" => Check::warn(
                "synchronous_commit",
                "off for this role and database: a crash takes the last commits although they were confirmed, business \
                 data and events alike; the relay never publishes such an event",
                edit("synchronous_commit") + ", or where a role or database has it otherwise, `alter role … reset …`",
            ),
            value => Check::ok("synchronous_commit", value),
        },
    ]
}

fn clock(ahead: TimeDelta, round_trip: TimeDelta) -> Check {
    let seconds = ahead.num_milliseconds() as f64 / 1000.0;
    // The answer may have been slow in either direction.
    if ahead.abs() > SKEW + round_trip / 2 {
        let direction = if seconds > 0.0 { "ahead of" } else { "behind" };
        return Check::warn(
            "clock",
            format!("PostgreSQL's clock is {:.1} s {direction} this machine's: ages and times mislead", seconds.abs()),
            "run a time service (NTP) on both; leases do not suffer, they go by the database's clock alone",
        );
    }
    Check::ok("clock", format!("PostgreSQL's clock and this machine's differ by {:.1} s", seconds.abs()))
}

fn pooler(server: Option<i32>, configured: &[u16], pooled: bool) -> Option<Check> {
    let server = server.filter(|port| configured.iter().all(|one| *port != i32::from(*one)))?;
    let configured = configured.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
    if pooled {
        return Some(Check::ok(
            "pooler",
            "something stands in between, and all that is sent fits a pooler in transaction mode",
        ));
    }
    Some(Check::warn(
        "pooler",
        format!("the URL names port {configured} and the server itself has {server}: something stands in between"),
        "a forwarded port (such as Docker's) and pooling by session need nothing; PgBouncer in transaction mode needs --pgbouncer, see \
         docs/connections.md; pooling by statement does not work",
    ))
}

fn prepared(prepared: Option<&Prepared>) -> Option<Check> {
    let Prepared { count, gid, owner, age } = prepared.filter(|prepared| prepared.age > LONG_PREPARED)?;
    Some(Check::warn(
        "prepared",
        format!(
            "{count} prepared transactions, the oldest ({gid}, of {owner}) for {}: its locks and events wait, and no dead \
             row can be removed",
            span(*age)
        ),
        "let its coordinator finish it, or `commit prepared` or `rollback prepared` it by hand",
    ))
}

fn transactions(longest: Option<&Transaction>, server: &Server) -> Check {
    const NAME: &str = "transactions";
    if !server.sees_others {
        return Check::unknown(
            NAME,
            format!("the role {} does not see the transactions of others", server.role),
            format!("grant pg_read_all_stats to {}", quoted(&server.role)),
        );
    }
    let Some(Transaction { pid, role, application, state, age }) = longest else {
        return Check::ok(NAME, "none is open");
    };
    let finding = format!(
        "the longest is open for {} (pid {pid}, role {role}, application {application:?}, {state})",
        span(*age)
    );
    if *age <= LONG_TRANSACTION {
        return Check::ok(NAME, finding);
    }
    Check::warn(
        NAME,
        format!("{finding}: the relay does not wait for it, but no dead row can be removed as long as it is open"),
        format!(
            "end it in its application, or `select pg_terminate_backend({pid})`; see idle_in_transaction_session_timeout"
        ),
    )
}

fn work(work: &Work, config: &DoctorConfig) -> Vec<Check> {
    let relay_paused = work.paused.iter().any(|pause| pause.name == LEASE);
    let mut checks: Vec<Check> = work.paused.iter().map(|pause| paused(pause, &config.postgres.schema)).collect();
    checks.extend(relay(work.leader.as_ref(), &work.backlog, relay_paused));
    if work.parked > 0 {
        checks.push(Check::warn(
            "parked",
            format!(
                "{} parked: the stream would not take them, or they wait behind such a one",
                counted(work.parked, "event")
            ),
            "`aftercommit parked list` tells why; then `aftercommit parked release` or `discard`",
        ));
    } else {
        checks.push(Check::ok("parked", "no event is parked"));
    }
    checks.extend(pruning(work.oldest_event, &work.backlog, config.retention));
    checks.push(super::ids::judge(&work.sequence, &config.postgres.schema));
    checks
}

fn paused(pause: &Pause, schema: &Schema) -> Check {
    let Pause { name, since, by, reason } = pause;
    let since = since.to_rfc3339_opts(SecondsFormat::Secs, true);
    let reason = reason.as_deref().unwrap_or("no reason given");
    let remedy = match name.strip_prefix("subscriber:") {
        _ if name == LEASE => "`aftercommit relay resume`".to_string(),
        Some("*") => "`aftercommit worker resume --all`".to_string(),
        Some(subscriber) => format!("`aftercommit worker resume --subscriber {subscriber}`"),
        None => format!("when it is time: `delete from {schema}.pause where name = '{}'`", name.replace('\'', "''")),
    };
    Check::warn("paused", format!("{name} was paused at {since} by {by}: {reason}"), remedy)
}

fn relay(leader: Option<&Leader>, backlog: &Backlog, paused: bool) -> [Check; 2] {
    let alive = leader.filter(|leader| leader.lease_left > 0.0);
    let events = backlog.events;
    let oldest = backlog.oldest_seconds.filter(|seconds| *seconds > LONG_BACKLOG);
    let waiting =
        |seconds: f64| format!("{} to publish, the oldest for {}", counted(events, "event"), span(time::span(seconds)));
    let relay = match (alive, leader) {
        (Some(leader), _) => {
            let state = leader.state.as_deref().unwrap_or("no report yet");
            Check::ok("relay", format!("{} leads, epoch {}: {state}", leader.holder, leader.epoch))
        }
        (None, last) => {
            let last = last.map_or_else(
                || "no relay has ever led this outbox".into(),
                |last| format!("no relay leads; the last was {}", last.holder),
            );
            Check::warn("relay", last, "start aftercommit-relay (not needed for a subscriber's database)")
        }
    };
    let state = alive.and_then(|leader| leader.state.as_deref()).filter(|state| !WORKS.contains(state));
    let obstacle = state.zip(backlog.oldest_seconds.filter(|seconds| *seconds > FRESH)).filter(|_| !paused);
    if let Some((state, seconds)) = obstacle {
        let finding = format!("{}, and the relay says: {state}", waiting(seconds));
        return [relay, Check::fail("backlog", finding, "mend what it says; after that it drains by itself")];
    }
    let backlog = match oldest {
        None => Check::ok("backlog", format!("{} to publish, none of them for a minute", counted(events, "event"))),
        Some(seconds) if alive.is_none() => Check::fail(
            "backlog",
            format!("{}, and no relay leads", waiting(seconds)),
            "start aftercommit-relay; if it runs, its log says why it cannot lead",
        ),
        Some(seconds) if paused => {
            Check::warn("backlog", format!("{}: publishing is paused", waiting(seconds)), "`aftercommit relay resume`")
        }
        Some(seconds) => Check::warn(
            "backlog",
            format!("{} although a relay leads", waiting(seconds)),
            "what the relay says it waits for, and its log, tell why; after an outage it drains by itself",
        ),
    };
    [relay, backlog]
}

fn pruning(oldest: Option<Duration>, backlog: &Backlog, retention: Duration) -> Option<Check> {
    let oldest = oldest?;
    // What is not published yet stays, however old.
    let waits = backlog.oldest_seconds.is_some_and(|seconds| seconds + 1.0 >= oldest.as_secs_f64());
    let late = retention + retention / 10 + Duration::from_hours(1);
    if oldest <= late || waits {
        return Some(Check::ok("pruning", format!("the oldest event in the outbox is {} old", span(oldest))));
    }
    Some(Check::warn(
        "pruning",
        format!(
            "the oldest event in the outbox is {} old, and events stay for {}: old ones are not removed",
            span(oldest),
            span(retention)
        ),
        "a leading relay removes them, if it was given the same --retention-days; its log says why it does not",
    ))
}

fn dead_letters(letters: &[(String, i64)]) -> Vec<Check> {
    if letters.is_empty() {
        return vec![Check::ok("dead letters", "none in this database")];
    }
    letters
        .iter()
        .map(|(subscriber, count)| {
            Check::warn(
                "dead letters",
                format!("subscriber {subscriber} gave up on {}", counted(*count, "event")),
                format!(
                    "`aftercommit dead list --subscriber {subscriber} --group` tells why, `dead retry` runs them again"
                ),
            )
        })
        .collect()
}

/// Requests to forget that are not through, and how much was forgotten.
fn forgotten(totals: &Totals) -> Option<Check> {
    const NAME: &str = "forgotten";
    let Totals { events, open, oldest_seconds } = *totals;
    let events = counted(events, "event");
    match oldest_seconds {
        Some(seconds) if open > 0 => Some(Check::warn(
            NAME,
            format!(
                "{events} forgotten; {} not through, the oldest for {}: the stream may still have payloads",
                counted(open, "request"),
                span(Duration::from_secs_f64(seconds.max(0.0)))
            ),
            "`aftercommit forget --resume`, with a relay running",
        )),
        _ if totals.events > 0 => Some(Check::ok(NAME, format!("{events} forgotten"))),
        _ => None,
    }
}

/// Nothing without jobs.
fn jobs(running: &[(String, i64, i64)]) -> Option<Check> {
    const NAME: &str = "jobs";
    let late: Vec<String> =
        running.iter().filter(|(.., late)| *late > 0).map(|(kind, _, late)| format!("{kind} {late}")).collect();
    if !late.is_empty() {
        let finding = format!("jobs are past the time they were due: {}", late.join(", "));
        let remedy = "see `aftercommit job list --overdue`, and who has not answered with `aftercommit job show`";
        return Some(Check::warn(NAME, finding, remedy));
    }
    let all: i64 = running.iter().map(|(_, count, _)| count).sum();
    (all > 0).then(|| Check::ok(NAME, format!("{}, none is overdue", counted(all, "running job"))))
}

fn captures(captures: &[Checked]) -> Vec<Check> {
    const NAME: &str = "captures";
    let mut checks: Vec<Check> = captures
        .iter()
        .filter(|checked| !checked.ok)
        .map(|checked| {
            Check::warn(
                NAME,
                format!("the capture of {} is not as it should be: {}", checked.table, checked.problems.join("; ")),
                match &checked.remedy {
                    Some(remedy) => format!("run: {remedy}"),
                    None => "do what it says; `aftercommit capture check` shows whether it is right then".into(),
                },
            )
        })
        .collect();
    if checks.is_empty() && !captures.is_empty() {
        checks.push(Check::ok(NAME, format!("{}, as it should be", counted(captures.len() as u64, "captured table"))));
    }
    checks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Severity::{self, Fail, Ok as Fine, Warn};
    use aftercommit_core::postgres::sequence::Sequence;

    fn good() -> Server {
        Server {
            version: "15.18".into(),
            version_number: 150_018,
            role: "relay".into(),
            standby: false,
            fsync: true,
            full_page_writes: true,
            synchronous_commit: "on".into(),
            port: Some(5432),
            clock: chrono::Utc::now(),
            sees_others: true,
        }
    }

    fn idle() -> Work {
        let leader = Leader {
            holder: "host:1".into(),
            epoch: 1,
            lease_left: 2.0,
            last_id: None,
            last_sequence: None,
            state: Some("idle".into()),
            since: None,
        };
        let backlog = Backlog { events: 0, oldest_seconds: None };
        let sequence = Sequence::of(1, 1, false, 7, 7);
        Work { leader: Some(leader), backlog, paused: vec![], parked: 0, oldest_event: None, sequence }
    }

    fn judged(work: &Work) -> Vec<(&'static str, Severity)> {
        let postgres = aftercommit_core::config::PostgresConfig::new("postgres://");
        let checks = super::work(work, &DoctorConfig::new(postgres, Default::default(), Default::default()));
        checks.iter().filter(|check| check.status != Fine).map(|check| (check.name, check.status)).collect()
    }

    #[test]
    fn settings_that_lose_commits_are_told() {
        type Spoil = fn(&mut Server);
        let cases: [(&str, Severity, Spoil); 5] = [
            ("fsync", Fail, |server| server.fsync = false),
            ("full_page_writes", Warn, |server| server.full_page_writes = false),
            ("synchronous_commit", Warn, |server| server.synchronous_commit = "off".into()),
            ("postgres", Fail, |server| server.standby = true),
            ("postgres", Fail, |server| server.version_number = 130_000),
        ];
        let judged = |server: &Server| {
            let checks = [vec![super::server(server)], durability(server).to_vec()].concat();
            checks
                .iter()
                .filter(|check| check.status != Fine)
                .map(|check| (check.name, check.status))
                .collect::<Vec<_>>()
        };
        assert_eq!(judged(&good()), []);
        for (name, status, spoil) in cases {
            let mut server = good();
            spoil(&mut server);
            assert_eq!(judged(&server), [(name, status)]);
        }
    }

    #[test]
    fn clocks_may_differ_by_five_seconds_and_what_the_question_took() {
        for (ahead, round_trip, status) in [(0, 0, Fine), (-5, 0, Fine), (6, 0, Warn), (-6, 0, Warn), (6, 4, Fine)] {
            let check = clock(TimeDelta::seconds(ahead), TimeDelta::seconds(round_trip));
            assert_eq!(check.status, status, "{check:?}");
        }
        assert!(clock(TimeDelta::seconds(-6), TimeDelta::zero()).finding.contains("6.0 s behind"));
    }

    #[test]
    fn another_port_means_that_something_stands_in_between() {
        assert_eq!(pooler(Some(5432), &[5432], false), None);
        assert_eq!(pooler(Some(5432), &[5431, 5432], false), None, "the second of two servers");
        assert_eq!(pooler(None, &[5432], false), None, "over a socket");
        let between = |pooled| pooler(Some(5432), &[6432], pooled).map(|check| check.status);
        assert_eq!((between(false), between(true)), (Some(Warn), Some(Fine)));
    }

    #[test]
    fn what_is_open_for_long_is_told_with_its_owner() {
        let transaction = |seconds| Transaction {
            pid: 42,
            role: "shop".into(),
            application: "report".into(),
            state: "idle in transaction".into(),
            age: Duration::from_secs(seconds),
        };
        assert_eq!(transactions(None, &good()).status, Fine);
        assert_eq!(transactions(Some(&transaction(300)), &good()).status, Fine);
        let check = transactions(Some(&transaction(301)), &good());
        assert!(
            check.status == Warn && check.finding.contains("pid 42") && check.finding.contains("report"),
            "{check:?}"
        );
        let blind = transactions(None, &Server { sees_others: false, ..good() });
        assert!(blind.remedy.is_some_and(|remedy| remedy.contains("pg_read_all_stats")));
        let waits =
            |seconds| Prepared { count: 1, gid: "g".into(), owner: "o".into(), age: Duration::from_secs(seconds) };
        assert_eq!(prepared(Some(&waits(60))), None);
        assert_eq!(prepared(Some(&waits(61))).map(|check| check.status), Some(Warn));
    }

    #[test]
    fn a_backlog_is_only_bad_when_it_stays() {
        let backlog = |seconds| Backlog { events: 3, oldest_seconds: Some(seconds) };
        let paused = Pause { name: LEASE.into(), since: chrono::Utc::now(), by: "me".into(), reason: None };
        let dead = || idle().leader.map(|leader| Leader { lease_left: -1.0, ..leader });
        assert_eq!(judged(&idle()), []);
        assert_eq!(judged(&Work { backlog: backlog(5.0), ..idle() }), []);
        assert_eq!(judged(&Work { backlog: backlog(61.0), ..idle() }), [("backlog", Warn)]);
        assert_eq!(judged(&Work { leader: dead(), ..idle() }), [("relay", Warn)]);
        assert_eq!(judged(&Work { leader: None, backlog: backlog(5.0), ..idle() }), [("relay", Warn)]);
        assert_eq!(
            judged(&Work { leader: dead(), backlog: backlog(61.0), ..idle() }),
            [("relay", Warn), ("backlog", Fail)]
        );
        let stopped = Work { backlog: backlog(61.0), paused: vec![paused], ..idle() };
        assert_eq!(judged(&stopped), [("paused", Warn), ("backlog", Warn)]);
        assert_eq!(judged(&Work { parked: 1, ..idle() }), [("parked", Warn)]);
    }

    #[test]
    fn old_events_stay_only_while_they_wait() {
        let hours = |hours: u64| Some(Duration::from_hours(hours));
        assert_eq!(judged(&Work { oldest_event: hours(7 * 24 + 1), ..idle() }), []);
        assert_eq!(judged(&Work { oldest_event: hours(9 * 24), ..idle() }), [("pruning", Warn)]);
        let backlog = Backlog { events: 1, oldest_seconds: Some(9.0 * 86_400.0) };
        assert_eq!(judged(&Work { oldest_event: hours(9 * 24), backlog, ..idle() }), [("backlog", Warn)]);
    }
}
