//! Leases: one holder per name, by the database's clock, with an epoch that grows at every change of hands.

use std::time::Duration;

use sqlx::PgExecutor;

use super::session::Session;

/// Takes a lease that is free, has expired, or is already the holder's own. None while somebody else holds it.
///
/// One that ends in more than a minute, and more than twice `ttl`, was written before the database's clock went back, and
/// its end says nothing: it is free too. A holder that lives has written it anew by then, or notices by the epoch that it lost it.
///
/// Asking in vain takes no transaction id: standbys ask twice a second.
pub async fn acquire(
    connection: &mut Session,
    name: &str,
    holder: &str,
    ttl: Duration,
) -> Result<Option<Tenure>, sqlx::Error> {
    let epoch: Option<i64> = sqlx::query_scalar(
        "insert into aftercommit.lease as l (name, holder, epoch, expires_at)
         select $1, $2, 1, clock_timestamp() + make_interval(secs => $3)
          where not exists (
                select from aftercommit.lease held
                 where held.name = $1 and held.holder <> $2 and held.expires_at >= clock_timestamp()
                   and held.expires_at <= clock_timestamp() + make_interval(secs => greatest(2 * $3, 60)))
         on conflict (name) do update
            set holder = excluded.holder, epoch = l.epoch + 1, expires_at = excluded.expires_at
          where l.expires_at < clock_timestamp() or l.holder = excluded.holder
             or l.expires_at > clock_timestamp() + make_interval(secs => greatest(2 * $3, 60))
         returning epoch",
    )
    .bind(name)
    .bind(holder)
    .bind(ttl.as_secs_f64())
    .fetch_optional(connection)
    .await?;
    Ok(epoch.map(|epoch| Tenure { name: name.into(), holder: holder.into(), epoch }))
}

/// Whether anybody has ever held the lease.
pub async fn exists(connection: impl PgExecutor<'_>, name: &str) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("select exists (select from aftercommit.lease where name = $1)")
        .bind(name)
        .fetch_one(connection)
        .await
}

/// How long a lease is asked for: longer where statements are slow, so that it does not run out while it is being
/// prolonged, and instances that are all alive do not take it from each other.
#[derive(Debug, Clone)]
pub struct Term {
    usual: Duration,
    slowest: Duration,
}

impl Term {
    /// The longest: somebody who died with it keeps others out for so long.
    const MAX: Duration = Duration::from_secs(30);

    /// Asks for `usual` as long as statements are fast.
    pub fn new(usual: Duration) -> Self {
        Self { usual, slowest: Duration::ZERO }
    }

    /// Between two prolongations lie two statements: one whose commit is late, and the next one.
    pub fn ask_for(&self) -> Duration {
        self.usual.max((3 * self.slowest).min(Self::MAX))
    }

    /// A statement about the lease took so long. One that was slow is forgotten step by step.
    pub fn took(&mut self, time: Duration) {
        self.slowest = time.max(self.slowest / 2);
    }
}

/// A lease that somebody holds, or held: other writes can be made conditional on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tenure {
    /// Name of the lease, such as `relay`.
    pub name: String,
    /// Who holds it: host, process id and a random part.
    pub holder: String,
    /// The lease's epoch, which grows by one at each change of hands.
    pub epoch: i64,
}

impl Tenure {
    /// Extends the lease. False when it has passed to another holder or epoch.
    pub async fn renew(&self, connection: &mut Session, ttl: Duration) -> Result<bool, sqlx::Error> {
        let done = sqlx::query(
            "update aftercommit.lease set expires_at = clock_timestamp() + make_interval(secs => $4)
              where name = $1 and holder = $2 and epoch = $3",
        )
        .bind(&self.name)
        .bind(&self.holder)
        .bind(self.epoch)
        .bind(ttl.as_secs_f64())
        .execute(connection)
        .await?;
        Ok(done.rows_affected() == 1)
    }

    /// Gives the lease up, so that a standby can take it at once. The epoch stays.
    pub async fn release(&self, connection: &mut Session) -> Result<(), sqlx::Error> {
        sqlx::query(
            "update aftercommit.lease set expires_at = to_timestamp(0) where name = $1 and holder = $2 and epoch = $3",
        )
        .bind(&self.name)
        .bind(&self.holder)
        .bind(self.epoch)
        .execute(connection)
        .await
        .map(drop)
    }
}

/// A new name for who holds a lease: host, process, and something random, because process numbers come again.
pub fn new_holder() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = Some(host.trim()).filter(|host| !host.is_empty()).unwrap_or("host");
    let id = uuid::Uuid::now_v7().simple().to_string();
    format!("{host}:{}:{}", std::process::id(), &id[24..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_longer_where_statements_are_slow() {
        let seconds = Duration::from_secs;
        let mut term = Term::new(seconds(4));
        term.took(seconds(1));
        assert_eq!(term.ask_for(), seconds(4));
        term.took(seconds(5));
        assert_eq!(term.ask_for(), seconds(15));
        term.took(seconds(60));
        assert_eq!(term.ask_for(), Term::MAX);
        (0..5).for_each(|_| term.took(seconds(0)));
        assert_eq!(term.ask_for(), seconds(60) * 3 / 32, "forgotten by halves");
        term.took(seconds(0));
        assert_eq!(term.ask_for(), seconds(4));
    }
}
