//! Moves the events of a window into the stream in atomic batches, stored one at a time.
//!
//! With `sync_interval: always` the server writes each single message to disk before it answers, but a batch only once.

use std::collections::VecDeque;

use tokio::sync::mpsc;
use uuid::Uuid;

use super::chain::{Chain, Doubt};
use super::pump::{MAX_BYTES, Pumped, Setting, closed};
use super::reader::Prepared;
use aftercommit_core::error::Error;
use aftercommit_core::fault;
use aftercommit_core::jetstream::publisher::{Answer, BatchPlace, Publisher, SendError};

/// What the server takes in one batch.
const BATCH: usize = 1000;

/// A run over the rest of a window.
pub(super) struct BatchPump<'a> {
    pub(super) publisher: &'a mut Publisher,
    pub(super) chain: &'a mut Chain,
    pub(super) setting: Setting<'a>,
}

/// A batch by the numbers of its messages.
#[derive(Debug, Clone, Copy)]
struct Batch {
    first: u64,
    size: usize,
}

impl Batch {
    fn last(self) -> u64 {
        self.first + self.size as u64 - 1
    }
}

/// Whether there is more to publish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Filled {
    /// Something waits.
    More,
    /// The window ends here.
    End,
    /// The relay is to publish no more.
    Told,
}

/// A batch that waits for its last message, which commits it.
struct Staged {
    batch: Batch,
    id: String,
    behind: u64,
    last: Prepared,
}

impl BatchPump<'_> {
    /// Publishes what waits, and then what comes. While a batch is being stored the next one is sent, all but its last
    /// message: that goes out when the one before is known to be stored, so that no batch takes another one's place.
    pub(super) async fn run(
        mut self,
        chunks: &mut mpsc::Receiver<Result<Vec<Prepared>, Error>>,
        mut waiting: VecDeque<Prepared>,
    ) -> Result<Pumped, Error> {
        let connection = self.setting.connection.clone();
        let mut lost = std::pin::pin!(connection.lost());
        if !connection.is_up() {
            return Ok(Pumped::Doubt(Doubt::ConnectionLost));
        }
        tokio::select! {
            biased;
            () = &mut lost => Ok(Pumped::Doubt(Doubt::ConnectionLost)),
            pumped = self.pump(chunks, &mut waiting) => pumped,
        }
    }

    async fn pump(
        &mut self,
        chunks: &mut mpsc::Receiver<Result<Vec<Prepared>, Error>>,
        waiting: &mut VecDeque<Prepared>,
    ) -> Result<Pumped, Error> {
        let mut in_flight: Option<Batch> = None;
        // Whether the server has opened a batch as such.
        let mut proven = false;
        loop {
            let filled = self.fill(chunks, waiting).await?;
            let staged = match filled {
                Filled::More => match self.stage(waiting, &mut proven).await? {
                    Ok(staged) => staged,
                    Err(doubt) => return Ok(Pumped::Doubt(doubt)),
                },
                // What is being stored is still heard out, so that the next leader finds a quiet stream.
                Filled::End | Filled::Told => None,
            };
            if let Some(batch) = in_flight.take()
                && let Some(doubt) = self.hear(batch, staged.as_ref()).await?
            {
                return Ok(Pumped::Doubt(doubt));
            }
            match staged {
                Some(staged) => match self.commit(staged).await? {
                    Ok(batch) => in_flight = Some(batch),
                    Err(doubt) => return Ok(Pumped::Doubt(doubt)),
                },
                None if filled == Filled::End => return Ok(Pumped::Done),
                None => return Ok(Pumped::Stopped),
            }
        }
    }

    /// Takes in what has been read, without waiting for more than it needs.
    async fn fill(
        &mut self,
        chunks: &mut mpsc::Receiver<Result<Vec<Prepared>, Error>>,
        waiting: &mut VecDeque<Prepared>,
    ) -> Result<Filled, Error> {
        if self.setting.signals.is_told_to_stop() {
            return Ok(Filled::Told);
        }
        while waiting.len() < BATCH {
            let chunk = match chunks.try_recv() {
                Ok(chunk) => Some(chunk),
                Err(_) if !waiting.is_empty() => break,
                Err(_) => tokio::select! {
                    chunk = chunks.recv() => chunk,
                    () = self.setting.signals.told_to_stop() => return Ok(Filled::Told),
                },
            };
            match chunk {
                Some(chunk) => waiting.extend(chunk?),
                None => return Ok(Filled::End),
            }
        }
        Ok(Filled::More)
    }

    /// Sends the next batch but for its last message. Of the first batch, nothing follows the first message before the
    /// server has opened a batch with it: a server that knows none would store the others by themselves, unchecked.
    async fn stage(
        &mut self,
        waiting: &mut VecDeque<Prepared>,
        proven: &mut bool,
    ) -> Result<Result<Option<Staged>, Doubt>, Error> {
        let mut bytes = 0;
        let fits = |prepared: &&Prepared| {
            bytes += prepared.event.bytes;
            bytes <= MAX_BYTES
        };
        let size = waiting.iter().take(BATCH).take_while(fits).count().max(1);
        let id = Uuid::new_v4().simple().to_string();
        let batch = Batch { first: self.chain.next_number(), size };
        let behind = self.chain.predecessor().sequence;
        for position in 1..size {
            let Some(prepared) = waiting.pop_front() else { break };
            let place = BatchPlace { id: &id, position, last: false, behind };
            if let Some(doubt) = self.send(prepared, place).await? {
                return Ok(Err(doubt));
            }
            if !*proven {
                if let Some(doubt) = self.opened(batch).await? {
                    return Ok(Err(doubt));
                }
                *proven = true;
            }
        }
        Ok(Ok(waiting.pop_front().map(|last| Staged { batch, id, behind, last })))
    }

    /// Sends the last message of a batch.
    async fn commit(&mut self, staged: Staged) -> Result<Result<Batch, Doubt>, Error> {
        let Staged { batch, id, behind, last } = staged;
        let place = BatchPlace { id: &id, position: batch.size, last: true, behind };
        Ok(match self.send(last, place).await? {
            Some(doubt) => Err(doubt),
            None => {
                self.setting.progress.in_flight(batch.size);
                Ok(batch)
            }
        })
    }

    async fn send(&mut self, prepared: Prepared, place: BatchPlace<'_>) -> Result<Option<Doubt>, Error> {
        let Prepared { mut event, message } = prepared;
        let sending = self.publisher.send_in_batch(self.chain.next_number(), message, place);
        let Ok(sent) = tokio::time::timeout(self.setting.limits.ack_timeout, sending).await else {
            return Ok(Some(self.timeout()));
        };
        match sent {
            Ok(()) => {
                event.sent_at = Some(std::time::Instant::now());
                self.chain.sent(event);
                fault::point("relay-sent");
                Ok(None)
            }
            Err(SendError::TooLarge { limit }) => Ok(Some(Doubt::TooLarge { event: Box::new(event), limit })),
            Err(SendError::Renewed) => Ok(Some(Doubt::ConnectionLost)),
            Err(SendError::Closed) => Err(closed()),
        }
    }

    /// Waits until a batch is stored.
    async fn hear(&mut self, batch: Batch, next: Option<&Staged>) -> Result<Option<Doubt>, Error> {
        let next = next.map(|next| next.batch.first);
        match tokio::time::timeout(self.setting.limits.ack_timeout, self.committed(batch, next)).await {
            Ok(outcome) => outcome,
            Err(_) => Ok(Some(self.timeout())),
        }
    }

    /// Waits until the server has opened a batch, before which nothing else is in flight.
    async fn opened(&mut self, batch: Batch) -> Result<Option<Doubt>, Error> {
        let opened = async {
            loop {
                let Some((number, answer)) = self.publisher.answer().await else { return Err(closed()) };
                match answer {
                    Answer::Unreadable if number == batch.first => return Ok(None),
                    Answer::Stored { .. } if number == batch.first => return Ok(Some(Doubt::Unbatched)),
                    other => {
                        if let Err(doubt) = self.chain.answered(number, other) {
                            return Ok(Some(doubt));
                        }
                    }
                }
            }
        };
        match tokio::time::timeout(self.setting.limits.ack_timeout, opened).await {
            Ok(outcome) => outcome,
            Err(_) => Ok(Some(self.timeout())),
        }
    }

    fn timeout(&self) -> Doubt {
        Doubt::Timeout { complaint: self.setting.connection.complaint() }
    }

    async fn committed(&mut self, batch: Batch, next: Option<u64>) -> Result<Option<Doubt>, Error> {
        loop {
            let Some((number, answer)) = self.publisher.answer().await else { return Err(closed()) };
            match answer {
                Answer::Stored { stream, sequence, .. } if number == batch.last() => {
                    return Ok(match self.chain.committed(batch.size, stream, sequence) {
                        Ok(stored) => {
                            self.setting.stored(stored, self.chain.sequence());
                            fault::point("relay-acknowledged");
                            None
                        }
                        Err(doubt) => Some(doubt),
                    });
                }
                // This batch, or the next one, is open.
                Answer::Unreadable if (number == batch.first && batch.size > 1) || Some(number) == next => {}
                // One message of the batch by itself.
                Answer::Stored { .. } if number >= batch.first => return Ok(Some(Doubt::Unbatched)),
                other => {
                    if let Err(doubt) = self.chain.answered(number, other) {
                        return Ok(Some(doubt));
                    }
                }
            }
        }
    }
}
