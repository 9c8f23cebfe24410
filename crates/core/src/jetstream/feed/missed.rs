//! What was delivered before, or got lost on the way: it is read from the stream.

use std::sync::atomic::Ordering;

use futures_util::FutureExt;

use super::super::history::{Batch, History};
use super::super::stored::{self, Filter, Stretch};
use super::super::witness::Witness;
use super::{BEHIND, Fed, Feed, Incoming, LOST_END, Over, Unwanted, stands};
use crate::error::Error;

impl Feed {
    /// Reads the stream up to where the consumer stands. A stream that has lost its end may end before that: then what comes
    /// into these places is read as it comes, because the consumer may count it as delivered.
    pub(super) async fn catch_up(&mut self, unacked: Option<u64>) -> Result<(), Over> {
        let last = self.seen.sequence;
        let first = match unacked {
            Some(floor) => floor + 1,
            None => self.end_of_stream().await? + 1,
        };
        if first > last {
            return Ok(());
        }
        tracing::info!(
            subscriber = self.spec.name,
            first,
            last,
            "reading messages that were delivered before and are not known to be done"
        );
        let mut next = first;
        loop {
            self.confirm().await.map_err(Over::Ended)?;
            let end = self.end_of_stream().await?.min(last);
            if next <= end {
                self.read_stream(next, end).await?;
                next = end + 1;
                if let Some(place) = self.at(end).await? {
                    self.last = Some(place);
                    let _ = self.output.send(Fed::Complete(place));
                }
            }
            if next > last {
                return Ok(());
            }
            tokio::select! {
                () = tokio::time::sleep(BEHIND) => {}
                () = self.output.closed() => return Err(Over::Unwanted),
            }
        }
    }

    /// Hands on the messages of the stream from `first` to `last` that are not done, as room for them becomes free. A stream
    /// that is written anew meanwhile may have others in front of what is still to be read.
    pub(super) async fn read_stream(&self, first: u64, last: u64) -> Result<(), Over> {
        if first > last {
            return Ok(());
        }
        let newest = self.newest().await?;
        let mut stretch = self.load(first, last, newest).await?;
        while let Some(next) = stretch.next {
            let (handed_on, following) = tokio::join!(self.hand_on_all(stretch), self.load(next, last, newest));
            handed_on?;
            stretch = following?;
        }
        Ok(self.hand_on_all(stretch).await?)
    }

    async fn hand_on_all(&self, stretch: Stretch) -> Result<(), Unwanted> {
        let messages = stretch.messages.into_values();
        let messages: Vec<_> = messages.map(|message| (Witness::of(&message), stored::event(&message))).collect();
        let ids = messages.iter().filter_map(|(_, event)| Some(event.as_ref().ok()?.id)).collect();
        let done = (self.done)(ids).await;
        for (place, event) in messages {
            let (id, size) = event.as_ref().map_or((None, 0), |event| (Some(event.id), event.payload.len()));
            if id.is_some_and(|id| done.contains(&id)) {
                continue;
            }
            self.wait_for_room().await?;
            let permit = self.budget.take(size);
            self.hand_on(Incoming { place, deliveries: 0, reply: None, event, permit })?;
        }
        Ok(())
    }

    async fn wait_for_room(&self) -> Result<(), Unwanted> {
        tokio::select! {
            () = self.budget.wait_for_room() => Ok(()),
            () = self.output.closed() => Err(Unwanted),
        }
    }

    /// A part of the stream, in which nothing was written anew up to `newest`.
    async fn load(&self, first: u64, last: u64, newest: Option<Witness>) -> Result<Stretch, Over> {
        if self.whole.load(Ordering::Relaxed) {
            match self.load_whole(first, last).await {
                Ok(stretch) => {
                    let stands = self.insist(|context, spec| stands(context, spec.stream, newest).boxed()).await?;
                    return if stands { Ok(stretch) } else { Err(Over::Ended(LOST_END.into())) };
                }
                Err(error) => {
                    let subscriber = &self.spec.name;
                    tracing::warn!(subscriber, error = %error.report(), "reading the stream message by message");
                    self.whole.store(false, Ordering::Relaxed);
                }
            }
        }
        let (stretch, stands) = self
            .insist(|context, spec| {
                let read = async move {
                    let stretch = stored::load(&context, &spec.stream, &spec.subjects, first, last).await?;
                    Ok((stretch, stands(context, spec.stream, newest).await?))
                };
                read.boxed()
            })
            .await?;
        if stands { Ok(stretch) } else { Err(Over::Ended(LOST_END.into())) }
    }

    /// A batch of the stream as it is, of which those messages are kept that are for the subscriber.
    async fn load_whole(&self, first: u64, last: u64) -> Result<Stretch, Error> {
        let history = History::new(&self.nats, &self.spec.stream).await?.hasty();
        let Batch { messages, next } = history.batch(first..=last).await?;
        let filter = Filter::of(&self.spec.subjects);
        let messages = messages.into_iter().filter(|message| filter.passes(&message.subject));
        Ok(Stretch { messages: messages.map(|message| (message.sequence, message)).collect(), next })
    }
}
