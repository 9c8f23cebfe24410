//! What lets the relay pass an event: written only by the relay that leads, and as durable as the relay's log.

/// The beginning of a statement that a relay may run only while it holds the lease under the epoch `$1`. Whatever it
/// writes has to come from `leads`, which has a row then; the lease cannot change hands before the commit. The commit
/// waits for the disk whatever the database's default is.
macro_rules! leading {
    () => {
        "with leads as materialized (
             select lease.epoch
               from (select set_config('synchronous_commit',
                         case when current_setting('synchronous_commit') in ('off', 'local') then 'on'
                              else current_setting('synchronous_commit') end, true)) as durable,
                    aftercommit.lease
              where lease.name = 'relay' and lease.epoch = $1
                for share of lease
         )"
    };
}
pub(super) use leading;

/// What came of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// So many rows were changed.
    Rows(u64),
    /// The lease has passed to another relay, and nothing was written.
    Fenced,
}

impl Written {
    /// From whether the relay leads, and the number of rows.
    pub(super) fn of((leads, rows): (bool, i64)) -> Self {
        if leads { Self::Rows(rows.unsigned_abs()) } else { Self::Fenced }
    }
}
