//! A stream at one moment, and whether it has stayed what it was: for whoever may read the whole stream.

use chrono::{DateTime, Utc};

use super::stream::StreamReader;
use super::witness::Witness;
use crate::error::{Error, ErrorKind};

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
