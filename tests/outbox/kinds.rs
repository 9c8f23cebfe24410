//! What a payload may hold comes to the handler as it was; what JSON cannot hold is refused by name before it is written.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use crate::support::Database;
use aftercommit::Event;
use aftercommit::outbox::{self, PublishErrorKind};
use aftercommit::testing::{drain, pending};
use aftercommit::worker::{Delivery, Handler, HandlerError, Subscriber};
use serde::{Deserialize, Serialize};
use sqlx::PgTransaction;
use sqlx::types::Uuid;
use sqlx::types::chrono::{DateTime, NaiveDate, Utc};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Everything {
    text: String,
    empty: String,
    small: i64,
    large: u64,
    float: f64,
    yes: bool,
    nothing: Option<i64>,
    something: Option<Box<Everything>>,
    list: Vec<(i32, Option<String>)>,
    map: BTreeMap<String, Vec<f64>>,
    set: BTreeSet<String>,
    tuple: (u8, String, bool),
    id: Uuid,
    at: DateTime<Utc>,
    day: NaiveDate,
    plain: Kind,
    with_fields: Kind,
    nested: BTreeMap<Uuid, Kind>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Kind {
    Plain,
    Tuple(i32, String),
    Fields { at: DateTime<Utc> },
}

impl Event for Everything {
    const TYPE: &'static str = "test.everything";
}

fn everything() -> Everything {
    let at: DateTime<Utc> = "2026-11-20T10:11:12.123456789Z".parse().unwrap();
    Everything {
        text: "Straße \"1\" \\ \u{1F600} \u{0} \n".into(),
        empty: String::new(),
        small: i64::MIN,
        large: u64::MAX,
        float: 0.1 + 0.2,
        yes: true,
        nothing: None,
        something: None,
        list: vec![(-1, None), (1, Some("a".into()))],
        map: BTreeMap::from([("a.b c".into(), vec![-0.0, f64::MAX, f64::MIN_POSITIVE])]),
        set: BTreeSet::from(["b".into(), "a".into()]),
        tuple: (255, "t".into(), false),
        id: Uuid::max(),
        at,
        day: at.date_naive(),
        plain: Kind::Plain,
        with_fields: Kind::Tuple(-7, "x".into()),
        nested: BTreeMap::from([(Uuid::nil(), Kind::Fields { at })]),
    }
}

#[derive(Clone, Default)]
struct Keep(Arc<Mutex<Vec<Everything>>>);

impl Handler<Everything> for Keep {
    async fn handle(&self, _: &mut PgTransaction<'_>, delivery: &Delivery<Everything>) -> Result<(), HandlerError> {
        self.0.lock().unwrap().push(delivery.event.clone());
        Ok(())
    }
}

#[tokio::test]
async fn every_kind_of_value_comes_to_the_handler_as_it_was() {
    let pool = Database::migrated().await.pool().await;
    let event = Everything { something: Some(Box::new(everything())), ..everything() };
    let mut tx = pool.begin().await.unwrap();
    outbox::publish(&mut tx, &event).await.unwrap();
    tx.commit().await.unwrap();
    let kept = Keep::default();
    drain(&pool, [Subscriber::new("keep").on::<Everything>(kept.clone())]).await.unwrap().assert_all_handled();
    assert_eq!(*kept.0.lock().unwrap(), [event]);
}

#[derive(Debug, Serialize, Deserialize)]
struct Wrapped<T> {
    field: T,
}

impl<T: Serialize + serde::de::DeserializeOwned + Send + Sync + 'static> Event for Wrapped<T> {
    const TYPE: &'static str = "test.wrapped";
}

#[derive(Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
struct Point(i32, i32);

#[derive(Debug, Serialize, Deserialize)]
struct Bytes(#[serde(with = "bytes_as_bytes")] Vec<u8>);

mod bytes_as_bytes {
    pub fn serialize<S: serde::Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    pub fn deserialize<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        serde::Deserialize::deserialize(deserializer)
    }
}

#[tokio::test]
async fn what_json_cannot_hold_is_refused_by_name_before_it_is_written() {
    let pool = Database::migrated().await.pool().await;
    let mut tx = pool.begin().await.unwrap();
    async fn refuse<T>(tx: &mut PgTransaction<'_>, field: T, name: &str)
    where
        T: Debug + Serialize + serde::de::DeserializeOwned + Send + Sync + 'static,
    {
        let event = Wrapped { field };
        let error = outbox::publish(tx, &event).await.unwrap_err();
        assert_eq!(error.kind(), PublishErrorKind::Invalid, "{event:?}");
        let text = error.to_string();
        assert!(text.contains("\"test.wrapped\"") && text.contains(name), "{event:?}: {text}");
    }
    refuse(&mut tx, f64::NAN, "payload.field ").await;
    refuse(&mut tx, vec![0.0, f64::INFINITY], "payload.field[1] ").await;
    refuse(&mut tx, Wrapped { field: f64::NEG_INFINITY }, "payload.field.field ").await;
    refuse(&mut tx, BTreeMap::from([(7, "seven".to_string())]), "payload.field").await;
    refuse(&mut tx, BTreeMap::from([(Point(1, 2), 3)]), "payload.field").await;
    refuse(&mut tx, Bytes(vec![1, 2, 3]), "payload.field").await;
    assert!(pending(&mut tx).await.unwrap().is_empty(), "nothing was written");
    // And the transaction is as good as before.
    outbox::publish(&mut tx, &Wrapped { field: 1.5 }).await.unwrap();
    tx.commit().await.unwrap();
}
