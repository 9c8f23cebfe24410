//! The console's own files. Their names change with what is in them, so browsers may keep them for ever.

use std::sync::LazyLock;

use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};

/// A file of the console.
pub(crate) struct Asset {
    /// Its path, with a digest of its content.
    pub(crate) path: String,
    kind: &'static str,
    content: &'static str,
}

pub(crate) static STYLE: LazyLock<Asset> =
    LazyLock::new(|| Asset::new("style", "css", "text/css", include_str!("style.css")));
pub(crate) static SCRIPT: LazyLock<Asset> =
    LazyLock::new(|| Asset::new("console", "js", "text/javascript", include_str!("console.js")));
pub(crate) static ICON: LazyLock<Asset> =
    LazyLock::new(|| Asset::new("icon", "svg", "image/svg+xml", include_str!("icon.svg")));

impl Asset {
    fn new(name: &str, ending: &str, kind: &'static str, content: &'static str) -> Self {
        let digest: String =
            Sha256::digest(content.as_bytes()).iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        Self { path: format!("/assets/{name}-{digest}.{ending}"), kind, content }
    }

    pub(crate) fn response(&self) -> Response {
        ([(CONTENT_TYPE, self.kind), (CACHE_CONTROL, "public, max-age=31536000, immutable")], self.content)
            .into_response()
    }
}

pub(crate) fn all() -> [&'static Asset; 3] {
    [&STYLE, &SCRIPT, &ICON]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn style_and_script_stay_small() {
        assert!(STYLE.content.len() < 15_000, "{}", STYLE.content.len());
        assert!(SCRIPT.content.lines().count() <= 200);
    }
}
