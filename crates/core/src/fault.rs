//! Named places in which a test can let the process die: what a SIGKILL at exactly that step would leave behind. And
//! mechanisms that a test can take away, to see that it notices.
//!
//! With the feature `testing`, `AFTERCOMMIT_FAULT=name:n` aborts the process when it passes `name` for the n-th time,
//! `AFTERCOMMIT_HOLD=name:file` makes the file when it passes `name` for the first time and holds the process there until
//! somebody removes it (of several such, with commas between them, one after the other), and `AFTERCOMMIT_BROKEN=name` takes
//! the mechanism `name` away. Without the feature there is nothing.

/// The process passes `name`.
#[cfg(not(feature = "testing"))]
pub fn point(_name: &str) {}

/// The process passes `name`.
#[cfg(feature = "testing")]
pub fn point(name: &str) {
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

/// The process passes `name`, where a test may hold it.
#[cfg(not(feature = "testing"))]
pub async fn pass(_name: &str) {}

/// The process passes `name`, and waits there until the test has done what it wants to do meanwhile.
#[cfg(feature = "testing")]
pub async fn pass(name: &str) {
    use std::collections::VecDeque;
    use std::path::PathBuf;
    use std::sync::{Mutex, OnceLock};

    static WANTED: OnceLock<Mutex<VecDeque<(String, PathBuf)>>> = OnceLock::new();
    point(name);
    let wanted = WANTED.get_or_init(|| {
        let wanted = std::env::var("AFTERCOMMIT_HOLD").unwrap_or_default();
        let each = wanted.split(',').filter_map(|one| one.split_once(':'));
        Mutex::new(each.map(|(name, file)| (name.to_string(), PathBuf::from(file))).collect())
    });
    let next = wanted.lock().ok().and_then(|mut wanted| wanted.pop_front_if(|(wanted, _)| wanted == name));
    let Some((_, file)) = next else { return };
    if std::fs::write(&file, "").is_ok() {
        while file.exists() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    }
}

/// Whether the mechanism `name` is taken away.
#[cfg(not(feature = "testing"))]
pub fn broken(_name: &str) -> bool {
    false
}

/// Whether the mechanism `name` is taken away.
#[cfg(feature = "testing")]
pub fn broken(name: &str) -> bool {
    use std::sync::OnceLock;

    static BROKEN: OnceLock<Option<String>> = OnceLock::new();
    BROKEN.get_or_init(|| std::env::var("AFTERCOMMIT_BROKEN").ok()).as_deref() == Some(name)
}
