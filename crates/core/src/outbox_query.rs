//! What subscribers' reconcilers ask about a publisher's outbox, whose database they cannot reach: a [`client::OutboxClient`]
//! sends a [`wire::Query`] over NATS, the leading relay [answers](server::answer) it from its database, and the client
//! [checks](validate) that the answer is one.

pub mod client;
pub mod reader;
pub mod server;
mod sql;
pub mod validate;
pub mod wire;
