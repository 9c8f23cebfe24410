//! A page: what it asks for, and how it looks. Each is served as HTML and, below `/api/v1`, as JSON.

use std::collections::HashMap;

use axum::extract::{Extension, Path, RawQuery, State};
use axum::http::Method;
use axum::response::Response;
use axum::routing::{MethodRouter, get};
use maud::Markup;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::access::{Role, Visitor};
use crate::problem::Problem;
use crate::{Console, document};

/// A page of the console.
pub(crate) trait Page: Serialize + Send + Sized + 'static {
    /// What stands in the address, in its path and behind the question mark. Anything else there is refused by name.
    type Query: DeserializeOwned + Serialize + Send + Sync + 'static;

    /// Asks the servers.
    fn load(at: &At<'_>, query: &Self::Query) -> impl Future<Output = Result<Self, Problem>> + Send;

    /// What stands in the browser's tab.
    fn title(&self, query: &Self::Query) -> String;

    /// Its content, below the heading.
    fn content(&self, at: &At<'_>, query: &Self::Query) -> Markup;
}

/// Where and for whom a page is made.
pub(crate) struct At<'a> {
    pub(crate) console: &'a Console,
    pub(crate) visitor: &'a Visitor,
    /// Its path in the console.
    pub(crate) path: String,
}

impl At<'_> {
    /// The address of something in the console, such as `/dead?subscriber=mails`.
    pub(crate) fn link(&self, path: &str) -> String {
        format!("{}{path}", self.console.config().public_url.path())
    }

    /// Whether the visitor may see payloads.
    pub(crate) fn shows_payloads(&self) -> bool {
        self.visitor.role >= Role::Reader
    }
}

/// No parameters.
#[derive(Debug, serde::Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Nothing {}

/// A way to something.
pub(crate) struct Route {
    pub(crate) method: Method,
    pub(crate) path: String,
    /// The least role that it takes; none when everybody may.
    pub(crate) least: Option<Role>,
    pub(crate) handler: MethodRouter<Console>,
}

/// The two routes of a page that everybody with a role may see.
pub(crate) fn page<P: Page>(path: &str) -> [Route; 2] {
    let route = |path: String, handler| Route { method: Method::GET, path, least: Some(Role::Viewer), handler };
    let api = format!("{}{}", document::API, if path == "/" { "/overview" } else { path });
    [route(path.into(), get(as_html::<P>)), route(api, get(as_json::<P>))]
}

async fn as_html<P: Page>(
    State(console): State<Console>,
    Extension(visitor): Extension<Visitor>,
    Path(parameters): Path<HashMap<String, String>>,
    RawQuery(query): RawQuery,
    uri: axum::http::Uri,
) -> Response {
    let at = At { console: &console, visitor: &visitor, path: document::within(&console, uri.path()) };
    let loaded = async {
        let query = read::<P>(&parameters, query.as_deref())?;
        Ok::<_, Problem>((load::<P>(&at, &query).await?, query))
    };
    match loaded.await {
        Ok((page, query)) => document::html(&at, &page.title(&query), page.content(&at, &query)),
        Err(problem) => document::problem(&console, Some(&visitor), &problem, false),
    }
}

async fn as_json<P: Page>(
    State(console): State<Console>,
    Extension(visitor): Extension<Visitor>,
    Path(parameters): Path<HashMap<String, String>>,
    RawQuery(query): RawQuery,
    uri: axum::http::Uri,
) -> Response {
    let at = At { console: &console, visitor: &visitor, path: document::within(&console, uri.path()) };
    let loaded = async { load::<P>(&at, &read::<P>(&parameters, query.as_deref())?).await };
    match loaded.await {
        Ok(page) => document::json(&page),
        Err(problem) => document::problem(&console, Some(&visitor), &problem, true),
    }
}

async fn load<P: Page>(at: &At<'_>, query: &P::Query) -> Result<P, Problem> {
    let turn = at.console.0.turns.acquire().await;
    let loaded = P::load(at, query).await;
    drop(turn);
    loaded
}

/// Puts together what the path and the query say. An empty value is as good as none: that is how forms leave fields out.
fn read<P: Page>(parameters: &HashMap<String, String>, query: Option<&str>) -> Result<P::Query, Problem> {
    let asked = form_urlencoded::parse(query.unwrap_or_default().as_bytes()).filter(|(_, value)| !value.is_empty());
    let mut all = form_urlencoded::Serializer::new(String::new());
    all.extend_pairs(parameters).extend_pairs(asked);
    serde_urlencoded::from_str(&all.finish())
        .map_err(|error| Problem::refused(format!("The address is wrong: {error}.")))
}
