//! Who works and answers. The row of the work is locked by whoever takes a step, until that transaction ends.

use super::{Action, Broken, Message, Scope, State, Status, Work};

/// What a participant has written down about its work.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Row {
    round: u8,
    /// False: cancelled before it began.
    started: bool,
    /// The next step.
    position: u8,
    /// How many steps it did.
    count: u8,
    ended: bool,
    /// The newest round that was answered as failed.
    failed: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Doing {
    /// Between two transactions.
    Nothing,
    /// A step, from this position, in an open transaction. It holds the row.
    Step { from: u8 },
    /// The step is committed, its position is not written.
    Stepped { next: u8 },
    /// The last attempt has failed and is rolled back.
    Failed,
    /// The answer is in an open transaction, with the row as it will be, if it is changed, and all steps, if they are part of it.
    Answer { status: Option<Status>, row: Option<Row>, steps: bool },
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Hand {
    message: Message,
    doing: Doing,
}

impl Hand {
    fn asked(&self) -> (u8, bool) {
        match self.message {
            Message::Request { round, cancel, .. } => (round, cancel),
            Message::Outcome { .. } => (0, false),
        }
    }

    fn holds_the_row(&self) -> bool {
        matches!(self.doing, Doing::Step { .. } | Doing::Answer { row: Some(_), .. })
    }
}

/// One participant: its database and its hands.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Participant {
    work: Work,
    row: Option<Row>,
    /// How often each step was committed.
    pub(super) effects: Vec<u8>,
    hands: Vec<Option<Hand>>,
}

impl Participant {
    pub(super) fn new(work: Work, hands: usize) -> Self {
        Self { work, row: None, effects: vec![0; usize::from(work.steps)], hands: vec![None; hands] }
    }

    /// Steps that were committed.
    pub(super) fn committed(&self) -> u8 {
        self.effects.iter().sum()
    }

    pub(super) fn actions(&self, scope: &Scope, at: usize, state: &State, actions: &mut Vec<Action>) {
        let mine = |message: &&Message| matches!(message, Message::Request { to, .. } if usize::from(*to) == at);
        // The hands are alike: the first free one takes the message.
        if let Some(free) = self.hands.iter().position(Option::is_none) {
            actions.extend(state.wire.keys().filter(mine).map(|message| Action::Take(at, free, *message)));
        }
        let locked = self.hands.iter().flatten().any(Hand::holds_the_row) && !scope.is(Broken::NoWorkLock);
        for (hand, found) in self.hands.iter().enumerate() {
            let Some(Hand { doing, .. }) = found else { continue };
            match doing {
                Doing::Nothing if !locked => actions.push(Action::Look(at, hand)),
                Doing::Failed if !locked => actions.push(Action::LookAtFailure(at, hand)),
                Doing::Nothing | Doing::Failed => {}
                Doing::Step { .. } => {
                    actions.push(Action::Step(at, hand));
                    if state.left.failures > 0 {
                        actions.push(Action::Fail(at, hand));
                    }
                }
                Doing::Stepped { .. } => actions.push(Action::WritePosition(at, hand)),
                Doing::Answer { .. } => {
                    actions.push(Action::Answer(at, hand, false));
                    if state.left.redeliveries > 0 {
                        actions.push(Action::Answer(at, hand, true));
                    }
                }
            }
        }
        if state.left.crashes > 0 && self.hands.iter().any(Option::is_some) {
            actions.push(Action::Crash(at));
        }
    }

    pub(super) fn take(&mut self, hand: usize, message: Message) {
        self.hands[hand] = Some(Hand { message, doing: Doing::Nothing });
    }

    fn hand(&mut self, hand: usize) -> &mut Hand {
        match &mut self.hands[hand] {
            Some(hand) => hand,
            None => panic!("the hand {hand} is free"),
        }
    }

    /// What there is to do, by the row as it is committed.
    pub(super) fn look(&mut self, scope: &Scope, hand: usize) {
        let (round, cancel) = self.hand(hand).asked();
        let row = self.row.clone();
        self.hand(hand).doing = match row {
            Some(_) if cancel && !scope.is(Broken::CancelAfterStart) => {
                Doing::Answer { status: None, row: None, steps: false }
            }
            _ if cancel => {
                let row = Row { round, started: false, position: 0, count: 0, ended: true, failed: 0 };
                Doing::Answer { status: Some(Status::Cancelled), row: Some(row), steps: false }
            }
            Some(row) if round > row.round && scope.is(Broken::RetryFromStart) => {
                self.row = Some(Row { round, position: 0, ended: false, ..row });
                Doing::Step { from: 0 }
            }
            Some(Row { ended: true, started, .. }) => {
                let status = if started { Status::Done } else { Status::Cancelled };
                Doing::Answer { status: Some(status), row: None, steps: false }
            }
            Some(row) if round <= row.failed && !scope.is(Broken::RoundRunsAgain) => {
                Doing::Answer { status: Some(Status::Failed), row: None, steps: false }
            }
            found => Doing::Step { from: found.map_or(0, |row| row.position) },
        };
    }

    fn begun(&self, round: u8) -> Row {
        let new = Row { round, started: true, position: 0, count: 0, ended: false, failed: 0 };
        self.row.clone().map_or(new, |row| Row { round: row.round.max(round), ..row })
    }

    /// Returns what is sent although the transaction has not committed.
    pub(super) fn step(&mut self, scope: &Scope, at: u8, hand: usize) -> Option<Message> {
        let (round, _) = self.hand(hand).asked();
        let Doing::Step { from } = self.hand(hand).doing else { return None };
        let steps = self.work.steps;
        let row = self.begun(round);
        if !self.work.each_step_commits {
            let row = Row { position: steps, count: row.count + steps, ended: true, ..row };
            let outside = scope.is(Broken::AnswerOutside);
            let count = row.count;
            let status = Some(Status::Done).filter(|_| !outside);
            self.hand(hand).doing = Doing::Answer { status, row: Some(row), steps: true };
            return outside.then_some(Message::Outcome { from: at, round, status: Status::Done, count });
        }
        self.effects[usize::from(from)] += 1;
        let next = from + 1;
        if scope.is(Broken::PositionOutside) {
            self.row = Some(row);
            self.hand(hand).doing = Doing::Stepped { next };
        } else {
            self.row = Some(Row { position: next, count: row.count + 1, ended: next == steps, ..row });
            self.hand(hand).doing = Doing::Nothing;
        }
        None
    }

    pub(super) fn write_position(&mut self, hand: usize) {
        let steps = self.work.steps;
        if let (Doing::Stepped { next }, Some(row)) = (self.hand(hand).doing.clone(), &mut self.row) {
            (row.position, row.count, row.ended) = (next, row.count + 1, next == steps);
        }
        self.hand(hand).doing = Doing::Nothing;
    }

    pub(super) fn fail(&mut self, hand: usize) {
        self.hand(hand).doing = Doing::Failed;
    }

    pub(super) fn look_at_failure(&mut self, scope: &Scope, hand: usize) {
        let (round, _) = self.hand(hand).asked();
        let row = self.begun(round);
        self.hand(hand).doing = match row.ended && !scope.is(Broken::FailureDoesNotLook) {
            true => Doing::Nothing,
            false => {
                let failed = row.failed.max(round);
                Doing::Answer { status: Some(Status::Failed), row: Some(Row { failed, ..row }), steps: false }
            }
        };
    }

    /// Returns the message that is done, and what is sent.
    pub(super) fn answer(&mut self, at: u8, hand: usize) -> (Message, Option<Message>) {
        let (round, _) = self.hand(hand).asked();
        let message = self.hand(hand).message;
        let doing = self.hand(hand).doing.clone();
        self.hands[hand] = None;
        let Doing::Answer { status, row, steps } = doing else { return (message, None) };
        if steps {
            self.effects.iter_mut().for_each(|times| *times += 1);
        }
        if row.is_some() {
            self.row = row;
        }
        let count = match status {
            Some(Status::Cancelled) => 0,
            _ => self.row.as_ref().map_or(0, |row| row.count),
        };
        (message, status.map(|status| Message::Outcome { from: at, round, status, count }))
    }

    /// Returns what comes again.
    pub(super) fn crash(&mut self) -> Vec<Message> {
        self.hands.iter_mut().filter_map(|hand| hand.take().map(|hand| hand.message)).collect()
    }
}
