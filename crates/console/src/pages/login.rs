//! Logging in and out.

use std::net::SocketAddr;

use axum::extract::{ConnectInfo, RawQuery, State};
use axum::http::header::SET_COOKIE;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Redirect, Response};
use maud::{Markup, html};
use serde::Deserialize;

use crate::access::{SESSION_COOKIE, cookie};
use crate::problem::Problem;
use crate::{Console, document};

/// The largest form that is read.
pub(crate) const LARGEST: usize = 16 << 10;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Form {
    name: String,
    password: String,
    #[serde(default)]
    to: String,
}

pub(crate) async fn form(State(console): State<Console>, RawQuery(query): RawQuery) -> Response {
    let query = query.unwrap_or_default();
    let to = form_urlencoded::parse(query.as_bytes()).find(|(name, _)| name == "to").map(|(_, to)| to.into_owned());
    document::shell(&console, None, "", "Log in", &fields(&console, &to.unwrap_or_default(), None))
}

fn fields(console: &Console, to: &str, problem: Option<&str>) -> Markup {
    let base = console.config().public_url.path();
    html! {
        @if let Some(problem) = problem { p.problem role="alert" { (problem) } }
        form.login method="post" action={ (base) "/login" } {
            label { "Name" input name="name" autocomplete="username" required autofocus; }
            label { "Password" input name="password" type="password" autocomplete="current-password" required; }
            input type="hidden" name="to" value=(to);
            button { "Log in" }
        }
    }
}

pub(crate) async fn log_in(
    State(console): State<Console>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    body: String,
) -> Response {
    let Some(users) = console.0.access.users() else {
        return document::problem(&console, None, &Problem::not_found("Nobody logs in here."), false);
    };
    let Ok(form) = serde_urlencoded::from_str::<Form>(&body) else {
        return document::problem(&console, None, &Problem::refused("The form is wrong."), false);
    };
    let again = |status, problem| {
        let mut response = document::shell(&console, None, "", "Log in", &fields(&console, &form.to, Some(problem)));
        *response.status_mut() = status;
        response
    };
    let role = match users.log_in(&form.name, &form.password, peer.ip()).await {
        Err(()) => {
            return again(StatusCode::TOO_MANY_REQUESTS, "Too many attempts from this address: wait for a minute.");
        }
        Ok(None) => {
            // Without the name: some people type their password there.
            tracing::warn!(peer = %peer.ip(), "a login to the console was refused");
            return again(StatusCode::UNAUTHORIZED, "Name or password is wrong.");
        }
        Ok(Some(role)) => role,
    };
    let Some(secret) = console.0.access.sessions.begin(&form.name, role) else {
        return again(StatusCode::SERVICE_UNAVAILABLE, "The system has no random numbers.");
    };
    tracing::info!(user = form.name, role = role.name(), peer = %peer.ip(), "somebody logged in to the console");
    set_cookie(&console, &secret, Redirect::to(&target(&console, &form.to)).into_response())
}

/// Where somebody wanted to go: a page of the console and nothing else.
fn target(console: &Console, to: &str) -> String {
    let base = console.config().public_url.path();
    let is_ours = to.strip_prefix(base).is_some_and(|path| path.starts_with('/') && !path.starts_with("//"));
    let is_plain = to.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'\\');
    if is_ours && is_plain { to.into() } else { format!("{base}/") }
}

fn set_cookie(console: &Console, value: &str, mut response: Response) -> Response {
    let url = &console.config().public_url;
    let (path, secure) = (url.path(), if url.is_secure() { "; Secure" } else { "" });
    let ended = if value.is_empty() { "; Max-Age=0" } else { "" };
    let cookie = format!("{SESSION_COOKIE}={value}; Path={path}/; HttpOnly; SameSite=Strict{secure}{ended}");
    if let Ok(cookie) = cookie.parse() {
        response.headers_mut().insert(SET_COOKIE, cookie);
    }
    response
}

pub(crate) async fn log_out(State(console): State<Console>, headers: HeaderMap) -> Response {
    if let Some(secret) = cookie(&headers, SESSION_COOKIE) {
        console.0.access.sessions.end(secret);
    }
    set_cookie(&console, "", Redirect::to(&format!("{}/login", console.config().public_url.path())).into_response())
}
