//! Moves the events of a window from the reader into the stream, many under way at a time.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::chain::{Chain, Doubt, Sent};
use super::progress::Progress;
use super::reader::Prepared;
use crate::error::{Error, ErrorKind};
use crate::fault;
use crate::jetstream::Connection;
use crate::jetstream::publisher::{Publisher, SendError};

/// Payload bytes under way at most, beside the number of messages.
const MAX_BYTES: usize = 8 << 20;

/// How a pump run ended.
#[derive(Debug)]
pub(super) enum Pumped {
    /// Every event of the window is stored.
    Done,
    /// What is stored must be read from the stream before going on.
    Doubt(Doubt),
    /// Told to stop; whatever is stored will be found again.
    Stopped,
}

/// How many messages may be under way, and how long an answer may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) messages: usize,
    pub(super) ack_timeout: Duration,
}

/// A run over the rest of a window.
pub(super) struct Pump<'a> {
    pub(super) publisher: &'a mut Publisher,
    pub(super) connection: &'a Connection,
    pub(super) chain: &'a mut Chain,
    pub(super) progress: &'a Progress,
    pub(super) limits: Limits,
    pub(super) paused: watch::Receiver<bool>,
    pub(super) shutdown: &'a CancellationToken,
}

impl Pump<'_> {
    pub(super) async fn run(
        mut self,
        mut chunks: mpsc::Receiver<Result<Vec<Prepared>, Error>>,
    ) -> Result<Pumped, Error> {
        let connection = self.connection.clone();
        let mut lost = std::pin::pin!(connection.lost());
        let mut told_to_stop = std::pin::pin!(stop(self.shutdown.clone(), self.paused.clone()));
        let mut waiting: VecDeque<Prepared> = VecDeque::new();
        let (mut more, mut stopping) = (true, false);
        let mut heard = Instant::now();
        loop {
            while !waiting.is_empty() && self.has_room() {
                if self.chain.load().0 == 0 {
                    heard = Instant::now();
                }
                let sending = self.send_next(&mut waiting);
                tokio::select! {
                    biased;
                    () = &mut lost => return Ok(Pumped::Doubt(Doubt::ConnectionLost)),
                    sent = sending => if let Some(doubt) = sent? { return Ok(Pumped::Doubt(doubt)) },
                }
            }
            self.progress.under_way(self.chain.load().0);
            let idle = self.chain.load().0 == 0;
            if idle && waiting.is_empty() && !more {
                return Ok(if stopping { Pumped::Stopped } else { Pumped::Done });
            }
            tokio::select! {
                biased;
                () = &mut lost, if !idle => return Ok(Pumped::Doubt(Doubt::ConnectionLost)),
                answer = self.publisher.answer(), if !idle => {
                    heard = Instant::now();
                    if let Some(doubt) = self.take_answers(answer)? {
                        return Ok(Pumped::Doubt(doubt));
                    }
                }
                chunk = chunks.recv(), if waiting.is_empty() && more => match chunk {
                    Some(chunk) => waiting.extend(chunk?),
                    None => more = false,
                },
                () = tokio::time::sleep_until(heard + self.limits.ack_timeout), if !idle => {
                    return Ok(Pumped::Doubt(Doubt::Timeout));
                }
                () = &mut told_to_stop, if !stopping => {
                    // What is under way is still heard out, so that the next leader finds a quiet stream.
                    (stopping, more) = (true, false);
                    waiting.clear();
                    chunks.close();
                }
            }
        }
    }

    fn has_room(&self) -> bool {
        let (messages, bytes) = self.chain.load();
        messages < self.limits.messages && bytes < MAX_BYTES
    }

    async fn send_next(&mut self, waiting: &mut VecDeque<Prepared>) -> Result<Option<Doubt>, Error> {
        let Some(Prepared { event, message }) = waiting.pop_front() else { return Ok(None) };
        match self.publisher.send(self.chain.next_number(), message, self.chain.predecessor()).await {
            Ok(()) => {
                self.chain.sent(Sent { sent_at: Some(std::time::Instant::now()), ..event });
                fault::point("relay-sent");
                Ok(None)
            }
            Err(SendError::TooLarge { limit }) => Ok(Some(Doubt::TooLarge { event, limit })),
            Err(SendError::Closed) => Err(closed()),
        }
    }

    /// Takes in an answer and all that have arrived behind it.
    fn take_answers(
        &mut self,
        first: Option<(u64, crate::jetstream::publisher::Answer)>,
    ) -> Result<Option<Doubt>, Error> {
        let Some(mut answer) = first else { return Err(closed()) };
        loop {
            match self.chain.answered(answer.0, answer.1) {
                Ok(stored) => {
                    self.progress.stored(&stored, self.chain.sequence());
                    fault::point("relay-acknowledged");
                }
                Err(doubt) => return Ok(Some(doubt)),
            }
            match self.publisher.ready_answer() {
                Some(next) => answer = next,
                None => return Ok(None),
            }
        }
    }
}

/// Returns when the relay is to publish no more, for now or for good.
async fn stop(shutdown: CancellationToken, mut paused: watch::Receiver<bool>) {
    tokio::select! {
        () = shutdown.cancelled() => {}
        Ok(_) = paused.wait_for(|paused| *paused) => {}
    }
}

fn closed() -> Error {
    Error::new(ErrorKind::Broker, "the NATS client was closed")
}
