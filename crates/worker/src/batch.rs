//! Handlers that get several events at once.

use std::collections::HashMap;
use std::future::Future;

use sqlx::PgTransaction;

use aftercommit_outbox::event::Event;

use super::handler::{Delivery, HandlerError};

/// Handles events of one type, several at once: for effects that cost much per call and little per event, such as
/// recomputing a total or one statement for many rows.
///
/// It gets those events of a transaction that are new and of its type, up to the subscriber's `max_batch`; events of
/// one key are in their order. The transaction already holds their inbox rows. When it fails, nothing of the
/// transaction stays, and the events run again in smaller batches, until the one that fails is alone: only then its
/// attempts count, and only a run with a single event decides to give it up or to snooze it. A handler that knows which
/// event is at fault says so with [`BatchError::at`] and saves the search.
///
/// ```
/// use aftercommit::Event;
/// use aftercommit::worker::{BatchError, BatchHandler, Delivery, Subscriber};
/// use sqlx::PgTransaction;
///
/// # #[derive(serde::Serialize, serde::Deserialize)]
/// # struct OrderPlaced { customer: i64, cents: i64 }
/// # impl Event for OrderPlaced { const TYPE: &'static str = "order.placed"; }
/// struct CountRevenue;
///
/// impl BatchHandler<OrderPlaced> for CountRevenue {
///     async fn handle(
///         &self,
///         tx: &mut PgTransaction<'_>,
///         deliveries: &[Delivery<OrderPlaced>],
///     ) -> Result<(), BatchError> {
///         let cents: i64 = deliveries.iter().map(|delivery| delivery.event.cents).sum();
///         sqlx::query("update revenue set cents = cents + $1").bind(cents).execute(&mut **tx).await?;
///         Ok(())
///     }
/// }
///
/// let revenue = Subscriber::new("revenue").on_batch::<OrderPlaced>(CountRevenue);
/// ```
pub trait BatchHandler<E: Event>: Send + Sync + 'static {
    /// Applies the events, at least one. The subscriber's `time_limit` is for all of them together.
    ///
    /// # Errors
    /// `?` on any error, or on a [`HandlerError`], means that some event failed; see [`HandlerError`] for what each
    /// means once that event is alone.
    fn handle(
        &self,
        tx: &mut PgTransaction<'_>,
        deliveries: &[Delivery<E>],
    ) -> impl Future<Output = Result<(), BatchError>> + Send;
}

/// Why a batch was not handled.
#[derive(Debug)]
pub struct BatchError {
    /// Which of the events is at fault, if that is known.
    pub(super) culprit: Option<usize>,
    pub(super) error: HandlerError,
}

impl BatchError {
    /// The event at `index` of the batch is at fault. It runs alone next, the others without it.
    pub fn at(index: usize, error: impl Into<HandlerError>) -> Self {
        Self { culprit: Some(index), error: error.into() }
    }
}

impl From<HandlerError> for BatchError {
    fn from(error: HandlerError) -> Self {
        Self { culprit: None, error }
    }
}

impl<E: std::error::Error + Send + Sync + 'static> From<E> for BatchError {
    fn from(error: E) -> Self {
        HandlerError::from(error).into()
    }
}

/// Divides events, given as the type that is handled in batches and the key, into runs of the same such type. The runs
/// one after another keep the order of every key; those of different keys may change places. An event without such a type
/// is a run of its own.
pub(super) fn runs<'a>(events: impl Iterator<Item = (Option<&'a str>, Option<&'a str>)>) -> Vec<Vec<usize>> {
    let mut runs: Vec<Vec<usize>> = Vec::new();
    let mut last_of_type: HashMap<&str, usize> = HashMap::new();
    let mut last_of_key: HashMap<&str, usize> = HashMap::new();
    for (event, (batched, key)) in events.enumerate() {
        let behind = key.and_then(|key| last_of_key.get(key)).copied();
        let open = batched.and_then(|batched| last_of_type.get(batched)).copied();
        let run = match open.filter(|open| behind.is_none_or(|behind| behind <= *open)) {
            Some(open) => open,
            None => {
                runs.push(Vec::new());
                runs.len() - 1
            }
        };
        runs[run].push(event);
        last_of_type.extend(batched.map(|batched| (batched, run)));
        last_of_key.extend(key.map(|key| (key, run)));
    }
    runs
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn runs_are_long_and_keep_the_order_of_keys() {
        let of = |events: &[(&'static str, &'static str)]| {
            let given = |text: &'static str| Some(text).filter(|text| !text.is_empty());
            runs(events.iter().map(|(batched, key)| (given(batched), given(key))))
        };
        assert_eq!(of(&[("p", "a"), ("p", "a"), ("p", "b")]), [vec![0, 1, 2]]);
        assert_eq!(of(&[("p", "a"), ("q", "b"), ("p", "c"), ("q", "d")]), [vec![0, 2], vec![1, 3]]);
        assert_eq!(of(&[("p", "a"), ("q", "a"), ("p", "a")]), [[0], [1], [2]]);
        assert_eq!(of(&[("p", "a"), ("q", "a"), ("q", ""), ("p", "b")]), [vec![0, 3], vec![1, 2]]);
        assert_eq!(of(&[("", "a"), ("", "a"), ("p", ""), ("", "")]), [[0], [1], [2], [3]]);
    }

    proptest! {
        #[test]
        fn every_event_is_in_one_run_behind_those_of_its_key(
            events in proptest::collection::vec((proptest::option::of("[pqr]"), proptest::option::of("[abc]")), 0..60)
        ) {
            let runs = runs(events.iter().map(|(batched, key)| (batched.as_deref(), key.as_deref())));
            let order: Vec<usize> = runs.concat();
            let mut sorted = order.clone();
            sorted.sort_unstable();
            prop_assert_eq!(sorted, (0..events.len()).collect::<Vec<_>>());
            for key in ["a", "b", "c"] {
                let mut of_key = order.iter().filter(|event| events[**event].1.as_deref() == Some(key));
                prop_assert!(of_key.by_ref().is_sorted(), "{:?}", runs);
            }
            for run in runs {
                prop_assert!(run.iter().all(|event| events[*event].0 == events[run[0]].0));
                prop_assert!(run.len() == 1 || events[run[0]].0.is_some());
            }
        }
    }
}
