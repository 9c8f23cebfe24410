//! Events that still run at an instance that has handed over: it lets what runs finish, and its successor works meanwhile.
//!
//! The inbox would keep them from running twice, but whoever enters one waits for the other transaction, with all that is
//! in the same batch. So they wait here, with their keys, until they have ended there.
//!
//! The session of a process that has died looks like that, too, until the server notices that its client is gone. What is left
//! behind then counts as a crash, as if it had been found at the take-over.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use crate::event::EventId;
use crate::postgres::attempt::{self, Record};
use crate::postgres::connections::Connections;
use crate::postgres::lease::Tenure;
use crate::postgres::running;

/// How often is looked whether they have ended.
pub(super) const LOOK: Duration = Duration::from_millis(250);

/// What was seen at the last look.
#[derive(Default)]
struct Seen {
    /// The events that run elsewhere.
    running: HashSet<Uuid>,
    /// What is on record of those whose process has died since.
    died: HashMap<Uuid, Record>,
}

/// The events that ran elsewhere when this session began.
pub(super) struct Elsewhere {
    seen: watch::Receiver<Seen>,
    _looking: Option<AbortOnDropHandle<()>>,
}

impl Elsewhere {
    /// Looks again and again until nothing of what earlier tenures ran at the begin does any more.
    pub(super) fn new(events: Vec<Uuid>, connections: &Arc<Connections>, tenure: &Arc<Tenure>, name: &str) -> Self {
        if !events.is_empty() {
            tracing::info!(
                subscriber = name,
                events = events.len(),
                "a predecessor still runs events, their keys wait"
            );
        }
        let looks = !events.is_empty();
        let (tell, seen) = watch::channel(Seen { running: events.into_iter().collect(), ..Seen::default() });
        let looking = looks.then(|| {
            let look = look(Arc::clone(connections), Arc::clone(tenure), name.to_string(), tell);
            AbortOnDropHandle::new(tokio::spawn(look))
        });
        Self { seen, _looking: looking }
    }

    /// Whether an event must wait for its end there.
    pub(super) fn runs(&self, event: EventId) -> bool {
        self.seen.borrow().running.contains(&event.as_uuid())
    }

    /// What is on record now of an event that ran there, if its process has died.
    pub(super) fn died(&self, event: EventId) -> Option<Record> {
        self.seen.borrow().died.get(&event.as_uuid()).cloned()
    }
}

async fn look(connections: Arc<Connections>, tenure: Arc<Tenure>, subscriber: String, tell: watch::Sender<Seen>) {
    while !tell.borrow().running.is_empty() {
        tokio::time::sleep(LOOK).await;
        let looked = connections.run(async |connection| {
            // First what has ended: of what is left behind the take-over makes crashes, and the rest still runs.
            let died = running::take_over(connection, &tenure, &subscriber).await?;
            let running = running::elsewhere(connection, &tenure, &subscriber).await?;
            let died: Vec<Uuid> = died.into_iter().map(|(event, _)| event).collect();
            Ok((running, attempt::records(connection, &subscriber, &died).await?))
        });
        match looked.await {
            Ok((running, died)) => tell.send_modify(|seen| {
                let running: HashSet<Uuid> = running.into_iter().collect();
                for (event, record) in died {
                    if seen.running.contains(&event) && !running.contains(&event) {
                        tracing::warn!(subscriber, event_id = %EventId::from(event), crashes = record.crashes, LEFT);
                        seen.died.insert(event, record);
                    }
                }
                seen.running.retain(|event| running.contains(event));
            }),
            // While the database is away nothing can run here either.
            Err(error) => tracing::debug!(subscriber, %error, "what a predecessor runs cannot be looked at"),
        }
    }
}

/// What is said of an event that ran when a process ended that did not stop in an orderly way.
pub(super) const LEFT: &str = "an event ran when its worker's process died or lost the lease";
