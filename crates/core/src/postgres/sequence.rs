//! The sequence that hands out the outbox's ids. Ids of a key follow its commits only when the sequence hands them out
//! one by one and upwards; and a row above it makes the next publishers fail.

use sqlx::{AssertSqlSafe, Executor};

use super::session::Session;
use crate::error::{Error, ErrorKind};

/// What the sequence says.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub struct Sequence {
    cache: i64,
    increment: i64,
    cycle: bool,
    /// The last id that it handed out.
    pub last_id: i64,
    /// The highest id of the outbox, and the highest that the relay counts as handed out.
    pub highest: i64,
    /// The subscription of logical replication that fills the outbox, if one does.
    subscription: Option<String>,
}

/// So many ids are kept for windows and for coming to a rest: with fewer left the sequence is as good as used up.
const RESERVE: i64 = 1 << 32;

impl Sequence {
    /// One with these settings, for tests.
    #[cfg(any(test, feature = "testing"))]
    pub fn of(cache: i64, increment: i64, cycle: bool, last_id: i64, highest: i64) -> Self {
        Self { cache, increment, cycle, last_id, highest, subscription: None }
    }

    /// The settings that are wrong, with their values; none when all is well.
    pub fn settings(&self) -> Option<String> {
        let mut wrong = Vec::new();
        if self.cache != 1 {
            wrong.push(format!("CACHE {}", self.cache));
        }
        if self.increment != 1 {
            wrong.push(format!("INCREMENT {}", self.increment));
        }
        if self.cycle {
            wrong.push("CYCLE".to_string());
        }
        (!wrong.is_empty()).then(|| wrong.join(", "))
    }

    /// Whether ids will be handed out that are there already, or that were.
    pub fn is_behind(&self) -> bool {
        self.last_id < self.highest
    }

    /// Why nobody can go by the ids, whatever the settings, and the way out.
    pub fn obstacle(&self) -> Option<String> {
        if let Some(subscription) = &self.subscription {
            return Some(format!(
                "the subscription {subscription} of logical replication fills the outbox with the ids of another database: \
                 end it (`drop subscription`), run `aftercommit migrate`, and then let the relay run here"
            ));
        }
        (self.last_id.max(self.highest) > i64::MAX - RESERVE).then(|| {
            format!(
                "the ids of the outbox have come to {}, and there are none behind: remove the rows with such ids once they \
                 are published, and set the sequence outbox_id_seq back",
                self.last_id.max(self.highest)
            )
        })
    }

    /// Refuses ids that nobody can go by, and settings with which events of a key get out of order.
    pub fn check(&self) -> Result<(), Error> {
        if let Some(obstacle) = self.obstacle() {
            return Err(Error::new(ErrorKind::NotReady, obstacle));
        }
        let Some(settings) = self.settings() else { return Ok(()) };
        Err(Error::new(
            ErrorKind::NotReady,
            format!(
                "the sequence outbox_id_seq has {settings}: ids would not follow the commits of a key. It must \
                 have CACHE 1, INCREMENT 1 and NO CYCLE: run `aftercommit migrate` as its owner, which sets that"
            ),
        ))
    }
}

/// Reads what the sequence says.
pub async fn read(connection: &mut Session) -> Result<Sequence, sqlx::Error> {
    sqlx::query_as(
        "select seqcache as cache, seqincrement as increment, seqcycle as cycle,
                (select case when is_called then last_value else last_value - seqincrement end from aftercommit.outbox_id_seq)
                    as last_id,
                greatest((select max(id) from aftercommit.outbox),
                         (select greatest(settled_id, target_id) from aftercommit.relay_log order by seq desc limit 1), 0)
                    as highest,
                (select subname::text from pg_subscription_rel join pg_subscription s on s.oid = srsubid
                  where srrelid = 'aftercommit.outbox'::regclass and subenabled limit 1) as subscription
           from pg_sequence where seqrelid = 'aftercommit.outbox_id_seq'::regclass",
    )
    .fetch_one(connection)
    .await
}

/// Sets the sequence forward to the highest id, when it is behind that. Returns where it stands then.
pub async fn catch_up(connection: &mut Session) -> Result<Option<i64>, sqlx::Error> {
    sqlx::query_scalar(
        "select setval('aftercommit.outbox_id_seq', highest.id)
           from (select greatest((select max(id) from aftercommit.outbox),
                                 (select greatest(settled_id, target_id) from aftercommit.relay_log
                                   order by seq desc limit 1)) as id) as highest,
                aftercommit.outbox_id_seq as s
          where highest.id > case when s.is_called then s.last_value else s.last_value - 1 end",
    )
    .fetch_optional(connection)
    .await
}

/// How often the owner asks for the sequence's lock, for a second each time: publishers that want an id wait behind it.
const TRIES: u32 = 30;

/// Puts right whatever is wrong. Only the sequence's owner may. Returns what was done, in words.
pub async fn heal(connection: &mut Session) -> Result<Vec<String>, Error> {
    let failed = |error| super::database_error("putting the sequence outbox_id_seq right failed", error);
    let found = read(connection).await.map_err(failed)?;
    let mut done = Vec::new();
    if let Some(settings) = found.settings() {
        let mut tries = 1;
        while let Err(error) = reset(connection).await {
            let locked = matches!(&error, sqlx::Error::Database(error) if error.code().as_deref() == Some("55P03"));
            if !locked || tries >= TRIES {
                return Err(failed(error));
            }
            tries += 1;
            tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        }
        done.push(format!("the sequence outbox_id_seq had {settings}: it has CACHE 1, INCREMENT 1 and NO CYCLE now"));
    } else if let Some(now) = catch_up(connection).await.map_err(failed)? {
        done.push(format!(
            "the sequence outbox_id_seq stood at {}, behind ids that were given out: it stands at {now} now",
            found.last_id
        ));
    }
    Ok(done)
}

/// Sets what the sequence must have, and starts it anew behind every id, which makes sessions forget ids that they have
/// taken in advance.
async fn reset(connection: &mut Session) -> Result<(), sqlx::Error> {
    let mut tx = connection.begin().await?;
    tx.execute("set local lock_timeout = '1s'; alter sequence aftercommit.outbox_id_seq increment 1 cache 1 no cycle")
        .await?;
    let next: i64 = sqlx::query_scalar(
        "select greatest((select last_value from aftercommit.outbox_id_seq), (select max(id) from aftercommit.outbox),
                         (select greatest(settled_id, target_id) from aftercommit.relay_log order by seq desc limit 1), 0) + 1",
    )
    .fetch_one(&mut tx)
    .await?;
    tx.execute(AssertSqlSafe(format!("alter sequence aftercommit.outbox_id_seq restart with {next}"))).await?;
    tx.commit().await
}
