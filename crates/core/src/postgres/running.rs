//! Which events run at present, written down before they do, so that a successor knows what was running when the
//! process died.

use sqlx::Executor;
use uuid::Uuid;

use super::lease::Tenure;
use super::session::Session;

/// Where one lane of a tenure writes down what it runs.
#[derive(Debug, Clone, Copy)]
pub struct Marker<'a> {
    /// Name of the subscriber.
    pub subscriber: &'a str,
    /// The epoch of the worker's lease.
    pub epoch: i64,
    /// The number of the lane.
    pub lane: i64,
    /// Whether nothing else runs in the process meanwhile.
    pub alone: bool,
}

/// The lane of the marker that says that the tenure is about to end: whoever ends the process now does so on purpose.
const STOPPING: i64 = -1;

/// What is on record of an event that ran when its tenure ended without a word.
const DIED: &str = "the worker's process died or lost its lease while this event ran";

impl Marker<'_> {
    /// The subscriber's name, checked once more for statements that are text.
    fn name(&self) -> Result<&str, sqlx::Error> {
        if !self.subscriber.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-') {
            return Err(sqlx::Error::Configuration(format!("{:?} is not a subscriber name", self.subscriber).into()));
        }
        Ok(self.subscriber)
    }

    /// The statement that sets the marker, as text: it is sent together with others, which leaves no room for
    /// parameters.
    pub(super) fn set(&self, events: &[Uuid]) -> Result<String, sqlx::Error> {
        let Self { epoch, lane, alone, .. } = self;
        let subscriber = self.name()?;
        let events: Vec<String> = events.iter().map(Uuid::to_string).collect();
        let events = events.join(",");
        Ok(format!(
            "insert into aftercommit.running (subscriber, epoch, lane, events, alone)
             values ('{subscriber}', {epoch}, {lane}, '{{{events}}}', {alone})
             on conflict (subscriber, epoch, lane) do update set events = excluded.events, alone = excluded.alone"
        ))
    }
}

/// Removes a marker whose lane has ended without a commit. One that a lost session still holds stays.
pub async fn clear(connection: &mut Session, marker: Marker<'_>) -> Result<(), sqlx::Error> {
    connection
        .execute(
            sqlx::query(
                "with free as (
                    select from aftercommit.running where subscriber = $1 and epoch = $2 and lane = $3
                       for update skip locked)
                 delete from aftercommit.running
                  where subscriber = $1 and epoch = $2 and lane = $3 and exists (select from free)",
            )
            .bind(marker.subscriber)
            .bind(marker.epoch)
            .bind(marker.lane),
        )
        .await
        .map(drop)
}

/// Writes down that the tenure waits for its last batches to end. A process that is killed meanwhile dies of no event.
pub async fn stopping(connection: &mut Session, tenure: &Tenure, subscriber: &str) -> Result<(), sqlx::Error> {
    connection
        .execute(
            sqlx::query(
                "insert into aftercommit.running (subscriber, epoch, lane, events) values ($1, $2, $3, '{}')
                 on conflict do nothing",
            )
            .bind(subscriber)
            .bind(tenure.epoch)
            .bind(STOPPING),
        )
        .await
        .map(drop)
}

/// The opposite: they have ended.
pub async fn stopped(connection: &mut Session, tenure: &Tenure, subscriber: &str) -> Result<(), sqlx::Error> {
    clear(connection, Marker { subscriber, epoch: tenure.epoch, lane: STOPPING, alone: false }).await
}

/// Removes what an outage kept the lanes of a tenure from removing, and what was locked when it took over: the process
/// has lived through those events, or ends without having run them. What is still locked stays.
pub async fn clear_all(connection: &mut Session, tenure: &Tenure, subscriber: &str) -> Result<(), sqlx::Error> {
    connection
        .execute(
            sqlx::query(
                "with left_behind as (
                    select epoch, lane from aftercommit.running
                     where subscriber = $1 and epoch <= $2
                       for update skip locked)
                 delete from aftercommit.running as r using left_behind as l
                  where r.subscriber = $1 and r.epoch = l.epoch and r.lane = l.lane",
            )
            .bind(subscriber)
            .bind(tenure.epoch),
        )
        .await
        .map(drop)
}

/// Takes over what earlier tenures left behind: counts a crash for each event that was running when they ended and that
/// is not done. Returns all events of the subscriber that have such a count. Markers that are locked stay for the next
/// time: their transaction is still open, because their process lets them finish, is frozen, or its end has not been
/// noticed yet. Their events may be committed any moment, so no other marker counts for those either. That a tenure was
/// about to end stays on record as long as it has such markers.
pub async fn take_over(
    connection: &mut Session,
    tenure: &Tenure,
    subscriber: &str,
) -> Result<Vec<(Uuid, i32)>, sqlx::Error> {
    sqlx::query_as(
        "with behind as (
            select epoch, lane from aftercommit.running
             where subscriber = $1 and epoch < $2
               for update skip locked),
         taken as (
            delete from aftercommit.running as r using behind
             where r.subscriber = $1 and r.epoch = behind.epoch and r.lane = behind.lane
               and not (r.lane = $3 and exists (
                    select from aftercommit.running as open
                     where open.subscriber = $1 and open.epoch = r.epoch
                       and not exists (select from behind
                                        where behind.epoch = open.epoch and behind.lane = open.lane)))
            returning r.events, r.epoch, r.lane, r.alone),
         suspect as (
            select ran.event_id, bool_or(taken.alone) as alone from taken, unnest(events) as ran(event_id)
             where not exists (select from behind as last where last.epoch = taken.epoch and last.lane = $3)
               and not exists (select from aftercommit.inbox as done
                                where done.subscriber = $1 and done.event_id = ran.event_id)
               and not exists (select from aftercommit.running as open
                                where open.subscriber = $1 and open.epoch < $2 and ran.event_id = any (open.events)
                                  and not exists (select from behind
                                                   where behind.epoch = open.epoch and behind.lane = open.lane))
             group by 1),
         counted as (
            insert into aftercommit.attempt as attempt (subscriber, event_id, crashes, crashes_alone, last_error)
            select $1, event_id, 1, alone::int, $4 from suspect order by event_id
            on conflict (subscriber, event_id) do update
               set crashes = attempt.crashes + 1, crashes_alone = attempt.crashes_alone + excluded.crashes_alone,
                   last_error = excluded.last_error, last_failed_at = clock_timestamp()
            returning event_id, crashes),
         forgotten as (
            delete from aftercommit.attempt as before using aftercommit.inbox as done
             where before.subscriber = $1 and done.subscriber = $1 and done.event_id = before.event_id
            returning before.event_id)
         select event_id, crashes from counted
         union all
         select event_id, crashes from aftercommit.attempt as before
          where subscriber = $1 and crashes > 0
            and not exists (select from suspect where suspect.event_id = before.event_id)
            and not exists (select from forgotten where forgotten.event_id = before.event_id)",
    )
    .bind(subscriber)
    .bind(tenure.epoch)
    .bind(STOPPING)
    .bind(DIED)
    .fetch_all(connection)
    .await
}

/// A marker of an earlier tenure whose transaction is still open.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub struct Open {
    epoch: i64,
    lane: i64,
    /// The events that the transaction runs.
    pub events: Vec<Uuid>,
}

/// What earlier tenures still run.
pub async fn elsewhere(connection: &mut Session, tenure: &Tenure, subscriber: &str) -> Result<Vec<Open>, sqlx::Error> {
    sqlx::query_as(
        "with ended as (
            select epoch, lane from aftercommit.running
             where subscriber = $1 and epoch < $2
               for key share skip locked)
         select epoch, lane, events from aftercommit.running as open
          where subscriber = $1 and epoch < $2 and events <> '{}'
            and not exists (select from ended where ended.epoch = open.epoch and ended.lane = open.lane)",
    )
    .bind(subscriber)
    .bind(tenure.epoch)
    .fetch_all(connection)
    .await
}

/// Counts a crash for what [`elsewhere`] found and what has ended since without a commit: the server runs a statement on for
/// some seconds when its client is gone. It counts as [`take_over`] would have counted it, and not when the tenure was about
/// to end.
pub async fn ended_elsewhere(connection: &mut Session, subscriber: &str, open: &[Open]) -> Result<(), sqlx::Error> {
    let events: Vec<Uuid> = open.iter().flat_map(|open| open.events.iter().copied()).collect();
    connection
        .execute(
            sqlx::query(
                "with ended as (
                    select epoch, lane from aftercommit.running as r
                     where subscriber = $1 and (epoch, lane) in (select * from unnest($2::bigint[], $3::bigint[]))
                       and not exists (select from aftercommit.running as last
                                        where last.subscriber = $1 and last.epoch = r.epoch and last.lane = $5)
                       for update skip locked),
                 taken as (
                    delete from aftercommit.running as r using ended
                     where r.subscriber = $1 and r.epoch = ended.epoch and r.lane = ended.lane
                    returning r.events, r.alone),
                 suspect as (
                    select ran.event_id, bool_or(alone) as alone from taken, unnest(events) as ran(event_id)
                     where ran.event_id = any ($4)
                       and not exists (select from aftercommit.inbox as done
                                        where done.subscriber = $1 and done.event_id = ran.event_id)
                     group by 1)
                 insert into aftercommit.attempt as attempt (subscriber, event_id, crashes, crashes_alone, last_error)
                 select $1, event_id, 1, alone::int, $6 from suspect order by event_id
                 on conflict (subscriber, event_id) do update
                    set crashes = attempt.crashes + 1, crashes_alone = attempt.crashes_alone + excluded.crashes_alone,
                        last_error = excluded.last_error, last_failed_at = clock_timestamp()",
            )
            .bind(subscriber)
            .bind(open.iter().map(|open| open.epoch).collect::<Vec<_>>())
            .bind(open.iter().map(|open| open.lane).collect::<Vec<_>>())
            .bind(events)
            .bind(STOPPING)
            .bind(DIED),
        )
        .await
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_subscriber_name_gets_into_the_statement() {
        let set = |subscriber| Marker { subscriber, epoch: 7, lane: 2, alone: true }.set(&[Uuid::nil(), Uuid::nil()]);
        assert!(set("branch-balance_2").unwrap().contains(
            "('branch-balance_2', 7, 2, '{00000000-0000-0000-0000-000000000000,00000000-0000-0000-0000-000000000000}', true)"
        ));
        assert!(set("x', 1, 1, '{}'); drop table inbox; --").is_err());
    }
}
