//! What subscribers learn.

use aftercommit::Event;
use serde::{Deserialize, Serialize};

/// What became of something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    Added,
    Removed,
}

/// A user became or ceased to be a steward of a system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SystemDataStewardsChanged {
    pub system_id: String,
    pub user_id: i64,
    pub change: Change,
}

impl Event for SystemDataStewardsChanged {
    const TYPE: &'static str = "system.data_stewards_changed";

    fn key(&self) -> Option<String> {
        Some(format!("system-{}", self.system_id))
    }
}

/// A system got or lost a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SystemConnectionLinkChanged {
    pub system_id: String,
    pub connection_config_id: String,
    pub change: Change,
}

impl Event for SystemConnectionLinkChanged {
    const TYPE: &'static str = "system.connection_link_changed";

    fn key(&self) -> Option<String> {
        Some(format!("system-{}", self.system_id))
    }
}

/// A monitor began or ceased to inherit the stewards of systems.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MonitorInheritanceFlagChanged {
    pub monitor_config_key: String,
    pub enabled: bool,
}

impl Event for MonitorInheritanceFlagChanged {
    const TYPE: &'static str = "monitor.inheritance_flag_changed";

    fn key(&self) -> Option<String> {
        Some(format!("monitor-{}", self.monitor_config_key))
    }
}

/// A system is gone. It carries what nobody can look up any more, as the deleting transaction saw it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SystemDeleted {
    pub system_id: String,
    pub stewards: Vec<i64>,
    pub connections: Vec<String>,
}

impl Event for SystemDeleted {
    const TYPE: &'static str = "system.deleted";

    fn key(&self) -> Option<String> {
        Some(format!("system-{}", self.system_id))
    }
}

/// A monitor has done something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MonitorOperationCompleted {
    pub monitor_config_key: String,
    pub operation_type: String,
}

impl Event for MonitorOperationCompleted {
    const TYPE: &'static str = "monitor.operation_completed";

    fn key(&self) -> Option<String> {
        Some(format!("monitor-{}", self.monitor_config_key))
    }
}
