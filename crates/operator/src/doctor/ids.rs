//! What the sequence that hands out the outbox's ids means.

use super::Check;
use aftercommit_core::config::Schema;
use aftercommit_core::postgres::sequence::Sequence;

pub(super) fn judge(sequence: &Sequence, schema: &Schema) -> Check {
    const NAME: &str = "ids";
    if let Some(obstacle) = sequence.obstacle() {
        return Check::fail(NAME, "nobody can go by the ids of the outbox, and the relay does not lead", obstacle);
    }
    if let Some(settings) = sequence.settings() {
        return Check::fail(
            NAME,
            format!(
                "the sequence {schema}.outbox_id_seq has {settings}: ids do not follow the commits of a key, so its events \
                 get out of order, and the relay does not lead"
            ),
            "run `aftercommit migrate` as its owner: it sets CACHE 1, INCREMENT 1 and NO CYCLE",
        );
    }
    if sequence.is_behind() {
        return Check::fail(
            NAME,
            format!(
                "the sequence {schema}.outbox_id_seq stands at {}, behind the id {} that was given out: it was set \
                 back, or rows were loaded without it; publishers fail with duplicate keys",
                sequence.last_id, sequence.highest
            ),
            "run `aftercommit migrate` as its owner; a leading relay sets it forward, too",
        );
    }
    Check::ok(NAME, "they are handed out one by one, upwards")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Severity;

    #[test]
    fn what_puts_ids_out_of_order_is_named() {
        for (sequence, word) in [
            (Sequence::of(50, 1, false, 7, 7), "CACHE 50"),
            (Sequence::of(1, -1, false, 7, 7), "INCREMENT -1"),
            (Sequence::of(1, 1, true, 7, 7), "CYCLE"),
            (Sequence::of(1, 1, false, 7, 8), "stands at 7"),
            (Sequence::of(1, 1, false, i64::MAX - 7, 8), "does not lead"),
        ] {
            let check = judge(&sequence, &Schema::default());
            assert!(check.status == Severity::Fail && check.finding.contains(word), "{check:?}");
        }
        assert_eq!(
            judge(&Sequence::of(1, 1, false, 1_000_000_000_000, 8), &Schema::default()).status,
            Severity::Ok,
            "far ahead is fine"
        );
    }
}
