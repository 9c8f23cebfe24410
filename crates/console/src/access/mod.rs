//! Who looks, and what they may see.

mod proxy;
mod session;
pub(crate) mod users;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use axum::extract::{ConnectInfo, Request, State};
use axum::http::header::{AUTHORIZATION, COOKIE};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Redirect, Response};
use serde::{Deserialize, Serialize};

use aftercommit_core::error::Error;

use crate::config::ConsoleConfig;
use crate::problem::Problem;
use crate::{Console, document};
pub use proxy::Proxy;
pub(crate) use session::{COOKIE as SESSION_COOKIE, Sessions};
use users::Users;

/// What somebody may do. Each includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Sees everything but payloads.
    Viewer,
    /// Sees payloads, too.
    Reader,
    /// Pauses, retries, releases, sends what was missed. Nothing here asks for it yet.
    Operator,
    /// Edits, discards, sends again. Nothing here asks for it yet.
    Admin,
}

impl Role {
    /// All of them, the least first.
    pub const ALL: [Self; 4] = [Self::Viewer, Self::Reader, Self::Operator, Self::Admin];

    /// Its name in settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Reader => "reader",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }
}

/// How the console knows who looks.
#[derive(Debug, Clone, Default)]
pub enum Access {
    /// Nobody logs in: whoever reaches the loopback address is a [`Role::Reader`].
    #[default]
    Loopback,
    /// A proxy has logged people in, and names them in headers.
    Proxy(Proxy),
    /// People log in with names and passwords of a [users file](crate::UsersFile); programs bring a token of it.
    Users(PathBuf),
}

/// Somebody who looks.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Visitor {
    pub(crate) name: String,
    pub(crate) role: Role,
    /// The token of their session's forms; none without a session.
    #[serde(skip)]
    pub(crate) form_token: Option<String>,
}

/// Who is let in.
pub(crate) struct Gate {
    way: Way,
    pub(crate) sessions: Sessions,
}

enum Way {
    Loopback,
    Proxy(Proxy),
    Users(Users),
}

impl Gate {
    pub(crate) fn new(config: &ConsoleConfig) -> Result<Self, Error> {
        let way = match &config.access {
            Access::Loopback => Way::Loopback,
            Access::Proxy(proxy) => Way::Proxy(proxy.clone()),
            Access::Users(path) => Way::Users(Users::read(path)?),
        };
        Ok(Self { way, sessions: Sessions::default() })
    }

    /// The users who can log in here; none when nobody does.
    pub(crate) fn users(&self) -> Option<&Users> {
        match &self.way {
            Way::Users(users) => Some(users),
            _ => None,
        }
    }

    fn visitor(&self, headers: &HeaderMap, peer: IpAddr) -> Option<Visitor> {
        match &self.way {
            Way::Loopback if peer.is_loopback() => {
                Some(Visitor { name: "loopback".into(), role: Role::Reader, form_token: None })
            }
            Way::Loopback => None,
            Way::Proxy(proxy) => proxy.visitor(headers, peer),
            Way::Users(users) => {
                let bearer = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
                match bearer {
                    Some(token) => users.by_token(token),
                    None => self.sessions.visitor(cookie(headers, SESSION_COOKIE)?),
                }
            }
        }
    }
}

/// The value of a cookie.
pub(crate) fn cookie<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    let pairs =
        headers.get_all(COOKIE).into_iter().filter_map(|value| value.to_str().ok()).flat_map(|text| text.split(';'));
    pairs.filter_map(|pair| pair.trim().split_once('=')).find(|(found, _)| *found == name).map(|(_, value)| value)
}

/// Lets in who has at least the role that the route asks for, and tells the route who it is.
pub(crate) async fn demand(
    State((console, least)): State<(Console, Role)>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    mut request: Request,
    next: Next,
) -> Response {
    let for_programs = document::is_for_programs(&console, &request);
    let Some(visitor) = console.0.access.visitor(request.headers(), peer.ip()) else {
        // A program gets a status, a person the form.
        if console.0.access.users().is_some() && !for_programs {
            return Redirect::to(&document::login_path(&console, document::asked(&request))).into_response();
        }
        let problem = Problem::new(StatusCode::UNAUTHORIZED, "Nobody has said who you are.");
        return document::problem(&console, None, &problem, for_programs);
    };
    if visitor.role < least {
        let problem = Problem::new(
            StatusCode::FORBIDDEN,
            format!("It takes the role {}, and {} has the role {}.", least.name(), visitor.name, visitor.role.name()),
        );
        return document::problem(&console, Some(&visitor), &problem, for_programs);
    }
    request.extensions_mut().insert(visitor);
    next.run(request).await
}
