//! From a request to one end: participants that work and answer, a coordinator that counts, an operator who asks anew and cancels.
//!
//! Messages come in any order and more than once, which is more than streams and inboxes allow. Each participant is one database with
//! several hands in it: instances that both believe to be active, and the message that asks beside the one that cancels.

mod coordinator;
mod participant;

use std::collections::BTreeMap;

use stateright::{Model, Property};

use coordinator::Coordinator;
pub use coordinator::Told;
use participant::Participant;

/// What is checked.
#[derive(Debug, Clone)]
pub struct Scope {
    /// The participants.
    pub participants: Vec<Work>,
    /// Hands of each participant.
    pub hands: usize,
    /// Hands of the coordinator.
    pub coordinators: usize,
    /// How often what may happen.
    pub faults: Faults,
    /// What of the protocol is left out.
    pub broken: Option<Broken>,
}

/// What a participant has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Work {
    /// So many steps.
    pub steps: u8,
    /// Each step commits by itself; otherwise all of them commit with the answer.
    pub each_step_commits: bool,
}

/// How often each thing may happen that need not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Faults {
    /// A participant's or the coordinator's process dies.
    pub crashes: u8,
    /// A message is handled, and comes again at any later time.
    pub redeliveries: u8,
    /// The last attempt at a step fails.
    pub failures: u8,
    /// Whoever has not answered is asked once more.
    pub overdue: u8,
    /// An operator asks those anew that failed.
    pub retries: u8,
    /// An operator cancels.
    pub cancels: u8,
}

/// A protocol without one of its parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Broken {
    /// The answer goes out before the work is committed.
    AnswerOutside,
    /// The position of the work is written behind the commit of the step.
    PositionOutside,
    /// Steps do not lock the row of the work.
    NoWorkLock,
    /// Who is asked anew begins from the start.
    RetryFromStart,
    /// A round that was answered as failed is run again when its message comes again.
    RoundRunsAgain,
    /// Who fails does not look whether the work was done meanwhile.
    FailureDoesNotLook,
    /// Who is asked not to begin does not look whether it has.
    CancelAfterStart,
    /// The coordinator counts the messages that it gets.
    CountsMessages,
    /// The coordinator takes answers of earlier rounds.
    AnyRound,
    /// The coordinator does not lock the job.
    NoJobLock,
    /// The end is told behind the commit of the last answer.
    EndOutside,
}

/// How a participant has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Status {
    /// It has done all of its work.
    Done,
    /// The last attempt failed.
    Failed,
    /// It did not begin.
    Cancelled,
}

/// On the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Message {
    /// Asks a participant, or asks it not to begin.
    Request {
        /// Whom.
        to: u8,
        /// Which time.
        round: u8,
        /// Not to begin.
        cancel: bool,
    },
    /// A participant's answer.
    Outcome {
        /// Whose.
        from: u8,
        /// Which time it was asked.
        round: u8,
        /// How it ended.
        status: Status,
        /// How many steps it did.
        count: u8,
    },
}

/// All of it at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct State {
    /// Each message with how often it waits.
    wire: BTreeMap<Message, u8>,
    participants: Vec<Participant>,
    coordinator: Coordinator,
    left: Faults,
}

/// What happens next; the first number is the participant, the second its hand, or the coordinator's hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// A message reaches a participant.
    Take(usize, usize, Message),
    /// It locks the row of the work, and begins a step or sees what there is to answer.
    Look(usize, usize),
    /// It commits the step, or has done all of them in the transaction of its answer.
    Step(usize, usize),
    /// It writes down where the next step begins, where that is not part of the step.
    WritePosition(usize, usize),
    /// The last attempt at the step fails.
    Fail(usize, usize),
    /// It locks the row to answer that it failed.
    LookAtFailure(usize, usize),
    /// It commits the answer; the message is done, or comes again.
    Answer(usize, usize, bool),
    /// Its process dies.
    Crash(usize),
    /// An answer reaches the coordinator, which opens a transaction.
    Count(usize, Message),
    /// The transaction commits; the message is done, or comes again.
    CloseCount(usize, bool),
    /// It tells the end, where that is not part of the transaction.
    TellEnd(usize),
    /// Its process dies.
    CrashCoordinator,
    /// Whoever has not answered is asked once more, in the same round.
    AskOverdue,
    /// Those that failed are asked in a new round.
    Retry,
    /// Those that have not answered are asked not to begin.
    Cancel,
}

impl Action {
    fn is_progress(self) -> bool {
        !matches!(
            self,
            Self::Fail(..)
                | Self::Answer(_, _, true)
                | Self::CloseCount(_, true)
                | Self::Crash(_)
                | Self::CrashCoordinator
                | Self::AskOverdue
                | Self::Retry
                | Self::Cancel
        )
    }
}

/// No step of a participant is done twice, in whatever rounds it is asked.
pub const ONCE: &str = "no step is done twice";
/// What the requester has written down about a participant is what is committed there.
pub const TRUE_ANSWERS: &str = "what is written down is what is committed";
/// Who is called cancelled has done nothing and never will.
pub const CANCEL_HIDES_NOTHING: &str = "who is cancelled has done nothing";
/// The end is told once for each time that the last one answered, with the totals of what is committed.
pub const ENDS_ONCE: &str = "the end is told once, with what is committed";
/// When nothing is left to do, everybody has answered and the end is told.
pub const NOTHING_LOST: &str = "the job ends";

impl Model for Scope {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let count = self.participants.len();
        let asked = (0..).take(count).map(|to| (Message::Request { to, round: 1, cancel: false }, 1));
        vec![State {
            wire: asked.collect(),
            participants: self.participants.iter().map(|work| Participant::new(*work, self.hands)).collect(),
            coordinator: Coordinator::new(count, self.coordinators),
            left: self.faults,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for (at, participant) in state.participants.iter().enumerate() {
            participant.actions(self, at, state, actions);
        }
        state.coordinator.actions(self, state, actions);
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut next = last.clone();
        next.step(self, action);
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(ONCE, |_, state: &State| {
                state.participants.iter().all(|participant| participant.effects.iter().all(|times| *times <= 1))
            }),
            Property::always(TRUE_ANSWERS, |_, state: &State| {
                let written = state.coordinator.answers.iter().zip(&state.participants);
                written.filter_map(|(answer, participant)| Some((answer.status?, answer.count, participant))).all(
                    |(status, count, participant)| {
                        let done = participant.effects.iter().all(|times| *times > 0);
                        count == participant.committed() && done == (status == Status::Done)
                    },
                )
            }),
            Property::always(CANCEL_HIDES_NOTHING, |_, state: &State| {
                let written = state.coordinator.answers.iter().zip(&state.participants);
                let mut cancelled = written.filter(|(answer, _)| answer.status == Some(Status::Cancelled));
                cancelled.all(|(_, participant)| participant.committed() == 0)
            }),
            Property::always(ENDS_ONCE, |scope: &Scope, state: &State| {
                let coordinator = &state.coordinator;
                let open = coordinator.is_running();
                // Without a transaction of both, the end is told a moment later.
                let late = scope.broken == Some(Broken::EndOutside) && coordinator.has_to_tell();
                let expected = coordinator.reopened + u8::from(!open && !late);
                let total: u8 = state.participants.iter().map(Participant::committed).sum();
                let last = coordinator.told.last();
                coordinator.told.len() == usize::from(expected)
                    && (open || late || last.is_some_and(|told| told.total == total))
            }),
            Property::always(NOTHING_LOST, |scope: &Scope, state: &State| {
                let mut actions = Vec::new();
                scope.actions(state, &mut actions);
                let coordinator = &state.coordinator;
                actions.into_iter().any(Action::is_progress)
                    || (!coordinator.is_running() && coordinator.answers.iter().all(|answer| answer.status.is_some()))
            }),
        ]
    }
}

impl Scope {
    fn is(&self, broken: Broken) -> bool {
        self.broken == Some(broken)
    }
}

impl State {
    fn send(&mut self, message: Message) {
        *self.wire.entry(message).or_default() += 1;
    }

    /// Takes a message off the wire.
    fn take(&mut self, message: Message) {
        if let Some(count) = self.wire.get_mut(&message) {
            *count -= 1;
        }
        self.wire.retain(|_, count| *count > 0);
    }

    fn step(&mut self, scope: &Scope, action: Action) {
        match action {
            Action::Take(at, hand, message) => {
                self.take(message);
                self.participants[at].take(hand, message);
            }
            Action::Look(at, hand) => self.participants[at].look(scope, hand),
            Action::Step(at, hand) => {
                let sent = self.participants[at].step(scope, at as u8, hand);
                sent.into_iter().for_each(|message| self.send(message));
            }
            Action::WritePosition(at, hand) => self.participants[at].write_position(hand),
            Action::Fail(at, hand) => {
                self.left.failures -= 1;
                self.participants[at].fail(hand);
            }
            Action::LookAtFailure(at, hand) => self.participants[at].look_at_failure(scope, hand),
            Action::Answer(at, hand, again) => {
                let (message, answer) = self.participants[at].answer(at as u8, hand);
                answer.into_iter().for_each(|answer| self.send(answer));
                if again {
                    self.left.redeliveries -= 1;
                    self.send(message);
                }
            }
            Action::Crash(at) => {
                self.left.crashes -= 1;
                let unacked = self.participants[at].crash();
                unacked.into_iter().for_each(|message| self.send(message));
            }
            Action::Count(hand, message) => {
                self.take(message);
                self.coordinator.open(hand, message);
            }
            Action::CloseCount(hand, again) => {
                let message = self.coordinator.close(scope, hand);
                if again {
                    self.left.redeliveries -= 1;
                    message.into_iter().for_each(|message| self.send(message));
                }
            }
            Action::TellEnd(hand) => self.coordinator.tell_end(hand),
            Action::CrashCoordinator => {
                self.left.crashes -= 1;
                let unacked = self.coordinator.crash();
                unacked.into_iter().for_each(|message| self.send(message));
            }
            Action::AskOverdue => {
                self.left.overdue -= 1;
                let asked = self.coordinator.asked(false);
                asked.into_iter().for_each(|message| self.send(message));
            }
            Action::Retry => {
                self.left.retries -= 1;
                let asked = self.coordinator.retry();
                asked.into_iter().for_each(|message| self.send(message));
            }
            Action::Cancel => {
                self.left.cancels -= 1;
                let asked = self.coordinator.asked(true);
                asked.into_iter().for_each(|message| self.send(message));
            }
        }
    }
}
