//! Named places in which a test can let the process die: what a SIGKILL at exactly that step would leave behind.
//!
//! With the feature `testing`, `AFTERCOMMIT_FAULT=name:n` aborts the process when it passes `name` for the n-th time.
//! Without the feature there is nothing.

/// The process passes `name`.
#[cfg(not(feature = "testing"))]
pub(crate) fn point(_name: &str) {}

/// The process passes `name`.
#[cfg(feature = "testing")]
pub(crate) fn point(name: &str) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicI64, Ordering};

    static WANTED: OnceLock<Option<(String, AtomicI64)>> = OnceLock::new();
    let wanted = WANTED.get_or_init(|| {
        let wanted = std::env::var("AFTERCOMMIT_FAULT").ok()?;
        let (name, times) = wanted.split_once(':')?;
        Some((name.to_string(), AtomicI64::new(times.parse().ok()?)))
    });
    if let Some((wanted, left)) = wanted
        && wanted == name
        && left.fetch_sub(1, Ordering::Relaxed) == 1
    {
        std::process::abort();
    }
}
