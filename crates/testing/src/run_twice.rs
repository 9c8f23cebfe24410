//! Is a handler idempotent?

use std::collections::{BTreeMap, BTreeSet};
use std::future::IntoFuture;

use futures_util::future::BoxFuture;
use sqlx::{Connection, PgTransaction};

use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::postgres::database_error;
use aftercommit_core::postgres::testing::{Fingerprint, fingerprints};
use aftercommit_outbox::event::Event;
use aftercommit_worker::{Delivery, Handler, describe};

/// Runs a handler twice for the same event, as at-least-once delivery without an inbox would, and compares what all
/// tables hold after the first run and after the second.
///
/// The worker's inbox keeps a handler from taking effect twice anyway. A handler that passes this test does not depend
/// on it: it stays right when inbox rows are lost in a restore, when an event is published twice under two ids, and it
/// converges when it re-reads state instead of adding up.
///
/// Both runs happen in a savepoint of the caller's transaction, which is rolled back at the end: what the test has
/// prepared in the transaction is seen by the handler, and afterwards it is as before.
///
/// ```no_run
/// # use aftercommit::{Event, testing, worker::{Delivery, Handler, HandlerError}};
/// # #[derive(serde::Serialize, serde::Deserialize)]
/// # struct OrderPlaced { order: i64 }
/// # impl Event for OrderPlaced { const TYPE: &'static str = "order.placed"; }
/// # struct SendReceipt;
/// # impl Handler<OrderPlaced> for SendReceipt {
/// #     async fn handle(&self, _: &mut sqlx::PgTransaction<'_>, _: &Delivery<OrderPlaced>) -> Result<(), HandlerError> { Ok(()) }
/// # }
/// # async fn example(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
/// let mut tx = pool.begin().await?;
/// testing::run_twice(&mut tx, &SendReceipt, &Delivery::new(OrderPlaced { order: 7 })).await?;
/// # Ok(())
/// # }
/// ```
///
/// Compared are all ordinary tables outside of PostgreSQL's own schemas, and `aftercommit.outbox`, because an event that
/// is published again is an effect too. It reads all of their rows three times, and the transaction's role must be
/// allowed to. It cannot see sequences, temporary tables, other databases, and what leaves PostgreSQL: mails, HTTP calls,
/// files.
///
/// # Errors
/// When awaited: of the kind [`ErrorKind::Integrity`] when the tables differ, naming them, when a run fails, or when the
/// first run changes nothing, so that nothing was tested; [`ErrorKind::Database`] when PostgreSQL cannot be asked.
pub fn run_twice<'a, 't, E: Event, H: Handler<E>>(
    tx: &'a mut PgTransaction<'t>,
    handler: &'a H,
    delivery: &'a Delivery<E>,
) -> RunTwice<'a, 't, E, H> {
    RunTwice { tx, handler, delivery, ignored: BTreeSet::new() }
}

/// A test of a handler, made when it is awaited. See [`run_twice`].
#[must_use = "nothing is tested until it is awaited"]
pub struct RunTwice<'a, 't, E, H> {
    tx: &'a mut PgTransaction<'t>,
    handler: &'a H,
    delivery: &'a Delivery<E>,
    ignored: BTreeSet<String>,
}

impl<'a, E: Event, H: Handler<E>> RunTwice<'a, '_, E, H> {
    /// Leaves out a table that may differ, such as a log of what was done: `name`, or `schema.name` outside of `public`.
    pub fn ignoring(mut self, table: impl Into<String>) -> Self {
        self.ignored.insert(table.into());
        self
    }

    async fn test(self) -> Result<(), Error> {
        let failed = |error| database_error("running a handler twice failed", error);
        let mut scratch = self.tx.begin().await.map_err(failed)?;
        let before = fingerprints(&mut scratch).await.map_err(failed)?;
        run(&mut scratch, self.handler, self.delivery, "first").await?;
        let once = fingerprints(&mut scratch).await.map_err(failed)?;
        run(&mut scratch, self.handler, self.delivery, "second").await?;
        let twice = fingerprints(&mut scratch).await.map_err(failed)?;
        scratch.rollback().await.map_err(failed)?;
        if before == once {
            return Err(broken("the handler changed no table, so nothing was tested: does it find what it needs?"));
        }
        let differing = differences(&once, &twice, &self.ignored);
        if differing.is_empty() {
            return Ok(());
        }
        Err(broken(format!("the handler is not idempotent; its second run changed {}", differing.join(", "))))
    }
}

impl<'a, 't: 'a, E: Event, H: Handler<E>> IntoFuture for RunTwice<'a, 't, E, H> {
    type Output = Result<(), Error>;
    type IntoFuture = BoxFuture<'a, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.test())
    }
}

/// One run in a savepoint of its own.
async fn run<E: Event, H: Handler<E>>(
    scratch: &mut PgTransaction<'_>,
    handler: &H,
    delivery: &Delivery<E>,
    which: &str,
) -> Result<(), Error> {
    let failed = |error| database_error(format!("after the handler's {which} run the transaction is unusable"), error);
    let mut savepoint = scratch.begin().await.map_err(failed)?;
    match handler.handle(&mut savepoint, delivery).await {
        Ok(()) => savepoint.commit().await.map_err(failed),
        Err(error) => Err(broken(format!("the handler's {which} run failed: {}", describe(&error)))),
    }
}

/// The tables that differ, each with what it held.
fn differences(
    once: &BTreeMap<String, Fingerprint>,
    twice: &BTreeMap<String, Fingerprint>,
    ignored: &BTreeSet<String>,
) -> Vec<String> {
    let tables: BTreeSet<&String> = once.keys().chain(twice.keys()).collect();
    let differing =
        tables.into_iter().filter(|table| !ignored.contains(*table) && once.get(*table) != twice.get(*table));
    differing
        .map(|table| match (once.get(table), twice.get(table)) {
            (Some(once), Some(twice)) if once.rows == twice.rows => {
                format!("{table} ({} rows, other values)", once.rows)
            }
            (Some(once), Some(twice)) => format!("{table} ({} rows, then {})", once.rows, twice.rows),
            (Some(_), None) => format!("{table} (dropped)"),
            _ => format!("{table} (created)"),
        })
        .collect()
}

fn broken(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Integrity, message)
}
