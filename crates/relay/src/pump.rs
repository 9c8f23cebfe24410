//! Moves the events of a window from the reader into the stream, many in flight at a time.

use std::collections::VecDeque;
use std::task::Poll;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::chain::{Doubt, Sent};
use super::in_flight::InFlight;
use super::method::PaceWatch;
use super::progress::Progress;
use super::reader::Prepared;
use super::signals::Signals;
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::fault;
use aftercommit_core::jetstream::Connection;
use aftercommit_core::jetstream::publisher::{Answer, Publisher, SendError};
use aftercommit_core::jetstream::stream::StreamReader;

/// Payload bytes in flight at most, beside the number of messages.
pub(super) const MAX_BYTES: usize = 8 << 20;

/// How a pump run ended.
#[derive(Debug)]
pub(super) enum Pumped {
    /// Every event of the window is stored.
    Done,
    /// What is stored must be read from the stream before more is published.
    Doubt(Doubt),
    /// Told to stop; whatever is stored will be found again.
    Stopped,
}

/// How many messages may be in flight, and how long an answer may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) messages: usize,
    pub(super) ack_timeout: Duration,
}

/// What every run needs.
#[derive(Clone)]
pub(super) struct Setting<'a> {
    pub(super) connection: &'a Connection,
    pub(super) progress: &'a Progress,
    pub(super) limits: Limits,
    pub(super) signals: Signals,
    /// Who is to be told of each event that is stored, and where.
    pub(super) stored: Option<mpsc::UnboundedSender<Sent>>,
}

impl Setting<'_> {
    /// These events are stored, the last one at `sequence`.
    pub(super) fn stored(&self, events: Vec<Sent>, sequence: u64) {
        self.progress.stored(&events, sequence);
        if let Some(listener) = &self.stored {
            // Whoever wants to know listens until the run is over.
            events.into_iter().for_each(|event| _ = listener.send(event));
        }
    }
}

/// A run over the rest of a window.
pub(super) struct Pump<'a> {
    pub(super) publisher: &'a mut Publisher,
    pub(super) in_flight: &'a mut InFlight,
    pub(super) setting: Setting<'a>,
    /// Who judges the server's pace, while it is not known.
    pub(super) watch: Option<&'a mut PaceWatch>,
    /// Where the server's word for a repeat is checked.
    pub(super) stream: &'a StreamReader,
    /// Such checks that are in flight.
    pub(super) checks: Checks,
}

/// The number of a message, the server's answer, and whether the event is really there.
pub(super) type Checks = FuturesUnordered<BoxFuture<'static, (u64, Answer, Result<bool, Error>)>>;

impl Pump<'_> {
    /// Publishes what comes. It returns how it ended; nothing when the server has turned out to be slow, and what is left
    /// in `waiting` and `chunks` is to go another way. Beside that it returns an outbox id up to which everything of the
    /// window is stored, for a stream with other writers, where that cannot be read from its end; 0 when nothing is known.
    pub(super) async fn run(
        mut self,
        chunks: &mut mpsc::Receiver<Result<Vec<Prepared>, Error>>,
        waiting: &mut VecDeque<Prepared>,
    ) -> Result<(Option<Pumped>, i64), Error> {
        let mut sending = None;
        let pumped = self.drain(chunks, waiting, &mut sending).await?;
        let next = waiting.front().map(|prepared: &Prepared| prepared.event.outbox_id);
        Ok((pumped, self.in_flight.stored_up_to(sending.into_iter().chain(next))))
    }

    async fn drain(
        &mut self,
        chunks: &mut mpsc::Receiver<Result<Vec<Prepared>, Error>>,
        waiting: &mut VecDeque<Prepared>,
        sending: &mut Option<i64>,
    ) -> Result<Option<Pumped>, Error> {
        let connection = self.setting.connection.clone();
        let mut lost = std::pin::pin!(connection.lost());
        let mut told_to_stop = std::pin::pin!(self.setting.signals.told_to_stop());
        let (mut more, mut stopping, mut slow) = (true, false, false);
        let mut heard = Instant::now();
        let ack_timeout = self.setting.limits.ack_timeout;
        // One timer for all answers: it is set anew only when it rings too early.
        let mut silence = std::pin::pin!(tokio::time::sleep_until(heard + ack_timeout));
        if !connection.is_up() {
            return Ok(Some(Pumped::Doubt(Doubt::ConnectionLost)));
        }
        loop {
            let sent_at = std::time::Instant::now();
            while !slow
                && self.has_room()
                && let Some(next) = self.in_flight.take_next(waiting)
            {
                if self.in_flight.load().0 == 0 {
                    heard = Instant::now();
                }
                *sending = Some(next.event.outbox_id);
                let mut sent = std::pin::pin!(self.send(next, sent_at));
                let doubt = match futures_util::poll!(sent.as_mut()) {
                    Poll::Ready(sent) => sent?,
                    Poll::Pending => tokio::select! {
                        biased;
                        () = &mut lost => return Ok(Some(Pumped::Doubt(Doubt::ConnectionLost))),
                        // The client takes no more when it cannot pass on what it has.
                        () = tokio::time::sleep(ack_timeout) => {
                            return Ok(Some(Pumped::Doubt(Doubt::Timeout { complaint: connection.complaint() })));
                        }
                        sent = sent => sent?,
                    },
                };
                if let Some(doubt) = doubt {
                    return Ok(Some(Pumped::Doubt(doubt)));
                }
                *sending = None;
            }
            self.setting.progress.in_flight(self.in_flight.load().0);
            let idle = self.in_flight.load().0 == 0;
            if idle && waiting.is_empty() && !more {
                return Ok(Some(if stopping { Pumped::Stopped } else { Pumped::Done }));
            }
            if idle && slow {
                return Ok(None);
            }
            tokio::select! {
                biased;
                () = &mut lost, if !idle => return Ok(Some(Pumped::Doubt(Doubt::ConnectionLost))),
                answer = self.publisher.answer(), if !idle => {
                    heard = Instant::now();
                    let before = self.in_flight.load().0;
                    if let Some(doubt) = self.take_answers(answer)? {
                        return Ok(Some(Pumped::Doubt(doubt)));
                    }
                    let now = self.in_flight.load().0;
                    let watch = self.watch.as_deref_mut();
                    slow |= watch.is_some_and(|watch| watch.answered(before - now, now, heard));
                }
                Some(checked) = self.checks.next() => {
                    heard = Instant::now();
                    if let Some(doubt) = self.checked(checked) {
                        return Ok(Some(Pumped::Doubt(doubt)));
                    }
                }
                chunk = chunks.recv(), if waiting.is_empty() && more && !slow => match chunk {
                    Some(chunk) => waiting.extend(chunk?),
                    None => more = false,
                },
                () = &mut silence, if !idle => {
                    if heard + ack_timeout <= Instant::now() {
                        return Ok(Some(Pumped::Doubt(Doubt::Timeout { complaint: connection.complaint() })));
                    }
                    silence.as_mut().reset(heard + ack_timeout);
                }
                () = &mut told_to_stop, if !stopping => {
                    // What is in flight is still heard out, so that the next leader finds a quiet stream.
                    (stopping, more) = (true, false);
                    waiting.clear();
                    chunks.close();
                }
            }
        }
    }

    fn has_room(&self) -> bool {
        let (messages, bytes) = self.in_flight.load();
        let limit = self.watch.as_ref().map_or(usize::MAX, |watch| watch.limit()).min(self.setting.limits.messages);
        messages < limit && bytes < MAX_BYTES
    }

    async fn send(&mut self, next: Prepared, sent_at: std::time::Instant) -> Result<Option<Doubt>, Error> {
        let Prepared { event, message } = next;
        match self.publisher.send(self.in_flight.next_number(), message, self.in_flight.predecessor()).await {
            Ok(()) => {
                self.in_flight.sent(Sent { sent_at: Some(sent_at), ..event });
                fault::point("relay-sent");
                Ok(None)
            }
            Err(SendError::TooLarge { limit }) => Ok(Some(Doubt::TooLarge { event: Box::new(event), limit })),
            Err(SendError::Renewed) => Ok(Some(Doubt::ConnectionLost)),
            Err(SendError::Closed) => Err(closed()),
        }
    }

    /// Takes in an answer and all that have arrived behind it.
    fn take_answers(&mut self, first: Option<(u64, Answer)>) -> Result<Option<Doubt>, Error> {
        if first.is_none() {
            return Err(closed());
        }
        let (mut next, mut stored, mut doubt) = (first, Vec::new(), None);
        while let Some((number, answer)) = next {
            if let Some((event, sequence)) = self.in_flight.repeat(number, &answer) {
                self.check(number, answer, event, sequence);
                next = self.publisher.ready_answer();
                continue;
            }
            match self.in_flight.answered(number, answer) {
                Ok(more) => stored.extend(more),
                Err(ended) => {
                    doubt = Some(self.in_flight.trace(ended, self.setting.connection.complaint()));
                    break;
                }
            }
            fault::point("relay-acknowledged");
            next = self.publisher.ready_answer();
        }
        self.setting.stored(stored, self.in_flight.sequence());
        Ok(doubt)
    }
}

impl Pump<'_> {
    /// Begins to look whether an event is in the stream that the server took for a repeat.
    fn check(&mut self, number: u64, answer: Answer, event: Sent, sequence: u64) {
        let stream = self.stream.clone();
        let look = async move { Ok(stream.message(sequence).await?.is_some_and(|message| event.is(&message))) };
        self.checks.push(look.map(move |there| (number, answer, there)).boxed());
    }

    /// Takes in what came of it.
    fn checked(&mut self, (number, answer, there): (u64, Answer, Result<bool, Error>)) -> Option<Doubt> {
        let answer = match (answer, there) {
            (Answer::Stored { stream, sequence, .. }, Ok(true)) => {
                Answer::Stored { stream, sequence, duplicate: false }
            }
            (answer, Ok(_)) => answer,
            (_, Err(error)) => {
                tracing::warn!(error = error.report(), "cannot look whether an event is in the stream");
                return Some(Doubt::Timeout { complaint: None });
            }
        };
        match self.in_flight.answered(number, answer) {
            Ok(stored) => {
                self.setting.stored(stored, self.in_flight.sequence());
                None
            }
            Err(doubt) => Some(doubt),
        }
    }
}

pub(super) fn closed() -> Error {
    Error::new(ErrorKind::Broker, "the NATS client was closed")
}
