//! Connections that are used again only when they were left in order.
//!
//! A pool would take a connection back whose user was cancelled in the middle of BEGIN, with a transaction open on it
//! that the next user knows nothing of. Here a connection that is not given back is closed, and the server ends what was
//! open on it.

use std::sync::{Mutex, PoisonError};

use sqlx::postgres::PgConnectOptions;

use super::session::{SILENCE, Session};
use crate::config::PostgresConfig;
use crate::error::Error;

/// Connections to one database, opened when they are needed. There are as many as are used at the same time.
#[derive(Debug)]
pub(crate) struct Connections {
    options: PgConnectOptions,
    pooled: bool,
    idle: Mutex<Vec<Session>>,
}

impl Connections {
    pub(crate) fn new(config: &PostgresConfig, application: &str) -> Result<Self, Error> {
        Ok(Self { options: super::options(config, application)?, pooled: config.pooled, idle: Mutex::default() })
    }

    /// Connections of one's own to the database of a pool, which is not asked for any.
    #[cfg(feature = "testing")]
    pub(crate) fn beside(pool: &sqlx::PgPool, application: &str) -> Self {
        let options = pool.connect_options().as_ref().clone().application_name(application);
        Self { options, pooled: false, idle: Mutex::default() }
    }

    /// An idle connection, or a new one.
    pub(crate) async fn take(&self) -> Result<Session, sqlx::Error> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        match idle {
            Some(connection) => Ok(connection),
            None => {
                let connection = super::open(&self.options).await?;
                Ok(Session::new(connection, self.pooled).patient_for(SILENCE))
            }
        }
    }

    /// Keeps a connection for the next one who needs it. Nothing may be open on it.
    pub(crate) fn give_back(&self, connection: Session) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
    }

    /// Closes the idle connections, which went away together with one that was in use.
    pub(crate) fn forget_idle(&self) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Runs one statement, or some without a transaction around them.
    pub(crate) async fn run<T>(
        &self,
        work: impl AsyncFnOnce(&mut Session) -> Result<T, sqlx::Error>,
    ) -> Result<T, sqlx::Error> {
        let mut connection = self.take().await?;
        let result = work(&mut connection).await;
        match &result {
            Err(error) if super::is_outage(error) => self.forget_idle(),
            _ => self.give_back(connection),
        }
        result
    }
}
