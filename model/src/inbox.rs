//! From the stream to one effect: lease, delivery, inbox transaction, ack, retries, dead letters and redrive.
//!
//! Every event has a transaction of its own here, and a failed one may run again at any time; batches and clocks are
//! left out. An instance that is frozen or cut off needs no step of its own: anything may happen between two of its.

use std::collections::BTreeSet;

use stateright::{Model, Property};

/// What is checked: this stream, so many instances, and so many faults at most.
#[derive(Debug, Clone)]
pub struct Scope {
    /// The stream: which event each message holds. An event may be in it twice.
    pub stream: Vec<u8>,
    /// The key of each event.
    pub keys: Vec<u8>,
    /// Instances of the subscriber.
    pub instances: usize,
    /// With which failed attempt an event becomes a dead letter.
    pub max_attempts: u8,
    /// How often what may go wrong.
    pub faults: Faults,
    /// What of the protocol is left out.
    pub broken: Option<Broken>,
}

/// How often each fault may happen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Faults {
    /// A process dies.
    pub crashes: u8,
    /// The lease of a living instance runs out.
    pub expiries: u8,
    /// A delivery is lost on the way.
    pub lost_deliveries: u8,
    /// An ack is lost on the way.
    pub lost_acks: u8,
    /// A message comes again although it is being worked on.
    pub redeliveries: u8,
    /// A handler fails.
    pub failures: u8,
    /// The database ends an open transaction.
    pub killed_transactions: u8,
    /// A commit succeeds and its answer is lost.
    pub unknown_commits: u8,
    /// An operator sends a dead letter back.
    pub redrives: u8,
}

/// A protocol without one of its parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Broken {
    /// No inbox.
    NoInbox,
    /// The inbox is looked at and written without a lock.
    CheckThenAct,
    /// The inbox row is committed before the handler runs.
    InboxBeforeEffect,
    /// The ack goes out before the commit.
    AckBeforeCommit,
    /// What was delivered to others or lost is waited for, and not read from the stream.
    NoStreamRead,
    /// Events of one key run side by side.
    NoKeys,
    /// Live events do not look at what was sent back.
    NoHold,
}

/// Where an event comes from; what was sent back goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Place {
    Redrive(u8),
    /// A message of the stream, counted from 1.
    Stream(u8),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Run {
    Waiting,
    /// Its transaction has begun; the rows of its key that had been sent back by then.
    Entering {
        behind: Vec<u8>,
    },
    /// The inbox row is written, and locked until the end, or was there before.
    Entered {
        fresh: bool,
        behind: Vec<u8>,
    },
    /// The effect is in the transaction.
    Handled {
        behind: Vec<u8>,
    },
    /// The transaction was rolled back, the failure is not counted yet.
    Failed,
    /// Decided.
    Decided,
}

/// An event in an instance's memory.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Item {
    place: Place,
    event: u8,
    reply: bool,
    run: Run,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Instance {
    Down,
    StandingBy,
    Active {
        /// All messages up to here were handed on.
        seen: u8,
        /// Deliveries went elsewhere since then.
        missed: bool,
        items: Vec<Item>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Outcome {
    Handled,
    Dead,
}

/// All of it at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct State {
    delivered: u8,
    /// Messages that were delivered and not acked.
    unacked: BTreeSet<u8>,
    inbox: Vec<Option<Outcome>>,
    attempts: Vec<u8>,
    redrive: BTreeSet<u8>,
    holder: Option<usize>,
    effects: Vec<u8>,
    /// Events that were ever sent back.
    sent_back: BTreeSet<u8>,
    overtaken: bool,
    instances: Vec<Instance>,
    left: Faults,
}

/// What happens next; the first number is the instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// It gets the lease and reads what was delivered and not acked from the stream.
    TakeOver(usize),
    /// It notices that it has lost the lease.
    GiveWay(usize),
    /// The next message is delivered to it.
    Deliver(usize),
    /// The next message is sent to it and lost.
    LoseDelivery,
    /// A message is delivered to it again.
    Redeliver(usize, u8),
    /// It finds rows that were sent back.
    FindRedriven(usize),
    /// Its transaction for this item begins.
    Begin(usize, usize),
    /// The inbox row is written, once nobody else holds it.
    Enter(usize, usize),
    /// The handler succeeds.
    Handle(usize, usize),
    /// The handler fails, and the transaction is rolled back.
    Fail(usize, usize),
    /// The failure is counted; with the last attempt the event becomes a dead letter.
    Count(usize, usize),
    /// The transaction commits.
    Commit(usize, usize),
    /// The transaction commits, and the instance does not learn of it.
    CommitUnknown(usize, usize),
    /// The database ends the transaction.
    Kill(usize, usize),
    /// The message is acked or terminated.
    Ack(usize, usize),
    /// The ack is lost.
    LoseAck(usize, usize),
    /// The lease of a living instance runs out.
    Expire,
    /// A process dies.
    Crash(usize),
    /// It is started again.
    Start(usize),
    /// An operator sends a dead letter back.
    Redrive(u8),
}

impl Action {
    fn is_progress(self) -> bool {
        !matches!(
            self,
            Self::LoseDelivery
                | Self::Fail(..)
                | Self::CommitUnknown(..)
                | Self::Kill(..)
                | Self::LoseAck(..)
                | Self::Expire
                | Self::Crash(_)
                | Self::Redrive(_)
        )
    }
}

/// No event takes effect twice.
pub const ONCE: &str = "no event takes effect twice";
/// The events of a key take effect in order, apart from those that were sent back.
pub const IN_ORDER: &str = "the events of a key take effect in order";
/// What begins after an event of its key was sent back takes effect behind it.
pub const SENT_BACK_FIRST: &str = "nothing overtakes what was sent back before it began";
/// When nothing is left to do, every event has taken effect or is a dead letter, and every message is acked.
pub const NOTHING_LOST: &str = "every event takes effect or is a dead letter";

impl Model for Scope {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let events = self.keys.len();
        vec![State {
            delivered: 0,
            unacked: BTreeSet::new(),
            inbox: vec![None; events],
            attempts: vec![0; events],
            redrive: BTreeSet::new(),
            holder: None,
            effects: Vec::new(),
            sent_back: BTreeSet::new(),
            overtaken: false,
            instances: vec![Instance::StandingBy; self.instances],
            left: self.faults,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let more = usize::from(state.delivered) < self.stream.len();
        for (at, instance) in state.instances.iter().enumerate() {
            match instance {
                Instance::Down => actions.push(Action::Start(at)),
                Instance::StandingBy if state.holder.is_none_or(|holder| holder == at) => {
                    actions.push(Action::TakeOver(at))
                }
                Instance::StandingBy => {}
                Instance::Active { items, .. } => {
                    if state.holder != Some(at) {
                        actions.push(Action::GiveWay(at));
                    }
                    if state.left.crashes > 0 {
                        actions.push(Action::Crash(at));
                    }
                    if more {
                        actions.push(Action::Deliver(at));
                    }
                    self.redeliveries(state, at, actions);
                    let known = |event| items.iter().any(|item| item.place == Place::Redrive(event));
                    if state.redrive.iter().any(|event| !known(*event)) {
                        actions.push(Action::FindRedriven(at));
                    }
                    for n in 0..items.len() {
                        self.item_actions(state, at, items, n, actions);
                    }
                }
            }
        }
        if more
            && state.left.lost_deliveries > 0
            && state.instances.iter().any(|one| matches!(one, Instance::Active { .. }))
        {
            actions.push(Action::LoseDelivery);
        }
        if state.left.expiries > 0 && state.holder.is_some() {
            actions.push(Action::Expire);
        }
        if state.left.redrives > 0 {
            let dead = (0..).zip(&state.inbox).filter(|(_, outcome)| **outcome == Some(Outcome::Dead));
            actions.extend(dead.map(|(event, _)| Action::Redrive(event)));
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut next = last.clone();
        next.step(self, action);
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(ONCE, |_, state: &State| {
                let effects = &state.effects;
                effects.iter().enumerate().all(|(n, event)| !effects[n + 1..].contains(event))
            }),
            Property::always(IN_ORDER, |scope: &Scope, state: &State| {
                let place = |event: &u8| scope.stream.iter().position(|stored| stored == event);
                let key = |event: &u8| scope.keys[usize::from(*event)];
                state.effects.iter().enumerate().all(|(n, event)| {
                    let mut later = state.effects[n + 1..].iter();
                    later.all(|later| {
                        key(event) != key(later) || place(event) <= place(later) || state.sent_back.contains(later)
                    })
                })
            }),
            Property::always(SENT_BACK_FIRST, |_, state: &State| !state.overtaken),
            Property::always(NOTHING_LOST, |scope: &Scope, state: &State| {
                let mut actions = Vec::new();
                scope.actions(state, &mut actions);
                let done = |event: u8| {
                    state.effects.contains(&event) || state.inbox[usize::from(event)] == Some(Outcome::Dead)
                };
                actions.into_iter().any(Action::is_progress)
                    || (state.unacked.is_empty()
                        && state.redrive.is_empty()
                        && scope.stream.iter().all(|event| done(*event)))
            }),
        ]
    }
}

impl Scope {
    fn event(&self, sequence: u8) -> u8 {
        self.stream[usize::from(sequence) - 1]
    }

    fn key(&self, event: u8) -> u8 {
        self.keys[usize::from(event)]
    }

    /// Signs of life keep a message from coming again; without them it comes when its ack wait has run out.
    fn redeliveries(&self, state: &State, at: usize, actions: &mut Vec<Action>) {
        for sequence in &state.unacked {
            let worked_on = state.instances.iter().any(|instance| match instance {
                Instance::Active { items, .. } => {
                    items.iter().any(|item| item.place == Place::Stream(*sequence) && item.reply)
                }
                _ => false,
            });
            if !worked_on || state.left.redeliveries > 0 {
                actions.push(Action::Redeliver(at, *sequence));
            }
        }
    }

    fn item_actions(&self, state: &State, at: usize, items: &[Item], n: usize, actions: &mut Vec<Action>) {
        let item = &items[n];
        match &item.run {
            Run::Waiting => {
                // The items are sorted by place: the oldest of a key is its first.
                let first = !items[..n].iter().any(|older| self.key(older.event) == self.key(item.event))
                    && !items
                        .iter()
                        .any(|other| self.key(other.event) == self.key(item.event) && other.run != Run::Waiting);
                if first || self.broken == Some(Broken::NoKeys) {
                    let holds_back = matches!(item.place, Place::Stream(_)) && self.holds_back(state, item.event);
                    // It is tried again when the rows before it are known and gone.
                    if !holds_back {
                        actions.push(Action::Begin(at, n));
                    }
                }
            }
            Run::Entering { .. } => {
                let locked = state.locked(item.event);
                if !locked || matches!(self.broken, Some(Broken::NoInbox | Broken::CheckThenAct)) {
                    actions.push(Action::Enter(at, n));
                }
                self.kill(state, at, n, actions);
            }
            Run::Entered { fresh: false, .. } => actions.push(Action::Commit(at, n)),
            Run::Entered { fresh: true, .. } => {
                actions.push(Action::Handle(at, n));
                if state.left.failures > 0 {
                    actions.push(Action::Fail(at, n));
                }
                self.kill(state, at, n, actions);
            }
            Run::Handled { .. } => {
                actions.push(Action::Commit(at, n));
                if state.left.unknown_commits > 0 {
                    actions.push(Action::CommitUnknown(at, n));
                }
                self.kill(state, at, n, actions);
            }
            Run::Failed if !state.locked(item.event) => actions.push(Action::Count(at, n)),
            Run::Failed => {}
            Run::Decided => {
                actions.push(Action::Ack(at, n));
                if item.reply && state.left.lost_acks > 0 {
                    actions.push(Action::LoseAck(at, n));
                }
            }
        }
    }

    fn kill(&self, state: &State, at: usize, n: usize, actions: &mut Vec<Action>) {
        if state.left.killed_transactions > 0 {
            actions.push(Action::Kill(at, n));
        }
    }

    /// Whether a live event has to wait for events of its key that were sent back.
    fn holds_back(&self, state: &State, event: u8) -> bool {
        self.broken != Some(Broken::NoHold)
            && !state.redrive.contains(&event)
            && state.inbox[usize::from(event)].is_none()
            && state.redrive.iter().any(|row| self.key(*row) == self.key(event))
    }
}

impl State {
    /// Whether a transaction that has not ended holds the event's row.
    fn locked(&self, event: u8) -> bool {
        self.instances.iter().any(|instance| match instance {
            Instance::Active { items, .. } => items.iter().any(|item| {
                item.event == event && matches!(item.run, Run::Entered { fresh: true, .. } | Run::Handled { .. })
            }),
            _ => false,
        })
    }

    fn items(&mut self, at: usize) -> &mut Vec<Item> {
        match &mut self.instances[at] {
            Instance::Active { items, .. } => items,
            other => panic!("{other:?} is not active"),
        }
    }

    fn take_in(&mut self, scope: &Scope, at: usize, sequence: u8, reply: bool) {
        let place = Place::Stream(sequence);
        let items = self.items(at);
        match items.iter_mut().find(|item| item.place == place) {
            Some(known) => known.reply |= reply,
            None => {
                items.push(Item { place, event: scope.event(sequence), reply, run: Run::Waiting });
                items.sort_unstable();
            }
        }
    }

    /// Reads messages from the stream, apart from those whose events are done.
    fn read_stream(&mut self, scope: &Scope, at: usize, from: u8, to: u8) {
        if scope.broken == Some(Broken::NoStreamRead) {
            return;
        }
        for sequence in from..=to {
            if self.inbox[usize::from(scope.event(sequence))].is_none() {
                self.take_in(scope, at, sequence, false);
            }
        }
    }

    /// Hands a delivered message on, behind all that come before it.
    fn hand_on(&mut self, scope: &Scope, at: usize, sequence: u8) {
        self.delivered_past(Some(at));
        let Instance::Active { seen, missed, .. } = &mut self.instances[at] else { return };
        if sequence > *seen {
            let (from, gap) = (*seen + 1, *missed);
            (*seen, *missed) = (sequence, false);
            if gap {
                self.read_stream(scope, at, from, sequence - 1);
            }
        }
        self.take_in(scope, at, sequence, true);
    }

    /// The others see a gap in what is delivered.
    fn delivered_past(&mut self, to: Option<usize>) {
        for (other, instance) in self.instances.iter_mut().enumerate() {
            if let Instance::Active { missed, .. } = instance
                && to != Some(other)
            {
                *missed = true;
            }
        }
    }

    fn step(&mut self, scope: &Scope, action: Action) {
        match action {
            Action::TakeOver(at) => {
                self.holder = Some(at);
                self.instances[at] = Instance::Active { seen: self.delivered, missed: false, items: Vec::new() };
                if let Some(first) = self.unacked.first().copied() {
                    self.read_stream(scope, at, first, self.delivered);
                }
                self.find_redriven(at);
            }
            Action::GiveWay(at) => self.instances[at] = Instance::StandingBy,
            Action::Deliver(at) => {
                self.delivered += 1;
                let sequence = self.delivered;
                self.unacked.insert(sequence);
                self.hand_on(scope, at, sequence);
            }
            Action::LoseDelivery => {
                self.left.lost_deliveries -= 1;
                self.delivered += 1;
                self.unacked.insert(self.delivered);
                self.delivered_past(None);
            }
            Action::Redeliver(at, sequence) => {
                let worked_on = |item: &Item| item.place == Place::Stream(sequence) && item.reply;
                let is = |instance: &Instance| matches!(instance, Instance::Active { items, .. } if items.iter().any(worked_on));
                if self.instances.iter().any(is) {
                    self.left.redeliveries -= 1;
                }
                self.hand_on(scope, at, sequence);
            }
            Action::FindRedriven(at) => self.find_redriven(at),
            Action::Expire => {
                self.left.expiries -= 1;
                self.holder = None;
            }
            Action::Crash(at) => {
                self.left.crashes -= 1;
                self.instances[at] = Instance::Down;
                if self.holder == Some(at) {
                    self.holder = None;
                }
            }
            Action::Start(at) => self.instances[at] = Instance::StandingBy,
            Action::Redrive(event) => {
                self.left.redrives -= 1;
                self.inbox[usize::from(event)] = None;
                self.redrive.insert(event);
                self.sent_back.insert(event);
            }
            Action::Begin(at, n)
            | Action::Enter(at, n)
            | Action::Handle(at, n)
            | Action::Fail(at, n)
            | Action::Count(at, n)
            | Action::Commit(at, n)
            | Action::CommitUnknown(at, n)
            | Action::Kill(at, n)
            | Action::Ack(at, n)
            | Action::LoseAck(at, n) => self.item_step(scope, action, at, n),
        }
    }

    fn find_redriven(&mut self, at: usize) {
        for event in self.redrive.clone() {
            let place = Place::Redrive(event);
            let items = self.items(at);
            if !items.iter().any(|item| item.place == place) {
                items.push(Item { place, event, reply: false, run: Run::Waiting });
                items.sort_unstable();
            }
        }
    }

    fn item_step(&mut self, scope: &Scope, action: Action, at: usize, n: usize) {
        let Item { place, event, reply, run } = self.items(at)[n].clone();
        let row = usize::from(event);
        let next = match (action, run) {
            (Action::Begin(..), _) => {
                let waits = self.redrive.contains(&event);
                match place {
                    // It runs from its row, or its row is gone.
                    Place::Stream(_) if waits && scope.broken != Some(Broken::NoHold) => Run::Decided,
                    Place::Redrive(_) if !waits => Run::Decided,
                    _ => {
                        let same = |row: &&u8| scope.key(**row) == scope.key(event) && **row != event;
                        let live = matches!(place, Place::Stream(_));
                        Run::Entering { behind: self.redrive.iter().filter(same).filter(|_| live).copied().collect() }
                    }
                }
            }
            (Action::Enter(..), Run::Entering { behind }) => {
                let known = self.inbox[row].is_some() && scope.broken != Some(Broken::NoInbox);
                // The row was taken by another transaction meanwhile.
                let gone = matches!(place, Place::Redrive(_)) && !self.redrive.contains(&event);
                if scope.broken == Some(Broken::InboxBeforeEffect) && !known {
                    self.inbox[row] = Some(Outcome::Handled);
                }
                Run::Entered { fresh: !known && !gone, behind }
            }
            (Action::Handle(..), Run::Entered { behind, .. }) => {
                if scope.broken == Some(Broken::AckBeforeCommit) && reply {
                    self.ack(place);
                }
                Run::Handled { behind }
            }
            (Action::Fail(..), _) => {
                self.left.failures -= 1;
                Run::Failed
            }
            (Action::Count(..), _) => {
                if self.holder != Some(at) {
                    return self.instances[at] = Instance::StandingBy;
                }
                self.attempts[row] += 1;
                match self.attempts[row] >= scope.max_attempts {
                    true => {
                        if self.inbox[row].is_none() {
                            self.inbox[row] = Some(Outcome::Dead);
                            self.attempts[row] = 0;
                        }
                        self.redrive.remove(&event);
                        Run::Decided
                    }
                    false => Run::Waiting,
                }
            }
            (Action::Commit(..), run) => {
                self.commit(event, place, run);
                Run::Decided
            }
            (Action::CommitUnknown(..), run) => {
                self.left.unknown_commits -= 1;
                self.commit(event, place, run);
                Run::Waiting
            }
            (Action::Kill(..), _) => {
                self.left.killed_transactions -= 1;
                Run::Waiting
            }
            (Action::Ack(..), _) => {
                if reply {
                    self.ack(place);
                }
                self.items(at).remove(n);
                return;
            }
            (Action::LoseAck(..), _) => {
                self.left.lost_acks -= 1;
                self.items(at).remove(n);
                return;
            }
            (action, run) => panic!("{action:?} in {run:?}"),
        };
        self.items(at)[n].run = next;
    }

    fn commit(&mut self, event: u8, place: Place, run: Run) {
        if let Place::Redrive(_) = place {
            self.redrive.remove(&event);
        }
        let Run::Handled { behind } = run else { return };
        self.inbox[usize::from(event)] = Some(Outcome::Handled);
        self.attempts[usize::from(event)] = 0;
        self.effects.push(event);
        self.overtaken |= behind.iter().any(|row| self.redrive.contains(row));
    }

    fn ack(&mut self, place: Place) {
        if let Place::Stream(sequence) = place {
            self.unacked.remove(&sequence);
        }
    }
}
