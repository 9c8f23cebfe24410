//! Questions to JetStream's API about one stream or consumer, as its leader answers them.
//!
//! In a cluster every server hears a question. Members that know no leader answer too: with an error, or with what they
//! have themselves, which may be old; and one that has just started with a consumer that has delivered nothing yet. None of
//! that is an answer here. The question is asked again until a leader answers, for some time.

use std::error::Error as StdError;
use std::time::{Duration, Instant};

use async_nats::StatusCode;
use async_nats::client::{self, Client, PublishError};
use async_nats::jetstream::context::{RequestError, RequestErrorKind};
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::{ClusterInfo, RawMessage};
use async_nats::jetstream::{self, Context, ErrorCode, consumer, stream};
use bytes::Bytes;
use futures_util::StreamExt;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::settings::Fields;
use crate::config::check_stream;
use crate::error::{Error, causes};

/// How long a question may be without a leader's answer before it is asked again. A leader that was elected meanwhile does
/// not answer older ones.
const GRACE: Duration = Duration::from_millis(250);
/// How long it is asked again. An election takes longer, and whoever asks has its own way to wait.
const PATIENCE: Duration = Duration::from_secs(2);

/// Why there is no answer.
pub(super) type Failure = Box<dyn StdError + Send + Sync>;

/// Only others have answered than a leader.
#[derive(Debug, thiserror::Error)]
#[error(
    "{of} has no leader at present; if that lasts, look into the logs of the nats-servers for `critical write error`, \
     and whether most of them run"
)]
struct NoLeader {
    of: String,
    source: Option<jetstream::Error>,
}

/// The user's account has no JetStream of its own.
#[derive(Debug, thiserror::Error)]
#[error(
    "the account of this NATS user has no JetStream; where it imports that of another one, set NATS_API_PREFIX or \
     --nats-api-prefix to the name that it has there, such as JS.API"
)]
struct NoJetStream(#[source] jetstream::Error);

/// Whether an error is that nobody leads the stream or the consumer.
pub fn has_no_leader(error: &Error) -> bool {
    causes(error).any(|cause| cause.is::<NoLeader>())
}

/// What an answer says about who gave it.
trait Answer: DeserializeOwned {
    /// Whether a leader gave it; `clustered` says whether the server at the other end is part of a cluster.
    fn is_leaders(&self, clustered: impl FnOnce() -> bool) -> bool;
}

impl Answer for stream::Info {
    fn is_leaders(&self, clustered: impl FnOnce() -> bool) -> bool {
        names_leader(self.cluster.as_ref(), clustered)
    }
}

impl Answer for consumer::Info {
    fn is_leaders(&self, clustered: impl FnOnce() -> bool) -> bool {
        names_leader(self.cluster.as_ref(), clustered)
    }
}

/// The answer to a question for one message.
#[derive(Deserialize)]
struct Got {
    message: RawMessage,
}

impl Answer for Got {
    fn is_leaders(&self, _: impl FnOnce() -> bool) -> bool {
        true
    }
}

/// One server alone says nothing of a cluster.
fn names_leader(cluster: Option<&ClusterInfo>, clustered: impl FnOnce() -> bool) -> bool {
    match cluster {
        Some(cluster) => cluster.leader.as_ref().is_some_and(|leader| !leader.is_empty()),
        None => !clustered(),
    }
}

fn is_leaders<T: Answer>(answer: &Response<T>, clustered: impl FnOnce() -> bool) -> bool {
    match answer {
        Response::Ok(answer) => answer.is_leaders(clustered),
        Response::Err { error } => error.error_code() != ErrorCode::CLUSTER_NOT_AVAILABLE,
    }
}

/// Whether the server at the other end keeps streams together with others. One that is a leaf of others and stands alone
/// otherwise names itself as its cluster.
fn clustered(client: &Client) -> bool {
    let server = client.server_info();
    server.jetstream && server.cluster.is_some_and(|cluster| cluster != server.server_name)
}

/// A question without details.
#[derive(Serialize)]
struct Plain {}

/// Which message is asked for.
#[derive(Serialize)]
struct Which<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    seq: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    next_by_subj: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_by_subj: Option<&'a str>,
}

/// The configuration and state of a stream or consumer.
#[derive(Deserialize)]
#[serde(try_from = "Value", bound = "I: DeserializeOwned")]
pub struct Described<I> {
    /// What the client makes of the server's answer.
    pub info: I,
    /// The configuration with everything that the server says of it.
    pub config: Fields,
}

impl<I: DeserializeOwned> TryFrom<Value> for Described<I> {
    type Error = serde_json::Error;

    fn try_from(answer: Value) -> Result<Self, serde_json::Error> {
        let config = answer.get("config").and_then(Value::as_object).cloned().unwrap_or_default();
        Ok(Self { info: serde_json::from_value(answer)?, config })
    }
}

impl<I: Answer> Answer for Described<I> {
    fn is_leaders(&self, clustered: impl FnOnce() -> bool) -> bool {
        self.info.is_leaders(clustered)
    }
}

/// The stream's configuration and state; none when there is no such stream.
pub(super) async fn stream(context: &Context, stream: &str) -> Result<Option<Described<stream::Info>>, Failure> {
    check_stream(stream)?;
    let answer = ask(context, &format!("STREAM.INFO.{stream}"), &Plain {}, || format!("stream {stream}")).await?;
    unless(answer, &[ErrorCode::STREAM_NOT_FOUND])
}

/// The consumer's configuration and state; none when there is no such consumer or stream.
pub(super) async fn consumer(
    context: &Context,
    stream: &str,
    consumer: &str,
) -> Result<Option<Described<consumer::Info>>, Failure> {
    check_stream(stream)?;
    let of = || format!("consumer {consumer} of stream {stream}");
    let answer = ask(context, &format!("CONSUMER.INFO.{stream}.{consumer}"), &Plain {}, of).await?;
    unless(answer, &[ErrorCode::CONSUMER_NOT_FOUND, ErrorCode::STREAM_NOT_FOUND])
}

/// The message under a sequence or, on a subject, the first from there on; none when there is none.
pub(super) async fn message(
    context: &Context,
    stream: &str,
    sequence: u64,
    next_on: Option<&str>,
) -> Result<Option<StreamMessage>, Failure> {
    get(context, stream, &Which { seq: Some(sequence), next_by_subj: next_on, last_by_subj: None }).await
}

/// The newest message; none when the stream is empty.
pub(super) async fn newest(context: &Context, stream: &str) -> Result<Option<StreamMessage>, Failure> {
    get(context, stream, &Which { seq: None, next_by_subj: None, last_by_subj: Some(">") }).await
}

/// Which message is deleted; without `no_erase` its bytes are overwritten.
#[derive(Serialize)]
struct Deleted {
    seq: u64,
    no_erase: bool,
}

/// The answer to a deletion.
#[derive(Deserialize)]
struct Deletion {
    success: bool,
}

impl Answer for Deletion {
    fn is_leaders(&self, _: impl FnOnce() -> bool) -> bool {
        true
    }
}

/// Deletes a message and overwrites its bytes. False when there was none under this sequence.
pub(super) async fn erase(context: &Context, stream: &str, sequence: u64) -> Result<bool, Failure> {
    check_stream(stream)?;
    let question = Deleted { seq: sequence, no_erase: false };
    let answer =
        ask::<Deletion>(context, &format!("STREAM.MSG.DELETE.{stream}"), &question, || format!("stream {stream}"))
            .await;
    let answer = unless(answer?, &[ErrorCode::NO_MESSAGE_FOUND, ErrorCode::SEQUENCE_NOT_FOUND]);
    Ok(answer?.is_some_and(|deletion| deletion.success))
}

async fn get(context: &Context, stream: &str, which: &Which<'_>) -> Result<Option<StreamMessage>, Failure> {
    check_stream(stream)?;
    let answer = ask(context, &format!("STREAM.MSG.GET.{stream}"), which, || format!("stream {stream}")).await?;
    let got: Option<Got> = unless(answer, &[ErrorCode::NO_MESSAGE_FOUND])?;
    got.map(|got| StreamMessage::try_from(got.message)).transpose()
}

/// What was answered; none for these errors.
fn unless<T>(answer: Response<T>, none: &[ErrorCode]) -> Result<Option<T>, Failure> {
    match answer {
        Response::Ok(answer) => Ok(Some(answer)),
        Response::Err { error } if none.contains(&error.error_code()) => Ok(None),
        Response::Err { error } if error.error_code() == ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT => {
            Err(NoJetStream(error).into())
        }
        Response::Err { error } => Err(error.into()),
    }
}

/// A leader's answer to a question; `of` says what it leads.
async fn ask<T: Answer>(
    context: &Context,
    subject: &str,
    question: &impl Serialize,
    of: impl FnOnce() -> String,
) -> Result<Response<T>, Failure> {
    // The first answer is nearly always a leader's. An inbox for each question would make many at a time a fifth slower.
    let answer = context.request(subject.to_string(), question).await?;
    if is_leaders(&answer, || clustered(&context.client())) {
        return Ok(answer);
    }
    let question = serde_json::to_vec(question)?.into();
    match insist(context, subject, question, answer).await? {
        Ok(answer) => Ok(answer),
        Err(Response::Ok(_)) => Err(NoLeader { of: of(), source: None }.into()),
        Err(Response::Err { error }) => Err(NoLeader { of: of(), source: Some(error) }.into()),
    }
}

/// Sends a question of JetStream's API, such as `STREAM.INFO.EVENTS`, whose answers come to an inbox of the caller's.
pub(super) async fn send(context: &Context, subject: &str, inbox: &str, question: Bytes) -> Result<(), PublishError> {
    context.send_request(subject.to_string(), client::Request::new().inbox(inbox.into()).payload(question)).await
}

/// Asks again until a leader answers; otherwise returns what was answered last, to begin with `last`.
async fn insist<T: Answer>(
    context: &Context,
    subject: &str,
    question: Bytes,
    mut last: Response<T>,
) -> Result<Result<Response<T>, Response<T>>, Failure> {
    let client = context.client();
    let inbox = client.new_inbox();
    let mut answers = client.subscribe(inbox.clone()).await?;
    let began = Instant::now();
    let mut insistence = Insistence::default();
    loop {
        match insistence.next(began.elapsed()) {
            Step::Ask => send(context, subject, &inbox, question.clone()).await?,
            Step::Listen(time) => {
                let Ok(answer) = tokio::time::timeout(time, answers.next()).await else { continue };
                let answer = answer.ok_or("the NATS client was closed")?;
                if answer.status == Some(StatusCode::NO_RESPONDERS) {
                    return Err(RequestError::new(RequestErrorKind::NoResponders).into());
                }
                last = serde_json::from_slice(&answer.payload)?;
                if is_leaders(&last, || clustered(&client)) {
                    return Ok(Ok(last));
                }
            }
            Step::GiveUp => return Ok(Err(last)),
        }
    }
}

/// When a question is asked again.
#[derive(Debug, Default)]
struct Insistence {
    /// When it is asked next.
    next: Duration,
}

#[derive(Debug, PartialEq, Eq)]
enum Step {
    Ask,
    /// For an answer, for so long.
    Listen(Duration),
    GiveUp,
}

impl Insistence {
    /// What to do so long after the first answer that was not a leader's.
    fn next(&mut self, elapsed: Duration) -> Step {
        if elapsed >= PATIENCE {
            return Step::GiveUp;
        }
        match self.next.checked_sub(elapsed).filter(|rest| !rest.is_zero()) {
            Some(rest) => Step::Listen(rest.min(PATIENCE - elapsed)),
            None => {
                self.next = elapsed + GRACE;
                Step::Ask
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use serde_json::json;

    fn leaders<T: Answer>(answer: Value, clustered: bool) -> bool {
        is_leaders(&serde_json::from_value::<Response<T>>(answer).unwrap(), || clustered)
    }

    /// The answer of a server that names this cluster, or none.
    fn stream(cluster: &Value) -> Value {
        let mut info = json!({
            "config": { "name": "S", "retention": "limits", "max_consumers": -1, "max_msgs": -1, "max_bytes": -1,
                "discard": "new", "max_age": 0, "storage": "file", "num_replicas": 3 },
            "created": "2026-01-01T00:00:00Z",
            "state": { "messages": 0, "bytes": 0, "first_seq": 0, "first_ts": "0001-01-01T00:00:00Z", "last_seq": 0,
                "last_ts": "0001-01-01T00:00:00Z", "consumer_count": 0 },
        });
        if !cluster.is_null() {
            info["cluster"] = cluster.clone();
        }
        info
    }

    fn consumer(cluster: &Value) -> Value {
        let mut info = json!({
            "stream_name": "S", "name": "c", "created": "2026-01-01T00:00:00Z",
            "config": { "durable_name": "c", "ack_policy": "explicit", "deliver_policy": "all", "replay_policy": "instant" },
            "delivered": { "consumer_seq": 0, "stream_seq": 0 }, "ack_floor": { "consumer_seq": 0, "stream_seq": 0 },
            "num_ack_pending": 0, "num_redelivered": 0, "num_waiting": 0, "num_pending": 0,
        });
        if !cluster.is_null() {
            info["cluster"] = cluster.clone();
        }
        info
    }

    #[test]
    fn a_state_counts_with_a_leader_or_from_a_single_server() {
        for (cluster, clustered, counts) in [
            (json!({ "name": "C", "leader": "n1" }), true, true),
            // Such as when a leaf node asks a cluster.
            (json!({ "name": "C", "leader": "n1" }), false, true),
            (json!({ "name": "C", "replicas": [] }), true, false),
            (json!({ "name": "C", "leader": "" }), true, false),
            (json!({ "name": "C" }), false, false),
            (Value::Null, true, false),
            (Value::Null, false, true),
        ] {
            assert_eq!(leaders::<stream::Info>(stream(&cluster), clustered), counts, "{cluster}, {clustered}");
            assert_eq!(leaders::<consumer::Info>(consumer(&cluster), clustered), counts, "{cluster}, {clustered}");
        }
    }

    #[test]
    fn every_error_counts_but_that_nobody_leads() {
        for (code, err_code, counts) in
            [(503, 10008, false), (404, 10037, true), (404, 10059, true), (404, 10014, true)]
        {
            let error = json!({ "error": { "code": code, "err_code": err_code, "description": "" } });
            assert_eq!(leaders::<Got>(error.clone(), true), counts, "{err_code}");
            assert_eq!(leaders::<stream::Info>(error.clone(), false), counts, "{err_code}");
            assert_eq!(leaders::<consumer::Info>(error, true), counts, "{err_code}");
        }
        let message = json!({ "message": { "subject": "a", "seq": 1, "time": "2026-01-01T00:00:00Z" } });
        assert!(leaders::<Got>(message, true), "only leaders answer with messages");
    }

    #[test]
    fn a_question_is_asked_again_and_again_and_given_up_in_the_end() {
        let millis = Duration::from_millis;
        let mut insistence = Insistence::default();
        assert_eq!(insistence.next(millis(0)), Step::Ask, "nobody hears the answers to the question before any more");
        assert_eq!(insistence.next(millis(0)), Step::Listen(GRACE));
        assert_eq!(insistence.next(millis(100)), Step::Listen(millis(150)), "another answer that does not count");
        assert_eq!(
            insistence.next(millis(250)),
            Step::Ask,
            "a leader that was elected meanwhile answers only this one"
        );
        assert_eq!(insistence.next(millis(1900)), Step::Ask, "once, however late it is");
        assert_eq!(insistence.next(millis(1900)), Step::Listen(millis(100)), "and not beyond the end");
        assert_eq!(insistence.next(millis(2000)), Step::GiveUp);
    }

    #[test]
    fn who_finds_no_leader_is_told_where_to_look() {
        let source = serde_json::from_value(json!({ "code": 503, "err_code": 10008, "description": "unavailable" }));
        let error = NoLeader { of: "stream S".into(), source: Some(source.unwrap()) };
        let error = Error::with_source(ErrorKind::Broker, "cannot read stream S", error);
        assert!(has_no_leader(&error) && !has_no_leader(&Error::new(ErrorKind::Broker, "timed out")));
        let line = error.report();
        for word in ["stream S has no leader", "critical write error", "most of them run", "10008"] {
            assert!(line.contains(word), "{line}");
        }
    }
}
