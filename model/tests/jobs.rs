//! The protocol of jobs holds within these scopes, and without any one of its parts it does not.
//! With `AFTERCOMMIT_MODEL=long` a larger scope is checked too.

mod search;

use aftercommit_model::jobs::{
    Broken, CANCEL_HIDES_NOTHING, ENDS_ONCE, Faults, NOTHING_LOST, ONCE, Scope, TRUE_ANSWERS, Work,
};
use search::holds;
use stateright::{Checker, HasDiscoveries, Model};

const STEPS: Work = Work { steps: 2, each_step_commits: true };
const AT_ONCE: Work = Work { steps: 1, each_step_commits: false };

const ALL: Faults = Faults { crashes: 1, redeliveries: 1, failures: 2, overdue: 1, retries: 2, cancels: 1 };

/// One participant whose steps each commit, with two hands.
fn steps() -> Scope {
    Scope { participants: vec![STEPS], hands: 2, coordinators: 1, faults: ALL, broken: None }
}

/// One participant that works and answers in one transaction, with two hands.
fn at_once() -> Scope {
    Scope { participants: vec![AT_ONCE], ..steps() }
}

/// Two participants, and two hands that count.
fn two() -> Scope {
    let faults = Faults { failures: 1, retries: 1, overdue: 0, ..ALL };
    Scope { participants: vec![AT_ONCE, AT_ONCE], hands: 1, coordinators: 2, faults, broken: None }
}

fn is_caught(broken: Broken, mut scope: Scope, property: &'static str) {
    scope.broken = Some(broken);
    let checker = scope.checker().finish_when(HasDiscoveries::AnyOf([property].into())).spawn_bfs().join();
    let path = checker.discovery(property).unwrap_or_else(|| panic!("{broken:?} was not caught"));
    println!("{broken:?}: caught in {:?}", path.into_actions());
}

#[test]
fn the_protocol_holds() {
    holds("steps", steps());
    holds("at once", at_once());
    holds("two participants", two());
    if std::env::var("AFTERCOMMIT_MODEL").is_ok_and(|size| size == "long") {
        holds("more faults", Scope { faults: Faults { crashes: 2, redeliveries: 2, ..ALL }, ..steps() });
        holds("two participants, overdue", Scope { faults: Faults { overdue: 1, ..two().faults }, ..two() });
        holds("three participants", Scope { participants: vec![AT_ONCE; 3], ..two() });
    }
}

#[test]
fn an_answer_outside_the_transaction_tells_what_is_rolled_back() {
    is_caught(Broken::AnswerOutside, at_once(), TRUE_ANSWERS);
}

#[test]
fn a_position_outside_the_transaction_does_a_step_twice() {
    is_caught(Broken::PositionOutside, steps(), ONCE);
}

#[test]
fn steps_that_lock_nothing_are_done_twice() {
    is_caught(Broken::NoWorkLock, steps(), ONCE);
}

#[test]
fn a_retry_from_the_start_does_steps_twice() {
    is_caught(Broken::RetryFromStart, steps(), ONCE);
}

#[test]
fn a_failed_round_that_runs_again_does_what_nobody_counts() {
    is_caught(Broken::RoundRunsAgain, steps(), TRUE_ANSWERS);
}

#[test]
fn a_failure_that_does_not_look_hides_work_that_is_done() {
    is_caught(Broken::FailureDoesNotLook, steps(), TRUE_ANSWERS);
}

#[test]
fn a_cancel_after_the_start_hides_what_was_done() {
    is_caught(Broken::CancelAfterStart, steps(), CANCEL_HIDES_NOTHING);
}

#[test]
fn counting_messages_ends_a_job_too_early() {
    is_caught(Broken::CountsMessages, two(), ENDS_ONCE);
}

#[test]
fn an_answer_of_an_earlier_round_is_not_true_any_more() {
    is_caught(Broken::AnyRound, steps(), TRUE_ANSWERS);
}

#[test]
fn of_two_last_answers_neither_ends_the_job_without_the_lock() {
    is_caught(Broken::NoJobLock, two(), NOTHING_LOST);
}

#[test]
fn an_end_told_behind_the_commit_is_told_never() {
    is_caught(Broken::EndOutside, two(), ENDS_ONCE);
}
