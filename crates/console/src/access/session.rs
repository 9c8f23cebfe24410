//! People who have logged in.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};

use super::{Role, Visitor};

/// The name of the cookie.
pub(crate) const COOKIE: &str = "aftercommit_console";
/// How long a session lasts.
const LASTS: Duration = Duration::from_secs(12 * 3600);
/// How long it lasts when nobody looks.
const RESTS: Duration = Duration::from_secs(3600);
/// How many there are at a time; with more the one that has rested longest ends.
const MOST: usize = 1000;

/// Sessions are in memory only: after a restart people log in again.
#[derive(Default)]
pub(crate) struct Sessions(Mutex<HashMap<[u8; 32], Session>>);

struct Session {
    name: String,
    role: Role,
    form_token: String,
    began: Instant,
    seen: Instant,
}

impl Session {
    fn is_over(&self, now: Instant) -> bool {
        now.duration_since(self.began) > LASTS || now.duration_since(self.seen) > RESTS
    }
}

impl Sessions {
    fn lock(&self) -> MutexGuard<'_, HashMap<[u8; 32], Session>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins one; returns what the cookie holds. None when the system has no random numbers.
    pub(crate) fn begin(&self, name: &str, role: Role) -> Option<String> {
        let (secret, form_token) = (random()?, random()?);
        let now = Instant::now();
        let mut sessions = self.lock();
        sessions.retain(|_, session| !session.is_over(now));
        if sessions.len() >= MOST
            && let Some(longest) = sessions.iter().min_by_key(|(_, session)| session.seen).map(|(id, _)| *id)
        {
            sessions.remove(&longest);
        }
        sessions.insert(id(&secret), Session { name: name.into(), role, form_token, began: now, seen: now });
        Some(secret)
    }

    /// Whose session it is.
    pub(super) fn visitor(&self, secret: &str) -> Option<Visitor> {
        let (mut sessions, now) = (self.lock(), Instant::now());
        let session = sessions.get_mut(&id(secret)).filter(|session| !session.is_over(now))?;
        session.seen = now;
        Some(Visitor { name: session.name.clone(), role: session.role, form_token: Some(session.form_token.clone()) })
    }

    /// Ends one.
    pub(crate) fn end(&self, secret: &str) {
        self.lock().remove(&id(secret));
    }
}

/// Only the digest is kept, so that looking one up takes the same time whatever was guessed.
fn id(secret: &str) -> [u8; 32] {
    Sha256::digest(secret.as_bytes()).into()
}

fn random() -> Option<String> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).ok()?;
    Some(URL_SAFE_NO_PAD.encode(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_whose_it_is_until_it_ends() {
        let sessions = Sessions::default();
        let secret = sessions.begin("jane", Role::Operator).unwrap();
        let visitor = sessions.visitor(&secret).unwrap();
        assert_eq!((visitor.name.as_str(), visitor.role), ("jane", Role::Operator));
        assert_ne!(visitor.form_token.unwrap(), secret);
        assert!(sessions.visitor("guessed").is_none());
        sessions.end(&secret);
        assert!(sessions.visitor(&secret).is_none());
    }

    #[test]
    fn there_is_no_end_of_logins_but_of_sessions() {
        let sessions = Sessions::default();
        let first = sessions.begin("first", Role::Viewer).unwrap();
        for _ in 0..MOST {
            sessions.begin("more", Role::Viewer).unwrap();
        }
        assert!(sessions.visitor(&first).is_none());
        assert_eq!(sessions.lock().len(), MOST);
    }
}
