//! Reads the rows of a window ahead of the publisher and makes messages of them.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use tokio::sync::{Mutex, mpsc};

use super::chain::Sent;
use crate::config::Naming;
use crate::error::Error;
use crate::fault;
use crate::jetstream::publisher::{Messages, Outgoing};
use crate::postgres::session::Session;
use crate::postgres::snapshot::Mark;
use crate::postgres::window::{self, OutboxEvent};
use crate::postgres::{database_error, parked};

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
    /// Whether any event was ever parked.
    pub(super) any_parked: bool,
    /// Keys with a parked event: the later ones wait behind it.
    pub(super) blocked_keys: HashSet<String>,
    /// Events that are in the stream already.
    pub(super) present: HashSet<i64>,
    /// Further ones: the outbox ids of what the stream was found to hold behind the base of the window, sorted.
    pub(super) found: Arc<Vec<i64>>,
    /// Events that need a message id of their own, because the server knows theirs from a message that is gone.
    pub(super) renamed: HashMap<i64, String>,
}

/// Reads for the publisher.
pub(super) struct Reader {
    pub(super) connection: Arc<Mutex<Session>>,
    pub(super) naming: Arc<Naming>,
    pub(super) exceptions: Exceptions,
}

impl Reader {
    /// Sends the remaining events of a window in order, a chunk at a time, and ends when there are no more or nobody
    /// listens. No transaction is open while it waits for the publisher.
    pub(super) async fn run(self, remainder: Remainder, chunks: mpsc::Sender<Result<Vec<Prepared>, Error>>) {
        let connection = self.connection.clone();
        let mut connection = connection.lock().await;
        let Remainder { settled, target, mut after } = remainder;
        loop {
            let chunk = match self.page(&mut connection, &settled, &target, &mut after).await {
                Ok(Some(page)) => self.send(&mut connection, page, &chunks).await,
                Ok(None) => return,
                Err(error) => Err(error),
            };
            match chunk {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    _ = chunks.send(Err(database_error("reading the outbox failed", error))).await;
                    return;
                }
            }
        }
    }

    /// The next rows that are to go out; none at the window's end.
    async fn page(
        &self,
        connection: &mut Session,
        settled: &Mark,
        target: &Mark,
        after: &mut i64,
    ) -> Result<Option<Vec<OutboxEvent>>, sqlx::Error> {
        let mut page = window::page(connection, settled, target, *after, PAGE_ROWS).await?;
        fault::point("relay-window-read");
        let Some(last) = page.last() else { return Ok(None) };
        *after = last.id;
        let Exceptions { any_parked, blocked_keys, present, found, .. } = &self.exceptions;
        page.retain(|event| !present.contains(&event.id) && found.binary_search(&event.id).is_err());
        if *any_parked {
            let ids: Vec<i64> = page.iter().map(|event| event.id).collect();
            let parked = parked::among(connection, &ids).await?;
            page.retain(|event| !parked.contains(&event.id));
            let blocked = |event: &OutboxEvent| event.key.as_ref().is_some_and(|key| blocked_keys.contains(key));
            let behind: Vec<i64> = page.iter().filter(|event| blocked(event)).map(|event| event.id).collect();
            if !behind.is_empty() {
                // Before anything later goes out: what is behind the stream's end is not looked at again.
                parked::park(connection, &behind, None, "waits behind an earlier event of its key").await?;
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
            let mut prepared = prepare(connection, &mut messages, &self.naming.source, row).await?;
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

/// Makes a message of a row; headers and payload of a large one are read here.
pub(super) async fn prepare(
    connection: &mut Session,
    messages: &mut Messages,
    source: &str,
    row: OutboxEvent,
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
    };
    Ok(Prepared { event, message: messages.message(&envelope) })
}
