//! The one comparison that does not believe the relay's marks. A sweep goes through the windows of the relay's log, and a
//! row that is in none of them would be missed by relay and sweep alike: written under an id that the marks had passed,
//! by hand, by a restore, or by a sequence that was tampered with. So a sweep also lists the outbox by its primary key
//! alone, and what it has found neither in a window nor in the stream by its end is missing.

use serde::{Deserialize, Serialize};

use super::chunk::{Page, judge};
use super::seen::Seen;
use super::{Comparing, Sweep, report_page};
use aftercommit_core::error::Error;
use aftercommit_core::postgres::compare;
use aftercommit_core::postgres::place::Place;
use aftercommit_core::postgres::window::Watch;

/// Ids that are listed at a time.
const IDS: i64 = 10_000;
/// Rows that are looked up at a time.
const ROWS: usize = 1000;
/// Rows of which it is not known yet where they are, at most. What is more, a later sweep finds.
const OPEN: usize = 100_000;

/// How far the outbox is listed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Listed {
    /// The highest id that was found in the stream: up to here the outbox is listed.
    up_to: i64,
    /// The rows up to there that were found neither in a window nor in the stream so far.
    open: Vec<i64>,
}

impl Listed {
    /// Takes in what the stream holds of the rows listed so far.
    fn found(&mut self, seen: &Seen) {
        self.open.retain(|id| !seen.contains(*id));
    }

    /// Takes in the next rows of the outbox.
    fn add(&mut self, ids: impl IntoIterator<Item = i64>, seen: &Seen) {
        let room = OPEN.saturating_sub(self.open.len());
        self.open.extend(ids.into_iter().filter(|id| !seen.contains(*id)).take(room));
    }
}

impl Comparing<'_> {
    pub(super) async fn begin_sweep(&mut self, first: Place) -> Result<Sweep, Error> {
        let place = self.skip_old(first).await?;
        let first = self.ask(async |session| compare::listed(session, 0, i64::MAX, 1).await).await?;
        // What the sweep leaves out at the beginning is older than that, or went into another stream.
        let up_to = first.first().map_or(0, |id| id - 1).max(place.mark.last_id);
        Ok(Sweep { since: self.run.id, place, listed: Some(Listed { up_to, open: Vec::new() }) })
    }

    /// Lists the outbox up to the highest row that this part of the stream holds.
    pub(super) async fn list(&mut self, seen: &Seen) -> Result<(), Error> {
        let Some(mut listed) = self.position.sweep.as_ref().and_then(|sweep| sweep.listed.clone()) else {
            return Ok(());
        };
        listed.found(seen);
        if let Some(last) = seen.last() {
            while listed.up_to < last {
                let after = listed.up_to;
                let ids = self.ask(async |session| compare::listed(session, after, last, IDS).await).await?;
                listed.up_to = ids.last().copied().unwrap_or(last);
                listed.add(ids, seen);
            }
        }
        if let Some(sweep) = &mut self.position.sweep {
            sweep.listed = Some(listed);
        }
        Ok(())
    }

    /// Reports what the outbox lists and the stream was not found to hold, when the sweep has come to `place`, which is
    /// the relay's newest. While the relay knows that it has something to do, what its mark does not hold is left out: that
    /// it has still to publish, above the highest row of the stream and, of transactions that have ended since, below it.
    pub(super) async fn report_unlisted(&mut self, place: &Place) -> Result<(), Error> {
        let Some(mut listed) = self.position.sweep.as_mut().and_then(|sweep| sweep.listed.take()) else {
            return Ok(());
        };
        let behind = self.ask(async |session| Watch::new(&place.mark).look(session).await).await?.news;
        if behind {
            let mut held = Vec::new();
            for ids in listed.open.chunks(ROWS) {
                held.extend(self.ask(async |session| compare::held_of(session, &place.mark, ids).await).await?);
            }
            listed.open = held;
        }
        let nothing = Seen::default();
        loop {
            let after = listed.up_to;
            let ids = match behind {
                true => self.ask(async |session| compare::held(session, &place.mark, after, IDS).await).await?,
                false => self.ask(async |session| compare::listed(session, after, i64::MAX, IDS).await).await?,
            };
            let Some(last) = ids.last() else { break };
            listed.up_to = *last;
            listed.add(ids, &nothing);
        }
        for ids in listed.open.chunks(ROWS) {
            let page = self.unlisted(ids, place).await?;
            report_page(self.run, &self.comparison.naming.stream, place, page, &mut self.queued).await?;
        }
        Ok(())
    }

    /// Those of these rows that should be in the stream and are not.
    async fn unlisted(&mut self, ids: &[i64], place: &Place) -> Result<Page, Error> {
        let max_age = self.stream.info().await?.config.max_age;
        let max_age = Some(max_age).filter(|max_age| !max_age.is_zero());
        let mut page = Page::default();
        let rows = self.ask(async |session| compare::absent(session, ids).await).await?;
        judge(rows, max_age, place.sequence, &self.run.connections, &self.history, &mut page).await?;
        Ok(page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_listed_and_never_found_stays_open() {
        let seen = |ids: &[i64]| {
            let mut seen = Seen::default();
            ids.iter().for_each(|id| seen.insert(*id));
            seen
        };
        let mut listed = Listed::default();
        let first = seen(&[1, 3]);
        listed.found(&first);
        listed.add([1, 2, 3], &first);
        assert_eq!(listed.open, [2], "it may still come");
        listed.found(&seen(&[5]));
        listed.add([4, 5], &seen(&[5]));
        assert_eq!(listed.open, [2, 4]);
        listed.found(&seen(&[2]));
        assert_eq!(listed.open, [4]);
    }
}
