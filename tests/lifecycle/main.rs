//! What happens along the life of a row.

mod capture;
mod erase;
mod example;
mod fanout;
mod forget;
mod guides;
mod hooks;
mod links;
mod seal;
#[path = "../support/mod.rs"]
mod support;
