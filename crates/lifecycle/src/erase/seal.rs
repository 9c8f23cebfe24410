//! Sealed events: encrypted with a key of the person that they are about, so that forgetting one row makes all copies unreadable.
//!
//! An event is in the outbox, the stream, inboxes, dead letters, and then in backups of all of them. Nobody can find every copy. What
//! cannot be found can be made unreadable: a [`Sealer`] encrypts the payload with a data key of the subject, which is in the table
//! `data_key`, itself encrypted with a master key that is in no database. [`Sealer::forget`] deletes that row.

mod cipher;
mod envelope;
mod error;

use std::collections::HashMap;
use std::fmt;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use aftercommit_core::postgres::seal::{self, DataKey, Found};
use aftercommit_outbox::{Event, EventId, RawEvent};
use aftercommit_worker::Delivery;
use sqlx::{PgConnection, PgExecutor};
use uuid::Uuid;
use zeroize::Zeroizing;

use super::Subject;
use cipher::{Key, for_event, for_key};
use envelope::Envelope;
pub use envelope::{SEALED_CONTENT_TYPE, Sealed};
pub use error::{SealError, SealErrorKind};

/// The longest time that a key may be kept in memory.
const LONGEST_CACHE: Duration = Duration::from_secs(60);
/// The most keys that are kept in memory.
const LARGEST_CACHE: usize = 10_000;

/// A key that wraps data keys: 32 random bytes from a secret store, with a name for rotation. It must not be in the database.
#[derive(Clone)]
pub struct MasterKey {
    id: String,
    key: Key,
}

impl MasterKey {
    /// A master key. The id, of 1 to 100 bytes, is written beside each data key that it wraps; it is no secret.
    pub fn new(id: impl Into<String>, bytes: [u8; 32]) -> Self {
        Self { id: id.into(), key: Zeroizing::new(bytes) }
    }
}

/// Shows the id, never the key.
impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MasterKey").field("id", &self.id).finish_non_exhaustive()
    }
}

/// What a handler gets of a sealed event.
#[derive(Debug, Clone, PartialEq)]
pub enum Opened<E> {
    /// The event.
    Plain(E),
    /// The subject's key was forgotten: nobody can read it any more.
    Erased,
}

/// Seals events and opens them.
///
/// The XChaCha20-Poly1305 cipher binds a payload to the event's id and type, and a data key to its subject, so that none can be put in
/// the place of another.
pub struct Sealer {
    master: MasterKey,
    earlier: Vec<MasterKey>,
    cache_for: Duration,
    cache: Mutex<HashMap<Uuid, (Instant, Key)>>,
}

impl Sealer {
    /// With this master key. No data key is kept in memory.
    ///
    /// # Errors
    /// [`Master`](SealErrorKind::Master) when its id is empty or longer than 100 bytes.
    pub fn new(master: MasterKey) -> Result<Self, SealError> {
        check(&master)?;
        Ok(Self { master, earlier: Vec::new(), cache_for: Duration::ZERO, cache: Mutex::default() })
    }

    /// A master key of before, which unwraps data keys that [`rewrap`](Self::rewrap) has not reached yet.
    ///
    /// # Errors
    /// [`Master`](SealErrorKind::Master) when its id is the one of another, is empty or longer than 100 bytes.
    pub fn earlier(mut self, master: MasterKey) -> Result<Self, SealError> {
        check(&master)?;
        if self.master(&master.id).is_some() {
            let problem = format!("there are two master keys with the id {:?}", master.id);
            return Err(SealError::new(SealErrorKind::Master, problem));
        }
        self.earlier.push(master);
        Ok(self)
    }

    /// Keeps unwrapped data keys in memory for this time when it opens events, at most a minute and 10,000 of them. Defaults to none:
    /// a key in memory opens events after it was forgotten, so each is looked up, by its primary key.
    #[must_use]
    pub fn cache_for(self, time: Duration) -> Self {
        Self { cache_for: time.min(LONGEST_CACHE), ..self }
    }

    /// Seals an event about a subject, for [`publish_raw`](aftercommit_outbox::publish_raw). The subject's first event makes its data
    /// key, in the caller's transaction; others that seal for the same subject at the same time wait for it.
    ///
    /// `keys` is a connection to the database with the keys: `&mut **tx`, or another one.
    ///
    /// # Errors
    /// [`Event`](SealErrorKind::Event) when JSON cannot hold the event, [`Subject`](SealErrorKind::Subject) when the subject cannot
    /// be, [`Master`](SealErrorKind::Master) when the subject's data key cannot be unwrapped.
    pub async fn seal<E: Event>(
        &self,
        keys: &mut PgConnection,
        subject: &Subject,
        event: &E,
    ) -> Result<RawEvent, SealError> {
        check_subject(subject)?;
        let payload = Zeroizing::new(envelope::payload(event)?);
        let (key_ref, key) = self.key_of(keys, subject).await?;
        let id = EventId::new();
        let sealed = cipher::encrypt(&key, &payload, &for_event(id, E::TYPE, key_ref))?;
        let raw = RawEvent::new(E::TYPE, SEALED_CONTENT_TYPE, Envelope::new(key_ref, sealed).to_json());
        let raw = raw.id(id).version(E::VERSION);
        Ok(match event.key() {
            Some(key) => raw.key(key),
            None => raw,
        })
    }

    /// Opens a sealed event, or says that it is erased. An event that was published before sealing began is returned as it is.
    ///
    /// `keys` is the database with the keys: `&mut **tx` where it is the subscriber's own, or a pool.
    ///
    /// # Errors
    /// [`Unknown`](SealErrorKind::Unknown) when the database has never had the key, [`Master`](SealErrorKind::Master) when no master
    /// key unwraps it, [`Changed`](SealErrorKind::Changed) when the event was changed or belongs to another id. In a handler `?` tries
    /// again; events that were changed become dead letters with the last attempt.
    pub async fn open<E: Event + Clone>(
        &self,
        keys: impl PgExecutor<'_>,
        delivery: &Delivery<Sealed<E>>,
    ) -> Result<Opened<E>, SealError> {
        let envelope = match &delivery.event {
            Sealed::Plain(event) => return Ok(Opened::Plain(event.clone())),
            Sealed::Sealed(envelope) => envelope,
        };
        let key = match self.cached(envelope.key) {
            Some(key) => key,
            None => match seal::find(keys, envelope.key).await? {
                Found::Key(found) => {
                    let key = self.unwrap(&found)?;
                    self.keep(envelope.key, &key);
                    key
                }
                Found::Forgotten => return Ok(Opened::Erased),
                Found::Unknown => {
                    let problem = format!(
                        "the key {} of a sealed event is not in this database, and never was: open it with the database that has the keys",
                        envelope.key
                    );
                    return Err(SealError::new(SealErrorKind::Unknown, problem));
                }
            },
        };
        let associated = for_event(delivery.id, E::TYPE, envelope.key);
        let payload = cipher::decrypt(&key, &envelope.data, &associated).ok_or_else(|| {
            let id = delivery.id;
            SealError::new(
                SealErrorKind::Changed,
                format!("the sealed event {id} was changed, or belongs to another id"),
            )
        })?;
        envelope::event(&payload).map(Opened::Plain)
    }

    /// Forgets the subject's data key: all its sealed events are erased, in whatever copy. False when it has none. Later events about
    /// it get a new key.
    ///
    /// # Errors
    /// When the database cannot be written; the role needs `execute` on `aftercommit.forget_data_key`.
    pub async fn forget(keys: &mut PgConnection, subject: &Subject) -> Result<bool, SealError> {
        check_subject(subject)?;
        Ok(seal::forget(keys, &subject.kind, &subject.id).await?)
    }

    /// Wraps up to `limit` data keys that an earlier master key wraps with the present one. Returns how many; with 0 the earlier
    /// ones are needed no more. Events stay as they are.
    ///
    /// # Errors
    /// [`Master`](SealErrorKind::Master) when a data key is wrapped by a master key that was not given.
    pub async fn rewrap(&self, keys: &mut PgConnection, limit: u32) -> Result<u64, SealError> {
        let found = seal::wrapped_by_others(keys, &self.master.id, limit.into()).await?;
        for old in &found {
            let key = self.unwrap(old)?;
            seal::rewrap(keys, &self.wrap(old.key_ref, &old.subject_kind, &old.subject_id, &key)?).await?;
        }
        Ok(found.len() as u64)
    }

    async fn key_of(&self, keys: &mut PgConnection, subject: &Subject) -> Result<(Uuid, Key), SealError> {
        // Twice, because another transaction may forget the key that was in the way of this one.
        for _ in 0..3 {
            if let Some(found) = seal::of_subject(keys, &subject.kind, &subject.id).await? {
                return Ok((found.key_ref, self.unwrap(&found)?));
            }
            let (key_ref, key) = (Uuid::new_v4(), cipher::new_key()?);
            if seal::insert(keys, &self.wrap(key_ref, &subject.kind, &subject.id, &key)?).await? {
                return Ok((key_ref, key));
            }
        }
        Err(SealError::new(SealErrorKind::Database, "the key of a subject is forgotten again and again: try later"))
    }

    fn master(&self, id: &str) -> Option<&MasterKey> {
        std::iter::once(&self.master).chain(&self.earlier).find(|master| master.id == id)
    }

    fn wrap(&self, key_ref: Uuid, kind: &str, id: &str, key: &Key) -> Result<DataKey, SealError> {
        let associated = for_key(key_ref, kind, id, &self.master.id);
        Ok(DataKey {
            subject_kind: kind.into(),
            subject_id: id.into(),
            key_ref,
            wrapped_key: cipher::encrypt(&self.master.key, key.as_slice(), &associated)?,
            key_id: self.master.id.clone(),
        })
    }

    fn unwrap(&self, found: &DataKey) -> Result<Key, SealError> {
        let DataKey { subject_kind, subject_id, key_ref, wrapped_key, key_id } = found;
        let Some(master) = self.master(key_id) else {
            let problem = format!("the key {key_ref} is wrapped by the master key {key_id:?}, which was not given");
            return Err(SealError::new(SealErrorKind::Master, problem));
        };
        let associated = for_key(*key_ref, subject_kind, subject_id, key_id);
        let bytes = cipher::decrypt(&master.key, wrapped_key, &associated);
        let key: Option<[u8; 32]> = bytes.and_then(|bytes| bytes.as_slice().try_into().ok());
        key.map(Zeroizing::new).ok_or_else(|| {
            let problem =
                format!("the master key {key_id:?} does not unwrap the key {key_ref}: it is another one of that id");
            SealError::new(SealErrorKind::Master, problem)
        })
    }

    fn cached(&self, key_ref: Uuid) -> Option<Key> {
        if self.cache_for.is_zero() {
            return None;
        }
        let cache = self.cache.lock().ok()?;
        cache.get(&key_ref).filter(|(since, _)| since.elapsed() < self.cache_for).map(|(_, key)| key.clone())
    }

    fn keep(&self, key_ref: Uuid, key: &Key) {
        if self.cache_for.is_zero() {
            return;
        }
        if let Ok(mut cache) = self.cache.lock() {
            cache.retain(|_, (since, _)| since.elapsed() < self.cache_for);
            if cache.len() < LARGEST_CACHE {
                cache.insert(key_ref, (Instant::now(), key.clone()));
            }
        }
    }
}

/// Shows the ids of its master keys.
impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sealer").field("master", &self.master).field("earlier", &self.earlier).finish_non_exhaustive()
    }
}

fn check(master: &MasterKey) -> Result<(), SealError> {
    if master.id.is_empty() || master.id.len() > 100 || master.id.contains('\0') {
        return Err(SealError::new(
            SealErrorKind::Master,
            "the id of a master key must have 1 to 100 bytes and no NUL",
        ));
    }
    Ok(())
}

fn check_subject(subject: &Subject) -> Result<(), SealError> {
    for (part, value, most) in [("kind", &subject.kind, 100), ("id", &subject.id, 500)] {
        if value.is_empty() || value.len() > most || value.contains('\0') {
            let problem = format!("the {part} of a subject must have 1 to {most} bytes and no NUL");
            return Err(SealError::new(SealErrorKind::Subject, problem));
        }
    }
    Ok(())
}
