//! The events that the bench publishes and handles itself: as those that it fills an outbox with.

use serde::{Deserialize, Serialize};

use aftercommit_outbox::event::Event;

/// An event with a payload of 256 bytes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Measured {
    #[serde(skip)]
    key: Option<String>,
    pub(crate) number: u64,
    text: String,
}

impl Measured {
    pub(crate) fn new(number: u64, key: String) -> Self {
        let frame = r#"{"number":,"text":""}"#.len() + number.to_string().len();
        Self { key: Some(key), number, text: "x".repeat(256 - frame) }
    }
}

impl Event for Measured {
    const TYPE: &'static str = "bench.measured";

    fn key(&self) -> Option<String> {
        self.key.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_has_256_bytes() {
        for number in [0, 7, 123_456_789] {
            let payload = serde_json::to_vec(&Measured::new(number, "a".into())).unwrap();
            assert_eq!(payload.len(), 256);
        }
    }
}
