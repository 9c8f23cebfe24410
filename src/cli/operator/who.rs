//! Who operates.

use clap::Args;

/// Who does it, for the audit trail.
#[derive(Args)]
pub(super) struct WhoArgs {
    /// Who does this, for the audit trail; $USER@host when not given
    #[arg(long = "as", env = "AFTERCOMMIT_OPERATOR", value_name = "NAME")]
    name: Option<String>,
}

impl WhoArgs {
    pub(super) fn name(&self) -> String {
        self.name.clone().filter(|name| !name.is_empty()).unwrap_or_else(user_at_host)
    }
}

fn user_at_host() -> String {
    let variable = |name| std::env::var(name).ok().filter(|text| !text.is_empty());
    let user = variable("USER").or_else(|| variable("LOGNAME")).unwrap_or_else(|| "unknown".into());
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").map(|host| host.trim().to_string()).ok();
    let host =
        host.filter(|host| !host.is_empty()).or_else(|| variable("HOSTNAME")).unwrap_or_else(|| "unknown".into());
    format!("{user}@{host}")
}
