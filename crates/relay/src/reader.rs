//! Reads the rows of a window ahead of the publisher and makes messages of them.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use tokio::sync::{Mutex, mpsc};

use super::blocked_keys::BlockedKeys;
use super::chain::{Origin, Sent};
use super::fence::fenced;
use aftercommit_core::config::Naming;
use aftercommit_core::error::Error;
use aftercommit_core::fault;
use aftercommit_core::jetstream::publisher::{Messages, Outgoing};
use aftercommit_core::postgres::fence::Written;
use aftercommit_core::postgres::outbox_event::OutboxEvent;
use aftercommit_core::postgres::session::Session;
use aftercommit_core::postgres::snapshot::Mark;
use aftercommit_core::postgres::walk::Walk;
use aftercommit_core::postgres::window;
use aftercommit_core::postgres::{database_error, parked};

/// Rows per query. Rows of more than 4 KiB are fetched one by one, so a page is at most 4 MiB.
const PAGE_ROWS: usize = 1000;
/// How many bytes of large events go to the publisher at a time.
const CHUNK_BYTES: usize = 2 << 20;

/// An event with its message.
pub(super) struct Prepared {
    pub(super) event: Sent,
    pub(super) message: Outgoing,
}

/// The part of a window that is still to be published.
pub(super) struct Remainder {
    pub(super) settled: Mark,
    pub(super) target: Mark,
    /// Everything up to this outbox id is in the stream.
    pub(super) after: i64,
}

/// Events of the window that do not simply go out.
#[derive(Debug, Clone, Default)]
pub(super) struct Exceptions {
    /// The highest outbox id that was ever parked, by the leader or a reader; 0 when none was.
    pub(super) last_parked: Arc<AtomicI64>,
    pub(super) blocked_keys: BlockedKeys,
    /// Events that are in the stream already.
    pub(super) present: HashSet<i64>,
    /// Further ones: the outbox ids of what the stream was found to hold behind the base of the window, sorted.
    pub(super) found: Arc<Vec<i64>>,
    /// Events that need a message id of their own, because the server knows theirs from a message that is gone.
    pub(super) renamed: HashMap<i64, String>,
    /// The messages of the stream that have an event's id and are not the event.
    pub(super) forged: HashMap<i64, Vec<u64>>,
}

impl Exceptions {
    /// A window is opened: what was known of single events belongs to the window before.
    pub(super) fn begin_window(&mut self) {
        self.present.clear();
        self.renamed.clear();
        self.forged.clear();
        self.found = Arc::default();
    }

    /// The event with this outbox id is parked.
    pub(super) fn parked(&self, outbox_id: i64) {
        self.last_parked.fetch_max(outbox_id, Ordering::Relaxed);
    }

    /// Whether any event was ever parked.
    pub(super) fn any_parked(&self) -> bool {
        self.last_parked.load(Ordering::Relaxed) != 0
    }
}

/// Reads for the publisher.
pub(super) struct Reader {
    pub(super) connection: Arc<Mutex<Session>>,
    pub(super) naming: Arc<Naming>,
    pub(super) exceptions: Exceptions,
    /// Under which the leader leads.
    pub(super) epoch: i64,
    /// Whether others write to the stream, too.
    pub(super) shared: bool,
}

impl Reader {
    /// Sends the remaining events of a window in order, a chunk at a time, and ends when there are no more or nobody
    /// listens. No transaction is open while it waits for the publisher.
    pub(super) async fn run(self, remainder: Remainder, chunks: mpsc::Sender<Result<Vec<Prepared>, Error>>) {
        let connection = self.connection.clone();
        let mut connection = connection.lock().await;
        let Remainder { settled, target, after } = remainder;
        let mut walk = Walk::new(settled, target, after);
        loop {
            let chunk = match self.page(&mut connection, &mut walk).await {
                Ok(Some(page)) => self.send(&mut connection, page, &chunks).await.map_err(failed),
                Ok(None) => return,
                Err(error) => Err(error),
            };
            match chunk {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    _ = chunks.send(Err(error)).await;
                    return;
                }
            }
        }
    }

    /// The next rows that are to go out; none at the window's end.
    async fn page(
        &self,
        connection: &mut Session,
        walk: &mut Walk<OutboxEvent>,
    ) -> Result<Option<Vec<OutboxEvent>>, Error> {
        let mut page = walk.next(connection, PAGE_ROWS).await.map_err(failed)?;
        fault::pass("relay-window-read").await;
        if page.is_empty() {
            return Ok(None);
        }
        let Exceptions { last_parked, blocked_keys, present, found, .. } = &self.exceptions;
        page.retain(|event| !present.contains(&event.id) && found.binary_search(&event.id).is_err());
        // What is newer was never parked.
        let parked_up_to = last_parked.load(Ordering::Relaxed);
        let maybe_parked = page.iter().filter(|event| event.id <= parked_up_to);
        let (ids, event_ids): (Vec<_>, Vec<_>) = maybe_parked.map(|event| (event.id, event.event_id)).unzip();
        if !ids.is_empty() {
            let parked = parked::among(connection, &ids, &event_ids).await.map_err(failed)?;
            page.retain(|event| !parked.contains(&event.id));
        }
        if !blocked_keys.is_empty() {
            let blocked = |event: &OutboxEvent| event.key.as_ref().is_some_and(|key| blocked_keys.contains(key));
            let behind: Vec<i64> = page.iter().filter(|event| blocked(event)).map(|event| event.id).collect();
            if let Some(last) = behind.last() {
                // Before anything later goes out: what is behind the stream's end is not looked at again.
                let parked =
                    parked::park(connection, self.epoch, &behind, None, "waits behind an earlier event of its key")
                        .await;
                if parked.map_err(failed)? == Written::Fenced {
                    return Err(fenced());
                }
                self.exceptions.parked(*last);
                page.retain(|event| !blocked(event));
            }
        }
        Ok(Some(page))
    }

    /// Hands a page to the publisher; false when nobody listens any more.
    async fn send(
        &self,
        connection: &mut Session,
        page: Vec<OutboxEvent>,
        chunks: &mpsc::Sender<Result<Vec<Prepared>, Error>>,
    ) -> Result<bool, sqlx::Error> {
        let mut messages = Messages::new(self.naming.prefix.clone());
        let (mut chunk, mut bytes) = (Vec::with_capacity(page.len()), 0);
        for row in page {
            let mut prepared = prepare(connection, &mut messages, &self.naming.source, row, self.shared).await?;
            if let Some(sequences) = self.exceptions.forged.get(&prepared.event.outbox_id) {
                prepared.message.mark_replaces(sequences);
            }
            if let Some(id) = self.exceptions.renamed.get(&prepared.event.outbox_id) {
                prepared.message.set_message_id(id);
                prepared.event.renamed = Some(id.clone());
            }
            bytes += prepared.event.bytes;
            chunk.push(prepared);
            if bytes > CHUNK_BYTES {
                bytes = 0;
                if chunks.send(Ok(std::mem::take(&mut chunk))).await.is_err() {
                    return Ok(false);
                }
            }
        }
        Ok(chunks.send(Ok(chunk)).await.is_ok())
    }
}

fn failed(error: sqlx::Error) -> Error {
    database_error("reading the outbox failed", error)
}

/// Makes a message of a row; headers and payload of a large one are read here.
pub(super) async fn prepare(
    connection: &mut Session,
    messages: &mut Messages,
    source: &str,
    row: OutboxEvent,
    shared: bool,
) -> Result<Prepared, sqlx::Error> {
    let envelope = window::envelope(connection, row, source).await?;
    let event = Sent {
        outbox_id: envelope.sequence,
        event_id: envelope.id.as_uuid(),
        key: envelope.key.clone(),
        renamed: None,
        bytes: envelope.payload.len(),
        created_at: envelope.time,
        sent_at: None,
        sequence: 0,
        digest: shared.then(|| envelope.digest()),
        origin: Origin::of(&envelope),
    };
    Ok(Prepared { event, message: messages.message(&envelope) })
}
