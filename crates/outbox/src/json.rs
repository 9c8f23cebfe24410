//! An event as JSON that every subscriber can read, or the field that stands in the way.
//!
//! `serde_json` alone writes `null` for NaN and infinity, digits for bytes and text for numbers that are map keys, and
//! it cannot know whether the type reads what it wrote. Each would turn up as a poison event at the subscribers, long
//! after the commit.

mod strict;

use serde::Serialize;
use serde_path_to_error::{Path, Segment};

use crate::error::Problem;
use crate::event::Event;

/// The payload of a value that only others read: what its type would make of it is not asked.
pub(crate) fn written(value: &impl Serialize) -> Result<Vec<u8>, Problem> {
    let payload = to_vec(value)?;
    // As a value, because readers that skip what they do not want know no limit.
    if serde_json::from_slice::<serde_json::Value>(&payload).is_err() {
        return Err(Problem::new(field([]), "is JSON that readers refuse, such as for being nested too deeply"));
    }
    Ok(payload)
}

/// The payload of `event`.
pub(crate) fn payload<E: Event>(event: &E) -> Result<Vec<u8>, Problem> {
    let payload = to_vec(event)?;
    if serde_json::from_slice::<E>(&payload).is_err() {
        return Err(Problem::new(
            unreadable_field::<E>(&payload),
            "cannot be read back from the JSON it is written as",
        ));
    }
    Ok(payload)
}

fn to_vec(value: &impl Serialize) -> Result<Vec<u8>, Problem> {
    strict::check(value).map_err(|refusal| Problem::new(field(refusal.path()), refusal.why))?;
    serde_json::to_vec(value).map_err(|error| Problem::new(field([]), error.to_string()))
}

/// Where reading fails. Why is left out: serde's reasons quote values.
fn unreadable_field<E: Event>(payload: &[u8]) -> String {
    let mut reader = serde_json::Deserializer::from_slice(payload);
    match serde_path_to_error::deserialize::<_, E>(&mut reader) {
        Ok(_) => field([]),
        Err(error) => field(steps(error.path())),
    }
}

/// One step from a value into what it holds.
#[derive(Debug, Clone, PartialEq)]
enum Step {
    Index(usize),
    Name(String),
    Unknown,
}

fn steps(path: &Path) -> impl Iterator<Item = Step> {
    path.iter().map(|segment| match segment {
        Segment::Seq { index } => Step::Index(*index),
        Segment::Map { key } => Step::Name(key.clone()),
        Segment::Enum { variant } => Step::Name(variant.clone()),
        Segment::Unknown => Step::Unknown,
    })
}

/// The path as text, such as `payload.items[2].price`. A map's key is data; it is shown only when it could as well be
/// the name of a field.
fn field(path: impl IntoIterator<Item = Step>) -> String {
    let mut text = String::from("payload");
    for step in path {
        match step {
            Step::Index(index) => text.push_str(&format!("[{index}]")),
            Step::Name(name) if is_identifier(&name) => text.push_str(&format!(".{name}")),
            Step::Name(_) | Step::Unknown => text.push_str(".*"),
        }
    }
    text
}

fn is_identifier(name: &str) -> bool {
    name.len() <= 64
        && name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet, HashMap};

    use serde::{Deserialize, Serialize};

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Sample<T>(T);

    impl<T: Serialize + serde::de::DeserializeOwned + Send + Sync + 'static> Event for Sample<T> {
        const TYPE: &'static str = "sample.taken";
    }

    fn refused<T: Serialize + serde::de::DeserializeOwned + Send + Sync + 'static>(value: T) -> (String, String) {
        let problem = payload(&Sample(value)).err().unwrap();
        (problem.field, problem.why)
    }

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    struct Order {
        id: uuid::Uuid,
        state: State,
        items: Vec<Item>,
        tags: BTreeMap<String, (i8, Option<bool>)>,
        codes: BTreeSet<char>,
        note: Option<String>,
        nothing: (),
    }

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    struct Item {
        price: f64,
        weight: f32,
        count: u128,
    }

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    enum State {
        Open,
        Held(f64),
        Moved(u8, f64),
        Paid { at: f64 },
    }

    fn order() -> Order {
        Order {
            id: uuid::Uuid::now_v7(),
            state: State::Open,
            items: vec![Item { price: 0.1, weight: f32::MIN_POSITIVE, count: u128::MAX }; 3],
            tags: BTreeMap::from([("a b".into(), (-1, None)), ("\u{0}\"".into(), (1, Some(true)))]),
            codes: BTreeSet::from(['ß', '\n']),
            note: Some("\u{2028}".into()),
            nothing: (),
        }
    }

    #[test]
    fn what_is_taken_reads_back_the_same() {
        for state in [State::Open, State::Held(-0.0), State::Moved(1, f64::MAX), State::Paid { at: 5e-324 }] {
            let event = Sample(Order { state, ..order() });
            let payload = payload(&event).ok().unwrap();
            assert_eq!(serde_json::from_slice::<Sample<Order>>(&payload).unwrap(), event);
        }
    }

    #[test]
    fn every_finite_float_reads_back_the_same() {
        // A multiplicative generator walks over the bit patterns.
        let mut bits = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..20_000 {
            bits = bits.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(1);
            let number = f64::from_bits(bits);
            if number.is_finite() {
                let text = serde_json::to_string(&number).unwrap();
                assert_eq!(serde_json::from_str::<f64>(&text).unwrap().to_bits(), number.to_bits(), "{text}");
            }
        }
    }

    #[test]
    fn numbers_that_json_cannot_hold_are_named() {
        let item = |price| Item { price, weight: 0.0, count: 0 };
        let items = vec![item(1.0), item(f64::NAN)];
        assert_eq!(refused(Order { items, ..order() }).0, "payload.items[1].price");
        for (state, field) in [
            (State::Held(f64::INFINITY), "payload.state.Held"),
            (State::Moved(0, f64::NEG_INFINITY), "payload.state.Moved[1]"),
            (State::Paid { at: f64::NAN }, "payload.state.Paid.at"),
        ] {
            assert_eq!(refused(Order { state, ..order() }).0, field);
        }
        assert_eq!(refused(f32::NAN).0, "payload");
        assert_eq!(refused(Some(f64::NAN)).0, "payload");
        assert_eq!(refused((1, f64::NAN)).0, "payload[1]");
        assert_eq!(refused(BTreeMap::from([("low", f64::NAN)].map(|(k, v)| (k.to_string(), v)))).0, "payload.low");
        let (field, why) = refused(BTreeMap::from([("ann@example.org".to_string(), f64::NAN)]));
        assert_eq!(field, "payload.*");
        assert_eq!(why, "is NaN or infinite, which JSON cannot hold");
    }

    #[test]
    fn keys_that_are_no_text_are_refused() {
        assert_eq!(refused(HashMap::from([(7, "x".to_string())])).0, "payload");
        assert_eq!(refused(vec![BTreeMap::from([(true, 1)])]).0, "payload[0]");
        let (field, why) = refused(BTreeMap::from([((1, 2), 3)]));
        assert_eq!((field.as_str(), why.as_str()), ("payload", "is a map whose keys are no strings"));
        assert!(payload(&Sample(BTreeMap::from([(uuid::Uuid::nil(), 1), (uuid::Uuid::max(), 2)]))).is_ok());
        assert!(payload(&Sample(BTreeMap::from([('a', 1)]))).is_ok());
    }

    #[derive(Serialize, Deserialize)]
    struct Flat {
        id: u8,
        #[serde(flatten)]
        more: BTreeMap<String, f64>,
    }

    #[test]
    fn flattened_fields_are_named() {
        let flat = |name: &str, number| Flat { id: 1, more: BTreeMap::from([(name.into(), number)]) };
        assert!(payload(&Sample(flat("other", 1.0))).is_ok());
        assert_eq!(refused(flat("other", f64::NAN)).0, "payload.other");
        let (_, why) = refused(flat("id", 1.0));
        assert_eq!(why, "cannot be read back from the JSON it is written as");
    }

    #[derive(Deserialize)]
    struct Bytes;

    impl Serialize for Bytes {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            serializer.serialize_bytes(b"x")
        }
    }

    #[derive(Deserialize)]
    struct Sulking;

    impl Serialize for Sulking {
        fn serialize<S: serde::Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
            Err(serde::ser::Error::custom("is not in the mood"))
        }
    }

    #[derive(Serialize, Deserialize)]
    struct OneWay {
        inner: Renamed,
    }

    #[derive(Serialize, Deserialize)]
    struct Renamed {
        #[serde(rename(serialize = "amount", deserialize = "value"))]
        amount: u8,
        #[serde(skip_serializing)]
        _secret: String,
    }

    #[test]
    fn bytes_and_failing_types_are_named() {
        let (field, why) = refused(BTreeMap::from([("scan".to_string(), vec![Bytes])]));
        assert_eq!(field, "payload.scan[0]");
        assert!(why.contains("publish_raw"), "{why}");
        assert_eq!(refused((1, Sulking)), ("payload[1]".into(), "is not in the mood".into()));
        assert!(payload(&Sample(b"a list of numbers".to_vec())).is_ok());
    }

    #[test]
    fn a_type_that_cannot_read_itself_is_named_without_values() {
        let (field, why) = refused(OneWay { inner: Renamed { amount: 1, _secret: "hush".into() } });
        assert!(field.starts_with("payload.inner"), "{field}");
        assert!(!why.contains("hush") && why.starts_with("cannot be read back"), "{why}");
    }

    #[test]
    fn what_only_others_read_is_checked_as_strictly() {
        #[derive(Serialize)]
        struct Told<'a> {
            name: &'a str,
            weight: f64,
        }
        assert_eq!(written(&Told { name: "x", weight: 0.5 }).ok().unwrap(), br#"{"name":"x","weight":0.5}"#);
        let problem = written(&[Told { name: "x", weight: f64::NAN }]).err().unwrap();
        assert_eq!(problem.field, "payload[0].weight");
        assert_eq!(written(&HashMap::from([(7, "x")])).err().unwrap().why, "is a map whose keys are no strings");
        // Its own type could not read it, which is no concern of those who do.
        assert!(written(&Sample(OneWay { inner: Renamed { amount: 1, _secret: "hush".into() } })).is_ok());
        assert!(written(&nested()).err().unwrap().why.contains("nested too deeply"));
    }

    fn nested() -> serde_json::Value {
        let mut value = serde_json::Value::Null;
        for _ in 0..200 {
            value = serde_json::Value::Array(vec![value]);
        }
        value
    }

    #[test]
    fn nesting_deeper_than_readers_go_is_refused() {
        let value = nested();
        assert_eq!(refused(value).1, "cannot be read back from the JSON it is written as");
    }
}
