//! The end of a dispatcher: what does not run goes back, what runs may finish.

use std::time::Duration;

use super::{Dispatcher, End};
use crate::executor::Executor;
use aftercommit_core::jetstream::ack::Answer;
use aftercommit_core::postgres::running;

impl Dispatcher {
    /// Lets others have what does not run, and writes down that what runs is the last of this dispatcher.
    pub(super) async fn give_back(&mut self) {
        if !self.executors.is_empty() {
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
            self.executors.shutdown().await;
            return end;
        }
        let waits = end == End::Stopped && !self.executors.is_empty();
        while let Some(report) = self.executors.join_next().await {
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

    /// Writes down that what runs is the last of this dispatcher, or that it has ended. Whoever stops a process kills it when
    /// that takes too long, and no event is to blame then.
    async fn tell_stopping(&mut self, stopping: bool) {
        let Executor { connections, tenure, subscriber, .. } = &self.executor;
        let told = connections.run(async |connection| match stopping {
            true => running::stopping(connection, tenure, &subscriber.name).await,
            false => running::stopped(connection, tenure, &subscriber.name).await,
        });
        if let Ok(Err(error)) = tokio::time::timeout(Duration::from_secs(1), told).await {
            tracing::debug!(subscriber = subscriber.name, error = %error, "it was not recorded that this instance stops");
        }
    }
}
