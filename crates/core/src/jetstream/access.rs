//! Who connects to NATS and how: checks the settings and turns them into those of the client.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use async_nats::{Auth, AuthError, ConnectOptions, ServerAddr};
use nkeys::{KeyPair, KeyPairType};
use percent_encoding::percent_decode_str;

use crate::config::{ClientCertificate, NatsAuth, NatsConfig, NatsTls, Secret, read_file, stays_here};
use crate::error::{Error, ErrorKind};
use aftercommit_outbox::subject::check_tokens;

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
    warn_of_clear_text(in_clear(config)?);
    Ok((secure(&config.tls, options)?.require_tls(must_encrypt(&config.tls, tls)), addresses))
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

/// The first tokens of JetStream's API, as the configured user writes them.
pub(super) fn api_prefix(config: &NatsConfig) -> Result<&str, Error> {
    const OWN: &str = "$JS.API";
    let Some(prefix) = config.api_prefix.as_deref() else { return Ok(OWN) };
    let legal = |c: char| c.is_ascii_graphic() && !matches!(c, '*' | '>');
    if prefix.chars().all(legal) && prefix.split('.').all(|token| !token.is_empty()) {
        return Ok(prefix);
    }
    Err(refuse(format!(
        "{prefix:?} cannot be the prefix of JetStream's API (NATS_API_PREFIX or --nats-api-prefix): take what the account \
         imports it as, such as JS.API"
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

/// Whether TLS is a must for all servers; `url` when the URL says so.
fn must_encrypt(tls: &NatsTls, url: bool) -> bool {
    let NatsTls { ca, certificate, first } = tls;
    url || *first || ca.is_some() || certificate.is_some()
}

fn secure(tls: &NatsTls, mut options: ConnectOptions) -> Result<ConnectOptions, Error> {
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
    Ok(options)
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

/// Reads the URLs. What they hold stays out of the errors, but for words that are not understood.
fn servers(urls: &str) -> Result<Servers, Error> {
    let mut found = Servers { addresses: Vec::new(), login: NatsAuth::Url, tls: false };
    // A password that holds a ',' is cut in two.
    let is_cut = urls.split(',').any(|piece| piece.contains('@') && !piece.contains("://"));
    for url in urls.split(',').map(str::trim).filter(|url| !url.is_empty()) {
        let address = address(url, is_cut)?;
        found.tls |= address.tls_required();
        let decode = |text: &str| percent_decode_str(text).decode_utf8().map(String::from).map_err(|_| malformed());
        let secret = |text: &str| decode(text).map(Secret::Text);
        let login = match (address.username(), address.password()) {
            (Some(user), Some(password)) => NatsAuth::UserPassword { user: decode(user)?, password: secret(password)? },
            (Some(token), None) => NatsAuth::Token(secret(token)?),
            (None, Some(_)) => return Err(refuse("NATS_URL has a password without a user")),
            (None, None) => NatsAuth::Url,
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

/// One URL, or a host with or without a port. It has nothing behind the host: the client would pass over it. `is_cut` when
/// what looks like a parameter may be a piece of a password.
fn address(url: &str, is_cut: bool) -> Result<ServerAddr, Error> {
    let is_plain =
        |text: &&str| text.len() <= 40 && text.chars().all(|c| c.is_ascii_alphanumeric() || "+-._".contains(c));
    if let Some((scheme, _)) = url.split_once("://") {
        match scheme.to_ascii_lowercase().as_str() {
            "nats" | "tls" => {}
            "ws" | "wss" => return Err(refuse("NATS_URL asks for a websocket; only nats:// and tls:// are possible")),
            _ if is_plain(&scheme) => {
                return Err(refuse(format!("NATS_URL begins with {scheme}://; only nats:// and tls:// are possible")));
            }
            _ => return Err(malformed()),
        }
    }
    let parsed = url.parse::<ServerAddr>().map_err(|_| malformed())?.into_inner();
    if let Some(query) = parsed.query() {
        let is_cut = is_cut || url.split_once('?').is_some_and(|(_, behind)| behind.contains('@'));
        let name = query.split(['=', '&']).next().filter(|name| is_plain(name) && !is_cut);
        let named = name.map(|name| format!(" {name}")).unwrap_or_default();
        return Err(refuse(format!(
            "NATS_URL has the parameter{named}, but there are none: TLS and logins have settings of their own (NATS_CA, NATS_CREDS, …)"
        )));
    }
    if !matches!(parsed.path(), "" | "/") || parsed.fragment().is_some() {
        return Err(refuse("NATS_URL has something behind the host: in a password write '/' as %2F and '#' as %23"));
    }
    ServerAddr::from_url(parsed).map_err(|_| malformed())
}

fn malformed() -> Error {
    refuse("NATS_URL is not of the form nats://host:4222 or tls://host:4222, separated by commas")
}

/// Says once in a process which servers somebody on the way could read along with, or stand in for.
fn warn_of_clear_text(servers: Vec<String>) {
    static TOLD: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    for server in servers {
        if TOLD.lock().unwrap_or_else(PoisonError::into_inner).insert(server.clone()) {
            tracing::warn!(
                server,
                "the connection to NATS may be neither encrypted nor verified: write tls:// in NATS_URL, with NATS_CA for \
                 an authority of your own"
            );
        }
    }
}

/// The servers that are not on this machine and to which TLS is not a must.
pub(super) fn in_clear(config: &NatsConfig) -> Result<Vec<String>, Error> {
    let Servers { addresses, tls, .. } = servers(&config.url)?;
    let away = addresses.iter().filter(|address| !must_encrypt(&config.tls, tls) && !stays_here(address.host()));
    Ok(away.map(|address| format!("{}:{}", address.host(), address.port())).collect())
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
    fn words_that_are_not_understood_are_named() {
        for (url, named) in [
            ("natss://me:hunter2@one", "natss"),
            ("http://me:hunter2@one", "http"),
            ("nats://me:hunter2@one?tls=hunter2", "tls"),
            ("nats://me:hunter2@one:4222/?tls_first=hunter2&x=1", "tls_first"),
            ("one?creds=hunter2", "creds"),
            ("nats://me:hunter2@one/hunter2", "behind the host"),
            ("nats://me:hunter2@one#hunter2", "behind the host"),
            ("nats://me:1?hunter2=2@one", "parameter"),
            ("nats://me:1?hunter2,2@one", "parameter"),
            ("nats://:hunter2@one", "without a user"),
        ] {
            let report = servers(url).unwrap_err().report();
            assert!(report.contains(named) && !report.contains("hunter2"), "{url}: {report}");
        }
        assert!(servers("NATS://one:4222/, TLS://[::1]:4222").unwrap().tls);
    }

    #[test]
    fn servers_elsewhere_are_in_clear_without_tls() {
        let elsewhere =
            |urls: &str, tls: NatsTls| in_clear(&NatsConfig { url: urls.into(), tls, ..Default::default() }).unwrap();
        let urls =
            "nats://me:hunter2@one,nats://me:hunter2@[::1],nats://me:hunter2@127.0.0.1,nats://me:hunter2@[fe80::1]:1";
        assert_eq!(elsewhere(urls, NatsTls::default()), ["one:4222", "fe80::1:1"]);
        for tls in
            [NatsTls { ca: Some("ca".into()), ..Default::default() }, NatsTls { first: true, ..Default::default() }]
        {
            assert_eq!(elsewhere(urls, tls), Vec::<String>::new());
        }
        assert_eq!(elsewhere("nats://one,tls://two", NatsTls::default()), Vec::<String>::new());
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
    fn the_api_is_where_the_account_imports_it() {
        let prefix = |prefix: Option<&str>| {
            api_prefix(&NatsConfig { api_prefix: prefix.map(String::from), ..Default::default() }).map(String::from)
        };
        assert_eq!(prefix(None).unwrap(), "$JS.API");
        for good in ["JS.API", "$JS.hub.API"] {
            assert_eq!(prefix(Some(good)).unwrap(), good);
        }
        for wrong in ["", ".", "JS.API.", ".API", "JS..API", "JS.*", ">", "JS API", "JS\r\nAPI"] {
            assert!(prefix(Some(wrong)).unwrap_err().report().contains("NATS_API_PREFIX"), "{wrong}");
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
