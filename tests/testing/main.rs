//! The kit for the users' own tests.

mod drain;
mod environment;
mod pending;
mod run_twice;
mod servers;
#[path = "../support/mod.rs"]
mod support;
