//! Hooks before a delete, and notices of changed links: what others need to know of rows that are about to be gone.
//!
//! A row's delete cascades into tables that others depend on, and afterwards nobody can tell what was there. [`DeleteHooks`]
//! locks the row, lets each hook write down what the cascade will take, deletes, and publishes what the hooks wrote, all in the
//! caller's transaction: it happens as a whole or not at all, and whoever follows up does so from an event that survives any
//! crash.
//!
//! [`Links`] does the same for rows that join two entities, and only speaks when something was written.

mod delete;
mod error;
mod link;
mod registry;
mod snapshot;

pub use delete::Deleted;
pub use error::{DeleteError, DeleteErrorKind};
pub use link::{LinkChange, Links};
pub use registry::{DeleteHook, DeleteHooks, HookPolicy, Registered};
pub use snapshot::SqlSnapshot;
