//! Erasing messages of a stream: nats-server overwrites their bytes before it gives the space back.
//!
//! It needs the permissions to publish to `$JS.API.STREAM.INFO.<stream>`, `$JS.API.STREAM.MSG.GET.<stream>`,
//! `$JS.API.DIRECT.GET.<stream>` and `$JS.API.STREAM.MSG.DELETE.<stream>`, and none to create a consumer.

use std::ops::RangeInclusive;

use async_nats::jetstream::{self, Context, ErrorCode};
use chrono::{DateTime, Utc};
use futures_util::{StreamExt, TryStreamExt};

use super::history::{Batch, History};
use super::stream::{Extent, StreamReader};
use super::{Connection, api};
use crate::error::{Error, ErrorKind};

/// Messages that are erased at the same time.
const ERASURES: usize = 32;

/// A stream whose messages may be erased.
pub struct Eraser {
    context: Context,
    history: History,
    reader: StreamReader,
    name: String,
}

impl Eraser {
    /// For the stream of this name.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] when the stream does not let messages be deleted; else when it cannot be asked.
    pub async fn new(connection: &Connection, name: &str) -> Result<Self, Error> {
        let reader = StreamReader::new(connection, name);
        let described = reader.described().await?;
        for setting in ["deny_delete", "sealed"] {
            if described.config.get(setting).and_then(serde_json::Value::as_bool) == Some(true) {
                let problem = format!(
                    "nothing was erased: stream {name} has {setting} set, so nats-server never deletes a message of it, and \
                     that setting cannot be taken back; move its subscribers to a stream without it"
                );
                return Err(Error::new(ErrorKind::Config, problem));
            }
        }
        let history = History::new(connection, name).await?;
        Ok(Self { context: connection.jetstream(), history, reader, name: name.into() })
    }

    /// What there is of the stream.
    pub async fn extent(&self) -> Result<Extent, Error> {
        self.reader.extent().await
    }

    /// The sequence from which on messages were stored at this time or later.
    pub async fn since(&self, extent: Extent, time: DateTime<Utc>) -> Result<u64, Error> {
        if extent.first > extent.last {
            return Ok(extent.first);
        }
        self.history.since(extent.first, extent.last, time).await
    }

    /// The next messages of a range.
    pub async fn batch(&self, range: RangeInclusive<u64>) -> Result<Batch, Error> {
        self.history.batch(range).await
    }

    /// Erases the messages under these sequences; those that are gone are no error. Returns how many there were.
    pub async fn erase(&self, sequences: &[u64]) -> Result<u64, Error> {
        let erased: Vec<bool> = futures_util::stream::iter(sequences.iter().copied())
            .map(|sequence| self.erase_one(sequence))
            .buffer_unordered(ERASURES)
            .try_collect()
            .await?;
        Ok(erased.into_iter().filter(|erased| *erased).count() as u64)
    }

    async fn erase_one(&self, sequence: u64) -> Result<bool, Error> {
        let error = match api::erase(&self.context, &self.name, sequence).await {
            Ok(erased) => return Ok(erased),
            Err(error) => error,
        };
        let code = error.downcast_ref::<jetstream::Error>().map(jetstream::Error::error_code);
        // The server does not say whether it failed, or had no such message.
        if code == Some(ErrorCode::STREAM_MESSAGE_DELETE_FAILED) && self.history.one(sequence).await?.is_none() {
            return Ok(false);
        }
        let name = &self.name;
        let problem = format!(
            "message {sequence} of stream {name} was not erased, for which the NATS user needs the right to publish to \
             $JS.API.STREAM.MSG.DELETE.{name}"
        );
        Err(Error::with_source(ErrorKind::Broker, problem, error))
    }
}
