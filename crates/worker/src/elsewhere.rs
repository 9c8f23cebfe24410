//! Events that still run at an instance that has handed over: it lets what runs finish, and its successor works meanwhile.
//!
//! The inbox would keep them from running twice, but whoever enters one waits for the other transaction, with all that is
//! in the same batch. So they wait here, with their keys, until they have ended there.
//!
//! The session of a process that has died looks the same until the server notices that its client is gone. What it leaves
//! behind counts as a crash then, as if it had been found at the take-over.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use aftercommit_core::postgres::attempt::{self, Record};
use aftercommit_core::postgres::connections::Connections;
use aftercommit_core::postgres::lease::Tenure;
use aftercommit_core::postgres::running::{self, Open};
use aftercommit_outbox::event::EventId;

/// How often is looked whether they have ended.
pub(super) const LOOK: Duration = Duration::from_millis(250);

/// What was seen at the last look.
struct Seen {
    /// The events that run elsewhere.
    running: HashSet<Uuid>,
    /// What is on record of those that have ended there since.
    ended: HashMap<Uuid, Record>,
}

/// The events that ran elsewhere when this dispatcher began.
pub(super) struct Elsewhere {
    seen: watch::Receiver<Seen>,
    _looking: AbortOnDropHandle<()>,
}

impl Elsewhere {
    /// Looks again and again until nothing of what earlier tenures ran at the begin does any more.
    pub(super) fn new(open: Vec<Open>, connections: &Arc<Connections>, tenure: &Arc<Tenure>, name: &str) -> Self {
        let running = events(&open);
        if !running.is_empty() {
            tracing::info!(
                subscriber = name,
                events = running.len(),
                "a predecessor still runs events, their keys wait"
            );
        }
        let (tell, seen) = watch::channel(Seen { running, ended: HashMap::new() });
        let look = look(Arc::clone(connections), Arc::clone(tenure), name.to_string(), open, tell);
        Self { seen, _looking: AbortOnDropHandle::new(tokio::spawn(look)) }
    }

    /// Whether an event must wait for its end there.
    pub(super) fn runs(&self, event: EventId) -> bool {
        self.seen.borrow().running.contains(&event.as_uuid())
    }

    /// What is on record of an event since it ended there without being done; none when nothing is, or it never ran there.
    pub(super) fn left(&self, event: EventId) -> Option<Record> {
        self.seen.borrow().ended.get(&event.as_uuid()).cloned()
    }
}

fn events(open: &[Open]) -> HashSet<Uuid> {
    open.iter().flat_map(|open| open.events.iter().copied()).collect()
}

async fn look(
    connections: Arc<Connections>,
    tenure: Arc<Tenure>,
    subscriber: String,
    mut open: Vec<Open>,
    tell: watch::Sender<Seen>,
) {
    while !open.is_empty() {
        tokio::time::sleep(LOOK).await;
        let looked = connections.run(async |connection| {
            let mut still = running::elsewhere(connection, &tenure, &subscriber).await?;
            // What a tenure that still believes to be active begins after the take-over is not waited for.
            still.retain(|still| open.contains(still));
            let (running, ended): (Vec<Open>, Vec<Open>) = open.iter().cloned().partition(|one| still.contains(one));
            if ended.is_empty() {
                return Ok((running, Vec::new()));
            }
            running::ended_elsewhere(connection, &subscriber, &ended).await?;
            let ended: Vec<Uuid> = events(&ended).into_iter().collect();
            Ok((running, attempt::records(connection, &subscriber, &ended).await?))
        });
        match looked.await {
            Ok((running, ended)) => {
                for (event, record) in ended.iter().filter(|(_, record)| record.crashes > 0) {
                    tracing::warn!(subscriber, event_id = %EventId::from(*event), crashes = record.crashes, "{LEFT}");
                }
                tell.send_modify(|seen| {
                    seen.ended.extend(ended);
                    seen.running = events(&running);
                });
                open = running;
            }
            // While the database is away nothing can run here either.
            Err(error) => tracing::debug!(subscriber, %error, "reading what a predecessor still runs failed"),
        }
    }
}

/// What is said of an event that ran when its tenure ended without a word.
pub(super) const LEFT: &str = "an event ran when its worker's process died or lost the lease";
