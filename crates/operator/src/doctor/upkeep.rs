//! What a database needs from those who keep it: room for its log, vacuum, tables as the migrations have made them, and
//! reconcilers that run.

use std::collections::BTreeMap;

use super::{Check, DoctorConfig, span};
use aftercommit_core::config::Schema;
use aftercommit_core::postgres::session::Session;
use aftercommit_core::postgres::upkeep::{self as facts, Attached, Compared, Remembered, Server, Slot};
use aftercommit_core::postgres::{quoted, time};
use aftercommit_core::text::counted;

/// What a slot may keep of the log without a word.
const MUCH_LOG: i64 = 10 << 30;
/// After two thousand million transactions the server takes no more writes; vacuum should have frozen all at 200 million.
const OLD: i64 = 1_000_000_000;
/// Sweeps over everything are due every 24 hours.
const LONG_AGO: f64 = 26.0 * 3600.0;
/// As the health check of reconcilers has it.
const MANY_FAILURES: i32 = 3;
/// How many names a check lists at most.
const LISTED: usize = 10;

/// The facts.
#[derive(Debug)]
pub(super) struct Upkeep {
    server: Server,
    slots: Vec<Slot>,
    attached: Vec<Attached>,
    /// None when the role may not see them, or without schema.
    compared: Option<Vec<Compared>>,
    /// None when the role may not see it, or without schema.
    pub(super) remembered: Option<Vec<Remembered>>,
}

pub(super) async fn look(connection: &mut Session, has_schema: bool) -> Result<Upkeep, sqlx::Error> {
    let (mut compared, mut remembered) = (None, None);
    if has_schema {
        // Rights that are missing are told by themselves.
        compared = facts::compared(connection).await.ok();
        remembered = facts::remembered(connection).await.ok();
    }
    Ok(Upkeep {
        server: facts::server(connection).await?,
        slots: facts::slots(connection).await?,
        attached: facts::attached(connection).await?,
        compared,
        remembered,
    })
}

/// `publishes` says whether a relay has ever led here.
pub(super) fn judge(upkeep: &Upkeep, publishes: bool, config: &DoctorConfig) -> Vec<Check> {
    let schema = &config.postgres.schema;
    let mut checks = vec![slots(&upkeep.slots, upkeep.server.slots_keep), frozen(upkeep.server.frozen)];
    checks.extend(encryption(&upkeep.server));
    checks.extend(attached(&upkeep.attached, upkeep.server.autovacuum, schema));
    checks.push(reconcilers(upkeep.compared.as_deref(), publishes));
    checks
}

fn slots(slots: &[Slot], keep: i64) -> Check {
    const NAME: &str = "slots";
    let idle = slots.iter().find(|slot| !slot.active && slot.kept.is_some() && keep < 0);
    if let Some(Slot { name, kept, .. }) = idle {
        return Check::warn(
            NAME,
            format!(
                "nobody reads from the replication slot {name}: it keeps {} MB of the write-ahead log, and more with every commit, \
                 until the disk is full",
                kept.unwrap_or(0) >> 20
            ),
            format!("start what reads from it, or `select pg_drop_replication_slot('{}')`", name.replace('\'', "''")),
        );
    }
    if let Some(Slot { name, kept, .. }) = slots.iter().find(|slot| slot.kept.is_some_and(|kept| kept > MUCH_LOG)) {
        return Check::warn(
            NAME,
            format!("the replication slot {name} keeps {} MB of the write-ahead log", kept.unwrap_or(0) >> 20),
            "see why its reader is so far behind; max_slot_wal_keep_size limits what slots may keep",
        );
    }
    Check::ok(
        NAME,
        format!("{}, none keeps much of the write-ahead log", counted(slots.len() as u64, "replication slot")),
    )
}

fn frozen(age: i64) -> Check {
    const NAME: &str = "wraparound";
    if age <= OLD {
        return Check::ok(NAME, format!("the oldest rows are {} million transactions old", age / 1_000_000));
    }
    Check::warn(
        NAME,
        format!(
            "the oldest rows are {} million transactions old: at 2,000 million the server takes no more writes",
            age / 1_000_000
        ),
        "run `vacuum (freeze)` in this database; see why autovacuum does not: old transactions, prepared ones, slots",
    )
}

/// Nothing over a socket, and where the server has no TLS to offer.
fn encryption(server: &Server) -> Option<Check> {
    (server.offers_tls && server.uses_tls == Some(false)).then(|| {
        Check::warn(
            "encryption",
            "PostgreSQL offers TLS, and this connection does not use it: passwords and payloads can be read on the way",
            "set sslmode=verify-full in DATABASE_URL, and sslrootcert if need be; at least take sslmode=disable away",
        )
    })
}

fn attached(attached: &[Attached], autovacuum: bool, schema: &Schema) -> Vec<Check> {
    let mut checks = Vec::new();
    let of = |kind: &'static str| attached.iter().filter(move |one| one.kind == kind);
    for Attached { table, kind, name } in of("trigger").chain(of("rule")) {
        checks.push(Check::warn(
            "tables",
            format!(
                "the {kind} {name} on {schema}.{table} is not ours: it can change or drop what is written, and its errors fail \
                 whoever writes"
            ),
            format!("if nobody needs it: `drop {kind} {} on {schema}.{table}`", quoted(name)),
        ));
    }
    for Attached { table, .. } in of("row security") {
        checks.push(Check::fail(
            "tables",
            format!("row security on {schema}.{table} hides rows: events are not published, or run again"),
            format!(
                "run deploy/postgres/roles.sql again, which lets our roles see all rows, and drop restrictive policies; or \
                 `alter table {schema}.{table} disable row level security`"
            ),
        ));
    }
    for Attached { table, .. } in of("autovacuum") {
        checks.push(Check::warn(
            "autovacuum",
            format!(
                "it is off for {schema}.{table}: rows that are removed stay on the disk, and each look takes longer"
            ),
            format!("`alter table {schema}.{table} reset (autovacuum_enabled)`"),
        ));
    }
    if !autovacuum {
        checks.push(Check::warn(
            "autovacuum",
            "it is off for the whole server: rows that are removed stay on the disk, and one day it takes no more writes",
            "set `autovacuum = on` in postgresql.conf and reload it",
        ));
    }
    for (name, finding) in [("tables", "as the migrations have made them"), ("autovacuum", "on")] {
        if checks.iter().all(|check| check.name != name) {
            checks.push(Check::ok(name, finding));
        }
    }
    checks
}

fn reconcilers(compared: Option<&[Compared]>, publishes: bool) -> Check {
    const NAME: &str = "reconcilers";
    let Some(compared) = compared else {
        return Check::unknown(
            NAME,
            "the role may not see whether outbox, stream and inboxes are compared",
            "give the login the role outbox_reconciler, or look as a reader or an operator",
        );
    };
    let mut wrong = BTreeMap::new();
    for Compared { name, since_success, failures } in compared {
        match since_success {
            _ if *failures >= MANY_FAILURES => {
                wrong.insert(name.as_str(), format!("{name} has failed {failures} times in a row"));
            }
            Some(seconds) if *seconds > LONG_AGO => {
                wrong.insert(name, format!("{name} last succeeded {} ago", span(time::span(*seconds))));
            }
            _ => {}
        }
    }
    let never = !compared.iter().any(|one| one.name == "outbox" && (one.since_success.is_some() || one.failures > 0));
    if publishes && never {
        wrong.insert("outbox", "outbox and stream have never been compared".into());
    }
    if wrong.is_empty() {
        return Check::ok(NAME, format!("{}, none late", counted(compared.len() as u64, "reconciler")));
    }
    let text: Vec<String> = wrong.into_values().take(LISTED).collect();
    Check::warn(
        NAME,
        format!("{}: what the stream or an inbox has lost is not noticed", text.join("; ")),
        "start relays and workers with AFTERCOMMIT_RECONCILE_EVERY=5m (--reconcile-every); `aftercommit runs` tells why runs fail",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Severity;

    #[test]
    fn a_slot_that_nobody_reads_is_told_unless_it_is_limited() {
        let slot = |active, kept| vec![Slot { name: "gone".into(), active, kept }];
        assert_eq!(slots(&[], -1).status, Severity::Ok);
        assert_eq!(slots(&slot(false, None), -1).status, Severity::Ok, "it keeps nothing");
        assert_eq!(slots(&slot(false, Some(1)), 64).status, Severity::Ok, "it is limited");
        assert_eq!(slots(&slot(true, Some(1)), -1).status, Severity::Ok);
        let check = slots(&slot(false, Some(7 << 20)), -1);
        assert!(check.status == Severity::Warn && check.finding.contains("keeps 7 MB"), "{check:?}");
        assert_eq!(slots(&slot(true, Some(MUCH_LOG + 1)), -1).status, Severity::Warn);
    }

    #[test]
    fn rows_that_nobody_freezes_are_told() {
        assert_eq!((frozen(200_000_000).status, frozen(OLD + 1).status), (Severity::Ok, Severity::Warn));
    }

    #[test]
    fn a_reconciler_that_is_late_fails_or_never_ran_is_named() {
        let one = |name: &str, since_success, failures| Compared { name: name.into(), since_success, failures };
        let judged = |all: &[Compared], publishes| reconcilers(Some(all), publishes);
        assert_eq!(reconcilers(None, true).status, Severity::Unknown);
        assert_eq!(judged(&[], false).status, Severity::Ok, "a subscriber's database");
        assert!(judged(&[], true).finding.contains("never been compared"));
        assert!(judged(&[one("outbox", None, 0)], true).finding.contains("never been compared"));
        assert_eq!(judged(&[one("outbox", Some(60.0), 2)], true).status, Severity::Ok);
        let late = judged(&[one("outbox", Some(1.0), 0), one("inbox:mails", Some(3.0 * 86_400.0), 0)], true);
        assert!(late.finding.starts_with("inbox:mails last succeeded 3 days ago:"), "{late:?}");
        assert!(judged(&[one("outbox", Some(60.0), 3)], true).finding.contains("failed 3 times"));
    }
}
