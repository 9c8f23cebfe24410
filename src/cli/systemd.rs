//! What systemd is told of a role that it started: ready, alive, stopping, and in words what it does.
//!
//! The protocol is that of sd_notify(3); without `NOTIFY_SOCKET` nothing is told.

#[cfg(target_os = "linux")]
pub(super) use linux::beside;

/// Runs a role; there is no systemd here.
#[cfg(not(target_os = "linux"))]
pub(super) async fn beside<T>(
    _: std::sync::Arc<impl aftercommit_core::health::Check>,
    _: tokio_util::sync::CancellationToken,
    role: impl Future<Output = T>,
) -> T {
    role.await
}

#[cfg(target_os = "linux")]
mod linux {
    use std::convert::Infallible;
    use std::env;
    use std::sync::Arc;
    use std::time::Duration;

    use sd_notify::NotifyState;
    use tokio_util::sync::CancellationToken;

    use aftercommit_core::health::Check;
    use aftercommit_core::text::cut;

    /// How often a role is asked until it is ready.
    const STARTING: Duration = Duration::from_millis(200);
    /// How often afterwards, at most.
    const LOOK: Duration = Duration::from_secs(2);
    /// How many characters are shown of what it does: `systemctl status` has one line for it.
    const STATUS: usize = 300;

    /// Runs a role, and tells systemd about it until it ends, when systemd wants to be told.
    pub(in super::super) async fn beside<T>(
        check: Arc<impl Check>,
        shutdown: CancellationToken,
        role: impl Future<Output = T>,
    ) -> T {
        if env::var_os("NOTIFY_SOCKET").is_none_or(|socket| socket.is_empty()) {
            return role.await;
        }
        tokio::select! {
            result = role => result,
            never = tell(check, shutdown) => match never {},
        }
    }

    /// Ready is who answers /readyz with 200. From then on the watchdog hears of it, unless it hangs: in an outage of a
    /// server a new start would not help.
    async fn tell(check: Arc<impl Check>, shutdown: CancellationToken) -> Infallible {
        let watchdog = sd_notify::watchdog_enabled();
        let look = watchdog.map_or(LOOK, |period| LOOK.min(period / 3));
        let mut told = Told::default();
        while !shutdown.is_cancelled() {
            let mut states = Vec::new();
            if !told.ready && check.readiness().ok {
                told.ready = true;
                states.push(NotifyState::Ready);
            }
            if watchdog.is_some() && !check.hangs() {
                states.push(NotifyState::Watchdog);
            }
            let status = in_one_line(&check.health().text);
            if status != told.status {
                told.status = status;
                states.push(NotifyState::Status(&told.status));
            }
            send(&states);
            tokio::select! {
                () = tokio::time::sleep(if told.ready { look } else { STARTING }) => {}
                () = shutdown.cancelled() => {}
            }
        }
        send(&[NotifyState::Stopping, NotifyState::Status("stopping")]);
        std::future::pending().await
    }

    /// What systemd has been told.
    #[derive(Default)]
    struct Told {
        ready: bool,
        status: String,
    }

    fn in_one_line(text: &str) -> String {
        cut(&text.lines().collect::<Vec<_>>().join("; "), STATUS)
    }

    fn send(states: &[NotifyState<'_>]) {
        if states.is_empty() {
            return;
        }
        if let Err(error) = sd_notify::notify(states) {
            tracing::debug!(%error, "systemd cannot be told");
        }
    }

    #[cfg(test)]
    mod tests {
        use super::in_one_line;

        #[test]
        fn subscribers_share_one_line_of_bounded_length() {
            assert_eq!(in_one_line("a: leading\nb: standing by\u{1b}[2J"), "a: leading; b: standing by\\u{1b}[2J");
            assert_eq!(in_one_line(&"é".repeat(400)).chars().count(), super::STATUS + 1);
        }
    }
}
