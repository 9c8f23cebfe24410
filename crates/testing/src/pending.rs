//! The events that an open transaction has published so far.

use std::any::type_name;
use std::collections::BTreeMap;
use std::fmt;
use std::future::IntoFuture;
use std::panic::Location;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use sqlx::PgConnection;

use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::postgres::database_error;
use aftercommit_core::postgres::testing::{self, PendingRow};
use aftercommit_outbox::event::{Event, EventId};

/// How much of a payload a failed assertion shows.
const SHOWN: usize = 300;

/// An event that was published in a transaction which is still open. Nobody gets it before the commit.
#[derive(Clone)]
#[non_exhaustive]
pub struct PendingEvent {
    /// Its identity, as `publish` returned it.
    pub id: EventId,
    /// Its type.
    pub event_type: String,
    /// The version of the payload's shape.
    pub version: u32,
    /// The ordering key.
    pub key: Option<String>,
    /// The publisher's headers, `traceparent` among them.
    pub headers: BTreeMap<String, String>,
    /// The payload's media type.
    pub content_type: String,
    /// The payload, byte for byte.
    pub payload: Bytes,
}

impl PendingEvent {
    /// The typed event.
    ///
    /// # Errors
    /// When it is of another type, or its payload cannot be read as `E`.
    pub fn read<E: Event>(&self) -> Result<E, Error> {
        if self.event_type != E::TYPE {
            let problem = format!("event {} is {}, not {}", self.id, self.event_type, E::TYPE);
            return Err(Error::new(ErrorKind::Integrity, problem));
        }
        serde_json::from_slice(&self.payload).map_err(|error| {
            let problem = format!("event {} ({}) cannot be read as {}", self.id, E::TYPE, type_name::<E>());
            Error::with_source(ErrorKind::Integrity, problem, error)
        })
    }
}

/// Shows what identifies the event, never its payload or headers.
impl fmt::Debug for PendingEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PendingEvent")
            .field("id", &self.id)
            .field("event_type", &self.event_type)
            .field("key", &self.key)
            .field("payload_bytes", &self.payload.len())
            .finish_non_exhaustive()
    }
}

impl TryFrom<PendingRow> for PendingEvent {
    type Error = Error;

    fn try_from(row: PendingRow) -> Result<Self, Error> {
        let id = EventId::from(row.event_id);
        let headers = serde_json::from_str(&row.headers).map_err(|error| {
            Error::with_source(ErrorKind::Integrity, format!("the headers of event {id} cannot be read"), error)
        })?;
        Ok(Self {
            id,
            event_type: row.event_type,
            version: row.version.unsigned_abs(),
            key: row.key,
            headers,
            content_type: row.content_type,
            payload: row.payload.into(),
        })
    }
}

/// A pending event of a known type.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Published<E> {
    /// The event.
    pub event: E,
    /// Its identity, as `publish` returned it.
    pub id: EventId,
    /// The version of the payload's shape.
    pub version: u32,
    /// The ordering key.
    pub key: Option<String>,
    /// The publisher's headers.
    pub headers: BTreeMap<String, String>,
}

/// The events that the open transaction has published so far, in the order of the calls; those of savepoints that were
/// rolled back are gone. Outside of a transaction there are none.
///
/// The role must be allowed to read the outbox, as the owner of a test's database is. The one that a service publishes
/// with usually may not.
///
/// # Errors
/// When PostgreSQL refuses the query.
pub async fn pending(connection: &mut PgConnection) -> Result<Vec<PendingEvent>, Error> {
    let rows = testing::pending(connection)
        .await
        .map_err(|error| database_error("reading the events of the open transaction failed", error))?;
    rows.into_iter().map(PendingEvent::try_from).collect()
}

/// Those of [`pending`] that are of type `E`.
///
/// # Errors
/// Those of [`pending`], and when a payload cannot be read as `E`.
pub async fn pending_of<E: Event>(connection: &mut PgConnection) -> Result<Vec<Published<E>>, Error> {
    typed(&pending(connection).await?)
}

fn typed<E: Event>(events: &[PendingEvent]) -> Result<Vec<Published<E>>, Error> {
    let of_type = events.iter().filter(|event| event.event_type == E::TYPE);
    of_type
        .map(|pending| {
            let PendingEvent { id, version, key, headers, .. } = pending.clone();
            Ok(Published { event: pending.read()?, id, version, key, headers })
        })
        .collect()
}

/// Removes the events that the open transaction has published so far, so that later assertions start afresh; returns how
/// many there were. Events of other transactions stay.
///
/// # Errors
/// When PostgreSQL refuses the statement.
pub async fn clear(connection: &mut PgConnection) -> Result<u64, Error> {
    testing::clear(connection)
        .await
        .map_err(|error| database_error("removing the events of the open transaction failed", error))
}

/// Asserts that the open transaction has published events of type `E`: at least one, unless [`times`] or [`never`] say
/// otherwise. Returns them in the order of the calls.
///
/// ```no_run
/// # use aftercommit::{Event, testing};
/// # #[derive(serde::Serialize, serde::Deserialize)]
/// # struct OrderPlaced { order: i64, cents: i64 }
/// # impl Event for OrderPlaced { const TYPE: &'static str = "order.placed"; }
/// # async fn place(_: &mut sqlx::PgTransaction<'_>, _: i64, _: i64) {}
/// # async fn example(pool: sqlx::PgPool) -> Result<(), sqlx::Error> {
/// let mut tx = pool.begin().await?;
/// place(&mut tx, 7, 990).await;
/// let placed = testing::assert_published::<OrderPlaced>(&mut tx).times(1).await;
/// assert_eq!(placed[0].event.order, 7);
/// testing::assert_published::<OrderPlaced>(&mut tx).matching(|placed| placed.cents == 0).never().await;
/// # Ok(())
/// # }
/// ```
///
/// # Panics
/// When awaited, if the number is another one, naming what was expected and what is pending, with payloads; and when
/// PostgreSQL cannot be asked. [`pending_of`] does the same without panicking.
///
/// [`times`]: AssertPublished::times
/// [`never`]: AssertPublished::never
#[track_caller]
pub fn assert_published<E: Event>(connection: &mut PgConnection) -> AssertPublished<'_, E> {
    AssertPublished { connection, expected: None, predicate: None, at: Location::caller() }
}

/// Which of the events count.
type Predicate<'c, E> = Box<dyn Fn(&E) -> bool + Send + 'c>;

/// An assertion about the events of an open transaction, made when it is awaited. See [`assert_published`].
#[must_use = "nothing is asserted until it is awaited"]
pub struct AssertPublished<'c, E> {
    connection: &'c mut PgConnection,
    expected: Option<usize>,
    predicate: Option<Predicate<'c, E>>,
    at: &'static Location<'static>,
}

impl<'c, E: Event> AssertPublished<'c, E> {
    /// Exactly so many.
    pub fn times(self, count: usize) -> Self {
        Self { expected: Some(count), ..self }
    }

    /// None at all.
    pub fn never(self) -> Self {
        self.times(0)
    }

    /// Only events for which this holds count.
    pub fn matching(self, predicate: impl Fn(&E) -> bool + Send + 'c) -> Self {
        Self { predicate: Some(Box::new(predicate)), ..self }
    }

    async fn check(self) -> Result<Vec<Published<E>>, String> {
        let Self { connection, expected, predicate, .. } = self;
        let all = pending(connection).await.map_err(|error| error.report())?;
        let mut found = typed::<E>(&all).map_err(|error| error.report())?;
        found.retain(|published| predicate.as_ref().is_none_or(|predicate| predicate(&published.event)));
        if expected.map_or(!found.is_empty(), |expected| found.len() == expected) {
            return Ok(found);
        }
        let expected = expected.map_or("at least 1".to_string(), |count| format!("exactly {count}"));
        let matching = if predicate.is_some() { " that match" } else { "" };
        let found = found.len();
        Err(format!("expected {expected} of {}{matching}, found {found}; {}", E::TYPE, describe(&all)))
    }
}

impl<'c, E: Event> IntoFuture for AssertPublished<'c, E> {
    type Output = Vec<Published<E>>;
    type IntoFuture = BoxFuture<'c, Self::Output>;

    #[expect(clippy::panic, reason = "an assertion")]
    fn into_future(self) -> Self::IntoFuture {
        let at = self.at;
        Box::pin(async move { self.check().await.unwrap_or_else(|problem| panic!("{at}: {problem}")) })
    }
}

/// What is pending, one event a line.
fn describe(events: &[PendingEvent]) -> String {
    if events.is_empty() {
        return "the transaction has published nothing (is it still open, and the one that published?)".into();
    }
    let lines = events.iter().map(|event| {
        let key = event.key.as_deref().map(|key| format!(" key {key:?}")).unwrap_or_default();
        let payload: String = String::from_utf8_lossy(&event.payload).chars().take(SHOWN).collect();
        format!("\n  {} {}{key} {payload}", event.event_type, event.id)
    });
    format!("the transaction has published:{}", lines.collect::<String>())
}
