//! All parts together: from end to end, in every set-up, in the examples and in the documentation.

mod backup;
mod connections;
mod cut_over;
mod dashboards;
mod docs;
mod duplicates;
mod end_to_end;
mod guides;
mod pgbouncer;
mod ping;
mod production;
mod quiet;
mod runbook;
mod schema;
mod silence;
mod sizing;
mod stats_debounce;
mod stewardship;
#[path = "../support/mod.rs"]
mod support;
#[cfg(target_os = "linux")]
mod systemd;
mod urls;
