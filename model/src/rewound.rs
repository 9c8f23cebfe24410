//! A stream that loses its end and is filled again, while a worker and a reconciler of its subscriber go by places in it.
//!
//! One relay and one instance of the subscriber; what else goes wrong is in the other two models. Each message has a stamp,
//! as the server's time of storing it: what is stored again gets another one.

use std::collections::BTreeSet;

use stateright::{Model, Property};

/// What is checked.
#[derive(Debug, Clone)]
pub struct Scope {
    /// The key of each event, in the order of the outbox.
    pub keys: Vec<u8>,
    /// So many of the first ones commit late, in one transaction.
    pub late: u8,
    /// Whether the server puts a consumer back that stands behind the end of its stream when it starts.
    pub clamps: bool,
    /// How often the power is cut.
    pub cuts: u8,
    /// How often the worker is stopped.
    pub stops: u8,
    /// Runs of the reconciler.
    pub runs: u8,
    /// What of the protocol is left out.
    pub broken: Option<Broken>,
}

/// A protocol without one of its parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Broken {
    /// The reconciler goes by sequences: it neither looks whether the stream still is what it was, nor at what comes before
    /// an event in its key.
    BareSequences,
    /// The reconciler does not look whether the stream still is what it was.
    NoMoment,
    /// The worker begins where the consumer stands.
    TrustsConsumer,
}

/// A message by its sequence, counted from 1, and its stamp.
type Witness = (usize, u8);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Message {
    event: u8,
    stamp: u8,
}

/// What the relay's log says is settled, and where the stream ended then.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Settled {
    events: BTreeSet<u8>,
    base: usize,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Worker {
    Away,
    Here {
        /// Everything up to here was taken in.
        seen: usize,
        /// Whether it has looked at the stream since the connection was lost.
        confirmed: bool,
        last: Option<Witness>,
        /// Taken in and not handled.
        queue: Vec<(usize, u8, u8)>,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Run {
    None,
    Begun { moment: Option<Witness>, floor: usize },
    Asked { moment: Option<Witness>, floor: usize, listed: BTreeSet<u8>, to: usize },
    Read { moment: Option<Witness>, listed: BTreeSet<u8>, waiting: BTreeSet<u8> },
}

/// All of it at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct State {
    committed: BTreeSet<u8>,
    stream: Vec<Message>,
    stamp: u8,
    log: Vec<Settled>,
    /// What the relay takes for stored.
    sent: Vec<u8>,
    delivered: usize,
    floor: usize,
    worker: Worker,
    /// How far the subscriber has come by its own account.
    reached: Vec<Witness>,
    inbox: BTreeSet<u8>,
    redrive: BTreeSet<u8>,
    effects: Vec<u8>,
    run: Run,
    wrongly_found: bool,
    left: (u8, u8, u8),
}

/// What happens next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// The late transaction commits.
    Commit,
    /// The relay stores the next event.
    Publish,
    /// The relay writes down that all is published.
    Settle,
    /// The relay notices that the stream has lost its end, and goes back.
    GoBack,
    /// Power is cut, and so many messages are left.
    Cut(usize),
    /// The worker stops.
    Stop,
    /// It starts, and takes in what was delivered before.
    Start,
    /// It looks whether the stream is what it was.
    Confirm,
    /// It takes in what comes into places that the consumer counts as delivered.
    CatchUp,
    /// The next message is delivered.
    Deliver,
    /// The oldest event is handled and acked.
    Handle,
    /// The first event that was sent back is handled.
    HandleRedriven,
    /// It writes down how far it has come.
    Write,
    /// A run begins: the stream, then the consumer.
    Begin,
    /// The relay says what is settled.
    Ask,
    /// What waits in the stream is read.
    Read,
    /// What neither is handled nor waits is sent back.
    Judge,
}

/// No event takes effect twice.
pub const ONCE: &str = "no event takes effect twice";
/// The events of a key take effect in order.
pub const IN_ORDER: &str = "the events of a key take effect in order";
/// Nothing is called missed that the worker will get.
pub const FOUND_RIGHTLY: &str = "nothing is called missed that waits";
/// When nothing is left to do, every event has taken effect.
pub const NOTHING_LOST: &str = "every event takes effect";

impl Model for Scope {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let all: BTreeSet<u8> = (0..).take(self.keys.len()).filter(|event| *event >= self.late).collect();
        vec![State {
            committed: all,
            stream: Vec::new(),
            stamp: 0,
            log: vec![Settled { events: BTreeSet::new(), base: 0 }],
            sent: Vec::new(),
            delivered: 0,
            floor: 0,
            worker: Worker::Away,
            reached: Vec::new(),
            inbox: BTreeSet::new(),
            redrive: BTreeSet::new(),
            effects: Vec::new(),
            run: Run::None,
            wrongly_found: false,
            left: (self.cuts, self.stops, self.runs),
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let (cuts, stops, runs) = state.left;
        if !state.committed.contains(&0) {
            actions.push(Action::Commit);
        }
        let as_sent = state.sent.len() == state.stream.len();
        if !as_sent {
            actions.push(Action::GoBack);
        } else if state.next_to_send().is_some() {
            actions.push(Action::Publish);
        } else if state.log.last().is_some_and(|last| last.base < state.stream.len()) {
            actions.push(Action::Settle);
        }
        if cuts > 0 {
            actions.extend((0..state.stream.len()).map(Action::Cut));
        }
        match &state.worker {
            Worker::Away => actions.push(Action::Start),
            Worker::Here { seen, confirmed, queue, .. } => {
                if stops > 0 {
                    actions.push(Action::Stop);
                }
                if !confirmed {
                    actions.push(Action::Confirm);
                } else if *seen < state.delivered {
                    if *seen < state.stream.len() {
                        actions.push(Action::CatchUp);
                    }
                } else if state.delivered < state.stream.len() {
                    actions.push(Action::Deliver);
                }
                if queue.first().is_some_and(|(_, event, _)| !self.holds_back(state, *event)) {
                    actions.push(Action::Handle);
                }
                if !state.redrive.is_empty() {
                    actions.push(Action::HandleRedriven);
                }
                if state.account().is_some_and(|place| state.reached.last() != Some(&place)) {
                    actions.push(Action::Write);
                }
            }
        }
        match &state.run {
            Run::None if runs > 0 => actions.push(Action::Begin),
            Run::None => {}
            Run::Begun { .. } => actions.push(Action::Ask),
            Run::Asked { .. } => actions.push(Action::Read),
            Run::Read { .. } => actions.push(Action::Judge),
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
                let effects: BTreeSet<&u8> = state.effects.iter().collect();
                effects.len() == state.effects.len()
            }),
            Property::always(IN_ORDER, |scope: &Scope, state: &State| {
                let effects = &state.effects;
                let early = |n: usize, event: &u8| {
                    effects[n + 1..].iter().any(|later| scope.key(*later) == scope.key(*event) && later < event)
                };
                !effects.iter().enumerate().any(|(n, event)| early(n, event))
            }),
            Property::always(FOUND_RIGHTLY, |_, state: &State| !state.wrongly_found),
            Property::always(NOTHING_LOST, |scope: &Scope, state: &State| {
                let mut actions = Vec::new();
                scope.actions(state, &mut actions);
                let faults = |action: &Action| matches!(action, Action::Cut(_) | Action::Stop);
                actions.iter().any(|action| !faults(action)) || state.effects.len() == scope.keys.len()
            }),
        ]
    }
}

impl Scope {
    fn key(&self, event: u8) -> u8 {
        self.keys[usize::from(event)]
    }

    fn is(&self, broken: &[Broken]) -> bool {
        self.broken.is_some_and(|this| broken.contains(&this))
    }

    fn holds_back(&self, state: &State, event: u8) -> bool {
        let waits = |row: &u8| self.key(*row) == self.key(event) && !state.redrive.contains(&event);
        !state.inbox.contains(&event) && state.redrive.iter().any(waits)
    }
}

impl State {
    fn next_to_send(&self) -> Option<u8> {
        self.committed.iter().copied().find(|event| !self.sent.contains(event))
    }

    fn witness(&self, sequence: usize) -> Option<Witness> {
        Some((sequence, self.stream.get(sequence.checked_sub(1)?)?.stamp))
    }

    fn stands(&self, witness: Witness) -> bool {
        self.witness(witness.0) == Some(witness)
    }

    /// The newest message at or before which everything is done.
    fn account(&self) -> Option<Witness> {
        let Worker::Here { last, queue, .. } = &self.worker else { return None };
        let last = (*last)?;
        queue.iter().all(|(sequence, ..)| *sequence > last.0).then_some(last)
    }

    fn take_in(&mut self, sequence: usize) {
        let Some(Message { event, stamp }) = self.stream.get(sequence - 1).cloned() else { return };
        let done = self.inbox.contains(&event);
        if let Worker::Here { seen, last, queue, .. } = &mut self.worker {
            *seen = sequence.max(*seen);
            *last = Some((sequence, stamp));
            if !done {
                queue.push((sequence, event, stamp));
            }
        }
    }

    fn start(&mut self, scope: &Scope) {
        let trusts = scope.is(&[Broken::TrustsConsumer]);
        self.reached.retain(|_| !trusts);
        while let Some(newest) = self.reached.last().copied().filter(|place| !self.stands(*place)) {
            self.reached.retain(|place| *place != newest);
        }
        let own = self.reached.last().map_or(0, |place| place.0);
        let from = if trusts { self.floor } else { self.floor.min(own) };
        let last = self.reached.last().copied();
        self.worker = Worker::Here { seen: from, confirmed: true, last, queue: Vec::new() };
        for sequence in from + 1..=self.delivered.min(self.stream.len()) {
            self.take_in(sequence);
        }
        if trusts && let Worker::Here { seen, .. } = &mut self.worker {
            *seen = self.delivered;
        }
    }

    fn effect(&mut self, event: u8) {
        if self.inbox.insert(event) {
            self.effects.push(event);
        }
    }

    fn step(&mut self, scope: &Scope, action: Action) {
        match action {
            Action::Commit => {
                self.committed.extend(0..scope.late);
            }
            Action::Publish => {
                let event = self.next_to_send().unwrap_or_default();
                self.stamp += 1;
                self.stream.push(Message { event, stamp: self.stamp });
                self.sent.push(event);
            }
            Action::Settle => {
                self.log.push(Settled { events: self.sent.iter().copied().collect(), base: self.stream.len() });
            }
            Action::GoBack => {
                self.sent = self.stream.iter().map(|message| message.event).collect();
                let end = self.stream.len();
                self.log.retain(|settled| settled.base <= end);
            }
            Action::Cut(left) => {
                self.left.0 -= 1;
                self.stream.truncate(left);
                if scope.clamps {
                    (self.delivered, self.floor) = (self.delivered.min(left), self.floor.min(left));
                }
                if let Worker::Here { confirmed, .. } = &mut self.worker {
                    *confirmed = false;
                }
            }
            Action::Stop => {
                self.left.1 -= 1;
                self.worker = Worker::Away;
            }
            Action::Start => self.start(scope),
            Action::Confirm => {
                let Worker::Here { confirmed, last, .. } = &mut self.worker else { return };
                let last = *last;
                *confirmed = true;
                if !scope.is(&[Broken::TrustsConsumer]) && last.is_none_or(|last| !self.stands(last)) {
                    self.start(scope);
                }
            }
            Action::CatchUp => {
                let Worker::Here { seen, .. } = &self.worker else { return };
                self.take_in(seen + 1);
            }
            Action::Deliver => {
                self.delivered += 1;
                self.take_in(self.delivered);
            }
            Action::Handle => {
                let Worker::Here { queue, .. } = &mut self.worker else { return };
                let (sequence, event, _) = queue.remove(0);
                if !self.redrive.contains(&event) {
                    self.effect(event);
                }
                self.floor = self.floor.max(sequence.min(self.delivered));
            }
            Action::HandleRedriven => {
                if let Some(event) = self.redrive.pop_first() {
                    self.effect(event);
                }
            }
            Action::Write => self.reached.extend(self.account()),
            Action::Begin | Action::Ask | Action::Read | Action::Judge => self.reconcile(scope),
        }
    }

    /// What the subscriber has passed: the consumer's word counts as far as the stream is what it was.
    fn passed(&self, scope: &Scope) -> usize {
        let floor = self.floor.min(self.stream.len());
        match self.reached.last() {
            Some(newest) if !scope.is(&[Broken::BareSequences]) && !self.stands(*newest) => {
                let last = self.reached.iter().rev().find(|place| self.stands(**place));
                floor.min(last.map_or(0, |place| place.0))
            }
            _ => floor,
        }
    }

    fn reconcile(&mut self, scope: &Scope) {
        let unchanged = |state: &Self, moment: &Option<Witness>| moment.is_none_or(|moment| state.stands(moment));
        let blind = scope.is(&[Broken::BareSequences, Broken::NoMoment]);
        self.run = match self.run.clone() {
            Run::None => {
                self.left.2 -= 1;
                Run::Begun { moment: self.witness(self.stream.len()), floor: self.passed(scope) }
            }
            Run::Begun { moment, floor } => {
                let Settled { events, base } =
                    self.log.last().cloned().unwrap_or(Settled { events: BTreeSet::new(), base: 0 });
                let end = self.witness(self.stream.len());
                // Up to here the stream is read, and has to be the same until the run judges.
                match base <= self.stream.len() && (blind || unchanged(self, &moment)) {
                    true => Run::Asked { moment: end, floor, listed: events, to: base },
                    false => Run::None,
                }
            }
            Run::Asked { moment, floor, listed, to } => {
                let waiting = self.stream.iter().take(to).skip(floor).map(|message| message.event).collect();
                Run::Read { moment, listed, waiting }
            }
            Run::Read { moment, listed, waiting } => {
                if blind || unchanged(self, &moment) {
                    let open = |event: &&u8| {
                        !self.inbox.contains(*event) && !self.redrive.contains(*event) && !waiting.contains(*event)
                    };
                    let missed: BTreeSet<u8> = listed.iter().filter(open).copied().collect();
                    self.send_back(scope, missed);
                }
                Run::None
            }
        };
    }

    fn send_back(&mut self, scope: &Scope, missed: BTreeSet<u8>) {
        for event in &missed {
            let at = self.stream.iter().position(|message| message.event == *event);
            self.wrongly_found |= at.is_none_or(|at| at >= self.delivered);
        }
        let before = |event: &u8| missed.iter().any(|found| scope.key(*found) == scope.key(*event) && event < found);
        let earlier: Vec<u8> = self.committed.iter().filter(|event| before(event)).copied().collect();
        let earlier = earlier.into_iter().filter(|event| !self.inbox.contains(event));
        let earlier: Vec<u8> = earlier.filter(|_| !scope.is(&[Broken::BareSequences])).collect();
        self.redrive.extend(missed.into_iter().chain(earlier));
    }
}
