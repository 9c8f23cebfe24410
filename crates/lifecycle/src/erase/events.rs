//! The events of a subject, as part of a service's erasure.

use std::time::Duration;

use aftercommit_core::postgres::forget as sql;
use aftercommit_worker::HandlerError;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::PgTransaction;

use super::Subject;
use super::eraser::{Eraser, Preview};
use super::forget::Selection;
use crate::fanout::Step;

/// What stands for the subject's id in a key.
const ID: &str = "{id}";
/// What the counts of an answer call them.
const EVENTS: &str = "aftercommit.events";
/// How often a verification looks whether the stream is erased.
const LOOK: Duration = Duration::from_secs(5);

/// An [`Eraser`] whose service also [forgets](super::forget) the events of the subject: in its outbox, its dead letters and wherever else its
/// database has copies, after the other rows are gone. The verification waits until the stream is erased, too, which
/// `aftercommit forget --resume --every 10s` does.
///
/// ```
/// use aftercommit::erase::{Events, Rows, Tables};
///
/// let orders = Tables::new("orders").of("tenant", [Rows::of("public.orders").column("tenant_id")]);
/// let orders = Events::of(orders).key("tenant", "tenant-{id}").key_prefix("tenant", "tenant-{id}/");
/// ```
///
/// The worker's role needs the rights of the role `eraser`, too.
#[derive(Debug)]
pub struct Events<E> {
    eraser: E,
    /// By the subject's kind; with true the beginning of keys.
    keys: Vec<(String, String, bool)>,
}

impl<E> Events<E> {
    /// Beside what this eraser does.
    pub fn of(eraser: E) -> Self {
        Self { eraser, keys: Vec::new() }
    }

    /// Events with this key, in which `{id}` stands for the id of a subject of this kind.
    #[must_use]
    pub fn key(mut self, kind: impl Into<String>, key: impl Into<String>) -> Self {
        self.keys.push((kind.into(), key.into(), false));
        self
    }

    /// Events with a key that begins so, in which `{id}` stands for the id of a subject of this kind. End it with what cannot stand in an
    /// id: `tenant-4` is the beginning of `tenant-42`, too.
    #[must_use]
    pub fn key_prefix(mut self, kind: impl Into<String>, prefix: impl Into<String>) -> Self {
        self.keys.push((kind.into(), prefix.into(), true));
        self
    }

    /// What is wrong with the keys.
    ///
    /// # Errors
    /// A key without `{id}` would be everybody's; so would a beginning that ends with it.
    pub fn check(&self) -> Result<(), String> {
        for (_, key, prefix) in &self.keys {
            if !key.contains(ID) {
                return Err(format!("the key {key:?} lacks {ID}, so it is not one subject's"));
            }
            if *prefix && key.ends_with(ID) {
                return Err(format!(
                    "the beginning of keys {key:?} must not end with {ID}: with 4 it is the beginning of 42, too"
                ));
            }
        }
        Ok(())
    }

    fn selections(&self, subject: &Subject) -> Result<Vec<Selection>, HandlerError> {
        self.check().map_err(HandlerError::reject)?;
        let of_kind = self.keys.iter().filter(|(kind, ..)| *kind == subject.kind);
        let selections = of_kind.map(|(_, key, prefix)| {
            let key = Some(key.replace(ID, &subject.id));
            if *prefix {
                Selection { key_prefix: key, ..Selection::default() }
            } else {
                Selection { key, ..Selection::default() }
            }
        });
        Ok(selections.collect())
    }

    async fn count(&self, tx: &mut PgTransaction<'_>, subject: &Subject) -> Result<u64, HandlerError> {
        let mut count = 0;
        for selection in self.selections(subject)? {
            let found = sql::find_within(tx, &selection).await?;
            count += (found.outbox + found.dead_letters + found.redriven).unsigned_abs();
        }
        Ok(count)
    }
}

/// Why they are forgotten, on record.
fn why(subject: &Subject) -> String {
    format!("erasure of {subject}")
}

/// Where a step goes on.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Position {
    /// With the other eraser.
    Rows(Value),
    /// With the selection of this number, and its request once it has begun.
    Events { at: usize, request: Option<i64> },
}

impl<E: Eraser> Eraser for Events<E> {
    fn name(&self) -> &str {
        self.eraser.name()
    }

    async fn preview(&self, tx: &mut PgTransaction<'_>, subject: &Subject) -> Result<Preview, HandlerError> {
        let mut preview = self.eraser.preview(tx, subject).await?;
        preview.counts.insert(EVENTS.into(), self.count(tx, subject).await?);
        Ok(preview)
    }

    async fn step(
        &self,
        tx: &mut PgTransaction<'_>,
        subject: &Subject,
        position: Option<Value>,
    ) -> Result<Step, HandlerError> {
        let (at, request) = match position.map(serde_json::from_value::<Position>).transpose()? {
            Some(Position::Events { at, request }) => (at, request),
            rows => {
                let rows = match rows {
                    Some(Position::Rows(position)) => Some(position),
                    _ => None,
                };
                let mut step = self.eraser.step(tx, subject, rows).await?;
                let next = step.next.take().map_or(Position::Events { at: 0, request: None }, Position::Rows);
                return Ok(step.more(serde_json::to_value(next)?));
            }
        };
        let Some(selection) = self.selections(subject)?.into_iter().nth(at) else {
            return Ok(Step::done([(EVENTS, 0)]));
        };
        let why = why(subject);
        let request = match request {
            Some(request) => request,
            None if sql::find_within(tx, &selection).await? == sql::Found::default() => {
                return Ok(Step::done([(EVENTS, 0)])
                    .more(serde_json::to_value(Position::Events { at: at + 1, request: None })?));
            }
            None => sql::begin_within(tx, self.name(), &why, &selection, false).await?,
        };
        if !sql::more_within(tx, request).await? {
            let next = Position::Events { at, request: Some(request) };
            return Ok(Step::done([(EVENTS, 0)]).more(serde_json::to_value(next)?));
        }
        let (events, _) = sql::forgotten_within(tx, request, &why).await?;
        let next = Position::Events { at: at + 1, request: None };
        Ok(Step::done([(EVENTS, events.unsigned_abs())]).more(serde_json::to_value(next)?))
    }

    async fn verify(&self, tx: &mut PgTransaction<'_>, subject: &Subject) -> Result<Preview, HandlerError> {
        let mut left = self.eraser.verify(tx, subject).await?;
        // Before the events are counted, for which the outbox is read.
        let (_, open) = sql::forgotten_within(tx, 0, &why(subject)).await?;
        if left.is_zero() && open > 0 {
            // Not a failure of this service: whoever erases streams has not come to it.
            tracing::info!(eraser = self.name(), %subject, open, "the stream has yet to be erased: `aftercommit forget --resume`");
            return Err(HandlerError::snooze(LOOK));
        }
        left.counts.insert(EVENTS.into(), self.count(tx, subject).await?);
        Ok(left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_one_subjects() {
        let events = |key: &str, prefix| Events { eraser: (), keys: vec![("tenant".into(), key.into(), prefix)] };
        for (key, prefix, right) in [
            ("tenant-{id}", false, true),
            ("tenant-{id}/", true, true),
            ("tenant", false, false),
            ("tenant-", true, false),
            ("tenant-{id}", true, false),
        ] {
            assert_eq!(events(key, prefix).check().is_ok(), right, "{key} {prefix}");
        }
        let selections = events("tenant-{id}/", true).selections(&Subject::new("tenant", 42)).unwrap();
        assert_eq!(selections, [Selection { key_prefix: Some("tenant-42/".into()), ..Selection::default() }]);
        assert_eq!(events("tenant-{id}/", true).selections(&Subject::new("person", 42)).unwrap(), []);
    }
}
