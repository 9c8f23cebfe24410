//! Whether a process makes progress, as its health checks say.

use std::time::{Duration, Instant};

use serde::Serialize;

/// The answer of a health check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// Whether all is well.
    pub ok: bool,
    /// What the process does, or why it makes no progress; one line for a person.
    pub text: String,
}

/// What can be checked from outside: a relay's monitor, a worker's, a runner's.
pub trait Check: Send + Sync + 'static {
    /// Whether the process makes progress.
    fn health(&self) -> Health;

    /// Whether it has what it needs to work: its servers, and the lead or a place in the queue for it.
    fn readiness(&self) -> Health;

    /// Whether it makes no progress and knows of nothing that keeps it: a process that only a new start helps. An outage of
    /// a server is none of its own. Defaults to false.
    fn hangs(&self) -> bool {
        false
    }

    /// Brings metrics that change by themselves up to date.
    fn refresh_metrics(&self);
}

/// What a process is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// It has no connection to one of its servers, or starts over.
    Connecting,
    /// Another process leads; this one waits.
    StandingBy,
    /// It does the work.
    Leading,
    /// It leads, and an operator has paused it.
    Paused,
}

impl Phase {
    /// Its name, as JSON has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::StandingBy => "standing_by",
            Self::Leading => "leading",
            Self::Paused => "paused",
        }
    }
}

/// What a health check is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts<'a> {
    /// What the process is at.
    pub phase: Phase,
    /// What it does or waits for; of a paused one, that it is paused.
    pub state: &'a str,
    /// Events that wait for it; none when nobody knows.
    pub waiting: Option<i64>,
    /// Whether it could not work if something waited.
    pub blocked: bool,
    /// Why the connection to NATS does not stand, as far as that is known; none when it does.
    pub outage: Option<&'a str>,
    /// When it last made progress: published something, found nothing to do, or found another one leading.
    pub progressed: Instant,
}

impl Facts<'_> {
    /// Unhealthy after longer than `patience` without progress while work waits or may wait.
    pub fn health(&self, patience: Duration, now: Instant) -> Health {
        let stalled = now.saturating_duration_since(self.progressed);
        if self.phase == Phase::Paused {
            return Health { ok: true, text: format!("{}, {}", self.state, self.waiting()) };
        }
        if stalled <= patience || (self.phase == Phase::Leading && self.waiting == Some(0) && !self.blocked) {
            return Health { ok: true, text: self.describe() };
        }
        let text = format!("no progress for {} s, {}; {}", stalled.as_secs(), self.waiting(), self.describe());
        Health { ok: false, text }
    }

    /// Ready is who is connected to both servers, and leads or could take over.
    pub fn readiness(&self) -> Health {
        Health { ok: self.outage.is_none() && !self.blocked && self.phase != Phase::Connecting, text: self.describe() }
    }

    /// Unhealthy, although it leads, work waits for certain, and nothing is known to be in its way.
    pub fn hangs(&self, patience: Duration, now: Instant) -> bool {
        let in_its_way = self.blocked || self.outage.is_some() || self.phase != Phase::Leading;
        !in_its_way && self.waiting.is_some_and(|events| events > 0) && !self.health(patience, now).ok
    }

    fn describe(&self) -> String {
        let phase = match self.phase {
            Phase::Connecting => "connecting",
            Phase::StandingBy => "standing by",
            Phase::Leading => "leading",
            // The state tells it, and by whom.
            Phase::Paused => self.state,
        };
        let nats = match self.outage {
            None => String::new(),
            Some("") => "; not connected to NATS".into(),
            Some(why) => format!("; not connected to NATS: {why}"),
        };
        match self.state {
            state if state.is_empty() || self.phase == Phase::Paused => format!("{phase}{nats}"),
            state => format!("{phase}: {state}{nats}"),
        }
    }

    fn waiting(&self) -> String {
        match self.waiting {
            Some(1) => "1 event waiting".into(),
            Some(events) => format!("{events} events waiting"),
            None => "the backlog is unknown".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    fn after(seconds: u64, phase: Phase, waiting: Option<i64>) -> Health {
        let start = Instant::now();
        let facts = Facts { phase, state: "doing", waiting, blocked: false, outage: None, progressed: start };
        facts.health(PATIENCE, start + Duration::from_secs(seconds))
    }

    #[test]
    fn a_leader_is_unhealthy_when_work_waits_and_nothing_moves() {
        assert!(after(30, Phase::Leading, Some(7)).ok, "within its patience");
        assert!(after(3600, Phase::Leading, Some(0)).ok, "nothing waits");
        let stuck = after(31, Phase::Leading, Some(7));
        assert_eq!(stuck, Health { ok: false, text: "no progress for 31 s, 7 events waiting; leading: doing".into() });
        assert!(!after(31, Phase::Leading, None).ok, "work may wait");
    }

    #[test]
    fn a_leader_that_could_not_work_is_unhealthy_even_if_nothing_waits() {
        let start = Instant::now();
        let facts = Facts {
            phase: Phase::Leading,
            state: "no function",
            waiting: Some(0),
            blocked: true,
            outage: None,
            progressed: start,
        };
        assert!(facts.health(PATIENCE, start + PATIENCE).ok);
        assert!(!facts.health(PATIENCE, start + PATIENCE * 2).ok);
        assert!(!facts.readiness().ok);
    }

    #[test]
    fn only_who_could_work_and_does_not_hangs() {
        let (start, late) = (Instant::now(), Instant::now() + PATIENCE * 2);
        let facts = Facts {
            phase: Phase::Leading,
            state: "publishing",
            waiting: Some(3),
            blocked: false,
            outage: None,
            progressed: start,
        };
        assert!(facts.hangs(PATIENCE, late) && !facts.hangs(PATIENCE, start));
        let others = [
            Facts { phase: Phase::StandingBy, ..facts.clone() },
            Facts { phase: Phase::Connecting, ..facts.clone() },
            Facts { phase: Phase::Paused, ..facts.clone() },
            Facts { waiting: Some(0), ..facts.clone() },
            Facts { waiting: None, ..facts.clone() },
            Facts { blocked: true, ..facts.clone() },
            Facts { outage: Some("refused"), ..facts.clone() },
        ];
        for facts in others {
            assert!(!facts.hangs(PATIENCE, late), "{facts:?}");
        }
    }

    #[test]
    fn one_that_cannot_connect_is_unhealthy_even_if_nothing_waited_last() {
        assert!(after(30, Phase::Connecting, Some(0)).ok);
        assert!(!after(31, Phase::Connecting, Some(0)).ok);
        assert!(!after(31, Phase::Connecting, None).text.contains("0 events"));
    }

    #[test]
    fn a_standby_is_healthy_as_long_as_it_sees_the_lease() {
        assert!(after(1, Phase::StandingBy, Some(1_000)).ok, "the leader's backlog is not its business");
        assert!(!after(31, Phase::StandingBy, Some(0)).ok, "the database answers no more");
    }

    #[test]
    fn a_paused_one_is_healthy_and_says_so() {
        let start = Instant::now();
        let facts = Facts {
            phase: Phase::Paused,
            state: "paused by me",
            waiting: Some(1),
            blocked: false,
            outage: None,
            progressed: start,
        };
        let paused = facts.health(PATIENCE, start + Duration::from_secs(3600));
        assert_eq!(facts.readiness().text, "paused by me");
        assert_eq!(paused, Health { ok: true, text: "paused by me, 1 event waiting".into() });
    }

    #[test]
    fn the_text_names_the_cause() {
        let start = Instant::now();
        let facts = Facts {
            phase: Phase::Leading,
            state: "waiting for the stream: no answer",
            waiting: Some(3),
            blocked: false,
            outage: Some("refused"),
            progressed: start,
        };
        let health = facts.health(PATIENCE, start + Duration::from_secs(60));
        assert!(
            health.text.contains("waiting for the stream: no answer; not connected to NATS: refused"),
            "{}",
            health.text
        );
    }

    #[test]
    fn ready_needs_both_servers_and_a_role() {
        let now = Instant::now();
        let facts = |phase, outage| Facts { phase, state: "", waiting: None, blocked: false, outage, progressed: now };
        assert!(facts(Phase::Leading, None).readiness().ok);
        assert!(facts(Phase::StandingBy, None).readiness().ok);
        assert!(facts(Phase::Paused, None).readiness().ok);
        assert!(!facts(Phase::Connecting, None).readiness().ok);
        let cut_off = facts(Phase::Leading, Some("")).readiness();
        assert_eq!(cut_off, Health { ok: false, text: "leading; not connected to NATS".into() });
    }
}
