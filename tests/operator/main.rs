//! The programs and questions of operators.

mod dead;
mod doctor;
mod explain;
mod flow;
mod forget;
mod leaders;
mod lines;
mod misconfigured;
mod nats_cli;
mod replay;
mod situations;
#[allow(dead_code, reason = "the tests of rights use all of it")]
#[path = "../security/stage.rs"]
mod stage;
mod status;
#[path = "../support/mod.rs"]
mod support;
