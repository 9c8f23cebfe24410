//! How fast everything is on this machine, each figure beside its floor or its control in the same run.
//!
//! A figure is a ratio of two arms that are measured in turn, round by round, so that whatever else the machine does
//! meets both. Each run of an arm is checked: a figure from a run that lost, doubled or re-ordered an event does not
//! exist. `scripts/bench` starts this program; `docs/performance.md` says how each figure is taken.
#![warn(clippy::unwrap_used, clippy::expect_used)]

mod arm;
mod backlog;
mod bench;
mod capture;
mod child;
mod cli;
mod cost;
mod counts;
mod drain;
mod event;
mod figure;
mod held;
mod idle;
mod jetstream;
mod latency;
mod machine;
mod postgres;
mod publish;
mod report;
mod retained;
mod run;
mod scratch;
mod worker;

fn main() -> std::process::ExitCode {
    cli::main()
}
