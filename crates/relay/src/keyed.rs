//! What is in flight to a stream with other writers, without any I/O: at most one message per key.
//!
//! Nothing can be chained there, because others write in between. So the next event of a key is sent only when the one
//! before it is stored, and a repeat is dropped by the server for its `Nats-Msg-Id`.

use std::collections::{HashMap, HashSet, VecDeque};

use super::chain::{Doubt, Sent};
use aftercommit_core::jetstream::publisher::Answer;

/// How far behind the first waiting event one with a free key is looked for.
const LOOK_AHEAD: usize = 1000;

/// The messages in flight.
#[derive(Debug)]
pub(super) struct Keyed {
    stream: String,
    sequence: u64,
    in_flight: HashMap<u64, Sent>,
    keys: HashSet<String>,
    bytes: usize,
    next_number: u64,
}

impl Keyed {
    pub(super) fn new(stream: &str, sequence: u64) -> Self {
        Self {
            stream: stream.into(),
            sequence,
            in_flight: HashMap::new(),
            keys: HashSet::new(),
            bytes: 0,
            next_number: 0,
        }
    }

    /// The highest sequence under which an event was stored.
    pub(super) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Messages and payload bytes in flight.
    pub(super) fn load(&self) -> (usize, usize) {
        (self.in_flight.len(), self.bytes)
    }

    /// Takes the first waiting event whose key has nothing in flight and nothing waiting before it.
    pub(super) fn take_next<T>(&self, waiting: &mut VecDeque<T>, event: impl Fn(&T) -> &Sent) -> Option<T> {
        let mut passed: HashSet<&str> = HashSet::new();
        let position = waiting.iter().take(LOOK_AHEAD).position(|candidate| match &event(candidate).key {
            Some(key) => !self.keys.contains(key) && passed.insert(key),
            None => true,
        })?;
        waiting.remove(position)
    }

    /// The lowest outbox id in flight.
    pub(super) fn first_outbox_id(&self) -> Option<i64> {
        self.in_flight.values().map(|event| event.outbox_id).min()
    }

    pub(super) fn next_number(&self) -> u64 {
        self.next_number
    }

    pub(super) fn sent(&mut self, event: Sent) {
        self.bytes += event.bytes;
        if let Some(key) = &event.key {
            self.keys.insert(key.clone());
        }
        self.in_flight.insert(self.next_number, event);
        self.next_number += 1;
    }

    /// The event in flight with this number.
    pub(super) fn event(&self, number: u64) -> Option<&Sent> {
        self.in_flight.get(&number)
    }

    /// Takes an answer in: the event that is stored now. A repeat is a doubt: the server remembers the id of a message that
    /// may be gone, or may be somebody else's.
    pub(super) fn answered(&mut self, number: u64, answer: Answer) -> Result<Vec<Sent>, Doubt> {
        let Some(event) = self.in_flight.get(&number).cloned().map(Box::new) else { return Ok(Vec::new()) };
        match answer {
            Answer::Stored { stream, sequence, .. } if stream != self.stream => {
                Err(Doubt::Misplaced { event, stream, sequence })
            }
            Answer::Stored { sequence, duplicate: true, .. } => Err(Doubt::Duplicate { event, sequence }),
            Answer::Stored { sequence, .. } => {
                self.in_flight.remove(&number);
                self.bytes -= event.bytes;
                if let Some(key) = &event.key {
                    self.keys.remove(key);
                }
                self.sequence = self.sequence.max(sequence);
                event.tell_published(&self.stream, sequence);
                Ok(vec![Sent { sequence, ..*event }])
            }
            Answer::Refused { code, description } => Err(Doubt::Refused { event, code, description }),
            Answer::NoResponders => Err(Doubt::NoResponders),
            Answer::Unreadable => Err(Doubt::Unreadable),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(id: i64, key: Option<&str>) -> Sent {
        Sent {
            outbox_id: id,
            event_id: uuid::Uuid::nil(),
            key: key.map(str::to_string),
            renamed: None,
            bytes: 1,
            created_at: chrono::DateTime::UNIX_EPOCH,
            sent_at: None,
            sequence: 0,
            digest: None,
            origin: None,
        }
    }

    fn send(keyed: &mut Keyed, waiting: &mut VecDeque<Sent>) -> Vec<i64> {
        let mut ids = Vec::new();
        while let Some(event) = keyed.take_next(waiting, |event| event) {
            ids.push(event.outbox_id);
            keyed.sent(event);
        }
        ids
    }

    fn stored(sequence: u64) -> Answer {
        Answer::Stored { stream: "S".into(), sequence, duplicate: false }
    }

    #[test]
    fn one_of_a_key_at_a_time_and_all_without_a_key() {
        let mut keyed = Keyed::new("S", 0);
        let mut waiting = VecDeque::from([
            event(1, Some("a")),
            event(2, Some("a")),
            event(3, Some("b")),
            event(4, None),
            event(5, Some("a")),
            event(6, None),
        ]);
        assert_eq!(send(&mut keyed, &mut waiting), [1, 3, 4, 6]);
        assert_eq!(keyed.answered(0, stored(9)).unwrap()[0].outbox_id, 1);
        assert_eq!(send(&mut keyed, &mut waiting), [2], "5 waits behind 2");
        assert_eq!(keyed.answered(0, stored(9)), Ok(vec![]), "an old answer again");
        assert_eq!(keyed.answered(4, stored(8)).unwrap()[0].outbox_id, 2);
        assert_eq!(keyed.sequence(), 9);
        assert_eq!(send(&mut keyed, &mut waiting), [5]);
    }

    #[test]
    fn neither_a_repeat_nor_another_stream_counts_as_stored() {
        let mut keyed = Keyed::new("S", 0);
        keyed.sent(event(1, Some("a")));
        let other = Answer::Stored { stream: "T".into(), sequence: 1, duplicate: false };
        assert!(keyed.answered(0, other).is_err());
        let repeat = Answer::Stored { stream: "S".into(), sequence: 1, duplicate: true };
        assert!(matches!(keyed.answered(0, repeat), Err(Doubt::Duplicate { sequence: 1, .. })));
        assert_eq!(keyed.load().0, 1);
        assert_eq!(keyed.answered(0, stored(1)).unwrap()[0].sequence, 1);
        assert_eq!(keyed.load(), (0, 0));
    }
}
