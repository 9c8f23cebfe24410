//! Reads the rows of a window ahead of the publisher and makes messages of them.

use std::sync::Arc;

use sqlx::PgConnection;
use tokio::sync::{Mutex, mpsc};

use super::chain::Sent;
use crate::config::Naming;
use crate::envelope::Envelope;
use crate::error::Error;
use crate::jetstream::publisher::Outgoing;
use crate::postgres::database_error;
use crate::postgres::snapshot::Mark;
use crate::postgres::window::{self, OutboxEvent};

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

/// Sends the remaining events of a window in order, a chunk at a time, and ends when there are no more or nobody
/// listens. No transaction is open while it waits for the publisher.
pub(super) async fn read(
    connection: Arc<Mutex<PgConnection>>,
    naming: Arc<Naming>,
    remainder: Remainder,
    chunks: mpsc::Sender<Result<Vec<Prepared>, Error>>,
) {
    let mut connection = connection.lock().await;
    let Remainder { settled, target, mut after } = remainder;
    loop {
        let page = match window::page(&mut connection, &settled, &target, after, PAGE_ROWS).await {
            Ok(page) => page,
            Err(error) => {
                _ = chunks.send(Err(database_error("reading the outbox failed", error))).await;
                return;
            }
        };
        let Some(last) = page.last() else { return };
        after = last.id;
        let (mut chunk, mut bytes) = (Vec::with_capacity(page.len()), 0);
        for row in page {
            match prepare(&mut connection, &naming, row).await {
                Ok(prepared) => {
                    bytes += prepared.event.bytes;
                    chunk.push(prepared);
                }
                Err(error) => {
                    _ = chunks.send(Err(database_error("reading a large event failed", error))).await;
                    return;
                }
            }
            if bytes > CHUNK_BYTES {
                bytes = 0;
                if chunks.send(Ok(std::mem::take(&mut chunk))).await.is_err() {
                    return;
                }
            }
        }
        if chunks.send(Ok(chunk)).await.is_err() {
            return;
        }
    }
}

async fn prepare(connection: &mut PgConnection, naming: &Naming, row: OutboxEvent) -> Result<Prepared, sqlx::Error> {
    let body = match row.body {
        Some(body) => body,
        None => window::body(connection, row.id).await?,
    };
    let event = Sent {
        outbox_id: row.id,
        event_id: row.event_id,
        bytes: body.payload.len(),
        created_at: row.created_at,
        sent_at: None,
    };
    let subject = naming.prefix.subject(&row.event_type);
    let envelope = Envelope {
        id: row.event_id.into(),
        event_type: row.event_type,
        version: row.version.unsigned_abs(),
        key: row.key,
        source: naming.source.clone(),
        time: row.created_at,
        sequence: row.id,
        headers: body.headers,
        content_type: row.content_type,
        payload: body.payload,
    };
    Ok(Prepared { event, message: Outgoing::new(subject, &envelope) })
}
