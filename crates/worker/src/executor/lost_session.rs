//! Asks the database about sessions that were lost while events ran: was it an outage, or is one of the events at fault?

use std::time::Duration;

use tokio::time::timeout;
use uuid::Uuid;

use aftercommit_core::postgres::attempt::{self, Judged, Lost};
use aftercommit_core::postgres::running::{self, Marker};

use super::{Executor, SILENT};
use crate::loss::Loss;
use crate::scheduler::EventPlace;
use crate::verdict::{BatchReport, Halt, Verdict};

/// How long the database may take to say what it knows of a loss.
const PROBE: Duration = Duration::from_secs(15);

impl Executor {
    /// Asks the database about losses that it could not be asked about at once. When it answers, the outage is over.
    pub(crate) async fn look_into(self, losses: Vec<Loss>) -> BatchReport {
        let mut report = BatchReport::default();
        let mut losses = losses.into_iter();
        for loss in losses.by_ref() {
            let result = self.find_out(loss, &mut report).await;
            if result.is_err() {
                report.halted(result);
                break;
            }
        }
        report.losses.extend(losses);
        report
    }

    /// Asks the database what a loss means. While it does not answer it is an outage, and the loss is kept.
    pub(super) async fn find_out(&self, loss: Loss, report: &mut BatchReport) -> Result<(), Halt> {
        self.connections.forget_idle();
        let judged = match self.judge(&loss).await {
            Ok(Some(judged)) => judged,
            Ok(None) => return Err(Halt::Fenced),
            Err(_) => {
                let reason = loss.reason.clone();
                report.losses.push(loss);
                return Err(Halt::Outage(reason));
            }
        };
        report.answered = true;
        for (place, id, _) in &loss.events {
            let verdict = judged.iter().find(|(judged, _)| judged == id).map(|(_, verdict)| verdict);
            let verdict = self.sentence(*place, *id, verdict.unwrap_or(&Judged::Spared), &loss.reason, report);
            report.verdicts.push((*place, verdict));
        }
        // What the lost session has not let go of is left to the next batch of that executor.
        let marker = Marker { lane: loss.executor, ..self.marker() };
        let cleared = self.connections.run(async |connection| running::clear(connection, marker).await);
        if let Err(error) = self.own(cleared).await {
            tracing::debug!(
                subscriber = self.subscriber.name,
                error,
                "the marker of a batch that has ended was not removed"
            );
        }
        report.looked_into.push(loss.executor);
        Ok(())
    }

    async fn judge(&self, loss: &Loss) -> Result<Option<Vec<(Uuid, Judged)>>, String> {
        let events: Vec<Uuid> = loss.events.iter().map(|(_, id, _)| *id).collect();
        let failures = loss.events.iter().map(|(.., failures)| *failures).max().unwrap_or(0);
        let lost = Lost {
            subscriber: &self.subscriber.name,
            lane: loss.executor,
            events: &events,
            alone: events.len() == 1,
            server: &loss.server,
            reason: &loss.reason,
            wait: self.subscriber.settings.backoff.after(failures + 1),
        };
        let judged = self.connections.run(async |connection| attempt::judge(connection, &self.tenure, &lost).await);
        match timeout(PROBE, self.own(judged)).await {
            Ok(judged) => judged,
            Err(_) => Err(SILENT.into()),
        }
    }

    fn sentence(
        &self,
        place: EventPlace,
        id: Uuid,
        judged: &Judged,
        reason: &str,
        report: &mut BatchReport,
    ) -> Verdict {
        let backoff = &self.subscriber.settings.backoff;
        let (record, verdict) = match judged {
            Judged::Done => return Verdict::Done,
            Judged::Spared => return Verdict::NotRun,
            // After a crash others get their turn first.
            Judged::Suspect(record) => {
                let crashes = record.crashes + record.database_crashes;
                (record, Verdict::Suspect(if crashes > 1 { backoff.after(crashes - 1) } else { Duration::ZERO }))
            }
            Judged::Failed(record) => (record, Verdict::Failed(backoff.after(record.attempts))),
        };
        tracing::warn!(
            subscriber = self.subscriber.name,
            event_id = %id,
            attempt = record.attempts,
            sessions_lost = record.sessions_lost,
            database_crashes = record.database_crashes,
            error = reason,
            "the database session was lost while an event ran"
        );
        report.records.push((place, record.clone()));
        verdict
    }
}
