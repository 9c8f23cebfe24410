//! The end of a session: what does not run goes back, what runs may finish.

use std::time::Duration;

use super::{End, Session};
use crate::executor::Lane;
use aftercommit_core::jetstream::ack::Answer;
use aftercommit_core::postgres::running;

impl Session {
    /// Lets others have what does not run, and writes down that what runs is the last of this session.
    pub(super) async fn give_back(&mut self) {
        if !self.lanes.is_empty() {
            self.tell_stopping(true).await;
        }
        let waiting = self.pending.iter_mut().filter(|(place, _)| !self.scheduler.runs(**place));
        for reply in waiting.filter_map(|(_, pending)| pending.reply.take()) {
            self.answers.send(&reply, &Answer::Again);
        }
        self.account.close(Duration::from_secs(1)).await;
    }

    /// Ends in an orderly way: what runs may finish.
    pub async fn finish(mut self, end: End) -> End {
        if end == End::Fenced {
            // The successor waits for the locks of what still runs here.
            self.lanes.shutdown().await;
            return end;
        }
        let waits = end == End::Stopped && !self.lanes.is_empty();
        while let Some(report) = self.lanes.join_next().await {
            if end == End::Stopped {
                self.settle(report);
            }
        }
        if waits {
            self.tell_stopping(false).await;
        }
        if end == End::Stopped {
            for reply in self.pending.values().filter_map(|pending| pending.reply.as_ref()) {
                self.answers.send(reply, &Answer::Again);
            }
            self.answers.finish(Duration::from_secs(2)).await;
        }
        end
    }

    /// Writes down that what runs is the last of this session, or that it has ended. Whoever stops a process kills it when
    /// that takes too long, and no event is to blame then.
    async fn tell_stopping(&mut self, stopping: bool) {
        let Lane { connections, tenure, subscriber, .. } = &self.lane;
        let told = connections.run(async |connection| match stopping {
            true => running::stopping(connection, tenure, &subscriber.name).await,
            false => running::stopped(connection, tenure, &subscriber.name).await,
        });
        if let Ok(Err(error)) = tokio::time::timeout(Duration::from_secs(1), told).await {
            tracing::debug!(subscriber = subscriber.name, error = %error, "that it stops is not on record");
        }
    }
}
