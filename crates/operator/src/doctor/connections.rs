//! Whether the server's connections are about to run out.

use super::Check;
use aftercommit_core::postgres::doctor::Connections;

/// With fewer left, the next instance that starts may take the last ones.
const FEW: i64 = 10;

pub(super) fn judge(found: &Connections) -> Check {
    let Connections { limit, used, ours } = *found;
    let text = format!("{used} of {limit} connections are in use, {ours} of them by programs of aftercommit");
    if limit - used >= FEW.min(limit / 5) {
        return Check::ok("connections", text);
    }
    Check::warn(
        "connections",
        format!("{text}: soon nobody else can log in"),
        "give workers a lower --max-connections (50 each, when nothing is said), raise max_connections, or put a pooler in between; \
         see docs/connections.md",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Severity;

    #[test]
    fn connections_that_run_out_are_a_warning() {
        let judged = |limit, used| judge(&Connections { limit, used, ours: 3 }).status;
        assert_eq!((judged(97, 87), judged(97, 88)), (Severity::Ok, Severity::Warn));
        assert_eq!((judged(97, 97), judged(20, 16), judged(20, 17)), (Severity::Warn, Severity::Ok, Severity::Warn));
    }
}
