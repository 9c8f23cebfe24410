//! Sealed events over a real database, and through relay and worker.

use std::sync::Arc;

use aftercommit::erase::{MasterKey, Opened, SEALED_CONTENT_TYPE, SealError, SealErrorKind, Sealed, Sealer, Subject};
use aftercommit::worker::{Delivery, Handler, HandlerError, Subscriber};
use aftercommit::{Event, outbox};
use serde::{Deserialize, Serialize};
use sqlx::{Connection, PgConnection, PgPool, PgTransaction};
use uuid::Uuid;

use crate::support::{Database, Roles, Work};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct UserRegistered {
    user: i64,
    email: String,
}

impl Event for UserRegistered {
    const TYPE: &'static str = "user.registered";
    const VERSION: u32 = 2;

    fn key(&self) -> Option<String> {
        Some("users".into())
    }
}

/// Of the same shape.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct UserRenamed {
    user: i64,
    email: String,
}

impl Event for UserRenamed {
    const TYPE: &'static str = "user.renamed";
}

fn user(n: i64) -> UserRegistered {
    UserRegistered { user: n, email: format!("ann{n}@example.org") }
}

fn subject(n: i64) -> Subject {
    Subject::new("user", n)
}

fn sealer(id: &str, byte: u8) -> Sealer {
    Sealer::new(MasterKey::new(id, [byte; 32])).unwrap()
}

/// Seals an event about this user in a transaction of its own.
async fn publish(pool: &PgPool, sealer: &Sealer, n: i64) -> Delivery<Sealed<UserRegistered>> {
    let mut tx = pool.begin().await.unwrap();
    let sealed = sealer.seal(&mut tx, &subject(n), &user(n)).await.unwrap();
    outbox::publish_raw(&mut tx, sealed).await.unwrap();
    tx.commit().await.unwrap();
    last(pool).await
}

/// The last event of the outbox, as a worker reads it.
async fn last<E: Event>(pool: &PgPool) -> Delivery<E> {
    let (id, payload): (Uuid, Vec<u8>) =
        sqlx::query_as("select event_id, payload from aftercommit.outbox order by id desc limit 1")
            .fetch_one(pool)
            .await
            .unwrap();
    let mut delivery = Delivery::new(serde_json::from_slice::<E>(&payload).unwrap());
    delivery.id = id.into();
    delivery
}

fn kind<T: std::fmt::Debug>(result: Result<T, SealError>) -> SealErrorKind {
    result.unwrap_err().kind()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sealed_event_opens_until_its_key_is_forgotten() {
    let database = Database::migrated().await;
    let (pool, sealer) = (database.pool().await, sealer("a", 1));
    let (first, other) = (publish(&pool, &sealer, 7).await, publish(&pool, &sealer, 8).await);
    let again = publish(&pool, &sealer, 7).await;
    let (event_type, version, key, content_type): (String, i32, String, String) =
        sqlx::query_as("select type, version, key, content_type from aftercommit.outbox limit 1")
            .fetch_one(&pool)
            .await
            .unwrap();
    assert_eq!(
        (event_type.as_str(), version, key.as_str(), content_type.as_str()),
        (UserRegistered::TYPE, 2, "users", SEALED_CONTENT_TYPE)
    );
    let dump = database.pg_dump(&["--data-only", "--inserts", "--table", "aftercommit.outbox"]);
    assert!(!dump.contains("ann7") && !dump.contains(&hex("ann7")), "{dump}");
    for delivery in [&first, &again] {
        assert_eq!(sealer.open(&pool, delivery).await.unwrap(), Opened::Plain(user(7)));
    }

    let mut tx = pool.begin().await.unwrap();
    assert!(Sealer::forget(&mut tx, &subject(7)).await.unwrap());
    assert_eq!(sealer.open(&mut *tx, &first).await.unwrap(), Opened::Erased, "in the transaction itself");
    tx.rollback().await.unwrap();
    assert_eq!(sealer.open(&pool, &first).await.unwrap(), Opened::Plain(user(7)), "a rollback forgets nothing");

    let mut connection = pool.acquire().await.unwrap();
    assert!(Sealer::forget(&mut connection, &subject(7)).await.unwrap());
    assert!(!Sealer::forget(&mut connection, &subject(7)).await.unwrap(), "it has none any more");
    for delivery in [&first, &again] {
        assert_eq!(sealer.open(&pool, delivery).await.unwrap(), Opened::Erased);
    }
    assert_eq!(sealer.open(&pool, &other).await.unwrap(), Opened::Plain(user(8)), "others are as they were");
    let back = publish(&pool, &sealer, 7).await;
    assert_eq!(sealer.open(&pool, &back).await.unwrap(), Opened::Plain(user(7)), "whoever comes back has a new key");
    assert_eq!(sealer.open(&pool, &first).await.unwrap(), Opened::Erased);
    // What is left of it tells nothing of the subject.
    let left = database.pg_dump(&["--data-only", "--inserts", "--table", "aftercommit.forgotten_key"]);
    assert!(left.contains("INSERT") && !left.contains("'7'"), "{left}");
}

fn hex(text: &str) -> String {
    text.bytes().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn another_master_key_opens_nothing() {
    let database = Database::migrated().await;
    let pool = database.pool().await;
    let delivery = publish(&pool, &sealer("a", 1), 7).await;
    let missing = sealer("b", 1).open(&pool, &delivery).await;
    assert!(missing.as_ref().unwrap_err().to_string().contains("\"a\", which was not given"), "{missing:?}");
    assert_eq!(kind(missing), SealErrorKind::Master);
    let wrong = sealer("a", 2).open(&pool, &delivery).await;
    assert!(wrong.as_ref().unwrap_err().to_string().contains("another one of that id"), "{wrong:?}");
    assert_eq!(kind(wrong), SealErrorKind::Master);
    // A publisher with it writes nothing that nobody could read.
    let mut tx = pool.begin().await.unwrap();
    assert_eq!(kind(sealer("a", 2).seal(&mut tx, &subject(7), &user(7)).await), SealErrorKind::Master);
}

/// A database without the keys is no erasure.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_was_never_there_is_not_erased() {
    let (here, elsewhere) = (Database::migrated().await, Database::migrated().await);
    let sealer = sealer("a", 1);
    let delivery = publish(&here.pool().await, &sealer, 7).await;
    let opened = sealer.open(&elsewhere.pool().await, &delivery).await;
    assert_eq!(kind(opened), SealErrorKind::Unknown);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_changed_or_exchanged_does_not_open() {
    let database = Database::migrated().await;
    let (pool, sealer) = (database.pool().await, sealer("a", 1));
    let mut first = publish(&pool, &sealer, 7).await;
    let second = publish(&pool, &sealer, 7).await;
    (first.id, _) = (second.id, first.id);
    assert_eq!(kind(sealer.open(&pool, &first).await), SealErrorKind::Changed, "the payload of another event");
    let mut renamed: Delivery<Sealed<UserRenamed>> = last(&pool).await;
    renamed.id = second.id;
    assert_eq!(kind(sealer.open(&pool, &renamed).await), SealErrorKind::Changed, "of another type");

    // A bit of the data, and somebody else's key.
    let json = |id: Uuid, change: &dyn Fn(&mut serde_json::Value)| {
        let pool = pool.clone();
        let change = {
            let mut value: serde_json::Value =
                serde_json::from_str(&serde_json::to_string(&second.event).unwrap()).unwrap();
            change(&mut value);
            value
        };
        async move {
            let payload = serde_json::to_vec(&change).unwrap();
            let update = "update aftercommit.outbox set payload = $2 where event_id = $1";
            sqlx::query(update).bind(id).bind(payload).execute(&pool).await.unwrap();
        }
    };
    json(second.id.as_uuid(), &|value| {
        let data = value["sealed"]["data"].as_str().unwrap();
        let other = if data.starts_with('A') { "B" } else { "A" };
        value["sealed"]["data"] = format!("{other}{}", &data[1..]).into();
    })
    .await;
    let changed: Delivery<Sealed<UserRegistered>> = last(&pool).await;
    assert_eq!(kind(sealer.open(&pool, &changed).await), SealErrorKind::Changed);
    let other = publish(&pool, &sealer, 8).await;
    let key = serde_json::to_value(&other.event).unwrap()["sealed"]["key"].clone();
    json(other.id.as_uuid(), &|value| value["sealed"]["key"] = key.clone()).await;
    let exchanged: Delivery<Sealed<UserRegistered>> = last(&pool).await;
    assert_eq!(kind(sealer.open(&pool, &exchanged).await), SealErrorKind::Changed);

    // The keys of two subjects, exchanged in the table.
    database
        .execute(
            "update aftercommit.data_key k set wrapped_key = o.wrapped_key
               from aftercommit.data_key o where o.subject_id <> k.subject_id",
        )
        .await;
    assert_eq!(kind(sealer.open(&pool, &second).await), SealErrorKind::Master);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_wrapped_anew_and_events_stay() {
    let database = Database::migrated().await;
    let (pool, old) = (database.pool().await, sealer("old", 1));
    let mut deliveries = Vec::new();
    for n in 0..5 {
        deliveries.push(publish(&pool, &old, n).await);
    }
    let both = sealer("new", 2).earlier(MasterKey::new("old", [1; 32])).unwrap();
    assert_eq!(both.open(&pool, &deliveries[0]).await.unwrap(), Opened::Plain(user(0)), "before it is wrapped anew");
    let mut connection = pool.acquire().await.unwrap();
    let mut done = Vec::new();
    while done.last() != Some(&0) {
        done.push(both.rewrap(&mut connection, 2).await.unwrap());
    }
    assert_eq!(done, [2, 2, 1, 0]);
    for (n, delivery) in (0..).zip(&deliveries) {
        assert_eq!(sealer("new", 2).open(&pool, delivery).await.unwrap(), Opened::Plain(user(n)));
        assert_eq!(kind(old.open(&pool, delivery).await), SealErrorKind::Master);
    }
    let twice = sealer("new", 2).earlier(MasterKey::new("new", [1; 32]));
    assert_eq!(twice.unwrap_err().kind(), SealErrorKind::Master);
    assert_eq!(kind(sealer("newest", 3).rewrap(&mut connection, 2).await), SealErrorKind::Master);
}

/// Many transactions seal the first event of a subject at once: there is one key, and all events open.
#[tokio::test(flavor = "multi_thread")]
async fn a_subjects_first_events_at_once_make_one_key() {
    let database = Database::migrated().await;
    let (pool, sealer) = (database.pool().await, Arc::new(sealer("a", 1)));
    let mut running = tokio::task::JoinSet::new();
    for n in 0..8 {
        let (pool, sealer) = (pool.clone(), Arc::clone(&sealer));
        running.spawn(async move {
            let mut tx = pool.begin().await.unwrap();
            let sealed = sealer.seal(&mut tx, &subject(7), &user(n)).await.unwrap();
            let id = outbox::publish_raw(&mut tx, sealed).await.unwrap();
            // Some of them take their key back.
            if n % 3 == 0 {
                tx.rollback().await.unwrap()
            } else {
                tx.commit().await.unwrap()
            }
            (n, id)
        });
    }
    let all: Vec<_> = running.join_all().await;
    let keys: i64 = sqlx::query_scalar("select count(*) from aftercommit.data_key").fetch_one(&pool).await.unwrap();
    assert_eq!(keys, 1);
    for (n, id) in all.into_iter().filter(|(n, _)| n % 3 != 0) {
        let payload: Vec<u8> = sqlx::query_scalar("select payload from aftercommit.outbox where event_id = $1")
            .bind(id.as_uuid())
            .fetch_one(&pool)
            .await
            .unwrap();
        let mut delivery = Delivery::new(serde_json::from_slice::<Sealed<UserRegistered>>(&payload).unwrap());
        delivery.id = id;
        assert_eq!(sealer.open(&pool, &delivery).await.unwrap(), Opened::Plain(user(n)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_in_memory_are_kept_only_when_asked() {
    let database = Database::migrated().await;
    let pool = database.pool().await;
    let keeps = sealer("a", 1).cache_for(std::time::Duration::from_secs(3600));
    let delivery = publish(&pool, &keeps, 7).await;
    assert_eq!(keeps.open(&pool, &delivery).await.unwrap(), Opened::Plain(user(7)));
    Sealer::forget(&mut pool.acquire().await.unwrap(), &subject(7)).await.unwrap();
    assert_eq!(keeps.open(&pool, &delivery).await.unwrap(), Opened::Plain(user(7)), "for a while");
    assert_eq!(sealer("a", 1).open(&pool, &delivery).await.unwrap(), Opened::Erased);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_sealed_is_refused_by_name() {
    let database = Database::migrated().await;
    let pool = database.pool().await;
    let mut tx = pool.begin().await.unwrap();
    for subject in [Subject::new("", "7"), Subject::new("user", ""), Subject::new("user", "a\0b")] {
        assert_eq!(kind(sealer("a", 1).seal(&mut tx, &subject, &user(7)).await), SealErrorKind::Subject);
    }
    for id in ["", "a\0"] {
        assert_eq!(Sealer::new(MasterKey::new(id, [1; 32])).unwrap_err().kind(), SealErrorKind::Master);
    }
    let shown = format!("{:?} {:?}", sealer("a", 77), last_event(&mut tx, &pool).await);
    assert!(!shown.contains("77, 77") && !shown.contains("ann"), "{shown}");
    let keys: i64 = sqlx::query_scalar("select count(*) from aftercommit.data_key").fetch_one(&mut *tx).await.unwrap();
    assert_eq!(keys, 1, "of the last one alone");
}

async fn last_event(tx: &mut PgTransaction<'_>, _: &PgPool) -> outbox::RawEvent {
    sealer("a", 1).seal(tx, &subject(7), &user(7)).await.unwrap()
}

/// A publisher seals and a worker opens; neither may forget, and neither sees whose keys there are who need not.
#[tokio::test(flavor = "multi_thread")]
async fn roles_seal_and_open_and_do_not_forget() {
    let database = Database::migrated().await;
    let roles = Roles::of(&database);
    let login = async |role: &str| {
        let login = roles.login(&database, role, &[role]).await;
        PgConnection::connect(&database.url_of(&login)).await.unwrap()
    };
    let (mut publisher, mut worker) = (login("publisher").await, login("worker").await);
    let sealer = sealer("a", 1);
    let mut tx = publisher.begin().await.unwrap();
    let sealed = sealer.seal(&mut tx, &subject(7), &user(7)).await.unwrap();
    outbox::publish_raw(&mut tx, sealed).await.unwrap();
    tx.commit().await.unwrap();
    let delivery = last(&database.pool().await).await;
    assert_eq!(sealer.open(&mut worker, &delivery).await.unwrap(), Opened::Plain(user(7)));
    for role in [&mut publisher, &mut worker] {
        assert_eq!(kind(Sealer::forget(role, &subject(7)).await), SealErrorKind::Database);
        for sql in ["delete from aftercommit.data_key", "update aftercommit.data_key set wrapped_key = ''"] {
            assert!(sqlx::query(sql).execute(&mut *role).await.is_err(), "{sql}");
        }
    }
    let mut reader = login("reader").await;
    assert!(sqlx::query("select from aftercommit.data_key").execute(&mut reader).await.is_err());
    // The eraser may, and nothing more: it deletes no rows and makes none.
    let mut eraser = login("eraser").await;
    let new = self::sealer("b", 2).earlier(MasterKey::new("a", [1; 32])).unwrap();
    assert_eq!(new.rewrap(&mut eraser, 10).await.unwrap(), 1);
    for sql in ["delete from aftercommit.data_key", "lock table aftercommit.data_key in exclusive mode"] {
        assert!(sqlx::query(sql).execute(&mut eraser).await.is_err(), "{sql}");
    }
    assert!(Sealer::forget(&mut eraser, &subject(7)).await.unwrap());
    assert_eq!(sealer.open(&mut worker, &delivery).await.unwrap(), Opened::Erased);
}

/// Writes the addresses that it can read.
struct Addresses(Sealer);

impl Handler<Sealed<UserRegistered>> for Addresses {
    async fn handle(
        &self,
        tx: &mut PgTransaction<'_>,
        delivery: &Delivery<Sealed<UserRegistered>>,
    ) -> Result<(), HandlerError> {
        let opened = self.0.open(&mut **tx, delivery).await?;
        let (key, n) = match opened {
            Opened::Plain(user) => (user.email, user.user),
            Opened::Erased => ("erased".into(), 0),
        };
        sqlx::query("insert into effect (key, n) values ($1, $2)").bind(key).bind(n).execute(&mut **tx).await?;
        Ok(())
    }
}

/// Through relay and worker: one that is forgotten before it is handled, one that is not, and one of before sealing began.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_opens_what_a_publisher_sealed() {
    let work = Work::shared().await;
    let pool = &work.outbox.pool;
    publish(pool, &sealer("a", 1), 7).await;
    publish(pool, &sealer("a", 1), 8).await;
    let mut tx = pool.begin().await.unwrap();
    outbox::publish(&mut tx, &user(9)).await.unwrap();
    Sealer::forget(&mut tx, &subject(7)).await.unwrap();
    tx.commit().await.unwrap();
    let _relay = work.outbox.relay();
    let subscriber = Subscriber::new("addresses").on::<Sealed<UserRegistered>>(Addresses(sealer("a", 1)));
    let worker = work.run(subscriber).await;
    work.wait_for(3).await;
    let effects: Vec<(String, i64)> =
        sqlx::query_as("select key, n from effect order by id").fetch_all(pool).await.unwrap();
    let read = |n| (user(n).email, n);
    assert_eq!(effects, [("erased".into(), 0), read(8), read(9)]);
    work.assert_nothing_failed().await;
    worker.stop().await;
}
