//! The categories that aftercommit's own tables are. Their keys have several columns, and what may go depends on more than a row
//! says: what is settled, what the stream still has. So their statements are written by hand, in `core`.

mod handled;
mod published;
mod records;

pub use handled::{FailedAttempts, Inbox};
pub use published::{DealtWith, Outbox, RelayLog};
pub use records::{AuditTrail, Leases};
