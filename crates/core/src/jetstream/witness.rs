//! Whether a stream still is what it was. A sequence alone does not tell: a stream that has lost its end gets other
//! messages in the same places. But it loses only its end, and what is stored again is stored at another time. So as long
//! as a message stands that was stored at a known time, nothing at or before it has been written anew.

use async_nats::datetime::DateTime as StoredAt;
use async_nats::jetstream::Context;
use async_nats::jetstream::message::StreamMessage;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::api;
use super::stream::StreamReader;
use crate::error::{Error, ErrorKind};
use crate::fault;

/// A stored message, known by when it was stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Witness {
    pub sequence: u64,
    /// In nanoseconds since 1970, by the server's clock.
    pub stored_at: i64,
}

impl Witness {
    pub fn new(sequence: u64, stored_at: StoredAt) -> Self {
        Self { sequence, stored_at: i64::try_from(stored_at.unix_timestamp_nanos()).unwrap_or_default() }
    }

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
    pub fn new(context: &Context, name: &str) -> Self {
        Self { context: context.clone(), name: name.into() }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// As [`stands`].
    pub async fn stands(&self, witness: Witness) -> Result<bool, Error> {
        stands(&self.context, &self.name, witness).await
    }
}

/// A stream at one moment.
#[derive(Debug, Clone)]
pub struct Moment {
    created: DateTime<Utc>,
    newest: Option<Witness>,
    /// Its last sequence.
    pub last: u64,
}

impl StreamReader {
    /// Whether nothing at or before the witness has been written anew. One that was removed stands as long as the stream
    /// reaches so far.
    pub async fn stands(&self, witness: Witness) -> Result<bool, Error> {
        match self.at(witness.sequence).await? {
            Some(message) => Ok(message == witness),
            // What was lost may be filled in between the two answers.
            None => Ok(self.extent().await?.last >= witness.sequence && self.at(witness.sequence).await?.is_none()),
        }
    }

    /// The stream as it is now.
    pub async fn moment(&self) -> Result<Moment, Error> {
        // The newest message is then never older than the stream's end.
        let extent = self.extent().await?;
        let newest = self.newest().await?;
        let last = newest.map_or(extent.last, |newest| newest.sequence.max(extent.last));
        Ok(Moment { created: extent.created, newest, last })
    }

    /// Makes sure that nothing that the stream had at a moment has been written anew since.
    pub async fn is_as_at(&self, moment: &Moment) -> Result<(), Error> {
        let newest = moment.newest.map_or(0, |newest| newest.sequence);
        // Behind it there was nothing.
        let next = self.following(newest + 1).await?;
        let extent = self.extent().await?;
        // Last: what stands now was not lost before.
        let known = match moment.newest {
            Some(newest) => self.at(newest.sequence).await? == Some(newest),
            None => true,
        };
        let nothing_new = next.is_none_or(|next| next > moment.last);
        match known && nothing_new && extent.created == moment.created && extent.last >= moment.last {
            true => Ok(()),
            false => Err(Error::new(
                ErrorKind::NotReady,
                format!(
                    "stream {} was changed at or before message {} while it was compared; the next run begins anew",
                    self.name(),
                    moment.last
                ),
            )),
        }
    }
}
