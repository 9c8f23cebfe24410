//! Asks the outbox of a stream, which its leading relay serves: see [`super::server`].

use std::time::{Duration, Instant};

use async_nats::{Message, StatusCode};
use futures_util::StreamExt;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use uuid::Uuid;

use super::validate::{self, InvalidAnswer};
use super::wire::{Displaced, END, Page, Query, Rest, subject};
use crate::envelope::Envelope;
use crate::error::{Error, ErrorKind};
use crate::jetstream::{self, Connection};

/// How long the next message of an answer may take, and what is announced for it.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a query is asked that nobody answers: relays may be about to take over.
const TRIES: u32 = 5;
const BETWEEN_TRIES: Duration = Duration::from_secs(1);
/// Between two looks for what the relay does not tell yet.
const LATELY: Duration = Duration::from_millis(200);

/// Asks the outbox of a stream.
pub struct OutboxClient {
    connection: Connection,
    subject: String,
    patience: Duration,
    tries: u32,
}

impl OutboxClient {
    /// Asks the outbox whose events are in `stream`.
    pub fn new(connection: &Connection, stream: &str) -> Self {
        Self { connection: connection.clone(), subject: subject(stream), patience: PATIENCE, tries: TRIES }
    }

    /// Takes no answer for an answer, at once.
    pub fn asking_once(mut self) -> Self {
        self.tries = 1;
        self
    }

    /// The next events up to a sequence of the stream, or with `digest` only how many and which. Go on behind its `next`
    /// as long as there is `more`.
    pub async fn page(&self, up_to: u64, after: Option<Value>, types: &[String], digest: bool) -> Result<Page, Error> {
        let (token, names) = (after.clone(), types.to_vec());
        let query = match digest {
            true => Query::Digest { up_to, after, types: names },
            false => Query::Page { up_to, after, types: names },
        };
        let (_, page) = self.ask(&query, 0).await?;
        validate::page(&page, token.as_ref(), types, digest).map_err(|error| self.refused(error))?;
        Ok(page)
    }

    /// The next events that are not where the outbox's order would have them. Waits for those of the last second, which
    /// the relay does not tell yet.
    pub async fn displaced(&self, after: Option<Value>) -> Result<Displaced, Error> {
        let begun = Instant::now();
        loop {
            let (_, displaced): (_, Displaced) = self.ask(&Query::Displaced { after: after.clone() }, 0).await?;
            validate::displaced(&displaced, after.as_ref()).map_err(|error| self.refused(error))?;
            if !displaced.more || !displaced.events.is_empty() {
                return Ok(displaced);
            }
            if begun.elapsed() > self.patience {
                return Err(
                    self.refused(InvalidAnswer::Refused("more is announced again and again, and never told".into()))
                );
            }
            tokio::time::sleep(LATELY).await;
        }
    }

    /// Events by their ids, those that the outbox still has, in its order.
    pub async fn events(&self, ids: &[Uuid]) -> Result<Vec<Envelope>, Error> {
        let (mut events, mut left) = (Vec::new(), ids.to_vec());
        while !left.is_empty() {
            let (found, rest) = self.several(&Query::Events { ids: left.clone() }, left.len()).await?;
            validate::events(&left, &found, &rest).map_err(|error| self.refused(error))?;
            if found.is_empty() && !rest.left_out.is_empty() {
                return Err(Error::new(ErrorKind::Broker, "an event of the outbox is larger than the server takes"));
            }
            events.extend(found);
            left = rest.left_out;
        }
        events.sort_by_key(|event| event.sequence);
        Ok(events)
    }

    /// The next events of some keys from an outbox id on, in its order, and where to go on. At least all that do not lie in
    /// the stream at or before `behind`.
    pub async fn of_keys(
        &self,
        keys: &[String],
        from: i64,
        behind: u64,
    ) -> Result<(Vec<Envelope>, Option<i64>), Error> {
        let query = Query::Keys { keys: keys.to_vec(), from, behind };
        let (events, rest) = self.several(&query, validate::MOST_EVENTS).await?;
        validate::of_keys(keys, from, &events, &rest).map_err(|error| self.refused(error))?;
        Ok((events, rest.next))
    }

    async fn several(&self, query: &Query, most: usize) -> Result<(Vec<Envelope>, Rest), Error> {
        let (messages, rest) = self.ask(query, most).await?;
        let events = messages.into_iter().map(|message| jetstream::envelope(message.headers.as_ref(), message.payload));
        let events = events.collect::<Result<_, _>>();
        Ok((events.map_err(|error| self.refused(InvalidAnswer::Wrong(error.to_string())))?, rest))
    }

    /// Events that come, `most` at most, and what stands behind them.
    async fn ask<T: DeserializeOwned>(&self, query: &Query, most: usize) -> Result<(Vec<Message>, T), Error> {
        let mut tries = 1;
        loop {
            match self.ask_once(query, most).await {
                Err(error) if error.kind() == ErrorKind::Broker && tries < self.tries => {
                    tracing::debug!(error = error.report(), tries, "asking the outbox again");
                    tries += 1;
                    tokio::time::sleep(BETWEEN_TRIES).await;
                }
                answer => return answer,
            }
        }
    }

    async fn ask_once<T: DeserializeOwned>(&self, query: &Query, most: usize) -> Result<(Vec<Message>, T), Error> {
        let subject = &self.subject;
        let failed = |why: String| Error::new(ErrorKind::Broker, format!("{subject}: {why}"));
        let client = &self.connection.client;
        let inbox = client.new_inbox();
        let mut answers = client.subscribe(inbox.clone()).await.map_err(|error| failed(error.to_string()))?;
        let query = json!(query).to_string();
        client
            .publish_with_reply(subject.clone(), inbox, query.into())
            .await
            .map_err(|error| failed(error.to_string()))?;
        let mut events = Vec::new();
        loop {
            let Ok(answer) = tokio::time::timeout(self.patience, answers.next()).await else {
                let complaint = self.connection.complaint().map(|text| format!(": {text}")).unwrap_or_default();
                return Err(failed(format!("no answer{complaint}")));
            };
            let message = answer.ok_or_else(|| failed("the NATS client was closed".into()))?;
            if message.status == Some(StatusCode::NO_RESPONDERS) {
                return Err(failed("no relay answers".into()));
            }
            let header = |name: &str| message.headers.as_ref().is_some_and(|headers| headers.get(name).is_some());
            if header(crate::envelope::CE_ID) && !header(END) {
                if events.len() == most {
                    return Err(self.refused(InvalidAnswer::Wrong(format!("more than {most} events"))));
                }
                events.push(message);
                continue;
            }
            return Ok((events, validate::last(&message.payload).map_err(|error| self.refused(error))?));
        }
    }

    fn refused(&self, error: InvalidAnswer) -> Error {
        let subject = &self.subject;
        match error {
            InvalidAnswer::Refused(why) => Error::new(ErrorKind::NotReady, format!("{subject}: {why}")),
            InvalidAnswer::Wrong(_) => {
                let problem = format!("an answer on {subject} is refused: only this stream's relays may answer there");
                Error::with_source(ErrorKind::Integrity, problem, error)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::config::NatsConfig;
    use crate::outbox_query::server::Queries;
    use crate::outbox_query::wire::{Answer, Listed, Moved};
    use aftercommit_testing::servers::{Nats, NatsOptions};

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
            replaces: Vec::new(),
        }
    }

    fn listed() -> Listed {
        let (event_type, time) = ("a".into(), chrono::DateTime::UNIX_EPOCH);
        Listed { id: 1, event_id: Uuid::from_u128(1), event_type, key: None, time }
    }

    fn answer(query: Query) -> Answer {
        let page = |count: Option<u64>, digest| Page {
            behind: 1,
            to: 2,
            events: count.is_none().then(listed).into_iter().collect(),
            next: json!(if count.is_none() { "token" } else { "next" }),
            count,
            digest,
            more: true,
            complete_to: None,
        };
        let send = |ids: &[u128], rest| Answer::Events(ids.iter().map(|n| ("e.a".into(), event(*n))).collect(), rest);
        match query {
            Query::Page { up_to: 7, after: None, types } if types == ["a"] => Answer::One(json!(page(None, None))),
            Query::Digest { after: Some(_), .. } => Answer::One(json!(page(Some(1), Some("5".into())))),
            Query::Displaced { .. } => {
                let moved =
                    Moved { id: 1, event_id: Uuid::nil(), key: None, state: "queued".into(), sequence: Some(4) };
                Answer::One(json!(Displaced { events: vec![moved], next: json!([1, 2]), more: true }))
            }
            // One at a time, in the order of the outbox.
            Query::Events { ids } => {
                let mut numbers: Vec<u128> = ids.iter().map(Uuid::as_u128).collect();
                numbers.sort_unstable();
                let left_out = numbers[1..].iter().map(|n| Uuid::from_u128(*n)).collect();
                send(&numbers[..1], Rest { next: None, left_out })
            }
            Query::Keys { from: 5, .. } => send(&[5, 6], Rest { next: Some(7), left_out: vec![] }),
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
        let mut queries = Queries::subscribe(&connect("relay").await, "S").await.unwrap();
        tokio::spawn(async move {
            while let Some((query, reply)) = queries.next().await {
                reply.send(answer(query)).await;
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

    /// Who is silent, and who announces more again and again, is left alone after a while.
    #[tokio::test]
    async fn it_does_not_wait_for_ever() {
        let nats = Nats::start(NatsOptions::default()).await.unwrap();
        let config = NatsConfig { url: nats.url(), ..NatsConfig::default() };
        let connect = async |name: &str| crate::jetstream::connect(&config, name, "_INBOX_test").await.unwrap();
        let patience = Duration::from_millis(50);
        let client = OutboxClient { patience, ..OutboxClient::new(&connect("asker").await, "S") };
        let mut queries = Queries::subscribe(&connect("relay").await, "S").await.unwrap();
        let answering = tokio::spawn(async move {
            let mut asked = 0;
            while let Some((query, reply)) = queries.next().await {
                asked += 1;
                match query {
                    Query::Displaced { after } => {
                        let never = Displaced { events: vec![], next: json!(after), more: true };
                        reply.send(Answer::One(json!(never))).await;
                    }
                    Query::Keys { .. } => break,
                    _ => {}
                }
            }
            asked
        });
        let silent = client.page(7, None, &[], true).await.unwrap_err();
        assert!(silent.kind() == ErrorKind::Broker && silent.report().contains("no answer"), "{}", silent.report());
        let announced = client.displaced(None).await.unwrap_err();
        assert!(announced.report().contains("never told"), "{}", announced.report());
        client.of_keys(&[], 1, 9).await.unwrap_err();
        assert!(answering.await.unwrap() > usize::try_from(TRIES).unwrap());
    }
}
