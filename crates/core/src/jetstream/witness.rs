//! Whether a stream still is what it was. A sequence alone does not tell: a stream that has lost its end gets other
//! messages in the same places. But it loses only its end, and what is stored again is stored at another time. So as long
//! as a message stands that was stored at a known time, nothing at or before it has been written anew.

use async_nats::datetime::DateTime as StoredAt;
use async_nats::jetstream::Context;
use async_nats::jetstream::message::StreamMessage;
use serde::{Deserialize, Serialize};

use super::api;
use crate::error::{Error, ErrorKind};
use crate::fault;

/// A stored message, known by when it was stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Witness {
    /// The message's sequence in the stream.
    pub sequence: u64,
    /// In nanoseconds since 1970, by the server's clock.
    pub stored_at: i64,
}

impl Witness {
    /// A message with this sequence that was stored at this time.
    pub fn new(sequence: u64, stored_at: StoredAt) -> Self {
        Self { sequence, stored_at: i64::try_from(stored_at.unix_timestamp_nanos()).unwrap_or_default() }
    }

    /// The witness that a message is.
    pub fn of(message: &StreamMessage) -> Self {
        Self::new(message.sequence, message.time)
    }
}

/// Whether nothing at or before the witness has been written anew, as whoever may read single messages can tell. One that was
/// removed, by its age say, stands as long as there is a newer one: what is stored again leaves no place empty.
pub async fn stands(context: &Context, stream: &str, witness: Witness) -> Result<bool, Error> {
    let failed = |error| Error::with_source(ErrorKind::Broker, format!("cannot read stream {stream}"), error);
    if let Some(message) = at(context, stream, witness.sequence).await? {
        return Ok(message == witness);
    }
    fault::pass("witness-missing").await;
    let newest = api::newest(context, stream).await.map_err(failed)?;
    let reaches = newest.is_some_and(|newest| newest.sequence > witness.sequence);
    // What was lost may have been filled in between the two answers.
    Ok(reaches && at(context, stream, witness.sequence).await?.is_none())
}

/// The message under a sequence as a witness; none when it was removed or is not there yet.
pub async fn at(context: &Context, stream: &str, sequence: u64) -> Result<Option<Witness>, Error> {
    let failed = |error| Error::with_source(ErrorKind::Broker, format!("cannot read stream {stream}"), error);
    let message = api::message(context, stream, sequence, None).await.map_err(failed)?;
    Ok(message.as_ref().map(Witness::of))
}

/// A stream of which it is asked whether it still is what it was.
pub struct Stream {
    context: Context,
    name: String,
}

impl Stream {
    /// Reads the stream of this name.
    pub fn new(context: &Context, name: &str) -> Self {
        Self { context: context.clone(), name: name.into() }
    }

    /// Name of the stream.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// As [`stands`].
    pub async fn stands(&self, witness: Witness) -> Result<bool, Error> {
        stands(&self.context, &self.name, witness).await
    }
}
