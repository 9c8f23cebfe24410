//! Named places in which a test can let the process die: what a SIGKILL at exactly that step would leave behind. And
//! mechanisms that a test can take away, to see that it notices.
//!
//! With the feature `testing`, `AFTERCOMMIT_FAULT=name:n` aborts the process when it passes `name` for the n-th time, and
//! `AFTERCOMMIT_BROKEN=name` takes the mechanism `name` away. Without the feature there is nothing.

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

/// Whether the mechanism `name` is taken away.
#[cfg(not(feature = "testing"))]
pub(crate) fn broken(_name: &str) -> bool {
    false
}

/// Whether the mechanism `name` is taken away.
#[cfg(feature = "testing")]
pub(crate) fn broken(name: &str) -> bool {
    use std::sync::OnceLock;

    static BROKEN: OnceLock<Option<String>> = OnceLock::new();
    BROKEN.get_or_init(|| std::env::var("AFTERCOMMIT_BROKEN").ok()).as_deref() == Some(name)
}
