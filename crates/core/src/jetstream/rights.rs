//! What the NATS user of a connection may do, as far as the server tells it.

use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use super::Connection;
use crate::config::Naming;
use aftercommit_outbox::subject;

/// The server tells a user about itself here, unless its permissions leave that out.
const ABOUT_ME: &str = "$SYS.REQ.USER.INFO";
/// What an account with JetStream of its own answers to.
const ACCOUNT: &str = "$JS.API.INFO";
/// A user who may not ask gets no answer at all.
const PATIENCE: Duration = Duration::from_secs(2);

/// A user, and what is more than looking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rights {
    /// The user's name; empty when nobody has to log in.
    pub user: String,
    /// The account that it is in, such as `OPERATOR`.
    pub account: String,
    /// What it may do to the stream, such as `delete the stream`; empty when it can only look.
    pub acts: Vec<&'static str>,
}

/// What [`ABOUT_ME`] is answered with.
#[derive(Deserialize)]
struct Answer {
    data: User,
}

#[derive(Deserialize)]
struct User {
    #[serde(default)]
    user: String,
    account: String,
    permissions: Option<Permissions>,
}

#[derive(Deserialize)]
struct Permissions {
    #[serde(default)]
    publish: Limits,
}

#[derive(Default, Deserialize)]
struct Limits {
    #[serde(default)]
    allow: Vec<String>,
    #[serde(default)]
    deny: Vec<String>,
}

impl Limits {
    fn admit(&self, wanted: &str) -> bool {
        let any = |list: &[String]| list.iter().any(|one| one == wanted || subject::matches(one, wanted));
        (self.allow.is_empty() || any(&self.allow)) && !any(&self.deny)
    }
}

/// Asks the server about the user. None when it does not tell. Nothing is changed.
pub async fn rights(connection: &Connection, naming: &Naming) -> Option<Rights> {
    let user = ask(connection, ABOUT_ME).await.and_then(|answer| serde_json::from_slice::<Answer>(&answer).ok())?.data;
    // Who is not in the stream's account reaches only what his own imports from it.
    let own = ask(connection, ACCOUNT).await.and_then(|answer| serde_json::from_slice::<Value>(&answer).ok());
    let has_jetstream = own.is_some_and(|answer| answer.get("error").is_none());
    Some(judge(user, has_jetstream, naming))
}

fn judge(user: User, has_jetstream: bool, naming: &Naming) -> Rights {
    let stream = &naming.stream;
    let all = [
        (format!("$JS.API.STREAM.CREATE.{stream}_2"), "create streams"),
        (format!("$JS.API.STREAM.UPDATE.{stream}"), "change the stream"),
        (format!("$JS.API.STREAM.PURGE.{stream}"), "purge the stream"),
        (format!("$JS.API.STREAM.DELETE.{stream}"), "delete the stream"),
        (naming.prefix.subject("x"), "publish into it"),
    ];
    let may = |wanted: &str| user.permissions.as_ref().is_none_or(|limits| limits.publish.admit(wanted));
    let acts = all.iter().filter(|(wanted, _)| has_jetstream && may(wanted)).map(|(_, act)| *act).collect();
    Rights { user: user.user, account: user.account, acts }
}

async fn ask(connection: &Connection, about: &'static str) -> Option<Vec<u8>> {
    let answer = connection.client.request(about, "".into());
    tokio::time::timeout(PATIENCE, answer).await.ok()?.ok().map(|message| message.payload.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acts(permissions: &str, has_jetstream: bool) -> Vec<&'static str> {
        let text = format!(r#"{{"data": {{"user": "u", "account": "A", "permissions": {permissions}}}}}"#);
        let user = serde_json::from_str::<Answer>(&text).unwrap().data;
        judge(user, has_jetstream, &Naming::default()).acts
    }

    #[test]
    fn who_is_not_in_the_streams_account_can_only_look() {
        assert_eq!(acts("null", false), [""; 0]);
        assert_eq!(acts("null", true).len(), 5);
    }

    #[test]
    fn permissions_limit_what_a_user_may() {
        let limited = |publish: &str| acts(&format!(r#"{{"publish": {publish}}}"#), true);
        assert_eq!(limited(r#"{"allow": ["$JS.API.STREAM.INFO.EVENTS"]}"#), [""; 0]);
        assert_eq!(limited(r#"{"allow": ["events.>"]}"#), ["publish into it"]);
        assert_eq!(limited(r#"{"allow": ["$JS.API.STREAM.*.EVENTS"]}"#).len(), 3);
        assert_eq!(limited(r#"{"deny": ["$JS.API.STREAM.CREATE.>"]}"#).len(), 4);
        assert_eq!(limited(r#"{"deny": ["$JS.API.>", "events.>"]}"#), [""; 0]);
    }
}
