//! What JetStream and the database say of a subscriber.

use aftercommit_core::jetstream::consumer::Load;
use aftercommit_core::postgres::status::Counts;

/// What was seen of one subscriber; in words where it could not be seen.
#[derive(Debug, Clone)]
pub(super) struct Sample {
    pub(super) consumer: Result<Option<Load>, String>,
    pub(super) tables: Result<Counts, String>,
}

impl Default for Sample {
    fn default() -> Self {
        Self {
            consumer: Err("its consumer was not looked at yet".into()),
            tables: Err("its tables were not looked at yet".into()),
        }
    }
}

impl Sample {
    /// Events that JetStream has not delivered yet, among them those that it shall deliver again now.
    pub(super) fn pending(&self) -> Option<u64> {
        self.consumer().map(|load| load.pending)
    }

    /// Events that were delivered and not answered.
    pub(super) fn in_flight(&self) -> Option<u64> {
        self.consumer().map(|load| load.in_flight)
    }

    /// Events with failed attempts that are still to be retried.
    pub(super) fn failing(&self) -> Option<u64> {
        self.tables().map(|counts| counts.failing)
    }

    pub(super) fn dead_letters(&self) -> Option<u64> {
        self.tables().map(|counts| counts.dead_letters)
    }

    /// Events that an operator has redriven.
    pub(super) fn redrive(&self) -> Option<u64> {
        self.tables().map(|counts| counts.redrive)
    }

    fn consumer(&self) -> Option<&Load> {
        self.consumer.as_ref().ok().and_then(Option::as_ref)
    }

    fn tables(&self) -> Option<&Counts> {
        self.tables.as_ref().ok()
    }

    /// What keeps events from coming.
    pub(super) fn obstacles(&self) -> impl Iterator<Item = String> {
        [self.consumer_obstacle(), self.tables.as_ref().err().cloned()].into_iter().flatten()
    }

    fn consumer_obstacle(&self) -> Option<String> {
        match &self.consumer {
            Err(problem) => Some(problem.clone()),
            Ok(None) => Some("its consumer does not exist".into()),
            Ok(Some(load)) if load.paused => {
                Some("its consumer is paused in JetStream (`nats consumer resume`)".into())
            }
            Ok(Some(load)) if load.full => {
                Some("JetStream delivers no more until some of the events without an ack are done".into())
            }
            Ok(Some(_)) => None,
        }
    }
}
