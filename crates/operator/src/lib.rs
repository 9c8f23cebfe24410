//! What an operator does: set up schema and stream, write an event by hand, look at where everything is
//! and whether it is well.

#![warn(clippy::unwrap_used, clippy::expect_used)]

pub mod audit;
pub mod coverage;
pub mod dead;
pub mod doctor;
pub mod events;
pub mod explain;
mod filter;
pub mod parked;
mod pause;
pub mod peek;
pub mod reconciler;
pub mod relay;
pub mod replay;
pub mod status;
pub mod subscriber;
mod waits;
pub mod worker;

pub use filter::{Filter, When};
pub use pause::Pausing;

use aftercommit_core::config::{Naming, NatsConfig, PostgresConfig, Schema};
use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::jetstream::advisories;
use aftercommit_core::jetstream::consumer::Claim;
use aftercommit_core::jetstream::topology::{self, StreamSettings};
use aftercommit_core::{jetstream, postgres};
use aftercommit_outbox::event::EventId;
use aftercommit_outbox::{self, PublishError, PublishErrorKind, RawEvent};

/// Brings the schema `aftercommit` up to date and returns the names of the migrations that were new, such as
/// `0001 outbox`. Done twice it changes nothing; several at once wait for each other. A first migration is all or nothing; of
/// an update each migration is, and those before one that fails stay. What was applied is recorded in `aftercommit.migrations`, never in the application's own migration table. There is nothing to do
/// where a newer version has migrated further: this one works there, too.
///
/// Nobody who publishes waits for it for longer than about a second: what holds a table that it must change, such as an open
/// transaction that has published, it waits for in the background, for as long as that takes, and logs who it is.
///
/// # Errors
/// When the database cannot be reached, when the role may not create the schema, or when the schema was changed, made
/// without a record of its migrations, or made by another version that this one cannot follow.
pub async fn migrate(config: &PostgresConfig) -> Result<Vec<String>, Error> {
    let mut session = postgres::connect(config, "aftercommit-migrate").await?;
    postgres::migrate::run(&mut session).await
}

/// Puts right what is wrong with the sequence that hands out the outbox's ids: settings with which ids would not follow the
/// commits of a key, such as `CACHE 50`, or that it stands behind ids which are there. Returns what was done, in words;
/// nothing when all was well.
///
/// # Errors
/// When the database cannot be reached, or the role does not own the sequence.
pub async fn correct_ids(config: &PostgresConfig) -> Result<Vec<String>, Error> {
    let mut session = postgres::connect(config, "aftercommit-migrate").await?;
    postgres::sequence::heal(&mut session).await
}

/// The SQL of [`migrate`] for this schema as one script, for another migration tool. It writes the same record, so that [`migrate`]
/// goes on from there.
pub fn migrations_sql(schema: &Schema) -> String {
    postgres::migrate::sql(schema)
}

/// Creates the stream of an outbox, or corrects settings of it that would lose events. Returns what was changed, in
/// words; nothing when all was well.
///
/// # Errors
/// When NATS cannot be reached, when the role may not administer the stream, or when the stream has a setting that
/// would lose events and cannot be changed in place.
pub async fn provision(nats: &NatsConfig, naming: &Naming) -> Result<Vec<String>, Error> {
    provision_stream(nats, naming, &Claim::default()).await
}

/// As [`provision`], and stamps the stream with the outbox's database and schema, so that no relay of another outbox publishes to
/// it by accident. Not for a stream that several outboxes share. `adopt` takes it over from another outbox, as after a restore;
/// no relay may publish that one any more.
///
/// # Errors
/// As [`provision`]; when the database cannot be reached, or the stream has the stamp of another outbox and is not adopted.
pub async fn provision_claimed(
    outbox: &PostgresConfig,
    nats: &NatsConfig,
    naming: &Naming,
    adopt: bool,
) -> Result<Vec<String>, Error> {
    let mut session = postgres::connect(outbox, "aftercommit-provision").await?;
    let owner = postgres::identity::owner(&mut session).await;
    let owner =
        owner.map_err(|error| postgres::database_error("asking which database the outbox is in failed", error))?;
    provision_stream(nats, naming, &Claim { owner: Some(owner), adopt }).await
}

async fn provision_stream(nats: &NatsConfig, naming: &Naming, claim: &Claim) -> Result<Vec<String>, Error> {
    let connection = jetstream::connect(nats, "aftercommit-provision", "_INBOX_prov").await?;
    let settings = StreamSettings { replicas: None, max_age: None, max_bytes: None };
    topology::provision_stream(&connection, naming, &settings, claim).await
}

/// Creates a stream `<stream>_ADVISORIES` that keeps for 30 days what JetStream announces of the consumers of an outbox's
/// stream: events that a subscriber gave up, and those that the server delivers no more. Returns what was changed, in words;
/// nothing when all was well.
///
/// # Errors
/// When NATS cannot be reached, or when the role may not administer that stream.
pub async fn provision_advisories(nats: &NatsConfig, naming: &Naming) -> Result<Vec<String>, Error> {
    let connection = jetstream::connect(nats, "aftercommit-provision", "_INBOX_prov").await?;
    advisories::provision(&connection, &naming.stream).await
}

/// Writes one event in a transaction of its own.
///
/// # Errors
/// When the database cannot be reached or refuses the event; [`ErrorKind::Config`] when the event itself is illegal, or when
/// this process publishes into another schema ([`set_schema`](aftercommit_outbox::set_schema)).
pub async fn publish(config: &PostgresConfig, event: RawEvent) -> Result<EventId, Error> {
    let failed = |error| postgres::database_error("writing the event failed", error);
    aftercommit_outbox::set_schema(config.schema.name())
        .map_err(|error| Error::with_source(ErrorKind::Config, "nothing was published", error))?;
    let mut session = postgres::connect(config, "aftercommit-publish").await?;
    let mut tx = session.begin().await.map_err(failed)?;
    let id = aftercommit_outbox::sqlx09::publish_through(config.pooled, tx.for_others(), event)
        .await
        .map_err(publish_error)?;
    tx.commit().await.map_err(failed)?;
    Ok(id)
}

fn publish_error(error: PublishError) -> Error {
    let kind = match error.kind() {
        PublishErrorKind::Invalid => ErrorKind::Config,
        _ => ErrorKind::Database,
    };
    Error::with_source(kind, "nothing was published", error)
}
