//! The users file: who may log in, and with what.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use argon2::password_hash::phc::PasswordHash;
use argon2::{Argon2, PasswordHasher, PasswordVerifier};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;

use super::{Role, Visitor};
use aftercommit_core::error::{Error, ErrorKind};

/// Passwords that are checked at a time: each takes 19 MiB for that moment.
const AT_A_TIME: usize = 2;
/// Attempts that one address may fail with in [`WINDOW`].
const ATTEMPTS: u32 = 10;
const WINDOW: Duration = Duration::from_secs(60);
/// Addresses that are remembered.
const ADDRESSES: usize = 10_000;
/// The longest password that is checked.
const LONGEST: usize = 1024;

/// The users file.
///
/// ```toml
/// [[user]]
/// name = "jane"
/// role = "reader"                       # viewer, reader, operator, admin
/// password = "$argon2id$v=19$…"         # made by `aftercommit console hash-password`
///
/// [[token]]                             # for programs: Authorization: Bearer …
/// name = "grafana"
/// role = "viewer"
/// sha256 = "9f86d081…"                  # of the token, in hexadecimal
/// ```
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UsersFile {
    /// People.
    #[serde(default)]
    user: Vec<User>,
    /// Programs.
    #[serde(default)]
    token: Vec<Token>,
}

#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct User {
    name: String,
    role: Role,
    password: String,
}

#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Token {
    name: String,
    role: Role,
    sha256: String,
}

/// Shows no hash.
impl std::fmt::Debug for User {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("User").field("name", &self.name).field("role", &self.role).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Token").field("name", &self.name).field("role", &self.role).finish_non_exhaustive()
    }
}

impl UsersFile {
    /// Reads the text of such a file.
    ///
    /// # Errors
    /// When it is not as it should be; the text names the user.
    pub fn parse(text: &str) -> Result<Self, String> {
        let file: Self = toml::from_str(text).map_err(|error| error.message().to_string())?;
        let mut names: Vec<&str> = file.user.iter().map(|user| user.name.as_str()).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(format!("there are two users {:?}", pair[0]));
        }
        for user in &file.user {
            let hash = PasswordHash::new(&user.password);
            if user.name.is_empty() || !hash.is_ok_and(|hash| hash.algorithm.as_str() == "argon2id") {
                return Err(format!(
                    "the password of user {:?} is not a hash that `aftercommit console hash-password` has made",
                    user.name
                ));
            }
        }
        for token in &file.token {
            if token.sha256.len() != 64 || !token.sha256.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                return Err(format!("sha256 of token {:?} is not 64 hexadecimal digits", token.name));
            }
        }
        match file.user.is_empty() && file.token.is_empty() {
            true => Err("it names nobody".into()),
            false => Ok(file),
        }
    }
}

/// Makes the hash of a password for the users file, with Argon2id and the parameters that OWASP recommends.
///
/// # Errors
/// [`ErrorKind::Config`] when it is shorter than 12 characters or longer than 1 KiB.
pub fn hash_password(password: &str) -> Result<String, Error> {
    if password.chars().count() < 12 || password.len() > LONGEST {
        return Err(Error::new(ErrorKind::Config, "a password must have from 12 characters to 1 KiB"));
    }
    let mut salt = [0; 16];
    getrandom::fill(&mut salt)
        .map_err(|_| Error::new(ErrorKind::Config, "the system has no random numbers for a salt"))?;
    let hash = Argon2::default().hash_password_with_salt(password.as_bytes(), &salt);
    hash.map(|hash| hash.to_string()).map_err(|_| Error::new(ErrorKind::Config, "this password cannot be hashed"))
}

/// Who may log in.
pub(crate) struct Users {
    file: UsersFile,
    /// For names that nobody has: an answer takes as long as for one that somebody has.
    nobody: String,
    turns: Semaphore,
    failures: Mutex<HashMap<IpAddr, (Instant, u32)>>,
}

impl Users {
    pub(super) fn read(path: &Path) -> Result<Self, Error> {
        let name = path.display();
        let text = std::fs::read_to_string(path).map_err(|error| {
            Error::with_source(ErrorKind::Config, format!("the users file {name} cannot be read (--users)"), error)
        })?;
        let file = UsersFile::parse(&text).map_err(|problem| {
            Error::new(ErrorKind::Config, format!("the users file {name} cannot be used: {problem}"))
        })?;
        let nobody = hash_password("the password of nobody")?;
        Ok(Self { file, nobody, turns: Semaphore::new(AT_A_TIME), failures: Mutex::default() })
    }

    pub(super) fn by_token(&self, token: &str) -> Option<Visitor> {
        let digest: String = Sha256::digest(token.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
        let found = self.file.token.iter().find(|token| token.sha256.eq_ignore_ascii_case(&digest))?;
        Some(Visitor { name: format!("token {}", found.name), role: found.role, form_token: None })
    }

    /// The role of who brings this name and password. `Err` when the address has failed too often.
    pub(crate) async fn log_in(&self, name: &str, password: &str, peer: IpAddr) -> Result<Option<Role>, ()> {
        self.may_try(peer)?;
        let user = self.file.user.iter().find(|user| user.name == name);
        let hash = user.map_or_else(|| self.nobody.clone(), |user| user.password.clone());
        let password = password.to_string();
        let Ok(_turn) = self.turns.acquire().await else { return Ok(None) };
        let fits = tokio::task::spawn_blocking(move || {
            let parsed = PasswordHash::new(&hash);
            password.len() <= LONGEST
                && parsed.is_ok_and(|hash| Argon2::default().verify_password(password.as_bytes(), &hash).is_ok())
        });
        let fits = matches!(fits.await, Ok(true));
        let role = user.filter(|_| fits).map(|user| user.role);
        if role.is_none() {
            self.failed(peer);
        }
        Ok(role)
    }

    fn may_try(&self, peer: IpAddr) -> Result<(), ()> {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        match failures.get(&peer) {
            Some((since, count)) if since.elapsed() < WINDOW && *count >= ATTEMPTS => Err(()),
            _ => Ok(()),
        }
    }

    fn failed(&self, peer: IpAddr) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        if failures.len() >= ADDRESSES {
            failures.retain(|_, (since, _)| since.elapsed() < WINDOW);
        }
        let (since, count) = failures.entry(peer).or_insert((Instant::now(), 0));
        if since.elapsed() >= WINDOW {
            (*since, *count) = (Instant::now(), 0);
        }
        *count += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWORD: &str = "correct horse battery";

    fn users(text: &str) -> Users {
        let file = UsersFile::parse(text).unwrap_or_else(|problem| panic!("{problem}"));
        let nobody = hash_password("the password of nobody").unwrap();
        Users { file, nobody, turns: Semaphore::new(AT_A_TIME), failures: Mutex::default() }
    }

    #[tokio::test]
    async fn who_knows_the_password_has_the_role_and_who_guesses_is_stopped() {
        let hash = hash_password(PASSWORD).unwrap();
        let users = users(&format!("[[user]]\nname = 'jane'\nrole = 'operator'\npassword = '{hash}'\n"));
        let (here, there) = ([127, 0, 0, 1].into(), [127, 0, 0, 2].into());
        assert_eq!(users.log_in("jane", PASSWORD, here).await, Ok(Some(Role::Operator)));
        assert_eq!(users.log_in("nobody", "the password of nobody", here).await, Ok(None));
        for _ in 1..ATTEMPTS {
            assert_eq!(users.log_in("jane", "wrong", here).await, Ok(None));
        }
        assert_eq!(users.log_in("jane", PASSWORD, here).await, Err(()));
        assert_eq!(users.log_in("jane", PASSWORD, there).await, Ok(Some(Role::Operator)));
    }

    #[test]
    fn a_token_is_known_by_its_digest() {
        let users = users(&format!(
            "[[token]]\nname = 'grafana'\nrole = 'viewer'\nsha256 = '{}'\n",
            "9F86D081884C7D659A2FEAA0C55AD015A3BF4F1B2B0B822CD15D6C15B0F00A08"
        ));
        assert_eq!(users.by_token("test").map(|visitor| visitor.role), Some(Role::Viewer));
        assert!(users.by_token("guess").is_none());
    }

    #[test]
    fn a_file_that_would_let_in_others_is_refused() {
        let hash = hash_password(PASSWORD).unwrap();
        let user = format!("[[user]]\nname = 'jane'\nrole = 'viewer'\npassword = '{hash}'\n");
        for (text, named) in [
            (String::new(), "nobody"),
            (format!("{user}{user}"), "jane"),
            ("[[user]]\nname = 'jane'\nrole = 'viewer'\npassword = 'hunter2'\n".into(), "hash-password"),
            (user.replace("viewer", "root"), "root"),
            (user.replace("role", "roll"), "roll"),
            ("[[token]]\nname = 't'\nrole = 'viewer'\nsha256 = 'abc'\n".into(), "64"),
        ] {
            let problem = UsersFile::parse(&text).unwrap_err();
            assert!(problem.contains(named) && !problem.contains("hunter2"), "{problem}");
        }
        assert!(hash_password("short").is_err());
    }
}
