//! Answers: a page around its content, JSON, and what is said when there is none.

use axum::extract::OriginalUri;
use axum::http::header::{CONTENT_TYPE, HeaderValue};
use axum::http::{Request, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use maud::{DOCTYPE, Markup, html};
use serde::Serialize;
use serde_json::json;

use crate::access::Visitor;
use crate::page::At;
use crate::problem::Problem;
use crate::{Console, html as parts};

/// Where the JSON twins are.
pub(crate) const API: &str = "/api/v1";

/// The pages of the menu.
const MENU: [(&str, &str); 8] = [
    ("/", "Overview"),
    ("/events", "Events"),
    ("/dead", "Dead letters"),
    ("/parked", "Parked"),
    ("/reconcile", "Reconcile"),
    ("/jobs", "Jobs"),
    ("/audit", "Audit"),
    ("/doctor", "Doctor"),
];

/// What was asked for, whatever router it has come through.
pub(crate) fn asked<B>(request: &Request<B>) -> &Uri {
    request.extensions().get::<OriginalUri>().map_or(request.uri(), |OriginalUri(uri)| uri)
}

/// Whether the answer is for a program.
pub(crate) fn is_for_programs<B>(console: &Console, request: &Request<B>) -> bool {
    within(console, asked(request).path()).starts_with("/api/")
}

/// A path without what stands before all of the console's.
pub(crate) fn within(console: &Console, path: &str) -> String {
    path.strip_prefix(console.config().public_url.path()).filter(|path| !path.is_empty()).unwrap_or("/").into()
}

/// Where somebody logs in who wanted to see this.
pub(crate) fn login_path(console: &Console, wanted: &Uri) -> String {
    let base = console.config().public_url.path();
    let wanted = wanted.path_and_query().map_or("/", |path| path.as_str());
    let to: String = form_urlencoded::byte_serialize(wanted.as_bytes()).collect();
    format!("{base}/login?to={to}")
}

pub(crate) fn html(at: &At<'_>, title: &str, content: Markup) -> Response {
    shell(at.console, Some(at.visitor), &at.path, title, &content)
}

/// A page; `path` is the one that the menu shows as the current one.
pub(crate) fn shell(
    console: &Console,
    visitor: Option<&Visitor>,
    path: &str,
    title: &str,
    content: &Markup,
) -> Response {
    let base = console.config().public_url.path();
    let stream = &console.config().naming.stream;
    let current =
        |to: &str| if to == "/" { path == "/" || path.starts_with("/subscribers") } else { path.starts_with(to) };
    let markup = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { (title) " · " (stream) }
                link rel="icon" href={ (base) (parts::assets::ICON.path) } type="image/svg+xml";
                link rel="stylesheet" href={ (base) (parts::assets::STYLE.path) };
                script src={ (base) (parts::assets::SCRIPT.path) } defer {}
            }
            body {
                a.skip href="#content" { "Skip to the content" }
                header {
                    a.brand href={ (base) "/" } { "aftercommit" span { (stream) } }
                    @if let Some(visitor) = visitor {
                        nav aria-label="Pages" {
                            @for (to, name) in MENU {
                                a href={ (base) (to) } aria-current=[current(to).then_some("page")] { (name) }
                            }
                        }
                        div.visitor {
                            span title="Your role" { (visitor.name) " · " (visitor.role.name()) }
                            @if let Some(token) = &visitor.form_token {
                                form method="post" action={ (base) "/logout" } {
                                    input type="hidden" name="form_token" value=(token);
                                    button.quiet { "Log out" }
                                }
                            }
                        }
                    }
                }
                main id="content" tabindex="-1" { h1 { (title) } (content) }
            }
        }
    };
    let mut response = markup.into_string().into_response();
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    response
}

pub(crate) fn json(value: &impl Serialize) -> Response {
    match serde_json::to_vec_pretty(value) {
        Ok(body) => ([(CONTENT_TYPE, HeaderValue::from_static("application/json"))], body).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

pub(crate) fn problem(console: &Console, visitor: Option<&Visitor>, problem: &Problem, for_programs: bool) -> Response {
    let mut response = match for_programs {
        true => json(&json!({ "error": problem.text })),
        false => {
            let content = html! {
                p.problem { @for line in problem.text.lines() { (line) br; } }
                p { a href={ (console.config().public_url.path()) "/" } { "To the overview" } }
            };
            shell(console, visitor, "", problem.heading(), &content)
        }
    };
    *response.status_mut() = problem.status;
    response
}
