//! The offline checker: what a history must show for the guarantees to hold.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;

use uuid::Uuid;

use super::history::{Act, Entry, Fate, What};

/// What must hold, under the numbers of docs/reliability.md.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Invariant {
    /// I1: nothing committed is lost.
    NothingLost,
    /// I2: nothing that was not committed gets out.
    NoGhost,
    /// I3: events of a key take effect in the order of their commits.
    KeyOrder,
    /// I4: each event takes effect once at each subscriber.
    OneEffect,
    /// I5: after a fault everything drains, and everybody is well.
    Drains,
    /// I6: only what is poison is given up.
    OnlyPoison,
    /// I7: what arrives is what was written.
    Unchanged,
}

impl fmt::Display for Invariant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NothingLost => "I1 nothing lost",
            Self::NoGhost => "I2 no ghost",
            Self::KeyOrder => "I3 key order",
            Self::OneEffect => "I4 one effect",
            Self::Drains => "I5 drains",
            Self::OnlyPoison => "I6 only poison",
            Self::Unchanged => "I7 unchanged",
        })
    }
}

/// A guarantee that was broken.
#[derive(Debug, Clone, PartialEq)]
pub struct Violation {
    pub invariant: Invariant,
    /// None when it is about no single event.
    pub event: Option<Uuid>,
    pub says: String,
}

/// What a history came to.
#[derive(Debug, Default)]
pub struct Verdict {
    pub violations: Vec<Violation>,
    pub counts: Counts,
}

/// How much there was of what.
#[derive(Debug, Default, Clone)]
pub struct Counts {
    pub written: usize,
    pub committed: usize,
    pub rolled_back: usize,
    pub unknown: usize,
    pub stored: usize,
    /// Messages beyond the first of their event.
    pub repeated: usize,
    pub effects: usize,
    pub dead: usize,
    pub parked: usize,
    pub faults: usize,
    pub removed: usize,
}

/// An event as the surviving timeline has it.
struct Kept<'a> {
    /// Its place among all that were kept.
    place: usize,
    key: Option<&'a str>,
    version: i64,
    digest: &'a str,
}

#[derive(Default)]
struct Facts<'a> {
    fates: HashMap<Uuid, (&'a Fate, bool)>,
    /// The transaction of each event that was not undone.
    written: HashMap<Uuid, Uuid>,
    undone: HashSet<Uuid>,
    durable: HashSet<Uuid>,
    rolled_back: HashSet<Uuid>,
    kept: HashMap<Uuid, Kept<'a>>,
    outboxed: HashMap<Uuid, u64>,
    stored: Vec<(u64, Uuid, u64)>,
    parked: HashMap<Uuid, &'a str>,
    effects: BTreeMap<&'a str, Vec<Effect<'a>>>,
    dead: HashMap<(&'a str, Uuid), &'a str>,
    removed: HashSet<Uuid>,
    drained: Option<f64>,
    unwell: Vec<String>,
    counts: Counts,
}

struct Effect<'a> {
    event: Uuid,
    key: Option<&'a str>,
    version: i64,
    digest: &'a str,
}

/// Judges a history. `subscribers` are those that must have got everything, each with whether a failed event of it comes
/// behind later ones of its key.
pub fn check(history: &[Entry], subscribers: &[(&str, bool)]) -> Verdict {
    let facts = gather(history);
    let mut found = Vec::new();
    commits(&facts, &mut found);
    stream(&facts, &mut found);
    for (subscriber, skips) in subscribers {
        effects(&facts, subscriber, *skips, &mut found);
        completeness(&facts, subscriber, &mut found);
    }
    let mut say = |says: String| found.push(Violation { invariant: Invariant::Drains, event: None, says });
    if facts.drained.is_none() {
        say("not everything was handled within the bound".into());
    }
    facts.unwell.iter().for_each(|unwell| say(unwell.clone()));
    // The first event comes first.
    let place = |event: Option<Uuid>| event.and_then(|id| facts.kept.get(&id)).map_or(usize::MAX, |kept| kept.place);
    found.sort_by_key(|violation| (violation.invariant, place(violation.event)));
    Verdict { violations: found, counts: facts.counts }
}

fn gather(history: &[Entry]) -> Facts<'_> {
    let mut facts = Facts::default();
    let (mut known, mut purged) = (Vec::new(), Vec::new());
    for Entry { what, .. } in history {
        match what {
            What::Wrote { tx, event, fate, oversize, .. } => {
                known.push(*event);
                facts.fates.insert(*event, (fate, *oversize));
                facts.written.insert(*event, *tx);
                facts.counts.written += 1;
            }
            What::Undone { event, .. } => {
                facts.written.remove(event);
                facts.undone.insert(*event);
            }
            What::Committed { tx, durable } => {
                facts.counts.committed += 1;
                if *durable {
                    facts.durable.insert(*tx);
                }
            }
            What::RolledBack { tx } => {
                facts.counts.rolled_back += 1;
                facts.rolled_back.insert(*tx);
            }
            What::Unknown { .. } => facts.counts.unknown += 1,
            What::Fault { .. } => facts.counts.faults += 1,
            What::Removed { event } => {
                facts.counts.removed += 1;
                facts.removed.insert(*event);
            }
            What::Purged => purged.append(&mut known),
            What::Kept { event, key, version, digest } => {
                let place = facts.kept.len();
                facts.kept.insert(*event, Kept { place, key: key.as_deref(), version: *version, digest });
            }
            What::Outboxed { event, bytes } => _ = facts.outboxed.insert(*event, *bytes),
            What::Stored { sequence, event, bytes } => facts.stored.push((*sequence, *event, *bytes)),
            What::Parked { event, reason } => _ = facts.parked.insert(*event, reason),
            What::Effect { subscriber, event, key, version, digest } => {
                let effect = Effect { event: *event, key: key.as_deref(), version: *version, digest };
                facts.effects.entry(subscriber).or_default().push(effect);
                facts.counts.effects += 1;
            }
            What::Dead { subscriber, event, reason } => _ = facts.dead.insert((subscriber, *event), reason),
            What::Drained { seconds } => facts.drained = *seconds,
            What::Unwell { who, says } => facts.unwell.push(format!("{who} is not well: {says}")),
            What::Healed { .. } | What::NatsRestarted | What::Note { .. } => {}
        }
    }
    facts.counts.dead = facts.dead.len();
    facts.counts.parked = facts.parked.len();
    facts.counts.stored = facts.stored.len();
    let distinct: HashSet<Uuid> = facts.stored.iter().map(|(_, event, _)| *event).collect();
    facts.counts.repeated = facts.counts.stored - distinct.len();
    facts.removed.extend(purged);
    facts
}

fn broken(found: &mut Vec<Violation>, invariant: Invariant, event: Uuid, says: impl Into<String>) {
    found.push(Violation { invariant, event: Some(event), says: says.into() });
}

/// The service's own rows and the outbox hold the same events: all that were confirmed, and nothing that was undone.
fn commits(facts: &Facts<'_>, found: &mut Vec<Violation>) {
    for (event, tx) in &facts.written {
        if facts.durable.contains(tx) && !facts.kept.contains_key(event) {
            broken(found, Invariant::NothingLost, *event, "its commit was confirmed, and its row is gone");
        }
    }
    for event in facts.kept.keys() {
        if !facts.outboxed.contains_key(event) {
            broken(found, Invariant::NothingLost, *event, "the service's row is there, and the outbox has no event");
        }
        if facts.undone.contains(event) || facts.written.get(event).is_some_and(|tx| facts.rolled_back.contains(tx)) {
            broken(found, Invariant::NoGhost, *event, "it was rolled back, and its row is there");
        }
    }
    for event in facts.outboxed.keys().filter(|event| !facts.kept.contains_key(*event)) {
        broken(found, Invariant::NoGhost, *event, "the outbox has the event, and the service has no row");
    }
    for (event, reason) in &facts.parked {
        if !facts.fates.get(event).is_some_and(|(_, oversize)| *oversize) {
            broken(found, Invariant::OnlyPoison, *event, format!("the relay parked it: {reason}"));
        }
    }
}

/// The stream holds only committed events, as they were written.
fn stream(facts: &Facts<'_>, found: &mut Vec<Violation>) {
    let mut seen = HashSet::new();
    for (sequence, event, bytes) in &facts.stored {
        match facts.outboxed.get(event) {
            None => broken(found, Invariant::NoGhost, *event, format!("the stream has it as message {sequence}")),
            Some(written) if written != bytes => {
                broken(
                    found,
                    Invariant::Unchanged,
                    *event,
                    format!("message {sequence} has other bytes than the outbox"),
                );
            }
            Some(_) => {}
        }
        seen.insert(event);
    }
    for event in facts.kept.keys() {
        if !seen.contains(event) && !facts.parked.contains_key(event) && !facts.removed.contains(event) {
            broken(found, Invariant::NothingLost, *event, "it is not in the stream");
        }
    }
}

/// What a subscriber did.
fn effects(facts: &Facts<'_>, subscriber: &str, skips: bool, found: &mut Vec<Violation>) {
    let mut times: HashMap<Uuid, usize> = HashMap::new();
    let mut last: HashMap<&str, i64> = HashMap::new();
    for effect in facts.effects.get(subscriber).into_iter().flatten() {
        let event = effect.event;
        let times = times.entry(event).or_default();
        *times += 1;
        if *times == 2 {
            broken(found, Invariant::OneEffect, event, format!("it took effect more than once at {subscriber}"));
        }
        let Some(kept) = facts.kept.get(&event) else {
            broken(found, Invariant::NoGhost, event, format!("it took effect at {subscriber} and was never committed"));
            continue;
        };
        if (effect.key, effect.version, effect.digest) != (kept.key, kept.version, kept.digest) {
            broken(found, Invariant::Unchanged, event, format!("{subscriber} saw something else than was written"));
        }
        let fate = facts.fates.get(&event).and_then(|(fate, _)| fate.get(subscriber));
        if fate.is_some_and(|act| act.is_deadly()) {
            broken(found, Invariant::OnlyPoison, event, format!("it is poison, and took effect at {subscriber}"));
        }
        // What was taken out of the stream comes later, and what failed does where nothing waits for it.
        let late = facts.removed.contains(&event) || (skips && matches!(fate, Some(Act::Flaky | Act::Panic)));
        if let Some(key) = effect.key.filter(|_| !late && *times == 1) {
            let last = last.entry(key).or_default();
            if effect.version <= *last {
                let says = format!("version {} of {key} took effect at {subscriber} behind {last}", effect.version);
                broken(found, Invariant::KeyOrder, event, says);
            }
            *last = effect.version;
        }
    }
}

/// Every committed event came to a subscriber, or is parked or a dead letter.
fn completeness(facts: &Facts<'_>, subscriber: &str, found: &mut Vec<Violation>) {
    let done: HashSet<Uuid> = facts.effects.get(subscriber).into_iter().flatten().map(|effect| effect.event).collect();
    for event in facts.kept.keys() {
        let dead = facts.dead.get(&(subscriber, *event));
        let deadly =
            facts.fates.get(event).is_some_and(|(fate, _)| fate.get(subscriber).is_some_and(|a| a.is_deadly()));
        match dead {
            Some(reason) if !deadly => {
                broken(found, Invariant::OnlyPoison, *event, format!("{subscriber} gave it up: {reason}"));
            }
            Some(_) if done.contains(event) => {
                broken(found, Invariant::OneEffect, *event, format!("{subscriber} handled it and gave it up"));
            }
            None if !done.contains(event) && !facts.parked.contains_key(event) => {
                broken(found, Invariant::NothingLost, *event, format!("it never took effect at {subscriber}"));
            }
            _ => {}
        }
    }
    let ghosts = facts.dead.keys().filter(|(of, event)| *of == subscriber && !facts.kept.contains_key(event));
    for (_, event) in ghosts {
        broken(found, Invariant::NoGhost, *event, format!("{subscriber} has a dead letter that was never committed"));
    }
}

/// Everything that the history says of an event, its transaction, and the faults meanwhile.
pub fn story(history: &[Entry], event: Uuid) -> String {
    let is_it = |entry: &&Entry| entry.what.event() == Some(event);
    let tx = history.iter().filter(is_it).find_map(|entry| entry.what.transaction());
    let begin = history.iter().find(is_it).map_or(0, |entry| entry.at);
    let end = history.iter().rfind(is_it).map_or(0, |entry| entry.at).min(begin + 15_000_000);
    let mut lines = Vec::new();
    for entry in history {
        let told = match &entry.what {
            What::Fault { .. } | What::Healed { .. } | What::Drained { .. } => {
                (begin - 3_000_000..end + 3_000_000).contains(&entry.at)
            }
            What::Wrote { .. } => entry.what.event() == Some(event),
            what => what.event() == Some(event) || (tx.is_some() && what.transaction() == tx && what.event().is_none()),
        };
        if told {
            let seconds = (entry.at - begin) as f64 / 1e6;
            lines.push(format!("  {seconds:+9.3} s  {}", serde_json::to_string(&entry.what).unwrap_or_default()));
        }
        if lines.len() > 80 {
            lines.push("  …".into());
            break;
        }
    }
    lines.join("\n")
}
