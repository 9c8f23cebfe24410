//! Every route, with the role that it takes.

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::Method;
use axum::middleware::from_fn_with_state;
use axum::response::Response;
use axum::routing::{get, post};

use crate::access::{Role, demand};
use crate::html::assets;
use crate::page::{Route, page};
use crate::pages::{audit, dead, doctor, event, events, jobs, live, login, overview, parked, reconcile, subscriber};
use crate::problem::Problem;
use crate::{Console, document, guard};

/// All of them. Who adds one says who may use it.
pub(crate) fn all() -> Vec<Route> {
    let mut routes: Vec<Route> = [
        page::<overview::Overview>("/"),
        page::<subscriber::Subscriber>("/subscribers/{name}"),
        page::<events::Events>("/events"),
        page::<event::Event>("/events/{id}"),
        page::<dead::Letters>("/dead"),
        page::<dead::Letter>("/dead/{id}"),
        page::<parked::Parked>("/parked"),
        page::<reconcile::Reconcile>("/reconcile"),
        page::<jobs::Jobs>("/jobs"),
        page::<jobs::One>("/jobs/{id}"),
        page::<audit::Audit>("/audit"),
        page::<doctor::Doctor>("/doctor"),
    ]
    .into_iter()
    .flatten()
    .collect();
    let route = |method, path: &str, least, handler| Route { method, path: path.into(), least, handler };
    routes.push(route(Method::GET, "/live", Some(Role::Viewer), get(live::live)));
    routes.push(route(Method::GET, "/login", None, get(login::form)));
    routes.push(route(Method::POST, "/login", None, post(login::log_in)));
    routes.push(route(Method::POST, "/logout", None, post(login::log_out)));
    routes.push(route(Method::GET, "/healthz", None, get(async || "ok\n")));
    for asset in assets::all() {
        routes.push(route(Method::GET, &asset.path, None, get(async || asset.response())));
    }
    routes
}

pub(crate) fn router(console: &Console) -> Router {
    let mut pages = Router::new();
    for Route { path, least, handler, .. } in all() {
        let handler = match least {
            Some(least) => handler.route_layer(from_fn_with_state((console.clone(), least), demand)),
            None => handler,
        };
        pages = pages.route(&path, handler);
    }
    let pages = pages.fallback(nothing).method_not_allowed_fallback(not_so);
    let base = console.config().public_url.path();
    let router = if base.is_empty() { pages } else { Router::new().nest(base, pages).fallback(nothing) };
    router
        .layer(DefaultBodyLimit::max(login::LARGEST))
        .layer(from_fn_with_state(console.clone(), guard::guard))
        .with_state(console.clone())
}

async fn nothing(State(console): State<Console>, request: Request) -> Response {
    let for_programs = document::is_for_programs(&console, &request);
    document::problem(&console, None, &Problem::not_found("There is no such page."), for_programs)
}

async fn not_so(State(console): State<Console>, request: Request) -> Response {
    let for_programs = document::is_for_programs(&console, &request);
    let problem = Problem::new(axum::http::StatusCode::METHOD_NOT_ALLOWED, "A page is only read.");
    document::problem(&console, None, &problem, for_programs)
}
