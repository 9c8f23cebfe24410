//! Writing events: from Rust, from SQL and by hand, and the schema that it goes into.

mod cli;
mod hostile;
mod inputs;
mod kinds;
mod migrate;
mod publish;
mod rules;
mod sql_contract;
#[path = "../support/mod.rs"]
mod support;
