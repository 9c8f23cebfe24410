//! People whom a proxy has logged in.

use std::net::IpAddr;

use axum::http::HeaderMap;

use super::{Role, Visitor};

/// The longest name of a user that is taken.
const LONGEST: usize = 200;

/// A proxy that logs people in and names them in headers. Of anybody else such headers are not believed.
#[derive(Debug, Clone)]
pub struct Proxy {
    /// The addresses from which it connects.
    pub peers: Vec<IpAddr>,
    /// The header with the user's name. Defaults to `x-forwarded-user`.
    pub user_header: String,
    /// The header with the user's groups, separated by commas. Defaults to `x-forwarded-groups`.
    pub groups_header: String,
    /// Which group has which role. Who is in several groups has the greatest of their roles, who is in none is not let in.
    pub roles: Vec<(String, Role)>,
}

impl Proxy {
    /// At these addresses, with the usual headers.
    pub fn new(peers: Vec<IpAddr>, roles: Vec<(String, Role)>) -> Self {
        Self { peers, user_header: "x-forwarded-user".into(), groups_header: "x-forwarded-groups".into(), roles }
    }

    pub(super) fn visitor(&self, headers: &HeaderMap, peer: IpAddr) -> Option<Visitor> {
        if !self.peers.contains(&peer.to_canonical()) {
            return None;
        }
        // A second header may have been smuggled in beside the proxy's own.
        let one = |name: &str| {
            let mut values = headers.get_all(name).into_iter();
            let value = values.next()?.to_str().ok()?.trim();
            (values.next().is_none() && !value.is_empty()).then_some(value)
        };
        let name = one(&self.user_header).filter(|name| name.len() <= LONGEST)?;
        let groups = one(&self.groups_header)?;
        let has = |group: &str| groups.split(',').any(|found| found.trim() == group);
        let role = self.roles.iter().filter(|(group, _)| has(group)).map(|(_, role)| *role).max()?;
        Some(Visitor { name: name.into(), role, form_token: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, axum::http::HeaderValue::from_static(value));
        }
        headers
    }

    #[test]
    fn only_the_proxy_is_believed_and_only_once() {
        let here: IpAddr = [10, 0, 0, 1].into();
        let proxy = Proxy::new(vec![here], vec![("ops".into(), Role::Operator), ("all".into(), Role::Viewer)]);
        let role = |pairs: &[(&'static str, &'static str)], peer| {
            proxy.visitor(&headers(pairs), peer).map(|visitor| (visitor.name, visitor.role))
        };
        let jane = [("x-forwarded-user", "jane"), ("x-forwarded-groups", "all, ops")];
        assert_eq!(role(&jane, here), Some(("jane".into(), Role::Operator)));
        assert_eq!(role(&jane, "::ffff:10.0.0.1".parse().unwrap()), Some(("jane".into(), Role::Operator)));
        assert_eq!(role(&jane, [10, 0, 0, 2].into()), None);
        assert_eq!(role(&[("x-forwarded-user", "jane"), ("x-forwarded-groups", "others")], here), None);
        assert_eq!(role(&[("x-forwarded-user", ""), ("x-forwarded-groups", "ops")], here), None);
        assert_eq!(role(&jane[..1], here), None);
        let twice = [jane[0], jane[1], ("x-forwarded-user", "root")];
        assert_eq!(role(&twice, here), None);
    }
}
