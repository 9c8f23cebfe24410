//! Who connects to NATS and how: checks the settings and turns them into those of the client.

use async_nats::{Auth, AuthError, ConnectOptions, ServerAddr};
use nkeys::{KeyPair, KeyPairType};
use percent_encoding::percent_decode_str;

use crate::config::{ClientCertificate, NatsAuth, NatsConfig, NatsTls, Secret, read_file};
use crate::error::{Error, ErrorKind};
use crate::subject::check_tokens;

/// The client's options with everything that the configuration says, and the servers, without secrets in their URLs.
pub(super) fn options(config: &NatsConfig) -> Result<(ConnectOptions, Vec<ServerAddr>), Error> {
    let Servers { addresses, login, tls } = servers(&config.url)?;
    let auth = match (login, &config.auth) {
        (NatsAuth::Url, auth) => auth.clone(),
        (login, NatsAuth::Url) => login,
        _ => return Err(refuse("NATS_URL names a user, and another setting does too: take one of them away")),
    };
    let options = match auth {
        NatsAuth::Url => ConnectOptions::new(),
        auth => {
            // What is wrong from the start is to be told before anything is tried.
            answer(&auth, &[])?;
            ConnectOptions::with_auth_callback(move |nonce| {
                let answer = answer(&auth, &nonce).map_err(|error| AuthError::new(error.report()));
                std::future::ready(answer)
            })
        }
    };
    Ok((secure(&config.tls, tls, options)?, addresses))
}

/// The configured inbox. Relays and workers answer to inboxes only, which they know by their first token.
pub(super) fn inbox_prefix(config: &NatsConfig) -> Result<Option<&str>, Error> {
    let Some(prefix) = config.inbox_prefix.as_deref() else { return Ok(None) };
    if prefix.starts_with("_INBOX") && check_tokens(prefix).is_ok() {
        return Ok(Some(prefix));
    }
    Err(refuse(format!(
        "{prefix:?} cannot be an inbox (NATS_INBOX_PREFIX or --nats-inbox-prefix): take one like _INBOX_worker.receipts"
    )))
}

/// What the client says of itself when the server has sent `nonce`. Files are read each time, so that a new secret
/// counts from the next connection on.
fn answer(auth: &NatsAuth, nonce: &[u8]) -> Result<Auth, Error> {
    let mut answer = Auth::new();
    match auth {
        NatsAuth::Url => {}
        NatsAuth::Credentials(path) => {
            let setting = "NATS_CREDS or --nats-creds";
            let text = read_file(path, setting)?;
            let [Some(jwt), Some(seed)] = decorated(&text) else {
                return Err(refuse(format!("the file {} is no credentials file ({setting})", path.display())));
            };
            answer.jwt = Some(jwt.into());
            answer.signature = Some(sign(&key_pair(seed, setting)?, nonce)?);
        }
        NatsAuth::Nkey(seed) => {
            let setting = "NATS_NKEY or --nats-nkey";
            let pair = key_pair(&seed.read(setting)?, setting)?;
            answer.nkey = Some(pair.public_key());
            answer.signature = Some(sign(&pair, nonce)?);
        }
        NatsAuth::Token(token) => answer.token = Some(token.read("NATS_TOKEN_FILE or --nats-token-file")?),
        NatsAuth::UserPassword { user, password } => {
            answer.username = Some(user.clone());
            answer.password = Some(password.read("NATS_PASSWORD_FILE or --nats-password-file")?);
        }
    }
    Ok(answer)
}

fn key_pair(seed: &str, setting: &str) -> Result<KeyPair, Error> {
    let wrong = || refuse(format!("what {setting} names does not hold the seed of a user's nkey, such as SU…"));
    let pair = KeyPair::from_seed(seed).map_err(|_| wrong())?;
    if pair.key_pair_type() == KeyPairType::User { Ok(pair) } else { Err(wrong()) }
}

fn sign(pair: &KeyPair, nonce: &[u8]) -> Result<Vec<u8>, Error> {
    pair.sign(nonce).map_err(|_| refuse("the nkey cannot sign"))
}

/// The JWT and the seed of a credentials file: the first line of each of its two blocks.
fn decorated(text: &str) -> [Option<&str>; 2] {
    let mut lines = text.lines().map(str::trim);
    [(); 2].map(|()| {
        lines.by_ref().find(|line| line.starts_with("---") && line.contains("BEGIN"))?;
        lines.next().filter(|line| !line.is_empty())
    })
}

fn secure(tls: &NatsTls, must: bool, mut options: ConnectOptions) -> Result<ConnectOptions, Error> {
    let NatsTls { ca, certificate, first } = tls;
    if let Some(ca) = ca {
        // The client takes a file without certificates for one that trusts nobody.
        let setting = "NATS_CA or --nats-ca";
        if !read_file(ca, setting)?.contains("-----BEGIN CERTIFICATE-----") {
            return Err(refuse(format!("the file {} has no certificate in PEM form ({setting})", ca.display())));
        }
        options = options.add_root_certificates(ca.clone());
    }
    if let Some(ClientCertificate { certificate, key }) = certificate {
        read_file(certificate, "NATS_CERT or --nats-cert")?;
        read_file(key, "NATS_KEY or --nats-key")?;
        options = options.add_client_certificate(certificate.clone(), key.clone());
    }
    if *first {
        options = options.tls_first();
    }
    Ok(options.require_tls(must || *first || ca.is_some() || certificate.is_some()))
}

/// Where to look when TLS with a server failed, to be written behind the error.
pub(super) fn hint(error: &str) -> &'static str {
    if error.contains("peer certificate") {
        " (is the server's certificate valid, and from an authority in NATS_CA or --nats-ca?)"
    } else if error.contains("fatal alert") {
        " (does the server take the certificate in NATS_CERT or --nats-cert?)"
    } else if error.contains("corrupt message") {
        " (the server answers without TLS, which the settings demand: tls:// in NATS_URL, NATS_CA, NATS_CERT, NATS_TLS_FIRST)"
    } else {
        ""
    }
}

#[derive(Debug)]
struct Servers {
    addresses: Vec<ServerAddr>,
    /// [`NatsAuth::Url`] when they name nobody.
    login: NatsAuth,
    tls: bool,
}

/// Reads the URLs. What they hold stays out of the errors.
fn servers(urls: &str) -> Result<Servers, Error> {
    let malformed = || refuse("NATS_URL is not of the form nats://host:4222 or tls://host:4222, separated by commas");
    let mut found = Servers { addresses: Vec::new(), login: NatsAuth::Url, tls: false };
    for url in urls.split(',').map(str::trim).filter(|url| !url.is_empty()) {
        let address: ServerAddr = url.parse().map_err(|_| malformed())?;
        if address.is_websocket() {
            return Err(refuse("NATS_URL asks for a websocket; only nats:// and tls:// are possible"));
        }
        found.tls |= address.tls_required();
        let decode = |text: &str| percent_decode_str(text).decode_utf8().map(String::from).map_err(|_| malformed());
        let secret = |text: &str| decode(text).map(Secret::Text);
        let login = match (address.username(), address.password()) {
            (Some(user), Some(password)) => NatsAuth::UserPassword { user: decode(user)?, password: secret(password)? },
            (Some(token), None) => NatsAuth::Token(secret(token)?),
            (None, _) => NatsAuth::Url,
        };
        if !found.addresses.is_empty() && login != found.login {
            return Err(refuse("the servers in NATS_URL name different users; all must name the same, or none"));
        }
        found.login = login;
        let mut url = address.into_inner();
        // They can only fail for a URL without a host, which is none of a server.
        url.set_username("").and_then(|()| url.set_password(None)).map_err(|()| malformed())?;
        found.addresses.push(ServerAddr::from_url(url).map_err(|_| malformed())?);
    }
    if found.addresses.is_empty() {
        return Err(refuse("no NATS server is named: set NATS_URL or --nats-url to nats://host:4222"));
    }
    Ok(found)
}

fn refuse(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Config, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_login_is_taken_out_of_the_url() {
        let servers = servers("nats://me:p%40ss@one:4222, nats://me:p%40ss@two").unwrap();
        assert_eq!(servers.login, NatsAuth::UserPassword { user: "me".into(), password: Secret::Text("p@ss".into()) });
        let urls: Vec<&str> = servers.addresses.iter().map(ServerAddr::as_url_str).collect();
        assert_eq!(urls, ["nats://one:4222", "nats://two"]);
        assert!(!servers.tls);
    }

    #[test]
    fn one_tls_url_makes_tls_a_must() {
        assert!(servers("nats://one,tls://two").unwrap().tls);
        assert_eq!(servers("token@one").unwrap().login, NatsAuth::Token(Secret::Text("token".into())));
    }

    #[test]
    fn what_cannot_be_meant_is_refused_without_showing_it() {
        for url in [
            "",
            " , ",
            "http://me:hunter2@one",
            "nats://me:hunter2@",
            "wss://me:hunter2@one",
            "nats://me:hunter2@one,nats://two",
        ] {
            let error = servers(url).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(!error.report().contains("hunter2") && error.report().contains("NATS_URL"), "{}", error.report());
        }
    }

    #[test]
    fn a_user_in_the_url_and_another_one_is_refused() {
        let config = NatsConfig {
            url: "nats://me:hunter2@one".into(),
            auth: NatsAuth::Token(Secret::Text("hunter3".into())),
            ..Default::default()
        };
        let error = options(&config).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(!error.report().contains("hunter"), "{}", error.report());
    }

    #[test]
    fn answers_come_to_an_inbox() {
        let inbox = |prefix: &str| {
            inbox_prefix(&NatsConfig { inbox_prefix: Some(prefix.into()), ..Default::default() })
                .map(|it| it.map(str::to_string))
        };
        assert_eq!(inbox("_INBOX_worker.receipts").unwrap().as_deref(), Some("_INBOX_worker.receipts"));
        for wrong in ["", "events", "_INBOX.", "_INBOX.>", "_INBOX_worker.*", "_INBOX a"] {
            assert!(inbox(wrong).unwrap_err().report().contains("NATS_INBOX_PREFIX"), "{wrong}");
        }
    }

    #[test]
    fn credentials_are_read_as_nsc_writes_them() {
        let text = "-----BEGIN NATS USER JWT-----\r\neyJ0.x.y\r\n------END NATS USER JWT------\r\n\r\n*** IMPORTANT ***\r\n\
                    NKEYs are sensitive.\r\n\r\n-----BEGIN USER NKEY SEED-----\r\nSUAM\r\n------END USER NKEY SEED------\r\n";
        assert_eq!(decorated(text), [Some("eyJ0.x.y"), Some("SUAM")]);
        assert_eq!(decorated("eyJ0.x.y"), [None, None]);
    }

    #[test]
    fn only_the_seed_of_a_user_is_taken_and_a_wrong_one_is_not_shown() {
        let seed = KeyPair::new_user().seed().unwrap();
        let nkey = |seed: String| answer(&NatsAuth::Nkey(Secret::Text(seed)), b"nonce");
        assert!(nkey(seed.clone()).is_ok());
        for wrong in [KeyPair::new_account().seed().unwrap(), seed[..20].to_string()] {
            let error = nkey(wrong.clone()).err().unwrap();
            assert!(error.report().contains("NATS_NKEY") && !error.report().contains(&wrong), "{}", error.report());
        }
    }
}
