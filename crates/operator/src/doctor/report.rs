//! What doctor says: the checks, how bad each is, and what to do.

use std::fmt;

use serde::Serialize;

use aftercommit_core::text::plain;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Severity {
    /// As it should be.
    Ok,
    /// Not checked: it cannot be known from here.
    #[serde(rename = "?")]
    Unknown,
    /// It works, and something can be lost, stops one day or waits for a decision.
    Warn,
    /// Events are lost or do not get on.
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// How bad it is.
    pub status: Severity,
    /// What was looked at, such as `grants`. Several checks can have the same name.
    pub name: &'static str,
    /// What was found.
    pub finding: String,
    /// What to do; none when all is well.
    pub remedy: Option<String>,
}

impl Check {
    pub(super) fn new(status: Severity, name: &'static str, finding: String, remedy: Option<String>) -> Self {
        debug_assert!(CHECKS.contains(&name), "{name} is not among the CHECKS that docs/doctor.md explains");
        Self { status, name, finding, remedy }
    }

    pub(super) fn ok(name: &'static str, finding: impl Into<String>) -> Self {
        Self::new(Severity::Ok, name, finding.into(), None)
    }

    /// What cannot be known from here, and how it could.
    pub(super) fn unknown(name: &'static str, why: impl fmt::Display, remedy: impl Into<String>) -> Self {
        Self::new(Severity::Unknown, name, format!("not checked: {why}"), Some(remedy.into()))
    }

    pub(super) fn warn(name: &'static str, finding: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(Severity::Warn, name, finding.into(), Some(remedy.into()))
    }

    pub(super) fn fail(name: &'static str, finding: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(Severity::Fail, name, finding.into(), Some(remedy.into()))
    }
}

/// The names of all checks, as docs/doctor.md explains them.
pub const CHECKS: [&str; 45] = [
    "postgres",
    "fsync",
    "full_page_writes",
    "synchronous_commit",
    "clock",
    "encryption",
    "pooler",
    "connections",
    "prepared",
    "transactions",
    "schema",
    "grants",
    "tables",
    "autovacuum",
    "wraparound",
    "slots",
    "paused",
    "relay",
    "backlog",
    "parked",
    "pruning",
    "ids",
    "dead letters",
    "jobs",
    "captures",
    "forgotten",
    "reconcilers",
    "nats",
    "nats user",
    "max_payload",
    "stream",
    "subjects",
    "owner",
    "room",
    "retention",
    "replicas",
    "disk",
    "subscribers",
    "consumer",
    "inbox",
    "workers",
    "failing",
    "pending",
    "unavailable",
    "other consumers",
];

/// What `aftercommit doctor` prints. With `--json` it is printed as it is here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The worst of the checks.
    pub status: Severity,
    /// All of them, those of the database first.
    pub checks: Vec<Check>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Check { status, name, finding, remedy } in &self.checks {
            let status = match status {
                Severity::Ok => "OK",
                Severity::Unknown => "?",
                Severity::Warn => "WARN",
                Severity::Fail => "FAIL",
            };
            writeln!(f, "{status:<4}  {name:<18}  {}", plain(finding))?;
            if let Some(remedy) = remedy {
                writeln!(f, "{:26}-> {}", "", plain(remedy))?;
            }
        }
        let count = |severity| self.checks.iter().filter(|check| check.status == severity).count();
        let [ok, unknown] = [Severity::Ok, Severity::Unknown].map(count);
        let unknown = if unknown > 0 { format!("{unknown} not checked, ") } else { String::new() };
        writeln!(f, "\n{ok} OK, {unknown}{} WARN, {} FAIL", count(Severity::Warn), count(Severity::Fail))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_readable() {
        let checks = vec![Check::ok("fsync", "on"), Check::warn("clock", "late", "run NTP")];
        let report = Report { status: Severity::Warn, checks };
        let expected = "OK    fsync               on\n\
                        WARN  clock               late\n                          -> run NTP\n\n1 OK, 1 WARN, 0 FAIL\n";
        assert_eq!(report.to_string(), expected);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["status"], "WARN");
        assert_eq!(
            json["checks"][0],
            serde_json::json!({"status": "OK", "name": "fsync", "finding": "on", "remedy": null})
        );
    }

    /// The first column of the table of checks: names between backquotes, several to a row.
    #[test]
    fn every_check_is_explained_and_no_other() {
        let page = include_str!("../../../../docs/doctor.md");
        let (_, table) = page.split_once("\n| Check |").unwrap();
        let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
        let names = rows.flat_map(|row| row.split(" | ").next().unwrap_or_default().split('`').skip(1).step_by(2));
        let mut explained: Vec<&str> = names.collect();
        let mut known = CHECKS.to_vec();
        explained.sort_unstable();
        known.sort_unstable();
        assert_eq!(explained, known);
    }

    /// Mistakes that tests make, each with the checks that name it.
    #[test]
    fn every_mistake_has_a_check() {
        let page = include_str!("../../../../docs/doctor.md");
        let (_, table) = page.split_once("\n| Mistake |").unwrap();
        let rows: Vec<&str> = table.lines().skip(2).take_while(|line| line.starts_with('|')).collect();
        assert!(rows.len() >= 25, "{}", rows.len());
        for row in rows {
            let checks: Vec<&str> = row.split(" | ").nth(1).unwrap_or_default().split('`').skip(1).step_by(2).collect();
            assert!(!checks.is_empty() && checks.iter().all(|check| CHECKS.contains(check)), "{row}");
        }
    }
}
