//! What may be wrong with an event, by what is on record of it. Pure logic: no IO, no clock.
//!
//! A session that ends while an event runs, or a server that crashes, may be an outage, or the event's doing. The first
//! time is free and puts what ran under suspicion. A suspect runs in a transaction of its own, and never beside another
//! suspect of its subscriber; when its session ends then while the database answers, that is an attempt. From the second
//! crash on, of the worker's process or of the server, it runs with nothing beside it in the process. Only crashes that came
//! while it was alone tell on it, and count towards `max_crashes`.

use aftercommit_core::postgres::attempt::Record;

use super::scheduler::Company;

/// Beside which others an event with that record may run.
pub(super) fn company(record: &Record) -> Company {
    match (record.crashes + record.database_crashes, record.sessions_lost, record.attempts) {
        (0, 0, 0) => Company::Any,
        // It fails alone: others need no second run because of it.
        (0, 0, _) => Company::Apart,
        // The first time it may well have been another one.
        (0 | 1, ..) => Company::Unsuspected,
        _ => Company::None,
    }
}

/// Whether an event is under suspicion already, so that what happens to its session when it is alone is its own doing.
pub(super) fn is_suspect(record: &Record) -> bool {
    record.sessions_lost > 0
}

/// Why an event must not run again, if that is so.
pub(super) fn exhausted(record: &Record, max_attempts: u32, max_crashes: u32) -> Option<String> {
    let Record { attempts, crashes, crashes_alone, database_crashes, sessions_lost, last_error } = record;
    // The first time the server crashed others ran, too.
    if crashes_alone + database_crashes.saturating_sub(1) >= max_crashes {
        return Some(match (crashes, database_crashes) {
            (died, 0) => format!("the worker's process died {died} times while this event ran"),
            (0, crashed) => format!("the database crashed {crashed} times while this event ran"),
            (died, crashed) => format!(
                "the worker's process died {died} times and the database crashed {crashed} times while this event ran"
            ),
        });
    }
    if *sessions_lost > 0 && *attempts >= max_attempts {
        return Some(format!("its database session was lost {sessions_lost} times while this event ran: {last_error}"));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(crashes: u32, database_crashes: u32, sessions_lost: u32, attempts: u32) -> Record {
        let crashes_alone = crashes.saturating_sub(2);
        Record { attempts, crashes, crashes_alone, database_crashes, sessions_lost, last_error: "terminated".into() }
    }

    #[test]
    fn the_more_an_event_is_suspected_the_less_company_it_has() {
        assert_eq!(company(&record(0, 0, 0, 0)), Company::Any);
        assert_eq!(company(&record(0, 0, 0, 1)), Company::Apart);
        for suspect in [record(1, 0, 0, 0), record(0, 1, 0, 0), record(0, 0, 1, 0), record(1, 0, 7, 7)] {
            assert_eq!(company(&suspect), Company::Unsuspected, "{suspect:?}");
        }
        for dangerous in [record(2, 0, 0, 0), record(1, 1, 0, 0), record(0, 2, 1, 0)] {
            assert_eq!(company(&dangerous), Company::None, "{dangerous:?}");
        }
    }

    #[test]
    fn an_event_is_given_up_for_what_it_did_and_the_reason_names_it() {
        let reason = |record: Record| exhausted(&record, 3, 3);
        for good in [record(4, 0, 0, 0), record(0, 3, 0, 0), record(3, 2, 0, 0), record(0, 0, 9, 2), record(0, 0, 0, 9)]
        {
            assert_eq!(reason(good.clone()), None, "{good:?}");
        }
        assert_eq!(reason(record(5, 0, 0, 0)).unwrap(), "the worker's process died 5 times while this event ran");
        assert_eq!(reason(record(0, 4, 1, 1)).unwrap(), "the database crashed 4 times while this event ran");
        assert_eq!(
            reason(record(4, 2, 0, 0)).unwrap(),
            "the worker's process died 4 times and the database crashed 2 times while this event ran"
        );
        assert_eq!(
            reason(record(0, 0, 4, 3)).unwrap(),
            "its database session was lost 4 times while this event ran: terminated"
        );
    }
}
