//! The messages of a consumer, in an order that can be relied on.
//!
//! JetStream delivers a message again only when its ack wait has run out, while newer ones come at once. So what a
//! predecessor left unacked, and what got lost on the way, would come behind newer messages of the same key. The feed
//! closes such holes: whenever messages were delivered that it has not seen, it reads them from the stream before it
//! hands on anything newer. Every message that the feed hands on for the first time is newer than all before it.
//!
//! Where the consumer stands counts only as far as the stream is what it was. When that has lost its end, others come into
//! the places of what was lost, and the consumer may count them as delivered. So the feed begins where the subscriber has
//! come by its own account, reads the stream from there up to where the consumer stands, and ends when a message that
//! it has seen is not in its place any more.

mod missed;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use async_nats::jetstream::Context;
use async_nats::{Client, StatusCode};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt, TryFutureExt};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use crate::backoff::Backoff;
use crate::envelope::{Envelope, EnvelopeError};
use crate::owner::Owner;
use aftercommit_outbox::event::EventId;

use super::Connection;
use super::ack::Reply;
use super::api;
use super::budget::{Budget, Permit};
use super::consumer::{self, ConsumerSpec, Position};
use super::seen::Seen;
use super::stored;
use super::witness::{self, Witness};
use crate::error::Error;

/// The most messages in one pull request.
const MAX_PULL: usize = 1000;
/// How long the server keeps a pull request.
const EXPIRES: Duration = Duration::from_secs(10);
/// How often the server says that it still knows of a pull request.
const HEARTBEAT: Duration = Duration::from_secs(3);
/// How often to look whether the stream has lost its end, or the consumer was given to another database, although the
/// connection holds.
const LOOK: Duration = Duration::from_secs(5);
/// How often to look for what comes into a stream that ends before the consumer's place.
const BEHIND: Duration = Duration::from_millis(250);
const LOST_END: &str = "the stream has lost its end, or its newest messages were removed";
const GIVEN_AWAY: &str = "the consumer was given to another database";
const MADE_ANEW: &str = "the connection was made anew";

/// A message for the subscriber.
#[derive(Debug)]
pub struct Incoming {
    /// Its place in the stream.
    pub place: Witness,
    /// How often it was delivered; 0 when it was read from the stream.
    pub deliveries: u64,
    /// Where the answer goes; none when it was read from the stream.
    pub reply: Option<Reply>,
    /// The event in it.
    pub event: Result<Envelope, EnvelopeError>,
    /// Its share of the memory.
    pub permit: Permit,
}

/// What a feed hands on.
#[derive(Debug)]
pub enum Fed {
    /// The next message.
    Message(Box<Incoming>),
    /// Everything for the subscriber at or before this message was handed on, or was done.
    Complete(Witness),
    /// The server does not deliver, for this reason; none when it does again.
    Refused(Option<String>),
    /// The consumer is gone or no longer the same, or the stream has lost its end: sequences and replies known so far mean
    /// nothing any more.
    Ended(String),
}

/// Finds out which of some events the subscriber is done with; it may leave some out.
pub type Done = Box<dyn Fn(Vec<EventId>) -> BoxFuture<'static, HashSet<EventId>> + Send + Sync>;

/// Reads a consumer from `position` on until it is dropped. What it reads from the stream and is `done` is not handed
/// on. `reached` is where the subscriber has come by its own account, if it has written that down.
pub fn start(
    nats: &Connection,
    spec: &ConsumerSpec,
    position: Position,
    reached: Option<Reached>,
    budget: &Arc<Budget>,
    done: Done,
) -> (mpsc::UnboundedReceiver<Fed>, AbortOnDropHandle<()>) {
    // The budget bounds what is in it.
    let (output, messages) = mpsc::unbounded_channel();
    let feed = Feed {
        client: nats.client.clone(),
        context: nats.jetstream(),
        nats: nats.clone(),
        spec: spec.clone(),
        budget: Arc::clone(budget),
        done,
        output,
        created: position.created,
        owner: position.owner,
        seen: Seen { sequence: position.delivered, deliveries: position.deliveries, missed: false },
        last: reached.and_then(|reached| reached.0),
        failures: 0,
        refused: None,
        whole: AtomicBool::new(spec.subjects.len() > stored::FEW_SUBJECTS),
        max_pull: MAX_PULL,
        // Nothing is known of the messages: be careful at first.
        typical: 1_000_000,
    };
    let unacked = match reached {
        Some(Reached(place)) => Some(position.ack_floor.min(place.map_or(0, |place| place.sequence))),
        None => position.outstanding.then_some(position.ack_floor),
    };
    (messages, AbortOnDropHandle::new(tokio::spawn(feed.run(unacked))))
}

/// Where a subscriber has come by its own account; nowhere when no place that it knows is in the stream any more.
#[derive(Debug, Clone, Copy)]
pub struct Reached(pub Option<Witness>);

struct Feed {
    client: Client,
    context: Context,
    nats: Connection,
    spec: ConsumerSpec,
    budget: Arc<Budget>,
    done: Done,
    output: mpsc::UnboundedSender<Fed>,
    created: String,
    owner: Option<Owner>,
    seen: Seen,
    /// The newest message of which it is known when it was stored.
    last: Option<Witness>,
    /// Interruptions since the last sign of life of the consumer.
    failures: u32,
    /// Whether to read the stream in whole batches. The user may lack the right to.
    whole: AtomicBool,
    /// Why the server does not deliver, as far as that was told.
    refused: Option<String>,
    /// The most messages in one pull request that the server takes.
    max_pull: usize,
    /// The size of messages, a moving average.
    typical: usize,
}

/// How many messages a pull request may ask for, as the server says when one asks for more
/// (`max_request_batch` of the server or the account, nats-server 2.11, `consumer.go`).
fn largest_request(description: &str) -> Option<usize> {
    description.strip_prefix("Exceeded MaxRequestBatch of ")?.trim().parse().ok().filter(|most| *most > 0)
}

/// The session's side of the feed is gone.
struct Unwanted;

/// What there is to a question.
type Answer<T> = BoxFuture<'static, Result<T, Error>>;

/// Why the feed does not go on.
enum Over {
    Unwanted,
    Ended(String),
}

impl Feed {
    async fn run(mut self, unacked: Option<u64>) {
        match self.catch_up(unacked).await {
            Ok(()) => {}
            Err(Over::Ended(reason)) => return self.end(reason),
            Err(Over::Unwanted) => return,
        }
        loop {
            let connects = match self.confirm().await {
                Ok(connects) => connects,
                Err(reason) => return self.end(reason),
            };
            match self.pull(connects).await {
                Ok(why) => {
                    tracing::debug!(subscriber = self.spec.name, why, "pulling is interrupted");
                    if self.failures > 0 {
                        self.tell_refused(Some(why));
                        tokio::time::sleep(Backoff::RECONNECT.after(self.failures)).await;
                    }
                    self.failures += 1;
                }
                Err(Over::Ended(reason)) => return self.end(reason),
                Err(Over::Unwanted) => return,
            }
        }
    }

    /// Tells the session and the log why the server does not deliver, or that it does again; each reason once.
    fn tell_refused(&mut self, why: Option<String>) {
        if self.refused == why {
            return;
        }
        match &why {
            Some(why) => tracing::warn!(subscriber = self.spec.name, why, "the server does not deliver"),
            None => tracing::info!(subscriber = self.spec.name, "the server delivers again"),
        }
        self.refused.clone_from(&why);
        let _ = self.output.send(Fed::Refused(why));
    }

    /// The server has given a sign of life of the consumer.
    fn heard(&mut self) {
        self.failures = 0;
        self.tell_refused(None);
    }

    fn end(self, reason: String) {
        let _ = self.output.send(Fed::Ended(reason));
    }

    /// The sequence of the newest message.
    async fn end_of_stream(&self) -> Result<u64, Unwanted> {
        Ok(self.newest().await?.map_or(0, |newest| newest.sequence))
    }

    async fn newest(&self) -> Result<Option<Witness>, Unwanted> {
        self.insist(|context, spec| {
            let newest = async move { api::newest(&context, &spec.stream).await.map_err(unreadable) };
            newest.map_ok(|newest| newest.as_ref().map(Witness::of)).boxed()
        })
        .await
    }

    async fn at(&self, sequence: u64) -> Result<Option<Witness>, Unwanted> {
        self.insist(|context, spec| async move { witness::at(&context, &spec.stream, sequence).await }.boxed()).await
    }

    fn connects(&self) -> u64 {
        self.client.statistics().connects.load(Ordering::Relaxed)
    }

    /// Waits until the server can be asked, and makes sure that consumer and stream are still the same. Returns of which
    /// connection that was found out.
    async fn confirm(&mut self) -> Result<u64, String> {
        let mut failures = 0;
        loop {
            let connects = self.connects();
            match look(self.context.clone(), self.spec.clone(), self.last).await {
                Ok((_, false)) => return Err(LOST_END.into()),
                // What is pulled would be thrown away for a connection that was made anew meanwhile, and come again only
                // after the ack wait.
                Ok(_) if connects != self.connects() => {}
                Ok((Some(now), _)) if consumer::is_successor(&now.created, &self.created) => {
                    return Err("the consumer was made anew".into());
                }
                Ok((Some(now), _)) if now.deliveries < self.seen.deliveries => {
                    return Err("the consumer was set back".into());
                }
                Ok((Some(now), _)) if now.owner != self.owner => return Err(GIVEN_AWAY.into()),
                Ok((None, _)) => return Err("the consumer was deleted".into()),
                Ok((Some(_), _)) => {
                    if failures > 0 {
                        tracing::info!(subscriber = self.spec.name, "nats answers again");
                    }
                    return Ok(connects);
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
    async fn pull(&mut self, connects: u64) -> Result<String, Over> {
        let inbox = self.client.new_inbox();
        let mut messages = match self.client.subscribe(inbox.clone()).await {
            Ok(messages) => messages,
            Err(error) => return Ok(error.to_string()),
        };
        let mut owed = 0;
        let mut heard = Instant::now();
        let mut watch = tokio::time::interval(Duration::from_millis(250));
        // The stream may be on another server than the one that this is connected to.
        let mut looking: Option<Answer<(Option<Position>, bool)>> = None;
        let mut looked = Instant::now();
        loop {
            let budget = Arc::clone(&self.budget);
            // Before the look at the room, so that nothing freed after it is missed.
            let freed = budget.freed();
            let room = budget.room(self.typical);
            if owed <= MAX_PULL / 2 && owed < room {
                let more = (room - owed).min(self.max_pull);
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
                    if self.connects() != connects {
                        return Ok(MADE_ANEW.into());
                    }
                    match self.receive(message, &mut owed).await? {
                        Some(odd) => return Ok(odd),
                        None => heard = Instant::now(),
                    }
                }
                () = freed, if owed <= MAX_PULL / 2 && owed >= room => {}
                seen = answer(&mut looking) => {
                    (looking, looked) = (None, Instant::now());
                    match seen {
                        Ok((_, false)) => return Err(Over::Ended(LOST_END.into())),
                        Ok((Some(now), _)) if now.owner != self.owner => {
                            return Err(Over::Ended(GIVEN_AWAY.into()));
                        }
                        _ => {}
                    }
                }
                () = self.output.closed() => {
                    // The server gives what is handed back to whoever pulls, and that must not be this one.
                    let _ = messages.unsubscribe().await;
                    let _ = self.client.flush().await;
                    return Err(Over::Unwanted);
                }
                _ = watch.tick() => {
                    if self.connects() != connects {
                        return Ok(MADE_ANEW.into());
                    }
                    if looking.is_none() && looked.elapsed() > LOOK {
                        looking = Some(look(self.context.clone(), self.spec.clone(), self.last).boxed());
                    }
                    if owed > 0 && heard.elapsed() > 3 * HEARTBEAT {
                        return Ok("the server is silent".into());
                    }
                }
            }
        }
    }

    async fn request(&self, inbox: &str, messages: usize) -> Result<(), String> {
        let subject = format!("CONSUMER.MSG.NEXT.{}.{}", self.spec.stream, self.spec.name);
        let body = format!(
            r#"{{"batch":{messages},"expires":{},"idle_heartbeat":{}}}"#,
            EXPIRES.as_nanos(),
            HEARTBEAT.as_nanos()
        );
        api::send(&self.context, &subject, inbox, body.into()).await.map_err(|error| error.to_string())
    }

    /// Takes one message or status, and says when it is odd.
    async fn receive(&mut self, message: async_nats::Message, owed: &mut usize) -> Result<Option<String>, Over> {
        match message.status {
            None | Some(StatusCode::OK) => {
                *owed = owed.saturating_sub(1);
                self.heard();
                self.accept(message).await?;
                Ok(None)
            }
            Some(StatusCode::IDLE_HEARTBEAT) => {
                self.heard();
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
                    _ => {
                        if let Some(most) = largest_request(description) {
                            self.max_pull = most;
                        }
                        Ok(Some(format!("{status} {description}")))
                    }
                }
            }
        }
    }

    /// Hands on a delivered message, behind all that come before it.
    async fn accept(&mut self, message: async_nats::Message) -> Result<(), Over> {
        let message = async_nats::jetstream::Message { message, context: self.context.clone() };
        let (place, delivery, count) = match message.info() {
            Ok(info) => (Witness::new(info.stream_sequence, info.published), info.consumer_sequence, info.delivered),
            Err(error) => {
                tracing::warn!(subscriber = self.spec.name, error, "a message did not come from the consumer");
                return Ok(());
            }
        };
        let message = message.message;
        if let Some((first, last)) = self.seen.arrived(place.sequence, delivery, count > 1) {
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
        if self.last.is_none_or(|last| last.sequence <= place.sequence) {
            self.last = Some(place);
        }
        let incoming = Incoming {
            place,
            deliveries: count.unsigned_abs(),
            reply: message.reply.map(Reply),
            event: super::envelope(message.headers.as_ref(), detached(&message.payload)),
            permit: self.budget.take(payload),
        };
        Ok(self.hand_on(incoming)?)
    }

    /// Asks until there is an answer.
    async fn insist<T>(&self, question: impl Fn(Context, ConsumerSpec) -> Answer<T>) -> Result<T, Unwanted> {
        let mut failures = 0;
        loop {
            match question(self.context.clone(), self.spec.clone()).await {
                Ok(answer) => return Ok(answer),
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

impl From<Unwanted> for Over {
    fn from(Unwanted: Unwanted) -> Self {
        Self::Unwanted
    }
}

fn unreadable(error: api::Failure) -> Error {
    Error::with_source(crate::error::ErrorKind::Broker, "the stream cannot be looked at", error)
}

/// Where the consumer stands, and whether the stream is still what it was.
async fn look(context: Context, spec: ConsumerSpec, last: Option<Witness>) -> Result<(Option<Position>, bool), Error> {
    let position = consumer::locate(&context, &spec).await?;
    Ok((position, stands(context, spec.stream, last).await?))
}

/// Whether the stream is still what it was; it is when nothing of it is known.
async fn stands(context: Context, stream: String, last: Option<Witness>) -> Result<bool, Error> {
    match last {
        Some(last) => witness::stands(&context, &stream, last).await,
        None => Ok(true),
    }
}

/// The answer to a question, once there is one.
async fn answer<T>(question: &mut Option<BoxFuture<'static, T>>) -> T {
    match question {
        Some(question) => question.await,
        None => std::future::pending().await,
    }
}

/// A copy, so that a small payload does not keep the connection's whole read buffer.
fn detached(payload: &Bytes) -> Bytes {
    Bytes::copy_from_slice(payload)
}
