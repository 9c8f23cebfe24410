//! The messages of a consumer, in an order that can be relied on.
//!
//! JetStream delivers a message again only when its ack wait has run out, while newer ones come at once. So what a
//! predecessor left unacked, and what got lost on the way, would come behind newer messages of the same key. The feed
//! closes such holes: whenever messages were delivered that it has not seen, it reads them from the stream before it
//! hands on anything newer. Every message that the feed hands on for the first time is newer than all before it.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use async_nats::jetstream::Context;
use async_nats::{Client, StatusCode};
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use tokio::sync::{Notify, mpsc};
use tokio_util::task::AbortOnDropHandle;

use crate::backoff::Backoff;
use crate::envelope::{Envelope, EnvelopeError};
use crate::event::EventId;

use super::ack::Reply;
use super::consumer::{self, ConsumerSpec, Position};
use super::stored::{self, Stretch};

/// The most messages in one pull request.
const MAX_PULL: usize = 1000;
/// How long the server keeps a pull request.
const EXPIRES: Duration = Duration::from_secs(10);
/// How often the server says that it still knows of a pull request.
const HEARTBEAT: Duration = Duration::from_secs(3);

/// A message for the subscriber.
#[derive(Debug)]
pub(crate) struct Incoming {
    /// Its place in the stream.
    pub(crate) sequence: u64,
    /// How often it was delivered; 0 when it was read from the stream.
    pub(crate) deliveries: u64,
    /// Where the answer goes; none when it was read from the stream.
    pub(crate) reply: Option<Reply>,
    /// The event in it.
    pub(crate) event: Result<Envelope, EnvelopeError>,
    /// Its share of the memory.
    pub(crate) permit: Permit,
}

/// What a feed hands on.
#[derive(Debug)]
pub(crate) enum Fed {
    /// The next message.
    Message(Box<Incoming>),
    /// The consumer is gone or no longer the same: sequences and replies known so far mean nothing any more.
    Ended(String),
}

/// How many messages, and of what size, may be in memory.
#[derive(Debug)]
pub(crate) struct Budget {
    max_messages: usize,
    max_bytes: usize,
    messages: AtomicUsize,
    bytes: AtomicUsize,
    freed: Notify,
}

/// The share of one message in a [`Budget`], given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Permit {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Budget {
    pub(crate) fn new(max_messages: usize, max_bytes: usize) -> Arc<Self> {
        Arc::new(Self {
            max_messages,
            max_bytes,
            messages: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            freed: Notify::new(),
        })
    }

    /// Room for messages of `typical` bytes.
    fn room(&self, typical: usize) -> usize {
        let messages = self.max_messages.saturating_sub(self.messages.load(Ordering::Relaxed));
        let bytes = self.max_bytes.saturating_sub(self.bytes.load(Ordering::Relaxed));
        messages.min(bytes.div_ceil(typical.max(1)))
    }

    pub(crate) fn is_full(&self) -> bool {
        self.room(1) == 0
    }

    fn take(self: &Arc<Self>, bytes: usize) -> Permit {
        self.messages.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        Permit { budget: Arc::clone(self), bytes }
    }

    async fn wait_for_room(&self) {
        loop {
            let freed = self.freed.notified();
            if !self.is_full() {
                return;
            }
            freed.await;
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.budget.messages.fetch_sub(1, Ordering::Relaxed);
        self.budget.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        self.budget.freed.notify_waiters();
    }
}

/// Finds out which of some events the subscriber is done with; it may leave some out.
pub(crate) type Done = Box<dyn Fn(Vec<EventId>) -> BoxFuture<'static, HashSet<EventId>> + Send + Sync>;

/// Reads a consumer from `position` on until it is dropped. What it reads from the stream and is `done` is not handed
/// on.
pub(crate) fn start(
    client: &Client,
    context: &Context,
    spec: &ConsumerSpec,
    position: Position,
    budget: &Arc<Budget>,
    done: Done,
) -> (mpsc::UnboundedReceiver<Fed>, AbortOnDropHandle<()>) {
    // The budget bounds what is in it.
    let (output, messages) = mpsc::unbounded_channel();
    let feed = Feed {
        client: client.clone(),
        context: context.clone(),
        spec: spec.clone(),
        budget: Arc::clone(budget),
        done,
        output,
        created: position.created,
        seen: Seen { sequence: position.delivered, deliveries: position.deliveries, missed: false },
        failures: 0,
        // Nothing is known of the messages: be careful at first.
        typical: 1_000_000,
    };
    let unacked = position.outstanding.then_some((position.ack_floor + 1, position.delivered));
    (messages, AbortOnDropHandle::new(tokio::spawn(feed.run(unacked))))
}

struct Feed {
    client: Client,
    context: Context,
    spec: ConsumerSpec,
    budget: Arc<Budget>,
    done: Done,
    output: mpsc::UnboundedSender<Fed>,
    created: String,
    seen: Seen,
    /// Interruptions since the last sign of life of the consumer.
    failures: u32,
    /// The size of messages, a moving average.
    typical: usize,
}

/// The session's side of the feed is gone.
struct Unwanted;

impl Feed {
    async fn run(mut self, unacked: Option<(u64, u64)>) {
        if let Some((first, last)) = unacked {
            tracing::info!(
                subscriber = self.spec.name,
                first,
                last,
                "reading messages that were delivered before and not acked"
            );
            if self.read_stream(first, last).await.is_err() {
                return;
            }
        }
        loop {
            if let Err(reason) = self.confirm().await {
                let _ = self.output.send(Fed::Ended(reason));
                return;
            }
            // Not before: what is pulled would be thrown away for a connection that was made anew meanwhile, and come again
            // only after the ack wait.
            match self.pull(self.connects()).await {
                Ok(why) => {
                    tracing::debug!(subscriber = self.spec.name, why, "pulling is interrupted");
                    if self.failures > 0 {
                        tokio::time::sleep(Backoff::RECONNECT.after(self.failures)).await;
                    }
                    self.failures += 1;
                }
                Err(Unwanted) => return,
            }
        }
    }

    fn connects(&self) -> u64 {
        self.client.statistics().connects.load(Ordering::Relaxed)
    }

    /// Waits until the server can be asked, and makes sure that the consumer is still the same.
    async fn confirm(&mut self) -> Result<(), String> {
        let mut failures = 0;
        loop {
            match consumer::locate(&self.context, &self.spec).await {
                Ok(Some(now)) if now.created != self.created => return Err("the consumer was made anew".into()),
                Ok(Some(now)) if now.deliveries < self.seen.deliveries => {
                    return Err("the consumer was set back".into());
                }
                Ok(None) => return Err("the consumer was deleted".into()),
                Ok(Some(_)) => {
                    if failures > 0 {
                        tracing::info!(subscriber = self.spec.name, "nats answers again");
                    }
                    return Ok(());
                }
                Err(error) => {
                    if failures == 0 {
                        tracing::warn!(subscriber = self.spec.name, error = %error.report(), "waiting for nats");
                    }
                    failures += 1;
                    tokio::time::sleep(Backoff::RECONNECT.after(failures)).await;
                }
            }
        }
    }

    /// Pulls until something is odd, and says what.
    async fn pull(&mut self, connects: u64) -> Result<String, Unwanted> {
        let inbox = self.client.new_inbox();
        let mut messages = match self.client.subscribe(inbox.clone()).await {
            Ok(messages) => messages,
            Err(error) => return Ok(error.to_string()),
        };
        let mut owed = 0;
        let mut heard = Instant::now();
        let mut watch = tokio::time::interval(Duration::from_millis(250));
        loop {
            let budget = Arc::clone(&self.budget);
            // Before the look at the room, so that nothing freed after it is missed.
            let freed = budget.freed.notified();
            let room = budget.room(self.typical);
            if owed <= MAX_PULL / 2 && owed < room {
                let more = (room - owed).min(MAX_PULL);
                if let Err(error) = self.request(&inbox, more).await {
                    return Ok(error);
                }
                if owed == 0 {
                    heard = Instant::now();
                }
                owed += more;
            }
            tokio::select! {
                message = messages.next() => {
                    let Some(message) = message else { return Ok("the subscription ended".into()) };
                    match self.receive(message, &mut owed).await? {
                        Some(odd) => return Ok(odd),
                        None => heard = Instant::now(),
                    }
                }
                () = freed, if owed <= MAX_PULL / 2 && owed >= room => {}
                () = self.output.closed() => {
                    // The server gives what is handed back to whoever pulls, and that must not be this one.
                    let _ = messages.unsubscribe().await;
                    let _ = self.client.flush().await;
                    return Err(Unwanted);
                }
                _ = watch.tick() => {
                    if self.connects() != connects {
                        return Ok("the connection was made anew".into());
                    }
                    if owed > 0 && heard.elapsed() > 3 * HEARTBEAT {
                        return Ok("the server is silent".into());
                    }
                }
            }
        }
    }

    async fn request(&self, inbox: &str, messages: usize) -> Result<(), String> {
        let subject = format!("$JS.API.CONSUMER.MSG.NEXT.{}.{}", self.spec.stream, self.spec.name);
        let body = format!(
            r#"{{"batch":{messages},"expires":{},"idle_heartbeat":{}}}"#,
            EXPIRES.as_nanos(),
            HEARTBEAT.as_nanos()
        );
        self.client.publish_with_reply(subject, inbox.to_string(), body.into()).await.map_err(|error| error.to_string())
    }

    /// Takes one message or status, and says when it is odd.
    async fn receive(&mut self, message: async_nats::Message, owed: &mut usize) -> Result<Option<String>, Unwanted> {
        match message.status {
            None | Some(StatusCode::OK) => {
                *owed = owed.saturating_sub(1);
                self.failures = 0;
                self.accept(message).await?;
                Ok(None)
            }
            Some(StatusCode::IDLE_HEARTBEAT) => {
                self.failures = 0;
                Ok(None)
            }
            Some(status) => {
                let description = message.description.as_deref().unwrap_or_default();
                let rest = message.headers.as_ref().and_then(|headers| headers.get("Nats-Pending-Messages"));
                let rest = rest.and_then(|rest| rest.as_str().parse::<usize>().ok());
                match rest {
                    // A pull request has run out, with so many messages not delivered.
                    Some(rest) if description != "Consumer Deleted" => {
                        *owed = owed.saturating_sub(rest);
                        Ok(None)
                    }
                    _ => Ok(Some(format!("{status} {description}"))),
                }
            }
        }
    }

    /// Hands on a delivered message, behind all that come before it.
    async fn accept(&mut self, message: async_nats::Message) -> Result<(), Unwanted> {
        let message = async_nats::jetstream::Message { message, context: self.context.clone() };
        let (sequence, delivery, count) = match message.info() {
            Ok(info) => (info.stream_sequence, info.consumer_sequence, info.delivered),
            Err(error) => {
                tracing::warn!(subscriber = self.spec.name, error, "a message did not come from the consumer");
                return Ok(());
            }
        };
        let message = message.message;
        if let Some((first, last)) = self.seen.arrived(sequence, delivery, count > 1) {
            tracing::info!(
                subscriber = self.spec.name,
                first,
                last,
                "deliveries were missed, reading the stream for them"
            );
            self.read_stream(first, last).await?;
        }
        let payload = message.payload.len();
        self.typical = (self.typical * 7 + message.length) / 8;
        self.hand_on(Incoming {
            sequence,
            deliveries: count.unsigned_abs(),
            reply: message.reply.map(Reply),
            event: super::envelope(message.headers.as_ref(), detached(&message.payload)),
            permit: self.budget.take(payload),
        })
    }

    /// Hands on the messages of the stream from `first` to `last` that are not done, as room for them becomes free.
    async fn read_stream(&self, first: u64, last: u64) -> Result<(), Unwanted> {
        if first > last {
            return Ok(());
        }
        let mut stretch = self.load(first, last).await?;
        while let Some(next) = stretch.next {
            let (handed_on, following) = tokio::join!(self.hand_on_all(stretch), self.load(next, last));
            handed_on?;
            stretch = following?;
        }
        self.hand_on_all(stretch).await
    }

    async fn hand_on_all(&self, stretch: Stretch) -> Result<(), Unwanted> {
        let messages: Vec<_> =
            stretch.messages.into_iter().map(|(sequence, message)| (sequence, stored::event(&message))).collect();
        let ids = messages.iter().filter_map(|(_, event)| Some(event.as_ref().ok()?.id)).collect();
        let done = (self.done)(ids).await;
        for (sequence, event) in messages {
            let (id, size) = event.as_ref().map_or((None, 0), |event| (Some(event.id), event.payload.len()));
            if id.is_some_and(|id| done.contains(&id)) {
                continue;
            }
            self.wait_for_room().await?;
            let permit = self.budget.take(size);
            self.hand_on(Incoming { sequence, deliveries: 0, reply: None, event, permit })?;
        }
        Ok(())
    }

    async fn wait_for_room(&self) -> Result<(), Unwanted> {
        tokio::select! {
            () = self.budget.wait_for_room() => Ok(()),
            () = self.output.closed() => Err(Unwanted),
        }
    }

    async fn load(&self, first: u64, last: u64) -> Result<Stretch, Unwanted> {
        let mut failures = 0;
        loop {
            match stored::load(&self.context, &self.spec.stream, &self.spec.subjects, first, last).await {
                Ok(stretch) => return Ok(stretch),
                Err(_) if self.output.is_closed() => return Err(Unwanted),
                Err(error) => {
                    if failures == 0 {
                        tracing::warn!(subscriber = self.spec.name, error = %error.report(), "waiting for nats");
                    }
                    failures += 1;
                    tokio::time::sleep(Backoff::RECONNECT.after(failures)).await;
                }
            }
        }
    }

    fn hand_on(&self, incoming: Incoming) -> Result<(), Unwanted> {
        self.output.send(Fed::Message(Box::new(incoming))).map_err(|_| Unwanted)
    }
}

/// How far the stream is known.
#[derive(Debug)]
struct Seen {
    /// All messages up to this stream sequence were handed on, or were acked before this feed began.
    sequence: u64,
    /// The consumer sequence of the last delivery.
    deliveries: u64,
    /// Whether deliveries were missed since the last new message.
    missed: bool,
}

impl Seen {
    /// A message of the stream has come as this delivery of the consumer, for the first time or again: the first and the
    /// last sequence of those in front of it that may have been missed.
    fn arrived(&mut self, sequence: u64, delivery: u64, again: bool) -> Option<(u64, u64)> {
        // What was missed may have been new, also when the next to come is one that comes again.
        self.missed |= delivery != self.deliveries + 1;
        self.deliveries = delivery;
        if sequence <= self.sequence {
            return None;
        }
        let (first, last) = (self.sequence + 1, sequence - 1);
        self.sequence = sequence;
        let missed = self.missed && first <= last;
        // All that was missed lies in front of a message that comes for the first time. Those that come again have no
        // order: the next one may leap over others that were missed.
        self.missed &= again;
        missed.then_some((first, last))
    }
}

/// A copy, so that a small payload does not keep the connection's whole read buffer.
fn detached(payload: &Bytes) -> Bytes {
    Bytes::copy_from_slice(payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_front_of_what_comes_again_more_may_have_been_missed() {
        let mut seen = Seen { sequence: 10, deliveries: 20, missed: false };
        // The consumer's subjects are not all of the stream's: a leap is no hole as long as no delivery is missing.
        assert_eq!(seen.arrived(12, 21, false), None);
        // 13 to 40 were delivered and lost on the way; then they come again, in whatever order.
        assert_eq!(seen.arrived(14, 51, true), Some((13, 13)));
        assert_eq!(seen.arrived(30, 52, true), Some((15, 29)));
        assert_eq!(seen.arrived(13, 53, true), None);
        assert_eq!(seen.arrived(31, 54, true), None);
        // A new one settles it: there is nothing in front of it that was not delivered.
        assert_eq!(seen.arrived(41, 55, false), Some((32, 40)));
        assert_eq!(seen.arrived(50, 56, false), None);
        // Missed without a leap, and found out later.
        assert_eq!(seen.arrived(20, 58, true), None);
        assert_eq!(seen.arrived(60, 59, false), Some((51, 59)));
    }

    #[test]
    fn a_budget_is_full_by_number_or_by_size_and_room_comes_back() {
        let budget = Budget::new(3, 1000);
        assert_eq!(budget.room(100), 3);
        assert_eq!(budget.room(600), 2, "what is on its way may exceed the size by one message");
        let small = budget.take(100);
        let large = budget.take(900);
        assert!(budget.is_full());
        drop(large);
        assert_eq!(budget.room(1), 2);
        let more = [budget.take(1), budget.take(1)];
        assert!(budget.is_full());
        drop((small, more));
        assert_eq!(budget.room(100), 3);
    }
}
