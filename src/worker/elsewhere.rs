//! Events that still run at an instance that has handed over: it lets what runs finish, and its successor works meanwhile.
//!
//! The inbox would keep them from running twice, but whoever enters one waits for the other transaction, with all that is
//! in the same batch. So they wait here, with their keys, until they have ended there.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use crate::event::EventId;
use crate::postgres::connections::Connections;
use crate::postgres::lease::Tenure;
use crate::postgres::running;

/// How often is looked whether they have ended.
pub(super) const LOOK: Duration = Duration::from_millis(250);

/// The events that run elsewhere, as they were at the last look.
pub(super) struct Elsewhere {
    events: watch::Receiver<HashSet<Uuid>>,
    _looking: Option<AbortOnDropHandle<()>>,
}

impl Elsewhere {
    /// Looks again and again until nothing of what earlier tenures ran at the begin does any more.
    pub(super) fn new(events: Vec<Uuid>, connections: &Arc<Connections>, tenure: &Arc<Tenure>, name: &str) -> Self {
        let events: HashSet<Uuid> = events.into_iter().collect();
        if !events.is_empty() {
            tracing::info!(
                subscriber = name,
                events = events.len(),
                "a predecessor still runs events, their keys wait"
            );
        }
        let (tell, told) = watch::channel(events);
        let looking = (!told.borrow().is_empty()).then(|| {
            let look = look(Arc::clone(connections), Arc::clone(tenure), name.to_string(), tell);
            AbortOnDropHandle::new(tokio::spawn(look))
        });
        Self { events: told, _looking: looking }
    }

    /// Whether an event must wait for its end there.
    pub(super) fn runs(&self, event: EventId) -> bool {
        self.events.borrow().contains(&event.as_uuid())
    }
}

async fn look(
    connections: Arc<Connections>,
    tenure: Arc<Tenure>,
    subscriber: String,
    tell: watch::Sender<HashSet<Uuid>>,
) {
    while !tell.borrow().is_empty() {
        tokio::time::sleep(LOOK).await;
        let looked = connections.run(async |connection| running::elsewhere(connection, &tenure, &subscriber).await);
        match looked.await {
            Ok(events) => {
                let events: HashSet<Uuid> = events.into_iter().collect();
                tell.send_modify(|known| known.retain(|event| events.contains(event)));
            }
            // While the database is away nothing can run here either.
            Err(error) => tracing::debug!(subscriber, %error, "what a predecessor runs cannot be looked at"),
        }
    }
}
