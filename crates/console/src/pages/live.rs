//! What changes on the first page, as server-sent events: only the parts that have changed.

use std::collections::HashMap;
use std::convert::Infallible;
use std::time::Duration;

use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde_json::json;

use super::overview::parts;
use crate::Console;

/// How often a silent connection is kept alive. The browser opens a new one by itself when it breaks.
const ALIVE: Duration = Duration::from_secs(15);

pub(crate) async fn live(State(console): State<Console>) -> Response {
    let seen = console.0.collector.watch();
    let sent: HashMap<&'static str, String> = HashMap::new();
    let events = stream::unfold((console, seen, sent, true), |(console, mut seen, mut sent, first)| async move {
        loop {
            if !first && seen.changed().await.is_err() {
                return None;
            }
            console.0.collector.goes_on();
            let now = seen.borrow_and_update().clone();
            if !now.is_read && seen.changed().await.is_ok() {
                continue;
            }
            let base = console.config().public_url.path().to_string();
            let mut changed = Vec::new();
            for (id, part) in parts(&now, &base) {
                let html = part.into_string();
                if sent.get(id) != Some(&html) {
                    changed.push(Event::default().event("part").data(json!({ "id": id, "html": html }).to_string()));
                    sent.insert(id, html);
                }
            }
            if !changed.is_empty() {
                let events = stream::iter(changed.into_iter().map(Ok::<_, Infallible>));
                return Some((events, (console, seen, sent, false)));
            }
        }
    });
    Sse::new(futures_util::StreamExt::flatten(events)).keep_alive(KeepAlive::new().interval(ALIVE)).into_response()
}
