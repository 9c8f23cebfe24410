//! `aftercommit doctor`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::as_json;
use crate::cli::relay::{Writers, days};
use crate::cli::servers::Servers;
use crate::worker::read_file;
use aftercommit_core::error::Error;
use aftercommit_operator::doctor::{DoctorConfig, Role, Severity, doctor};
use aftercommit_worker::Registry;

/// What the relay was given too has the same names here, so that one environment serves both.
#[derive(Args)]
pub(super) struct Doctor {
    /// A worker.toml whose subscribers are to have consumers as it says; may be given several times
    #[arg(long, value_name = "FILE")]
    config: Vec<PathBuf>,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    /// Who writes to the stream
    #[arg(long, env = "AFTERCOMMIT_MODE", value_enum, default_value = "exclusive")]
    mode: Writers,
    /// The HTTP monitoring port of a NATS server, such as http://127.0.0.1:8222: when it writes to the disk is told there
    #[arg(long, env = "NATS_MONITOR", value_name = "URL")]
    nats_monitor: Option<String>,
    /// The roles of deploy/postgres/roles.sql whose rights the database login is to have, all of them and no others, such as
    /// relay,outbox_reconciler; without it those of a relay must be there
    #[arg(long = "role", value_name = "ROLE", value_delimiter = ',', value_parser = role)]
    roles: Vec<Role>,
    /// How long events stay in the outbox: a number of days, or a duration such as 12h
    #[arg(long, env = "AFTERCOMMIT_RETENTION_DAYS", value_name = "DAYS", default_value = "7", value_parser = days)]
    retention_days: f64,
    #[command(flatten)]
    servers: Servers,
}

fn role(name: &str) -> Result<Role, String> {
    let known = || Role::ALL.map(Role::name).join(", ");
    Role::ALL
        .into_iter()
        .find(|role| role.name() == name)
        .ok_or_else(|| format!("unknown role: use one of {}", known()))
}

/// The report, and whether nothing in it fails.
pub(super) async fn run(command: Doctor) -> Result<(String, bool), Error> {
    let (postgres, nats, naming) = command.servers.config()?;
    let mut declared = Vec::new();
    for file in &command.config {
        declared.extend(read_file(file)?);
    }
    let config = DoctorConfig {
        subscribers: Registry::from(declared).subscriptions(&naming)?,
        mode: command.mode.into(),
        nats_monitor: command.nats_monitor.filter(|url| !url.is_empty()),
        retention: Duration::from_secs_f64(command.retention_days * 86_400.0),
        roles: command.roles,
        ..DoctorConfig::new(postgres, nats, naming)
    };
    let report = doctor(&config).await?;
    let text = if command.json { as_json(&report)? } else { report.to_string() };
    Ok((text, report.status != Severity::Fail))
}
