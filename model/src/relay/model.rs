//! The steps and the properties.

use std::cmp::Ordering;

use stateright::{Model, Property};

use super::database::{Database, LogRow, Stage};
use super::leader::{Answer, Chain, Leader, Place, Step, mark};
use super::{Action, Broken, Event, Faults, Relay, Scope, State, Stored};

/// Whatever is in the stream was committed, and no crash takes it back.
pub const NO_GHOST: &str = "nothing that was rolled back or lost by the database is in the stream";
/// No event is in the stream twice.
pub const ONCE: &str = "no event is in the stream twice";
/// The events of a key stand in the stream in the order of their commits.
pub const IN_ORDER: &str = "the events of a key are in order";
/// When nothing is left to do, everything that was committed is in the stream, or parked.
pub const NOTHING_LOST: &str = "nothing that was committed is lost";

impl Model for Scope {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            database: Database::new(self),
            relays: vec![Relay::StandingBy; self.relays],
            wire: Vec::new(),
            stream: Vec::new(),
            left: self.faults,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for tx in 0..self.transactions.len() {
            self.transaction_actions(state, tx, actions);
        }
        for at in 0..self.relays {
            self.relay_actions(state, at, actions);
        }
        self.wire_actions(state, actions);
        let Faults { database_crashes, promotions, expiries, foreign, .. } = state.left;
        if expiries > 0 && state.database.holder.is_some() {
            actions.push(Action::Expire);
        }
        if database_crashes > 0 {
            actions.extend((0..=state.database.unflushed()).map(Action::CrashDatabase));
        }
        if promotions > 0 {
            actions.extend((0..=state.database.records()).map(Action::Promote));
        }
        if foreign > 0 {
            actions.push(Action::Foreign);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut next = last.clone();
        next.step(self, action);
        // What nobody waits for any more has no order; the rest keeps that of its sender.
        next.wire.sort_by(|one, other| match one.sender.cmp(&other.sender) {
            Ordering::Equal if one.sender.is_none() => one.cmp(other),
            order => order,
        });
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(NO_GHOST, |scope: &Scope, state| {
                // What a standby did not get was published all the same.
                scope.faults.promotions > 0 || published(state).all(|(event, _)| committed(scope, state, event))
            }),
            Property::always(ONCE, |_, state| {
                published(state)
                    .enumerate()
                    .all(|(n, (event, _))| published(state).skip(n + 1).all(|(later, _)| later != event))
            }),
            Property::always(IN_ORDER, |scope: &Scope, state| {
                published(state).enumerate().all(|(n, (event, id))| {
                    published(state)
                        .skip(n + 1)
                        .all(|(later, later_id)| key(scope, event) != key(scope, later) || id <= later_id)
                })
            }),
            Property::always(NOTHING_LOST, |scope: &Scope, state| {
                scope.something_to_do(state)
                    || (0..events(scope)).filter(|event| committed(scope, state, *event)).all(|event| {
                        published(state).any(|(stored, _)| stored == event) || state.database.parked.contains(&event)
                    })
            }),
        ]
    }
}

/// How many events the scope has.
fn events(scope: &Scope) -> Event {
    scope.transactions.iter().map(|transaction| transaction.keys.len() as Event).sum()
}

fn key(scope: &Scope, event: Event) -> Option<u8> {
    scope.transactions.iter().flat_map(|transaction| &transaction.keys).nth(usize::from(event)).copied()
}

/// The events of the stream with their outbox ids.
fn published(state: &State) -> impl Iterator<Item = (Event, i64)> + '_ {
    state.stream.iter().filter_map(|stored| match stored {
        Stored::Own { event, outbox_id } => Some((*event, *outbox_id)),
        Stored::Foreign => None,
    })
}

fn committed(scope: &Scope, state: &State, event: Event) -> bool {
    let transactions = scope.transactions.iter().zip(&state.database.stages);
    let mut stages = transactions.flat_map(|(transaction, stage)| transaction.keys.iter().map(move |_| stage));
    matches!(stages.nth(usize::from(event)), Some(Stage::Committed { .. }))
}

impl Scope {
    fn something_to_do(&self, state: &State) -> bool {
        let mut actions = Vec::new();
        self.actions(state, &mut actions);
        // What nobody waits for may arrive or not.
        let awaited = |n: usize| state.wire[n].sender.is_some();
        actions.into_iter().any(|action| action.is_progress() && !matches!(action, Action::Deliver(n) if !awaited(n)))
    }

    fn transaction_actions(&self, state: &State, tx: usize, actions: &mut Vec<Action>) {
        match &state.database.stages[tx] {
            Stage::NotBegun => actions.push(Action::Begin(tx)),
            Stage::Running { .. } => {
                if state.database.may_write(self, tx) {
                    actions.push(Action::Write(tx));
                }
                if state.database.may_commit(self, tx) {
                    actions.push(Action::Commit(tx));
                }
                actions.push(Action::RollBack(tx));
            }
            Stage::Committed { .. } | Stage::RolledBack | Stage::Lost => {}
        }
    }

    fn relay_actions(&self, state: &State, at: usize, actions: &mut Vec<Action>) {
        let holder = state.database.holder;
        let leader = match &state.relays[at] {
            Relay::Down => return actions.push(Action::Start(at)),
            Relay::StandingBy => {
                if holder.is_none_or(|holder| usize::from(holder) == at) {
                    actions.push(Action::Acquire(at));
                }
                return;
            }
            Relay::TakingOver { .. } => {
                actions.push(Action::TakeOver(at));
                if state.left.relay_crashes > 0 {
                    actions.push(Action::Crash(at));
                }
                return;
            }
            Relay::Leading(leader) => leader,
        };
        if state.left.relay_crashes > 0 {
            actions.push(Action::Crash(at));
        }
        if leader.cut_off || holder != Some(at as u8) {
            actions.push(Action::StepDown(at));
        }
        match &leader.step {
            Step::Doubt => actions.push(Action::ReadEnd(at)),
            // Its next statement would fail.
            Step::End(_) | Step::Opening { .. } if leader.cut_off => {}
            Step::End(_) => actions.push(Action::FindPlace(at)),
            Step::Opening { snapshot: None, .. } => actions.push(Action::TakeSnapshot(at)),
            Step::Opening { last_id: None, .. } => actions.push(Action::ReadSequence(at)),
            Step::Opening { .. } => actions.push(Action::OpenWindow(at)),
            Step::Publishing { chain, to_do } => {
                match to_do.first() {
                    Some((event, _)) if self.unfit.contains(event) => {
                        if !leader.cut_off {
                            actions.push(Action::Park(at));
                        }
                    }
                    Some(_) if chain.in_flight.len() < self.in_flight => actions.push(Action::Send(at)),
                    _ => {}
                }
                let on_the_way =
                    |event| state.wire.iter().any(|message| message.sender == Some(at as u8) && message.event == event);
                let unanswerable = chain.in_flight.iter().any(|(event, stored)| !stored && !on_the_way(*event));
                if unanswerable || (state.left.timeouts > 0 && !chain.in_flight.is_empty()) {
                    actions.push(Action::GiveUp(at));
                }
            }
            Step::Idle(_) if leader.cut_off => {}
            Step::Idle(chain) => {
                let row = &leader.row;
                let news = leader.news(self, &state.database);
                if row.scattered && row.target.is_some() {
                    actions.push(Action::Settle(at));
                } else if usize::from(chain.sequence) != state.stream.len() {
                    actions.push(Action::LookAtStream(at));
                    if news {
                        actions.push(Action::BeginWindow(at));
                    }
                } else if news || leader.unseen(self, &state.database) {
                    actions.push(Action::BeginWindow(at));
                }
                if row.target.is_some() && !row.scattered && !news {
                    actions.push(Action::Settle(at));
                }
            }
        }
    }

    fn wire_actions(&self, state: &State, actions: &mut Vec<Action>) {
        for (n, message) in state.wire.iter().enumerate() {
            // A connection keeps the order of its messages, until it breaks.
            let first = n == 0 || message.sender.is_none() || state.wire[n - 1].sender != message.sender;
            if !first {
                continue;
            }
            actions.push(Action::Deliver(n));
            if message.sender.is_some() && state.left.lost_acks > 0 {
                actions.push(Action::DeliverUnanswered(n));
            }
            if message.sender.is_some() && state.left.lost_publishes > 0 {
                actions.push(Action::Lose(n));
            }
        }
    }
}

impl State {
    fn step(&mut self, scope: &Scope, action: Action) {
        match action {
            Action::Begin(tx) => self.database.begin(tx, scope),
            Action::Write(tx) => self.database.write(tx),
            Action::Commit(tx) => self.database.commit(scope, tx),
            Action::RollBack(tx) => self.database.roll_back(tx),
            Action::Acquire(at) => {
                self.database.holder = Some(at as u8);
                self.relays[at] = Relay::TakingOver { newest: true };
            }
            Action::TakeOver(at) => self.take_over(scope, at),
            Action::StepDown(at) => self.stand_by(at),
            Action::ReadEnd(at) => {
                let end = self.stream.len() as u8;
                self.leader(at).step = Step::End(end);
            }
            Action::FindPlace(at) => self.find_place(scope, at),
            Action::Send(at) => {
                let stream = std::mem::take(&mut self.stream);
                let message = self.leader(at).send(scope, at as u8, &stream);
                self.stream = stream;
                self.wire.extend(message);
            }
            Action::Park(at) => {
                let Step::Publishing { to_do, .. } = &self.leader(at).step else { return };
                let Some((event, _)) = to_do.first().copied() else { return };
                if self.database.holder != Some(at as u8) {
                    return self.stand_by(at);
                }
                self.database.park(event, scope.broken != Some(Broken::ParkingNotDurable));
                self.doubt(at);
            }
            Action::GiveUp(at) => {
                let on_the_way = self.wire.iter().filter(|message| message.sender == Some(at as u8)).count();
                let Step::Publishing { chain, .. } = &self.leader(at).step else { return };
                if chain.in_flight.iter().filter(|(_, stored)| !stored).count() == on_the_way {
                    self.left.timeouts -= 1;
                }
                self.doubt(at);
            }
            Action::BeginWindow(at) => {
                let Step::Idle(chain) = self.leader(at).step.clone() else { return };
                let (base, end) = (chain.sequence, chain.sequence);
                self.leader(at).step = Step::Opening { base, again: false, end, snapshot: None, last_id: None };
            }
            Action::TakeSnapshot(at) => {
                let now = self.database.snapshot();
                if let Step::Opening { snapshot, .. } = &mut self.leader(at).step {
                    *snapshot = Some(now);
                }
            }
            Action::ReadSequence(at) => {
                let now = self.database.last_id;
                if let Step::Opening { last_id, .. } = &mut self.leader(at).step {
                    *last_id = Some(now);
                }
            }
            Action::OpenWindow(at) => self.open_window(scope, at),
            Action::Settle(at) => self.settle(scope, at),
            Action::LookAtStream(at) => self.doubt(at),
            Action::Deliver(n) => self.deliver(n, true),
            Action::DeliverUnanswered(n) => {
                self.left.lost_acks -= 1;
                self.deliver(n, false);
            }
            Action::Lose(n) => {
                self.left.lost_publishes -= 1;
                self.wire.remove(n);
            }
            Action::Expire => {
                self.left.expiries -= 1;
                self.database.holder = None;
            }
            Action::Crash(at) => {
                self.left.relay_crashes -= 1;
                self.stand_by(at);
                self.relays[at] = Relay::Down;
                if self.database.holder == Some(at as u8) {
                    // It runs out by itself; when, is as open as when another one asks for it.
                    self.database.holder = None;
                }
            }
            Action::Start(at) => self.relays[at] = Relay::StandingBy,
            Action::CrashDatabase(kept) => {
                self.left.database_crashes -= 1;
                self.database.crash(kept);
                self.cut_off();
            }
            Action::Promote(kept) => {
                self.left.promotions -= 1;
                self.database.promote(kept);
                self.cut_off();
            }
            Action::Foreign => {
                self.left.foreign -= 1;
                self.stream.push(Stored::Foreign);
            }
        }
    }

    fn leader(&mut self, at: usize) -> &mut Leader {
        match &mut self.relays[at] {
            Relay::Leading(leader) => leader,
            other => panic!("{other:?} does not lead"),
        }
    }

    /// The database is gone as the relays knew it.
    fn cut_off(&mut self) {
        for relay in &mut self.relays {
            match relay {
                Relay::Leading(leader) => leader.cut_off = true,
                Relay::TakingOver { .. } => *relay = Relay::StandingBy,
                Relay::Down | Relay::StandingBy => {}
            }
        }
    }

    /// Nobody waits for its messages any more; they may still arrive.
    fn abandon(&mut self, at: usize) {
        for message in self.wire.iter_mut().filter(|message| message.sender == Some(at as u8)) {
            message.sender = None;
        }
    }

    fn stand_by(&mut self, at: usize) {
        self.abandon(at);
        self.relays[at] = Relay::StandingBy;
    }

    fn doubt(&mut self, at: usize) {
        self.abandon(at);
        self.leader(at).step = Step::Doubt;
    }

    fn take_over(&mut self, scope: &Scope, at: usize) {
        let Relay::TakingOver { newest } = self.relays[at] else { return };
        if !newest && scope.broken != Some(Broken::NoLogFence) {
            return self.relays[at] = Relay::StandingBy;
        }
        let mut row = self.database.newest.clone();
        if row.timeline != self.database.timeline && scope.broken != Some(Broken::NoTimeline) {
            (row.target, row.scattered) = (None, true);
        }
        self.relays[at] = Relay::Leading(Leader { row: row.clone(), newest: true, cut_off: false, step: Step::Doubt });
        self.append(at, row, true);
    }

    /// Appends a state; whoever believes in an earlier one can append no more.
    fn append(&mut self, at: usize, row: LogRow, durable: bool) {
        self.database.append(row.clone(), durable);
        for (other, relay) in self.relays.iter_mut().enumerate() {
            match relay {
                Relay::Leading(leader) if other == at => {
                    (leader.row, leader.newest) = (row.clone(), true);
                }
                Relay::Leading(Leader { newest, .. }) | Relay::TakingOver { newest } => *newest = false,
                Relay::Down | Relay::StandingBy => {}
            }
        }
    }

    /// Whether this leader may not append behind its state.
    fn fenced(&mut self, scope: &Scope, at: usize) -> bool {
        !self.leader(at).newest && scope.broken != Some(Broken::NoLogFence)
    }

    fn find_place(&mut self, scope: &Scope, at: usize) {
        if self.fenced(scope, at) {
            return self.stand_by(at);
        }
        let leader = self.leader(at).clone();
        let Step::End(end) = leader.step else { return };
        let row = &leader.row;
        let after = match leader.place(scope, &self.database, &self.stream, end) {
            _ if row.scattered && row.target.is_some() => 0,
            Place::Behind(after) if !row.scattered => after,
            Place::Behind(_) | Place::Unknown => {
                let base = row.base;
                self.leader(at).step = Step::Opening { base, again: true, end, snapshot: None, last_id: None };
                return;
            }
        };
        self.publish(scope, at, end, after);
    }

    fn publish(&mut self, scope: &Scope, at: usize, end: u8, after: i64) {
        let to_do = self.leader(at).clone().to_do(scope, &self.database, &self.stream, end, after);
        let leader = self.leader(at);
        leader.step = Step::Publishing { chain: Chain::behind(end), to_do };
        leader.rest_if_done();
    }

    fn open_window(&mut self, scope: &Scope, at: usize) {
        let Step::Opening { base, again, end, snapshot: Some(snapshot), last_id: Some(last_id) } =
            self.leader(at).step.clone()
        else {
            return;
        };
        if self.fenced(scope, at) {
            return self.stand_by(at);
        }
        let row = self.leader(at).row.clone();
        let next_xid = self.database.next_xid;
        let target = Some(mark(scope, &self.database, &snapshot, last_id, next_xid));
        let settled = if again { row.settled } else { row.target.unwrap_or(row.settled) };
        let durable = scope.broken != Some(Broken::NoBarrier);
        let timeline = self.database.timeline;
        self.append(at, LogRow { settled, target, base, scattered: again, timeline }, durable);
        self.publish(scope, at, end, 0);
    }

    fn settle(&mut self, scope: &Scope, at: usize) {
        if self.fenced(scope, at) {
            return self.stand_by(at);
        }
        let leader = self.leader(at).clone();
        let (Step::Idle(chain), Some(target)) = (leader.step.clone(), leader.row.target.clone()) else {
            return;
        };
        let timeline = self.database.timeline;
        self.append(
            at,
            LogRow { settled: target, target: None, base: chain.sequence, scattered: false, timeline },
            true,
        );
    }

    /// The server stores a message that is where it has to be, and refuses it otherwise. Its duplicate window has passed.
    fn deliver(&mut self, n: usize, answered: bool) {
        let message = self.wire.remove(n);
        let last_id = match self.stream.last() {
            Some(Stored::Own { event, .. }) => Some(*event),
            _ => None,
        };
        let fits = message.expected_sequence.is_none_or(|sequence| usize::from(sequence) == self.stream.len())
            && message.expected_id.is_none_or(|id| last_id == Some(id));
        let answer = match fits {
            true => {
                self.stream.push(Stored::Own { event: message.event, outbox_id: message.outbox_id });
                Answer::Stored(self.stream.len() as u8)
            }
            false => Answer::Refused,
        };
        let Some(at) = message.sender.map(usize::from).filter(|_| answered) else { return };
        let leader = self.leader(at);
        let Step::Publishing { chain, .. } = &mut leader.step else { return };
        match chain.answered(message.event, answer) {
            true => leader.rest_if_done(),
            false => self.doubt(at),
        }
    }
}
