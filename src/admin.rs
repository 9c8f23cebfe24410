//! What an operator does: set up the schema and the stream, look at where everything is.

pub mod status;

use crate::config::{Naming, NatsConfig, PostgresConfig};
use crate::error::Error;
use crate::jetstream::topology::{self, StreamSettings};
use crate::{jetstream, postgres};

/// Brings the schema `aftercommit` up to date and returns the names of the migrations that were new.
///
/// # Errors
/// When the database cannot be reached or the role may not create the schema.
pub async fn migrate(config: &PostgresConfig) -> Result<Vec<String>, Error> {
    let mut connection = postgres::connect(config, "aftercommit-migrate").await?;
    postgres::migrate::run(&mut connection).await
}

/// Creates the stream of an outbox, or corrects settings of it that would lose events. Returns what was changed, in
/// words; nothing when all was well.
///
/// # Errors
/// When NATS cannot be reached, when the role may not administer the stream, or when the stream has a setting that
/// would lose events and cannot be changed in place.
pub async fn provision(nats: &NatsConfig, naming: &Naming) -> Result<Vec<String>, Error> {
    let connection = jetstream::connect(nats, "aftercommit-provision", "_INBOX_prov").await?;
    let settings = StreamSettings { replicas: None, max_age: None, max_bytes: None };
    topology::provision_stream(&connection, naming, &settings).await
}
