//! Services that publish: transactions of every kind, each written down before anybody else can see it.

use std::path::PathBuf;
use std::time::Duration;

use aftercommit::outbox::{self, RawEvent};
use aftercommit::{Event, EventId};
use serde::{Deserialize, Serialize};
use sqlx::postgres::PgPoolOptions;
use sqlx::{PgPool, PgTransaction};
use uuid::Uuid;

use super::history::{Act, Fate, Journal, What};
use super::subscribers;
use super::support::Random;

/// The service's own tables. The ledger is what was really committed.
pub const TABLES: &str = "
    create table aggregate (key text primary key, version bigint not null);
    insert into aggregate select 'key-' || n, 0 from generate_series(1, 12) n;
    create table ledger (id bigint generated always as identity, event_id uuid not null, key text, version bigint,
                         digest text not null)";

const KEYS: u64 = 12;
/// More than the servers' max_payload.
const OVERSIZE: usize = 70_000;

/// The event.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Changed {
    pub key: Option<String>,
    pub version: i64,
    pub fate: Fate,
    pub body: String,
}

impl Event for Changed {
    const TYPE: &'static str = "key.changed";

    fn key(&self) -> Option<String> {
        self.key.clone()
    }
}

/// What a publisher's process needs to know.
pub struct Publisher {
    pool: PgPool,
    journal: Journal,
}

impl Publisher {
    pub async fn from_environment() -> Option<Self> {
        let url = std::env::var("FAULTS_DATABASE").ok()?;
        let journal = Journal::open(&PathBuf::from(std::env::var("FAULTS_JOURNAL").ok()?));
        let options = PgPoolOptions::new().max_connections(4).acquire_timeout(Duration::from_secs(2));
        Some(Self { pool: options.connect_lazy(&url).ok()?, journal })
    }

    /// Writes until the process is killed.
    pub async fn run(self) {
        let publisher = &self;
        let writer = |seed: u128| async move {
            let mut random = Random(seed as u64);
            loop {
                if publisher.transaction(&mut random).await.is_err() {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                let pause = if random.one_in(30) { 0 } else { 100 + random.below(150) };
                tokio::time::sleep(Duration::from_millis(pause)).await;
            }
        };
        // What is written need not be the same in each run, as what is done to it is.
        let seed = || Uuid::now_v7().as_u128();
        tokio::join!(writer(seed()), writer(seed()), writer(seed()));
    }

    async fn transaction(&self, random: &mut Random) -> Result<(), sqlx::Error> {
        let mut tx = self.pool.begin().await?;
        let id = Uuid::now_v7();
        let durable = !random.one_in(4);
        match self.fill(&mut tx, id, durable, random).await {
            Ok(true) => {}
            Ok(false) => {
                self.journal.write(What::RolledBack { tx: id });
                return tx.rollback().await;
            }
            // It was not asked to commit, so it never will.
            Err(error) => {
                self.journal.write(What::RolledBack { tx: id });
                return Err(error);
            }
        }
        let committed = tx.commit().await;
        self.journal.write(match committed {
            Ok(()) => What::Committed { tx: id, durable },
            Err(_) => What::Unknown { tx: id },
        });
        committed
    }

    /// Whether to commit.
    async fn fill(
        &self,
        tx: &mut PgTransaction<'_>,
        id: Uuid,
        durable: bool,
        random: &mut Random,
    ) -> Result<bool, sqlx::Error> {
        if !durable {
            sqlx::raw_sql("set local synchronous_commit = off").execute(&mut **tx).await?;
        }
        if random.one_in(4) {
            // The transaction gets its id long before it has the lock of its key.
            sqlx::raw_sql("select pg_current_xact_id()").execute(&mut **tx).await?;
        }
        let mut keys: Vec<u64> = (0..=random.below(3)).map(|_| random.below(KEYS) + 1).collect();
        keys.sort_unstable();
        keys.dedup();
        for key in keys.into_iter().map(|key| format!("key-{key}")) {
            let version = "update aggregate set version = version + 1 where key = $1 returning version";
            let version: i64 = sqlx::query_scalar(version).bind(&key).fetch_one(&mut **tx).await?;
            if random.one_in(4) {
                sqlx::raw_sql("savepoint s").execute(&mut **tx).await?;
                let event = self.write(tx, id, None, 0, random).await?;
                sqlx::raw_sql("rollback to savepoint s").execute(&mut **tx).await?;
                self.journal.write(What::Undone { tx: id, event });
            }
            self.write(tx, id, Some(key), version, random).await?;
            if random.one_in(10) {
                tokio::time::sleep(Duration::from_millis(random.below(40))).await;
            }
        }
        if random.one_in(4) {
            self.write(tx, id, None, 0, random).await?;
        }
        if random.one_in(60) {
            tokio::time::sleep(Duration::from_millis(500 + random.below(1500))).await;
        }
        Ok(!random.one_in(6))
    }

    /// The event, and the service's own row beside it.
    async fn write(
        &self,
        tx: &mut PgTransaction<'_>,
        id: Uuid,
        key: Option<String>,
        version: i64,
        random: &mut Random,
    ) -> Result<Uuid, sqlx::Error> {
        let oversize = key.is_none() && version == 0 && random.one_in(150);
        let length = if oversize { OVERSIZE } else { random.below(400) as usize };
        let body: String = (0..length).map(|_| char::from(b'a' + random.below(26) as u8)).collect();
        let changed = Changed { key, version, fate: fate(random), body };
        let event = EventId::new();
        self.journal.write(What::Wrote {
            tx: id,
            event: event.as_uuid(),
            key: changed.key.clone(),
            version,
            fate: changed.fate.clone(),
            oversize,
        });
        let digest: String = sqlx::query_scalar(
            "insert into ledger (event_id, key, version, digest)
             values ($1, $2, $3, encode(sha256(convert_to($4, 'UTF8')), 'hex')) returning digest",
        )
        .bind(event.as_uuid())
        .bind(&changed.key)
        .bind(version)
        .bind(&changed.body)
        .fetch_one(&mut **tx)
        .await?;
        let raw = RawEvent::of(&changed).unwrap().id(event).header("digest", digest);
        match outbox::publish_raw(tx, raw).await {
            Ok(_) => Ok(event.as_uuid()),
            Err(error) => Err(sqlx::Error::Protocol(error.to_string())),
        }
    }
}

fn fate(random: &mut Random) -> Fate {
    let mut fate = Fate::new();
    for name in subscribers::NAMES {
        let act = match random.below(1000) {
            0..20 => Act::Flaky,
            20..26 => Act::Panic,
            26..28 => Act::Slow,
            28..34 => Act::Snooze,
            34..36 => Act::Poison,
            36..38 => Act::Reject,
            _ => continue,
        };
        fate.insert(name.to_string(), act);
    }
    fate
}

/// Writes an event in a transaction that has its id at once, and commits so much later.
pub async fn hold(pool: &PgPool, journal: &Journal, lasts: Duration) -> Result<(), sqlx::Error> {
    let mut tx = pool.begin().await?;
    sqlx::raw_sql("select pg_current_xact_id()").execute(&mut *tx).await?;
    let (id, event) = (Uuid::now_v7(), EventId::new());
    let changed = Changed { key: None, version: 0, fate: Fate::new(), body: "held".into() };
    let (key, fate) = (None, Fate::new());
    journal.write(What::Wrote { tx: id, event: event.as_uuid(), key, version: 0, fate, oversize: false });
    let digest: String = sqlx::query_scalar(
        "insert into ledger (event_id, version, digest)
         values ($1, 0, encode(sha256(convert_to('held', 'UTF8')), 'hex')) returning digest",
    )
    .bind(event.as_uuid())
    .fetch_one(&mut *tx)
    .await?;
    let raw = RawEvent::of(&changed).unwrap().id(event).header("digest", digest);
    outbox::publish_raw(&mut tx, raw).await.map_err(|error| sqlx::Error::Protocol(error.to_string()))?;
    tokio::time::sleep(lasts).await;
    let committed = tx.commit().await;
    journal.write(match committed {
        Ok(()) => What::Committed { tx: id, durable: true },
        Err(_) => What::Unknown { tx: id },
    });
    committed
}
