//! Who counts answers and tells the end, and the operator, whose transactions lock the job, too.

use super::{Action, Broken, Message, Scope, State, Status};

/// What is written down about a participant.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Answer {
    round: u8,
    /// None while it has not answered.
    pub(super) status: Option<Status>,
    pub(super) count: u8,
}

/// The end, as it is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Told {
    /// Steps of all participants together.
    pub total: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Hand {
    Free,
    /// A transaction that has read the other answers.
    Open {
        message: Message,
        others: Vec<Answer>,
    },
    /// The last answer is committed, the end is not told.
    ToTell {
        total: u8,
    },
}

/// The requester's database and the coordinator's hands.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Coordinator {
    pub(super) answers: Vec<Answer>,
    running: bool,
    /// How often a job that had ended was asked anew.
    pub(super) reopened: u8,
    pub(super) told: Vec<Told>,
    /// Messages that were counted, where messages are counted.
    heard: u8,
    hands: Vec<Hand>,
}

impl Coordinator {
    pub(super) fn new(participants: usize, hands: usize) -> Self {
        Self {
            answers: vec![Answer { round: 1, status: None, count: 0 }; participants],
            running: true,
            reopened: 0,
            told: Vec::new(),
            heard: 0,
            hands: vec![Hand::Free; hands],
        }
    }

    pub(super) fn is_running(&self) -> bool {
        self.running
    }

    pub(super) fn has_to_tell(&self) -> bool {
        self.hands.iter().any(|hand| matches!(hand, Hand::ToTell { .. }))
    }

    pub(super) fn actions(&self, scope: &Scope, state: &State, actions: &mut Vec<Action>) {
        let left = &state.left;
        let open: Vec<u8> = self.hands.iter().filter_map(Hand::about).collect();
        if let Some(free) = self.hands.iter().position(|hand| *hand == Hand::Free) {
            for message in state.wire.keys() {
                let Message::Outcome { from, .. } = message else { continue };
                // Without the lock of the job, a participant's row still is one.
                let waits = if scope.is(Broken::NoJobLock) { open.contains(from) } else { !open.is_empty() };
                if !waits {
                    actions.push(Action::Count(free, *message));
                }
            }
        }
        for (at, hand) in self.hands.iter().enumerate() {
            match hand {
                Hand::Free => {}
                Hand::Open { .. } => {
                    actions.push(Action::CloseCount(at, false));
                    if left.redeliveries > 0 {
                        actions.push(Action::CloseCount(at, true));
                    }
                }
                Hand::ToTell { .. } => actions.push(Action::TellEnd(at)),
            }
        }
        if left.crashes > 0 && self.hands.iter().any(|hand| *hand != Hand::Free) {
            actions.push(Action::CrashCoordinator);
        }
        if !open.is_empty() {
            return;
        }
        let is = |status| self.answers.iter().any(|answer| answer.status == status);
        if left.overdue > 0 && self.running && is(None) {
            actions.push(Action::AskOverdue);
        }
        if left.cancels > 0 && self.running && is(None) {
            actions.push(Action::Cancel);
        }
        if left.retries > 0 && is(Some(Status::Failed)) {
            actions.push(Action::Retry);
        }
    }

    pub(super) fn open(&mut self, hand: usize, message: Message) {
        self.hands[hand] = Hand::Open { message, others: self.answers.clone() };
    }

    /// Returns the message that is done.
    pub(super) fn close(&mut self, scope: &Scope, hand: usize) -> Option<Message> {
        let Hand::Open { message, mut others } = std::mem::replace(&mut self.hands[hand], Hand::Free) else {
            return None;
        };
        let Message::Outcome { from, round, status, count } = message else { return Some(message) };
        let mine = &mut self.answers[usize::from(from)];
        let last = if scope.is(Broken::CountsMessages) {
            *mine = Answer { status: Some(status), count: mine.count + count, ..*mine };
            self.heard += 1;
            usize::from(self.heard) == self.answers.len()
        } else if mine.status.is_none() && (mine.round == round || scope.is(Broken::AnyRound)) {
            *mine = Answer { status: Some(status), count, ..*mine };
            // What was read before, with its own answer.
            others[usize::from(from)] = mine.clone();
            others.iter().all(|answer| answer.status.is_some())
        } else {
            return Some(message);
        };
        if last {
            self.running = false;
            self.heard = 0;
            let total = self.answers.iter().map(|answer| answer.count).sum();
            match scope.is(Broken::EndOutside) {
                true => self.hands[hand] = Hand::ToTell { total },
                false => self.told.push(Told { total }),
            }
        }
        Some(message)
    }

    pub(super) fn tell_end(&mut self, hand: usize) {
        if let Hand::ToTell { total } = std::mem::replace(&mut self.hands[hand], Hand::Free) {
            self.told.push(Told { total });
        }
    }

    /// Returns what comes again.
    pub(super) fn crash(&mut self) -> Vec<Message> {
        let all = self.hands.iter_mut().map(|hand| std::mem::replace(hand, Hand::Free));
        all.filter_map(|hand| match hand {
            Hand::Open { message, .. } => Some(message),
            Hand::Free | Hand::ToTell { .. } => None,
        })
        .collect()
    }

    /// Whoever has not answered, asked in the same round to work or not to begin.
    pub(super) fn asked(&self, cancel: bool) -> Vec<Message> {
        let all = (0..).zip(&self.answers).filter(|(_, answer)| answer.status.is_none());
        all.map(|(to, answer)| Message::Request { to, round: answer.round, cancel }).collect()
    }

    /// Those that failed, asked in a new round.
    pub(super) fn retry(&mut self) -> Vec<Message> {
        let mut asked = Vec::new();
        for (to, answer) in (0..).zip(&mut self.answers) {
            if answer.status == Some(Status::Failed) {
                (answer.round, answer.status) = (answer.round + 1, None);
                asked.push(Message::Request { to, round: answer.round, cancel: false });
            }
        }
        self.reopened += u8::from(!self.running);
        self.running = true;
        asked
    }
}

impl Hand {
    /// Whose answer an open transaction is about.
    fn about(&self) -> Option<u8> {
        match self {
            Self::Open { message: Message::Outcome { from, .. }, .. } => Some(*from),
            _ => None,
        }
    }
}
