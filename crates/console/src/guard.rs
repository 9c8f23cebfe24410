//! What holds for every request: whom it is for, where it comes from, and what a browser may do with the answer.

use axum::extract::{Request, State};
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, HOST, ORIGIN, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::Response;

use crate::problem::Problem;
use crate::{Console, document};

/// Nothing but the console's own files, and no form that leads elsewhere.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; form-action 'self'; \
                      frame-ancestors 'none'; base-uri 'none'";
/// The longest address that is read, in bytes.
const LONGEST: usize = 8 << 10;

pub(crate) async fn guard(State(console): State<Console>, request: Request, next: Next) -> Response {
    let for_programs = document::is_for_programs(&console, &request);
    let mut response = match refusal(&console, &request) {
        Some(problem) => document::problem(&console, None, &problem, for_programs),
        None => next.run(request).await,
    };
    let headers = response.headers_mut();
    let set = |headers: &mut HeaderMap, name: HeaderName, value: &'static str| {
        headers.insert(name, HeaderValue::from_static(value));
    };
    set(headers, CONTENT_SECURITY_POLICY, POLICY);
    set(headers, X_CONTENT_TYPE_OPTIONS, "nosniff");
    set(headers, X_FRAME_OPTIONS, "DENY");
    set(headers, REFERRER_POLICY, "no-referrer");
    set(headers, HeaderName::from_static("cross-origin-opener-policy"), "same-origin");
    set(headers, HeaderName::from_static("cross-origin-resource-policy"), "same-origin");
    headers.entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

fn refusal(console: &Console, request: &Request) -> Option<Problem> {
    let (url, headers) = (&console.config().public_url, request.headers());
    let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let host = text(HOST).or_else(|| request.uri().authority().map(|authority| authority.as_str())).unwrap_or_default();
    if !url.is_for(&host.to_ascii_lowercase()) {
        return Some(Problem::new(StatusCode::MISDIRECTED_REQUEST, format!("The console is at {url}.")));
    }
    if request.uri().path_and_query().is_some_and(|path| path.as_str().len() > LONGEST) {
        return Some(Problem::new(StatusCode::URI_TOO_LONG, "The address is too long."));
    }
    if matches!(*request.method(), Method::GET | Method::HEAD) {
        return None;
    }
    // Of a browser one of them is always there; a program brings a token, which no page of a stranger has.
    let fits = match (text(HeaderName::from_static("sec-fetch-site")), text(ORIGIN)) {
        (Some(site), _) if site != "same-origin" => false,
        (_, Some(origin)) => url.is_origin(&origin.to_ascii_lowercase()),
        (Some(_), None) => true,
        (None, None) => headers.contains_key(axum::http::header::AUTHORIZATION),
    };
    (!fits).then(|| Problem::new(StatusCode::FORBIDDEN, "The request does not come from a page of the console."))
}
