//! PostgreSQL snapshots as values: which transactions a reader saw as finished.

use std::fmt;
use std::str::FromStr;

/// A `pg_snapshot`: `xmin:xmax:xip`, as the PostgreSQL documentation describes it in section 9.27.8.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Snapshot {
    xmin: u64,
    xmax: u64,
    running: Vec<u64>,
}

/// A text that is not a snapshot.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a pg_snapshot")]
pub struct SnapshotError(String);

impl Snapshot {
    /// Whether a transaction had ended before the snapshot was taken.
    pub fn sees(&self, xid: u64) -> bool {
        xid < self.xmin || (xid < self.xmax && self.running.binary_search(&xid).is_err())
    }
}

impl FromStr for Snapshot {
    type Err = SnapshotError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refuse = || SnapshotError(text.chars().take(64).collect());
        let mut parts = text.splitn(3, ':');
        let mut number = || parts.next().and_then(|part| part.parse::<u64>().ok());
        let (xmin, xmax) = (number().ok_or_else(refuse)?, number().ok_or_else(refuse)?);
        let list = parts.next().ok_or_else(refuse)?;
        let mut running = list
            .split(',')
            .filter(|xid| !xid.is_empty())
            .map(|xid| xid.parse::<u64>().map_err(|_| refuse()))
            .collect::<Result<Vec<_>, _>>()?;
        running.sort_unstable();
        // As strict as PostgreSQL, which is given what was read here.
        if xmin == 0 || xmin > xmax || running.iter().any(|xid| !(xmin..xmax).contains(xid)) {
            return Err(refuse());
        }
        Ok(Self { xmin, xmax, running })
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:", self.xmin, self.xmax)?;
        for (n, xid) in self.running.iter().enumerate() {
            write!(f, "{}{xid}", if n == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

/// More transactions than run at a time, those within savepoints counted, too.
const MOST_RUNNING: u64 = 1_000_000;

/// A moment of the outbox: a snapshot, then the last id that was handed out, then the next transaction id, read in
/// this order. It tells every row that the snapshot does not see without looking at those that it does: such a row
/// has an id above `last_id`, or its transaction is one of [`Mark::running`].
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Mark {
    /// Which transactions were finished.
    pub snapshot: Snapshot,
    /// The last outbox id that had been handed out.
    pub last_id: i64,
    /// The transaction id that was to be given out next.
    pub next_xid: u64,
    /// Rows with ids up to here came in a dump of another cluster. Their transaction ids mean nothing in this one; the
    /// mark holds them all. 0 when there are none.
    pub floor: i64,
}

impl Mark {
    /// The mark that holds nothing.
    pub fn nothing() -> Self {
        Self { snapshot: Snapshot { xmin: 1, xmax: 1, running: Vec::new() }, last_id: 0, next_xid: 1, floor: 0 }
    }

    /// Whether a row had been committed.
    pub fn holds(&self, id: i64, xid: u64) -> bool {
        id <= self.floor || (id <= self.last_id && self.snapshot.sees(xid))
    }

    /// The transactions that may have taken an id above the floor and up to `last_id`, and had not ended: those in the
    /// snapshot's list, and those that began after the newest one that had ended. The latter are not in the list,
    /// because a snapshot's xmax is one above the newest *ended* transaction.
    pub fn running(&self) -> impl Iterator<Item = u64> + '_ {
        self.snapshot.running.iter().copied().chain(self.snapshot.xmax..self.next_xid)
    }

    /// Whether so few transactions can have been running that looking at each of them costs little. A mark that a stranger
    /// sends may name as many as there are numbers.
    pub(crate) fn is_plausible(&self) -> bool {
        self.next_xid.saturating_sub(self.snapshot.xmax) <= MOST_RUNNING
    }

    /// Those of [`Mark::running`] that had ended at `later`: where rows with low ids may have come to light.
    pub(crate) fn ended_by(&self, later: &Self) -> Vec<u64> {
        self.running().filter(|xid| self.has_ended_by(later, *xid)).collect()
    }

    /// Whether a transaction of which this mark knows had ended at `later`. When a restore lies between the two, it is one
    /// of the dumped cluster, and all of those have ended.
    pub(crate) fn has_ended_by(&self, later: &Self, xid: u64) -> bool {
        later.floor >= self.last_id || later.snapshot.sees(xid)
    }
}

/// Transaction ids in the form in which they are bound as `text[]`.
pub(crate) fn xids(ids: impl IntoIterator<Item = u64>) -> Vec<String> {
    ids.into_iter().map(|xid| xid.to_string()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_writes_what_postgres_writes() {
        for text in ["749:749:", "10:20:10,14,15"] {
            assert_eq!(text.parse::<Snapshot>().unwrap().to_string(), text);
        }
        for bad in ["", "1", "1:2", "a:b:", "1:2:x", "1:2:3:4", "0:1:", "2:1:", "2:4:1", "2:4:4"] {
            assert!(bad.parse::<Snapshot>().is_err(), "{bad}");
        }
    }

    #[test]
    fn sees_what_had_ended() {
        let snapshot: Snapshot = "10:20:10,14".parse().unwrap();
        for (xid, seen) in [(9, true), (10, false), (11, true), (14, false), (19, true), (20, false), (21, false)] {
            assert_eq!(snapshot.sees(xid), seen, "{xid}");
        }
    }

    fn mark(snapshot: &str, last_id: i64, next_xid: u64, floor: i64) -> Mark {
        Mark { snapshot: snapshot.parse().unwrap(), last_id, next_xid, floor }
    }

    #[test]
    fn transactions_at_and_above_xmax_count_as_running() {
        let settled = mark("10:20:10,14", 5, 23, 0);
        assert_eq!(settled.running().collect::<Vec<_>>(), [10, 14, 20, 21, 22]);
        assert_eq!(settled.ended_by(&mark("14:22:14", 9, 23, 0)), [10, 20, 21]);
    }

    #[test]
    fn after_a_restore_the_numbers_of_the_old_cluster_have_all_ended() {
        let before = mark("9010:9020:9010,9014", 50, 9021, 0);
        let after = mark("740:742:740", 60, 743, 50);
        assert_eq!(before.ended_by(&after), [9010, 9014, 9020]);
        assert!(before.holds(50, 9000) && !before.holds(50, 9014) && !before.holds(51, 100));
        assert!(after.holds(50, 9014) && after.holds(51, 739) && !after.holds(51, 740));
    }

    #[test]
    fn a_mark_of_endless_transactions_is_not_plausible() {
        assert!(mark("10:20:10,14", 5, 23, 0).is_plausible() && Mark::nothing().is_plausible());
        assert!(!mark("1:1:", 5, u64::MAX, 0).is_plausible());
    }

    /// A cluster as simple as can be: transactions take their numbers and ids when they like and end when they like, and
    /// marks are taken in three steps between which anything may happen.
    #[derive(Default)]
    struct Cluster {
        xids: u64,
        ids: i64,
        running: Vec<(u64, Vec<i64>)>,
        newest_ended: u64,
        /// Ids with the transactions that committed them.
        committed: Vec<(i64, u64)>,
        step: (Option<Snapshot>, Option<i64>),
        marks: Vec<Mark>,
        /// Whether windows hold two ids from the first new row on at most.
        cut: bool,
        /// Ids that sessions have taken in advance.
        taken: Vec<i64>,
    }

    impl Cluster {
        fn act(&mut self, action: u8, which: usize) {
            let one = which.checked_rem(self.running.len());
            match (action, one) {
                (0 | 1, _) => {
                    self.xids += 1;
                    self.running.push((self.xids, Vec::new()));
                }
                (2 | 3, Some(one)) => {
                    self.ids += 1;
                    self.running[one].1.push(self.ids);
                }
                (4..=6, Some(one)) => {
                    let (xid, ids) = self.running.remove(one);
                    self.newest_ended = self.newest_ended.max(xid);
                    if action != 6 {
                        self.committed.extend(ids.into_iter().map(|id| (id, xid)));
                    }
                }
                (7, _) => self.look(),
                // What tampering with the sequence comes to: it is set back, set far ahead, or ids are kept for later.
                (8, _) => self.ids = self.ids * 3 / 4,
                (9, _) => self.ids += 100,
                (10, _) => {
                    self.ids += 1;
                    self.taken.push(self.ids);
                }
                (11, Some(one)) => {
                    let id = self.taken.pop();
                    self.running[one].1.extend(id);
                }
                _ => {}
            }
        }

        /// The next step of taking a mark.
        fn look(&mut self) {
            match std::mem::take(&mut self.step) {
                (None, _) => {
                    let xmax = self.newest_ended + 1;
                    let mut running: Vec<u64> =
                        self.running.iter().map(|(xid, _)| *xid).filter(|x| *x < xmax).collect();
                    running.sort_unstable();
                    let xmin = running.first().copied().unwrap_or(xmax);
                    self.step = (Some(Snapshot { xmin, xmax, running }), None);
                }
                (snapshot, None) => self.step = (snapshot, Some(self.ids)),
                (Some(snapshot), Some(last_id)) => {
                    // Never lower than before, nor than any row; and cut, behind a large backlog.
                    let before = self.marks.last().map_or(0, |mark| mark.last_id);
                    let rows = self.committed.iter().filter(|(_, xid)| snapshot.sees(*xid)).map(|(id, _)| *id);
                    let reach = rows.clone().max().unwrap_or(0).max(last_id).max(before);
                    let first = rows.filter(|id| *id > before).min().unwrap_or(reach);
                    let last_id = if self.cut { reach.min(first + 1) } else { reach };
                    self.marks.push(Mark { snapshot, last_id, next_xid: self.xids + 1, floor: 0 });
                }
            }
        }

        /// Everybody is done, and a last mark is taken.
        fn end(&mut self) {
            while !self.running.is_empty() {
                self.act(4, 0);
            }
            self.step = (None, None);
            (0..3).for_each(|_| self.look());
            while self.cut && self.committed.iter().any(|(id, xid)| !self.marks.last().unwrap().holds(*id, *xid)) {
                (0..3).for_each(|_| self.look());
            }
        }

        /// In how many windows a row is, by the conditions of `walk`.
        fn windows(&self, id: i64, xid: u64) -> usize {
            let marks: Vec<Mark> = std::iter::once(Mark::nothing()).chain(self.marks.clone()).collect();
            let is_in = |settled: &Mark, target: &Mark| match id <= settled.last_id {
                true => {
                    let late = xid >= settled.next_xid && settled.has_ended_by(target, xid);
                    late || settled.ended_by(target).contains(&xid)
                }
                false => id <= target.last_id && target.snapshot.sees(xid),
            };
            marks.windows(2).filter(|pair| is_in(&pair[0], &pair[1])).count()
        }
    }

    fn each_row_is_in_one_window(
        actions: Vec<(u8, usize)>,
        cut: bool,
    ) -> Result<(), proptest::test_runner::TestCaseError> {
        let mut cluster = Cluster { cut, ..Cluster::default() };
        actions.into_iter().for_each(|(action, which)| cluster.act(action, which));
        cluster.end();
        for (id, xid) in &cluster.committed {
            proptest::prop_assert_eq!(cluster.windows(*id, *xid), 1, "row {} of transaction {}", id, xid);
        }
        Ok(())
    }

    proptest::proptest! {
        #[test]
        fn each_committed_row_is_in_one_window(
            actions in proptest::collection::vec((0..8_u8, proptest::prelude::any::<usize>()), 0..250),
            cut in proptest::prelude::any::<bool>()
        ) {
            each_row_is_in_one_window(actions, cut)?;
        }

        #[test]
        fn so_it_is_whatever_the_sequence_hands_out(
            actions in proptest::collection::vec((0..12_u8, proptest::prelude::any::<usize>()), 0..250),
            cut in proptest::prelude::any::<bool>()
        ) {
            each_row_is_in_one_window(actions, cut)?;
        }
    }

    /// As a session with ids that it took in advance writes: the table's column `xid` stands before `id`, so that its
    /// default is evaluated first, but that alone does not make the order certain.
    #[test]
    fn a_row_older_than_its_transaction_is_in_one_window() {
        let mut cluster = Cluster { ids: 1, ..Cluster::default() };
        (0..3).for_each(|_| cluster.look());
        cluster.act(0, 0);
        cluster.running[0].1.push(1);
        cluster.end();
        assert_eq!((cluster.committed.as_slice(), cluster.windows(1, 1)), ([(1, 1)].as_slice(), 1));
    }
}
