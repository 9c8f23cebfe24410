//! What is wrong with the subscribers' work: workers that are missing or cannot work, events that fail or wait for long.

use super::{Check, Severity};
use crate::status::{self, Kind, Problem, Status};
use aftercommit_core::error::Error;

/// What other checks tell.
const ELSEWHERE: [Kind; 5] = [Kind::Backlog, Kind::Parked, Kind::Stream, Kind::Paused, Kind::DeadLetters];

pub(super) fn judge(status: &Result<Status, Error>) -> Vec<Check> {
    const NAME: &str = "workers";
    let status = match status {
        Ok(status) => status,
        Err(error) => {
            let remedy = "look as a reader or an operator (deploy/postgres/roles.sql), in the subscribers' database";
            return vec![Check::unknown(NAME, format!("what the workers do: {}", error.report()), remedy)];
        }
    };
    let problems: Vec<&Problem> = status.problems.iter().filter(|problem| !ELSEWHERE.contains(&problem.kind)).collect();
    let mut checks: Vec<Check> = problems.iter().map(|problem| check(problem)).collect();
    if checks.is_empty() {
        let active = status.subscribers.values().filter(|one| one.active.is_some()).count();
        let finding = format!(
            "{active} of {} subscribers have an active worker here, and nothing is stuck",
            status.subscribers.len()
        );
        checks.push(Check::ok(NAME, finding));
    }
    let others: Vec<&str> = status.other_consumers.iter().flatten().map(|other| other.name.as_str()).collect();
    if !others.is_empty() {
        let finding =
            format!("no subscriber of aftercommit reads from {}: somebody else's, or left behind", others.join(", "));
        checks.push(Check::ok("other consumers", finding));
    }
    checks
}

fn check(problem: &Problem) -> Check {
    let Problem { severity, kind, place, what, remedy } = problem;
    let status = match severity {
        status::Severity::Stuck => Severity::Fail,
        status::Severity::Attention => Severity::Warn,
    };
    let name = match kind {
        Kind::Failing => "failing",
        Kind::Slow => "pending",
        Kind::Unavailable => "unavailable",
        _ => "workers",
    };
    Check::new(status, name, format!("{place}: {what}"), Some(remedy.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use aftercommit_core::error::ErrorKind;

    #[test]
    fn who_may_not_look_is_told_so() {
        let checks = judge(&Err(Error::new(ErrorKind::Database, "permission denied")));
        assert!(checks[0].status == Severity::Unknown && checks[0].finding.contains("permission denied"), "{checks:?}");
    }

    #[test]
    fn a_missing_worker_fails_and_a_failing_event_warns() {
        let problem = |severity, kind| Problem {
            severity,
            kind,
            place: "subscriber mails".into(),
            what: "what".into(),
            remedy: "remedy".into(),
        };
        let missing = check(&problem(status::Severity::Stuck, Kind::Worker));
        assert_eq!((missing.status, missing.name), (Severity::Fail, "workers"));
        assert_eq!(missing.finding, "subscriber mails: what");
        let failing = check(&problem(status::Severity::Attention, Kind::Failing));
        assert_eq!((failing.status, failing.name), (Severity::Warn, "failing"));
    }
}
