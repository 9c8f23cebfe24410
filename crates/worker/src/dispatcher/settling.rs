//! What becomes of events that were given to an executor: they are answered, wait, or run again.

use std::collections::HashMap;
use std::time::Instant;

use tokio::task::JoinError;

use super::{Dispatcher, End, HELD};
use crate::doubt;
use crate::loss::Loss;
use crate::progress::EventOutcome;
use crate::scheduler::EventPlace;
use crate::subscriber::{FailurePolicy, MAX_WAIT};
use crate::verdict::{BatchReport, LOGGED, OutageWait, Verdict};
use aftercommit_core::backoff::Backoff;
use aftercommit_core::fault;
use aftercommit_core::jetstream::ack::Answer;
use aftercommit_core::postgres::attempt::Record;
use aftercommit_core::text;
use aftercommit_core::told::Why;

impl Dispatcher {
    /// Takes in the outcome of a batch. Returns why the dispatcher ends, if it does.
    pub(super) fn settle(&mut self, report: Result<(i64, BatchReport), JoinError>) -> Option<End> {
        let report = match report {
            Ok((number, report)) => {
                // The markers of lost sessions must stand until the database was asked about them.
                if report.losses.iter().all(|loss| loss.executor != number) {
                    self.numbers.remove(&number);
                }
                self.executor.progress.notes.ended(number);
                report
            }
            // Handlers' panics are caught in the executor: this is a defect of ours, and its events are still given out.
            Err(error) => return Some(End::Broken(format!("an executor failed: {error}"))),
        };
        self.settle_losses(report.losses, &report.looked_into);
        let mut records: HashMap<EventPlace, Record> = report.records.into_iter().collect();
        for (place, verdict) in report.verdicts {
            if let Some(pending) = self.pending.get_mut(&place) {
                match records.remove(&place) {
                    Some(record) => pending.record = record,
                    None => pending.record.attempts += u32::from(matches!(verdict, Verdict::Failed(_))),
                }
            }
            self.settle_event(place, verdict);
            if let Some(pending) = self.pending.get(&place) {
                self.scheduler.bears(place, doubt::company(&pending.record));
            }
        }
        if report.answered || report.ran.is_some() {
            self.gate.open(&self.executor.subscriber.name);
        }
        if let Some(ran) = report.ran {
            self.pace.ran(ran);
        }
        if let Some(reason) = report.outage {
            self.executor.progress.trouble(&reason);
            self.gate.close(&self.executor.subscriber.name, &reason);
        }
        report.fenced.then_some(End::Fenced)
    }

    fn settle_losses(&mut self, losses: Vec<Loss>, looked_into: &[i64]) {
        self.looking &= looked_into.is_empty() && losses.is_empty();
        looked_into.iter().for_each(|executor| _ = self.numbers.remove(executor));
        self.numbers.extend(losses.iter().map(|loss| loss.executor));
        self.losses.extend(losses);
    }

    fn settle_event(&mut self, place: EventPlace, verdict: Verdict) {
        let Some(pending) = self.pending.get_mut(&place) else { return };
        let (notes, key) =
            (&self.executor.progress.notes, pending.event.as_ref().and_then(|(event, _)| event.key.as_deref()));
        let answer = match verdict {
            Verdict::NotRun => return self.scheduler.put_back(place),
            // The rows go before it as soon as they are known.
            Verdict::Held => {
                self.redrives.look_now();
                return self.scheduler.hold(place, Instant::now() + HELD);
            }
            Verdict::Interrupted { reason, wait } => {
                self.interrupted += usize::from(pending.interruptions == 0);
                self.executor.progress.count(EventOutcome::Interrupted);
                self.executor
                    .progress
                    .trouble_with("a service that the handler needs is not available", Some(reason.clone()));
                pending.interruptions += 1;
                // The first one and then ever more rarely.
                if pending.interruptions.is_power_of_two() {
                    tracing::warn!(
                        subscriber = self.executor.subscriber.name,
                        event_id = %pending.id,
                        ?place,
                        times = pending.interruptions,
                        error = text::cut(&reason, LOGGED),
                        "a service that the handler needs is not available, waiting"
                    );
                }
                let wait = match wait {
                    OutageWait::Soon => Backoff::RECONNECT.after(pending.interruptions),
                    OutageWait::Exactly(wait) => wait,
                };
                let wait = wait.min(MAX_WAIT);
                notes.waits(pending.id, key, Why::Unavailable, Some(&reason), pending.interruptions, wait);
                return self.scheduler.hold(place, Instant::now() + wait);
            }
            Verdict::Suspect(wait) => return self.scheduler.hold(place, Instant::now() + wait),
            Verdict::Failed(wait) | Verdict::Later(wait) => {
                pending.alive = false;

                let wait = wait.min(MAX_WAIT);
                let until = Instant::now() + wait;
                let why = if matches!(verdict, Verdict::Failed(_)) { Why::Failing } else { Why::Snoozed };
                notes.waits(pending.id, key, why, None, 0, wait);
                match (&verdict, self.executor.subscriber.settings.failure_policy) {
                    (Verdict::Failed(_), FailurePolicy::Skip) => self.scheduler.skip(place, until),
                    _ => self.scheduler.hold(place, until),
                }
                Answer::Later(wait)
            }
            Verdict::Done => Answer::Done,
            Verdict::Dead(reason) => Answer::Never(reason),
        };
        self.interrupted -= usize::from(pending.interruptions > 0);
        pending.interruptions = 0;
        self.executor.progress.settled();
        if let Some(reply) = &pending.reply {
            self.answers.send(reply, &answer);
        }
        fault::point("worker-answered");
        if !matches!(answer, Answer::Later(_)) {
            notes.done(pending.id);
            self.scheduler.done(place);
            self.pending.remove(&place);
            match place {
                EventPlace::Redrive(_) => self.redrives.done(),
                EventPlace::Stream(sequence) => self.account.done(sequence),
            }
        }
    }
}
