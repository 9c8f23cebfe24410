//! The programs and questions of operators.

mod dead;
mod doctor;
mod explain;
mod flow;
mod forget;
mod leaders;
mod lines;
mod nats_cli;
mod replay;
mod situations;
mod status;
#[path = "../support/mod.rs"]
mod support;
