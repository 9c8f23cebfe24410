//! What happens along the life of a row.

mod hooks;
mod links;
#[path = "../support/mod.rs"]
mod support;
