//! Moves the events of a window into the stream in atomic batches, one at a time.
//!
//! With `sync_interval: always` the server writes each single message to disk before it answers, but a batch only once.

use std::collections::VecDeque;

use tokio::sync::mpsc;
use uuid::Uuid;

use super::chain::{Chain, Doubt};
use super::pump::{MAX_BYTES, Pumped, Setting, closed, stop};
use super::reader::Prepared;
use crate::error::Error;
use crate::fault;
use crate::jetstream::publisher::{Answer, BatchPlace, Publisher, SendError};

/// What the server takes in one batch.
const BATCH: usize = 1000;

/// A run over the rest of a window.
pub(super) struct BatchPump<'a> {
    pub(super) publisher: &'a mut Publisher,
    pub(super) chain: &'a mut Chain,
    pub(super) setting: Setting<'a>,
}

impl BatchPump<'_> {
    /// Publishes what waits, and then what comes.
    pub(super) async fn run(
        mut self,
        chunks: &mut mpsc::Receiver<Result<Vec<Prepared>, Error>>,
        mut waiting: VecDeque<Prepared>,
    ) -> Result<Pumped, Error> {
        let connection = self.setting.connection.clone();
        let mut lost = std::pin::pin!(connection.lost());
        let mut told_to_stop = std::pin::pin!(stop(self.setting.shutdown.clone(), self.setting.paused.clone()));
        if !connection.is_up() {
            return Ok(Pumped::Doubt(Doubt::ConnectionLost));
        }
        loop {
            while waiting.len() < BATCH {
                // What has been read goes out without waiting for more.
                let chunk = match chunks.try_recv() {
                    Ok(chunk) => Some(chunk),
                    Err(_) if !waiting.is_empty() => break,
                    Err(_) => tokio::select! {
                        chunk = chunks.recv() => chunk,
                        () = &mut told_to_stop => return Ok(Pumped::Stopped),
                    },
                };
                match chunk {
                    Some(chunk) => waiting.extend(chunk?),
                    None => return Ok(Pumped::Done),
                }
            }
            let stored = tokio::select! {
                biased;
                () = &mut lost => return Ok(Pumped::Doubt(Doubt::ConnectionLost)),
                stored = self.batch(&mut waiting) => stored?,
            };
            if let Some(doubt) = stored {
                return Ok(Pumped::Doubt(doubt));
            }
            if self.setting.is_told_to_stop() {
                return Ok(Pumped::Stopped);
            }
        }
    }

    /// Sends the next batch and waits until it is stored.
    async fn batch(&mut self, waiting: &mut VecDeque<Prepared>) -> Result<Option<Doubt>, Error> {
        let mut bytes = 0;
        let fits = |prepared: &&Prepared| {
            bytes += prepared.event.bytes;
            bytes <= MAX_BYTES
        };
        let size = waiting.iter().take(BATCH).take_while(fits).count().max(1);
        let id = Uuid::new_v4().simple().to_string();
        let behind = self.chain.sequence();
        let first = self.chain.next_number();
        for position in 1..=size {
            let Some(Prepared { mut event, message }) = waiting.pop_front() else { break };
            let place = BatchPlace { id: &id, position, last: position == size, behind };
            let sending = self.publisher.send_in_batch(self.chain.next_number(), message, place);
            let Ok(sent) = tokio::time::timeout(self.setting.limits.ack_timeout, sending).await else {
                return Ok(Some(Doubt::Timeout { complaint: self.setting.connection.complaint() }));
            };
            match sent {
                Ok(()) => {
                    event.sent_at = Some(std::time::Instant::now());
                    self.chain.sent(event);
                    fault::point("relay-sent");
                }
                Err(SendError::TooLarge { limit }) => {
                    return Ok(Some(Doubt::TooLarge { event: Box::new(event), limit }));
                }
                Err(SendError::Closed) => return Err(closed()),
            }
        }
        self.setting.progress.under_way(size);
        let last = first + size as u64 - 1;
        match tokio::time::timeout(self.setting.limits.ack_timeout, self.committed(first, last)).await {
            Ok(outcome) => outcome,
            Err(_) => Ok(Some(Doubt::Timeout { complaint: self.setting.connection.complaint() })),
        }
    }

    async fn committed(&mut self, first: u64, last: u64) -> Result<Option<Doubt>, Error> {
        loop {
            let Some((number, answer)) = self.publisher.answer().await else { return Err(closed()) };
            match answer {
                Answer::Stored { stream, sequence, .. } if number == last => {
                    return Ok(match self.chain.committed(stream, sequence) {
                        Ok(stored) => {
                            self.setting.progress.stored(&stored, self.chain.sequence());
                            fault::point("relay-acknowledged");
                            None
                        }
                        Err(doubt) => Some(doubt),
                    });
                }
                // The batch is open.
                Answer::Unreadable if number == first && number != last => {}
                other => return Ok(self.chain.answered(number, other).err()),
            }
        }
    }
}
