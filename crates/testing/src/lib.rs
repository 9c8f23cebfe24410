//! For the tests of services that publish and handle events.
//!
//! | To test | Use | Needs |
//! |---|---|---|
//! | that a transaction publishes what it should | [`assert_published`], [`pending`], [`clear`] | PostgreSQL |
//! | what subscribers make of committed events | [`drain`] | PostgreSQL |
//! | that a handler does no harm when it runs again | [`run_twice`] | PostgreSQL |
//! | the whole way, relay and worker included | [`Environment`] | PostgreSQL and nats-server |
//! | that every subscriber has a publisher | [`coverage`] | nothing |
//! | crashes and outages | [`servers`] | PostgreSQL and nats-server |
//!
//! The assertions panic, as assertions do; everything else returns errors. The guide `docs/guides/test-your-events.md`
//! shows them all at work.
//!
//! Behind the feature `testing`, which belongs under `[dev-dependencies]`.

#![warn(clippy::unwrap_used, clippy::expect_used)]

pub mod coverage;
mod drain;
mod environment;
mod pending;
mod run_twice;
#[cfg(unix)]
pub mod servers;

pub use drain::{Dead, Drained, Failed, Outcome, drain, drain_into};
pub use environment::{Environment, Running};
pub use pending::{AssertPublished, PendingEvent, Published, assert_published, clear, pending, pending_of};
pub use run_twice::{RunTwice, run_twice};

use std::time::Duration;

use uuid::Uuid;

use aftercommit_core::error::{Error, ErrorKind};

/// How long to rest between two looks at a condition.
const REST: Duration = Duration::from_millis(10);

/// Waits until `condition` holds, looking at it again and again, for at most `deadline`.
///
/// Use it instead of sleeping: it goes on as soon as it can, and `what` says which condition a failed test waited for.
///
/// ```
/// # use std::time::Duration;
/// # use aftercommit::testing::eventually;
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), aftercommit::Error> {
/// let mut looks = 0;
/// eventually(Duration::from_secs(5), "the third look", async || {
///     looks += 1;
///     looks == 3
/// })
/// .await
/// # }
/// ```
///
/// # Errors
/// When the deadline passes first, also when the condition itself does not return.
pub async fn eventually(deadline: Duration, what: &str, mut condition: impl AsyncFnMut() -> bool) -> Result<(), Error> {
    let held = async {
        while !condition().await {
            tokio::time::sleep(REST).await;
        }
    };
    tokio::time::timeout(deadline, held)
        .await
        .map_err(|_| Error::new(ErrorKind::NotReady, format!("waited {deadline:?} in vain for this: {what}")))
}

/// A name that no other test uses: `prefix`, an underscore and random digits. It is legal as the name of a database, a
/// stream, a consumer and as a subject token, if `prefix` is.
pub fn unique_name(prefix: &str) -> String {
    format!("{prefix}_{}", Uuid::now_v7().simple())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_deadline_that_passes_names_the_condition() {
        let deadline = Duration::from_millis(30);
        let never = eventually(deadline, "the moon is blue", async || false).await.unwrap_err();
        assert!(never.to_string().contains("the moon is blue"), "{never}");
        let hangs = eventually(deadline, "the moon is blue", async || std::future::pending().await).await;
        assert!(hangs.is_err());
    }
}
