//! Asks the outbox of a stream, which its leading relay serves: see [`super::outbox_service`].

use std::time::Duration;

use async_nats::{Message, StatusCode};
use futures_util::StreamExt;
use serde_json::{Value, json};
use uuid::Uuid;

use super::Connection;
use super::outbox_service::{Displaced, END, Page, Question, Rest, subject};
use crate::envelope::Envelope;
use crate::error::{Error, ErrorKind};

/// How long the next message of an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a question is asked that nobody answers: relays may be about to take over.
const TRIES: u32 = 5;
const BETWEEN_TRIES: Duration = Duration::from_secs(1);
/// Between two looks for what the relay does not tell yet.
const LATELY: Duration = Duration::from_millis(200);

/// Asks the outbox of a stream.
pub(crate) struct OutboxClient {
    connection: Connection,
    subject: String,
}

impl OutboxClient {
    pub(crate) fn new(connection: &Connection, stream: &str) -> Self {
        Self { connection: connection.clone(), subject: subject(stream) }
    }

    /// The next events up to a sequence of the stream, or with `digest` only how many and which. Go on behind its `next`
    /// as long as there is `more`.
    pub(crate) async fn page(
        &self,
        up_to: u64,
        after: Option<Value>,
        types: &[String],
        digest: bool,
    ) -> Result<Page, Error> {
        let types = types.to_vec();
        let question = match digest {
            true => Question::Digest { up_to, after, types },
            false => Question::Page { up_to, after, types },
        };
        self.one(&question).await
    }

    /// The next events that are not where the outbox's order would have them. Waits for those of the last second, which
    /// the relay does not tell yet.
    pub(crate) async fn displaced(&self, after: Option<Value>) -> Result<Displaced, Error> {
        loop {
            let displaced: Displaced = self.one(&Question::Displaced { after: after.clone() }).await?;
            if !displaced.more || !displaced.events.is_empty() {
                return Ok(displaced);
            }
            tokio::time::sleep(LATELY).await;
        }
    }

    /// Events by their ids, those that the outbox still has, in its order.
    pub(crate) async fn events(&self, ids: &[Uuid]) -> Result<Vec<Envelope>, Error> {
        let (mut events, mut left) = (Vec::new(), ids.to_vec());
        while !left.is_empty() {
            let (found, rest) = self.several(&Question::Events { ids: left }).await?;
            if found.is_empty() && !rest.left_out.is_empty() {
                return Err(Error::new(ErrorKind::Broker, "an event of the outbox is larger than the server takes"));
            }
            events.extend(found);
            left = rest.left_out;
        }
        events.sort_by_key(|event| event.sequence);
        Ok(events)
    }

    /// The next events of some keys from an outbox id on, in its order, and where to go on.
    pub(crate) async fn of_keys(
        &self,
        keys: &[String],
        from: i64,
        up_to: u64,
    ) -> Result<(Vec<Envelope>, Option<i64>), Error> {
        let (events, rest) = self.several(&Question::Keys { keys: keys.to_vec(), from, up_to }).await?;
        Ok((events, rest.next))
    }

    async fn one<T: serde::de::DeserializeOwned>(&self, question: &Question) -> Result<T, Error> {
        let (_, last) = self.ask(question).await?;
        serde_json::from_value(last).map_err(|error| self.unreadable(error))
    }

    async fn several(&self, question: &Question) -> Result<(Vec<Envelope>, Rest), Error> {
        let (messages, last) = self.ask(question).await?;
        let events = messages.into_iter().map(|message| super::envelope(message.headers.as_ref(), message.payload));
        let events = events.collect::<Result<_, _>>().map_err(|error| self.unreadable(error))?;
        Ok((events, serde_json::from_value(last).map_err(|error| self.unreadable(error))?))
    }

    async fn ask(&self, question: &Question) -> Result<(Vec<Message>, Value), Error> {
        let mut tries = 1;
        loop {
            match self.ask_once(question).await {
                Err(error) if error.kind() == ErrorKind::Broker && tries < TRIES => {
                    tracing::debug!(error = error.report(), tries, "asking the outbox again");
                    tries += 1;
                    tokio::time::sleep(BETWEEN_TRIES).await;
                }
                answer => return answer,
            }
        }
    }

    async fn ask_once(&self, question: &Question) -> Result<(Vec<Message>, Value), Error> {
        let subject = &self.subject;
        let failed = |why: String| Error::new(ErrorKind::Broker, format!("{subject}: {why}"));
        let client = &self.connection.client;
        let inbox = client.new_inbox();
        let mut answers = client.subscribe(inbox.clone()).await.map_err(|error| failed(error.to_string()))?;
        let question = json!(question).to_string();
        client
            .publish_with_reply(subject.clone(), inbox, question.into())
            .await
            .map_err(|error| failed(error.to_string()))?;
        let mut events = Vec::new();
        loop {
            let Ok(answer) = tokio::time::timeout(PATIENCE, answers.next()).await else {
                let complaint = self.connection.complaint().map(|text| format!(": {text}")).unwrap_or_default();
                return Err(failed(format!("no answer{complaint}")));
            };
            let message = answer.ok_or_else(|| failed("the NATS client was closed".into()))?;
            if message.status == Some(StatusCode::NO_RESPONDERS) {
                return Err(failed("no relay answers".into()));
            }
            let header = |name: &str| message.headers.as_ref().is_some_and(|headers| headers.get(name).is_some());
            if header(crate::envelope::CE_ID) && !header(END) {
                events.push(message);
                continue;
            }
            let last: Value = serde_json::from_slice(&message.payload).map_err(|error| self.unreadable(error))?;
            if let Some(why) = last.get("error").and_then(Value::as_str) {
                return Err(Error::new(ErrorKind::NotReady, format!("{subject}: {why}")));
            }
            return Ok((events, last));
        }
    }

    fn unreadable(&self, error: impl std::error::Error + Send + Sync + 'static) -> Error {
        Error::with_source(ErrorKind::Integrity, format!("an answer on {} cannot be read", self.subject), error)
    }
}

#[cfg(all(test, feature = "testing"))]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::config::NatsConfig;
    use crate::jetstream::outbox_service::{Answer, Listed, Moved, Questions};
    use crate::testing::servers::{Nats, NatsOptions};

    fn event(n: u128) -> Envelope {
        Envelope {
            id: Uuid::from_u128(n).into(),
            event_type: "a".into(),
            version: 1,
            key: Some("k".into()),
            source: "/test".into(),
            time: chrono::DateTime::UNIX_EPOCH,
            sequence: i64::try_from(n).unwrap_or_default(),
            headers: [("x".to_string(), "y".to_string())].into(),
            content_type: "application/json".into(),
            payload: Bytes::from_static(b"{}"),
        }
    }

    fn answer(question: Question) -> Answer {
        let page = |count, digest| Page {
            behind: 1,
            to: 2,
            events: vec![Listed {
                id: 1,
                event_id: Uuid::from_u128(1),
                event_type: "a".into(),
                key: None,
                time: chrono::DateTime::UNIX_EPOCH,
            }],
            count,
            digest,
            next: json!("token"),
            more: true,
            complete_to: None,
        };
        let send = |ids: &[u128], rest| Answer::Events(ids.iter().map(|n| ("e.a".into(), event(*n))).collect(), rest);
        match question {
            Question::Page { up_to: 7, after: None, types } if types == ["a"] => Answer::One(json!(page(None, None))),
            Question::Digest { after: Some(_), .. } => Answer::One(json!(page(Some(1), Some("5".into())))),
            Question::Displaced { .. } => {
                let moved =
                    Moved { id: 1, event_id: Uuid::nil(), key: None, state: "queued".into(), sequence: Some(4) };
                Answer::One(json!(Displaced { events: vec![moved], next: json!([1, 2]), more: true }))
            }
            // One at a time, in the order of the outbox.
            Question::Events { ids } => {
                let mut numbers: Vec<u128> = ids.iter().map(Uuid::as_u128).collect();
                numbers.sort_unstable();
                let left_out = numbers[1..].iter().map(|n| Uuid::from_u128(*n)).collect();
                send(&numbers[..1], Rest { next: None, left_out })
            }
            Question::Keys { from: 5, .. } => send(&[5, 6], Rest { next: Some(7), left_out: vec![] }),
            other => Answer::One(json!({ "error": format!("{other:?}") })),
        }
    }

    #[tokio::test]
    async fn it_asks_until_it_has_everything() {
        let nats = Nats::start(NatsOptions::default()).await.unwrap();
        let config = NatsConfig { url: nats.url(), ..NatsConfig::default() };
        let connect = async |name: &str| crate::jetstream::connect(&config, name, "_INBOX_test").await.unwrap();
        let client = OutboxClient::new(&connect("asker").await, "S");
        // Nobody answers yet; it asks again.
        let early = tokio::spawn(async move { (client.displaced(None).await, client) });
        tokio::time::sleep(Duration::from_millis(100)).await;
        let mut questions = Questions::subscribe(&connect("relay").await, "S").await.unwrap();
        tokio::spawn(async move {
            while let Some((question, reply)) = questions.next().await {
                reply.send(answer(question)).await;
            }
        });
        let (displaced, client) = early.await.unwrap();
        assert_eq!(displaced.unwrap().events[0].sequence, Some(4));
        let page = client.page(7, None, &["a".into()], false).await.unwrap();
        assert_eq!((page.events.len(), page.count), (1, None));
        let digest = client.page(7, Some(page.next), &[], true).await.unwrap();
        assert_eq!((digest.count, digest.digest.as_deref()), (Some(1), Some("5")));
        let events = client.events(&[3, 1, 2].map(Uuid::from_u128)).await.unwrap();
        assert_eq!(events, [event(1), event(2), event(3)]);
        let (events, next) = client.of_keys(&["k".into()], 5, 9).await.unwrap();
        assert_eq!((events, next), (vec![event(5), event(6)], Some(7)));
        let refused = client.of_keys(&[], 1, 9).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::NotReady);
    }
}
