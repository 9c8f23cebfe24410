//! Answers queries from the outbox's database. It only reads what the relay's role may read.

use std::sync::Arc;

use chrono::DateTime;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::config::{Naming, PostgresConfig};
use crate::envelope::Envelope;
use crate::error::{Error, ErrorKind};
use crate::postgres::place::{self, Place};
use crate::postgres::session::Session;
use crate::postgres::window::{self, Watch};
use crate::postgres::{self, database_error};

use super::sql;
use super::wire::{Answer, Displaced, Listed, Moved, Page, Query, Rest};

/// Events in a page, unless they are more than a message holds.
const PAGE: i64 = 500;
/// What an answer holds beside its events, at most.
const OVERHEAD: usize = 4 << 10;
/// As long as the rest of an event that was moved.
const MOVED: &str = "\"id\":9223372036854775807,\"event_id\":\"00000000-0000-0000-0000-000000000000\",\"state\":\"published\",\"sequence\":18446744073709551615";
/// Ids that are read at a time for a digest.
const IDS: i64 = 10_000;
/// Messages of the stream that one range covers, unless the relay's log has no place so near.
const RANGE: u64 = 100_000;
/// Rows that are looked through for some keys at a time.
const LOOK: i64 = 100_000;
/// Whole events in an answer, and their bytes.
const EVENTS: i64 = 100;
const EVENT_BYTES: usize = 4 << 20;

/// Where the next query goes on: between two places, behind an id; or behind a place.
#[derive(Debug, Serialize, Deserialize)]
struct Token {
    from: Place,
    to: Option<Place>,
    id: i64,
}

/// Why there is no answer.
pub(super) enum Refusal {
    Told(&'static str),
    Database(sqlx::Error),
}

const FOREIGN: Refusal = Refusal::Told("the token was not issued by this outbox");

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Told(why) => Self::new(ErrorKind::NotReady, why),
            Refusal::Database(error) => database_error("reading the outbox failed", error),
        }
    }
}

impl From<sqlx::Error> for Refusal {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error)
    }
}

/// Reads an outbox for those who query it.
pub struct OutboxReader {
    session: Session,
    naming: Arc<Naming>,
    /// Bytes of one message.
    room: usize,
}

/// How many of these fit into a message: at least one, so that every page leads on.
fn fitting<T: Serialize>(events: &[T], room: usize) -> usize {
    let mut bytes = OVERHEAD;
    let fits = |event: &&T| {
        bytes += serde_json::to_vec(event).map_or(0, |json| json.len() + 1);
        bytes <= room
    };
    events.iter().take_while(fits).count().max(1)
}

impl OutboxReader {
    /// Without a relay, for somebody who may read the outbox's database.
    pub async fn open(postgres: &PostgresConfig, naming: &Naming) -> Result<Self, Error> {
        let session = postgres::connect(postgres, "aftercommit").await?;
        // What is read here goes into no message.
        Ok(Self { session, naming: Arc::new(naming.clone()), room: usize::MAX })
    }

    /// For the leading relay; `room` are the bytes of one message.
    pub(super) async fn serving(postgres: &PostgresConfig, naming: &Arc<Naming>, room: usize) -> Result<Self, Error> {
        let session = postgres::connect(postgres, "aftercommit-relay").await?.watched();
        Ok(Self { session, naming: Arc::clone(naming), room })
    }

    /// As [`Query::Page`].
    pub async fn listed(&mut self, up_to: u64, after: Option<Value>, types: &[String]) -> Result<Page, Error> {
        self.page(up_to, after, types).await.map_err(Error::from)
    }

    /// As [`Query::Events`], all of them.
    pub async fn whole(&mut self, ids: &[Uuid]) -> Result<Vec<Envelope>, Error> {
        let failed = |error| Error::from(Refusal::Database(error));
        let mut left = sql::ids(&mut self.session, ids).await.map_err(failed)?;
        let mut all = Vec::new();
        while !left.is_empty() {
            let (events, left_out) = self.events(&left).await?;
            all.extend(events.into_iter().map(|(_, event)| event));
            left = left_out.into_iter().map(|(id, _)| id).collect();
        }
        Ok(all)
    }

    pub(super) async fn answer(&mut self, query: Query) -> Result<Answer, Refusal> {
        let texts: &[String] = match &query {
            Query::Page { types, .. } | Query::Digest { types, .. } => types,
            Query::Keys { keys, .. } => keys,
            Query::Displaced { .. } | Query::Events { .. } => &[],
        };
        if texts.iter().any(|text| text.contains('\0')) {
            return Err(Refusal::Told("no type and no key has a NUL"));
        }
        Ok(match query {
            Query::Page { up_to, after, types } => Answer::One(json!(self.page(up_to, after, &types).await?)),
            Query::Digest { up_to, after, types } => Answer::One(json!(self.digest(up_to, after, &types).await?)),
            Query::Displaced { after } => Answer::One(json!(self.displaced(after).await?)),
            Query::Events { ids } => {
                let outbox_ids = sql::ids(&mut self.session, &ids).await?;
                let (events, left_out) = self.events(&outbox_ids).await?;
                Answer::Events(events, Rest { next: None, left_out: left_out.into_iter().map(|(_, id)| id).collect() })
            }
            Query::Keys { keys, from, behind } => self.of_keys(&keys, from, behind).await?,
        })
    }

    /// The range that a query is about.
    async fn range(&mut self, up_to: u64, after: Option<Value>) -> Result<Option<Token>, Refusal> {
        let stream = &self.naming.stream;
        let Some(limit) = place::at(&mut self.session, stream, up_to).await? else { return Ok(None) };
        let token: Option<Token> = match after {
            Some(after) => Some(serde_json::from_value(after).map_err(|_| FOREIGN)?),
            None => None,
        };
        let mut from = match token {
            Some(token) if token.to.is_some() => return Ok(Some(token)),
            Some(token) => token.from,
            None => match place::first(&mut self.session, stream).await? {
                Some(first) => first,
                None => return Ok(None),
            },
        };
        if let Some(back) = place::gone_back(&mut self.session, stream, &from).await? {
            from = back;
        }
        let to = place::next(&mut self.session, stream, &from, RANGE, limit.seq).await?;
        Ok(Some(Token { from, to, id: 0 }))
    }

    async fn page(&mut self, up_to: u64, after: Option<Value>, types: &[String]) -> Result<Page, Refusal> {
        let Some(Token { from, to, id }) = self.range(up_to, after.clone()).await? else { return Ok(nothing(after)) };
        let Some(to) = to else { return self.end(from).await };
        let ids = window::ids(&mut self.session, &from.mark, &to.mark, id, PAGE).await?;
        let heads = sql::heads(&mut self.session, &ids, types).await?;
        let (behind, sequence) = (from.sequence, to.sequence);
        let listed = |head: sql::Head| Listed {
            id: head.id,
            event_id: head.event_id,
            event_type: head.event_type,
            key: head.key,
            time: head.created_at,
        };
        let mut events: Vec<Listed> = heads.into_iter().map(listed).collect();
        let mut last = ids.last().copied();
        let fit = fitting(&events, self.room);
        if fit < events.len() {
            events.truncate(fit);
            last = events.last().map(|event| event.id);
        }
        let next = match last {
            Some(last) => Token { from, to: Some(to), id: last },
            None => Token { from: to, to: None, id: 0 },
        };
        Ok(Page {
            behind,
            to: sequence,
            events,
            count: None,
            digest: None,
            next: json!(next),
            more: true,
            complete_to: None,
        })
    }

    async fn digest(&mut self, up_to: u64, after: Option<Value>, types: &[String]) -> Result<Page, Refusal> {
        let Some(Token { from, to, .. }) = self.range(up_to, after.clone()).await? else { return Ok(nothing(after)) };
        let Some(to) = to else { return self.end(from).await };
        let (mut count, mut sum, mut last) = (0, 0_u128, 0);
        loop {
            let ids = window::ids(&mut self.session, &from.mark, &to.mark, last, IDS).await?;
            let Some(end) = ids.last() else { break };
            last = *end;
            let (more, digest) = sql::digest(&mut self.session, &ids, types).await?;
            count += more;
            sum = sum.wrapping_add(digest);
        }
        let (behind, sequence) = (from.sequence, to.sequence);
        let next = json!(Token { from: to, to: None, id: 0 });
        let (count, digest) = (Some(count), Some(sum.to_string()));
        Ok(Page { behind, to: sequence, events: Vec::new(), count, digest, next, more: true, complete_to: None })
    }

    /// The answer behind the last place.
    async fn end(&mut self, from: Place) -> Result<Page, Refusal> {
        let now = place::now(&mut self.session).await?;
        let complete_to = match Watch::new(&from.mark).look(&mut self.session).await?.news {
            false => Some(now),
            true => place::marked_at(&mut self.session, &from).await?,
        };
        let sequence = from.sequence;
        let next = json!(Token { from, to: None, id: 0 });
        let (count, digest) = (Some(0), None);
        Ok(Page { behind: sequence, to: sequence, events: Vec::new(), count, digest, next, more: false, complete_to })
    }

    async fn displaced(&mut self, after: Option<Value>) -> Result<Displaced, Refusal> {
        let after: (i64, i64) = match after {
            Some(token) => serde_json::from_value(token).map_err(|_| FOREIGN)?,
            None => (0, 0),
        };
        let time = DateTime::from_timestamp_micros(after.0).filter(|_| after.0 >= 0).ok_or(FOREIGN)?;
        // First, so that nothing is too new for this look and too old for the next.
        let lately = sql::repaired_lately(&mut self.session).await?;
        let mut rows = sql::repaired(&mut self.session, (time, after.1), PAGE).await?;
        // Keys are the only part that can be long.
        let keys: Vec<_> = rows.iter().map(|row| (row.2.clone(), MOVED)).collect();
        rows.truncate(fitting(&keys, self.room));
        let next = rows.last().map_or(after, |(id, .., at)| (at.timestamp_micros(), *id));
        let more = lately || !rows.is_empty();
        let events = rows
            .into_iter()
            .map(|(id, event_id, key, state, sequence, _)| Moved {
                id,
                event_id,
                key,
                state,
                sequence: sequence.map(i64::cast_unsigned),
            })
            .collect();
        Ok(Displaced { events, next: json!(next), more })
    }

    async fn of_keys(&mut self, keys: &[String], from: i64, behind: u64) -> Result<Answer, Refusal> {
        // What this place holds lies at or before the sequence; everything else has at least this id.
        let first = match place::at(&mut self.session, &self.naming.stream, behind).await? {
            Some(place) => sql::first_behind(&mut self.session, &place.mark).await?,
            None => i64::MIN,
        };
        let after = from.max(first).saturating_sub(1);
        let (ids, next) = sql::of_keys(&mut self.session, keys, after, LOOK, EVENTS).await?;
        let (events, left_out) = self.events(&ids).await?;
        // What was too much comes first next time.
        let next = left_out.first().map(|(id, _)| *id - 1).or(next);
        Ok(Answer::Events(events, Rest { next: next.map(|id| id + 1), left_out: Vec::new() }))
    }

    /// These events whole, the first at least, and those that were too much.
    async fn events(&mut self, ids: &[i64]) -> Result<(Vec<(String, Envelope)>, Vec<(i64, Uuid)>), Refusal> {
        let rows = window::some(&mut self.session, ids).await?;
        let (mut events, mut left_out, mut bytes) = (Vec::new(), Vec::new(), 0);
        for row in rows {
            if !events.is_empty() && (bytes > EVENT_BYTES || events.len() >= EVENTS as usize) {
                left_out.push((row.id, row.event_id));
                continue;
            }
            let event = window::envelope(&mut self.session, row, &self.naming.source).await?;
            let subject = self.naming.prefix.subject(&event.event_type);
            bytes += event.payload.len();
            events.push((subject, event));
        }
        Ok((events, left_out))
    }
}

/// The answer when nothing lies before the sequence in question.
fn nothing(after: Option<Value>) -> Page {
    Page {
        behind: 0,
        to: 0,
        events: Vec::new(),
        count: Some(0),
        digest: None,
        next: json!(after),
        more: false,
        complete_to: None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::select;
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    use sqlx::Executor;

    use super::*;
    use aftercommit_testing::servers::Postgres;

    const STREAM: &str = "EVENTS";

    /// An outbox with one event, which is in the stream.
    async fn reader() -> OutboxReader {
        let postgres = PostgresConfig::new(Postgres::shared().await.unwrap().create_database().await.unwrap());
        let mut session = postgres::connect(&postgres, "aftercommit-test").await.unwrap();
        postgres::migrate::run(&mut session).await.unwrap();
        let naming = Naming { stream: STREAM.into(), ..Naming::default() };
        let mut reader = OutboxReader::open(&postgres, &naming).await.unwrap();
        let written = "select aftercommit.publish('a.b', '{}', 'k');
            insert into aftercommit.relay_log
                (seq, epoch, settled, settled_id, settled_xid, stream, stream_created, base_sequence, system_identifier)
            select 1, 1, pg_current_snapshot(), 1, pg_snapshot_xmax(pg_current_snapshot()), 'EVENTS', now(), 1, 1";
        for statement in written.split(';') {
            reader.session.execute(sqlx::AssertSqlSafe(statement)).await.unwrap();
        }
        reader
    }

    fn number() -> impl Strategy<Value = Value> {
        let bounds = [i64::MIN, -1, 0, 1, 2, i64::MAX].map(|number| json!(number));
        prop_oneof![select(bounds.to_vec()), Just(json!(u64::MAX)), any::<i64>().prop_map(Value::from)]
    }

    fn place() -> impl Strategy<Value = Value> {
        let snapshots =
            ["1:1:", "3:900:3,5", "900:3:", "0:0:", "1:18446744073709551615:", "1:2:9", "x", "1:9:2,2,1", "\0"];
        let parts = (number(), select(snapshots.to_vec()), number(), number(), number(), number());
        parts.prop_map(|(seq, snapshot, id, xid, floor, sequence)| {
            json!({"seq": seq, "snapshot": snapshot, "id": id, "xid": xid, "floor": floor, "sequence": sequence})
        })
    }

    fn token() -> impl Strategy<Value = Value> {
        let others =
            [json!(null), json!([]), json!({}), json!("x"), json!([1]), json!({"from": {}, "to": null, "id": 0})];
        let ours = (place(), prop::option::of(place()), number())
            .prop_map(|(from, to, id)| json!({"from": from, "to": to, "id": id}));
        prop_oneof![6 => ours, 3 => (number(), number()).prop_map(|pair| json!(pair)), 1 => select(others.to_vec())]
    }

    fn query() -> impl Strategy<Value = Value> {
        let texts =
            select(vec![json!([]), json!(["a.b"]), json!(["a\0b"]), json!(["k", "\u{10ffff}'\";--"]), json!([""])]);
        let kind = select(vec!["page", "digest", "displaced", "keys", "events"]);
        (kind, number(), token(), texts, number()).prop_map(|(kind, up_to, after, texts, from)| match kind {
            "page" | "digest" => json!({kind: {"up_to": up_to, "after": after, "types": texts}}),
            "keys" => json!({kind: {"keys": texts, "from": from, "behind": up_to}}),
            "displaced" => json!({kind: {"after": after}}),
            _ => json!({kind: {"ids": [Uuid::nil(), Uuid::max()]}}),
        })
    }

    #[tokio::test]
    async fn every_query_is_answered_or_refused() {
        let mut reader = reader().await;
        let mut runner = TestRunner::deterministic();
        let (mut answered, mut refused) = (0, 0);
        for _ in 0..2_000 {
            let asked = query().new_tree(&mut runner).unwrap().current();
            let Ok(query) = serde_json::from_value::<Query>(asked.clone()) else { continue };
            match reader.answer(query).await {
                Ok(_) => answered += 1,
                Err(Refusal::Told(_)) => refused += 1,
                Err(Refusal::Database(error)) => panic!("{error}: {asked}"),
            }
        }
        assert!(answered > 100 && refused > 100, "{answered} answered, {refused} refused");
        let page = reader.listed(1, None, &[]).await.unwrap();
        assert_eq!(page.events.iter().map(|event| event.id).collect::<Vec<_>>(), [1]);
    }

    #[test]
    fn arbitrary_bytes_are_no_query() {
        let mut runner = TestRunner::deterministic();
        for _ in 0..1_000 {
            let bytes = prop::collection::vec(any::<u8>(), 0..200).new_tree(&mut runner).unwrap().current();
            assert!(serde_json::from_slice::<Query>(&bytes).is_err());
        }
    }
}
