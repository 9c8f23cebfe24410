//! The programs and questions of operators.

mod bench;
mod dead;
mod doctor;
mod explain;
mod leaders;
mod nats_cli;
mod replay;
mod status;
#[path = "../support/mod.rs"]
mod support;
