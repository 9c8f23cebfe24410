//! `aftercommit health`.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::{Request, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use aftercommit_core::error::{Error, ErrorKind};
use aftercommit_core::text::plain;

/// What is shown of an answer, at most.
const SHOWN: usize = 64 << 10;

/// For health checks of containers, which have no other program to ask with.
#[derive(Args)]
pub(super) struct Health {
    /// What to ask: /healthz, /readyz or /metrics of a relay, a worker or another program with --http; defaults to /readyz on
    /// this machine, at the port of AFTERCOMMIT_HTTP, or 9464
    #[arg(long, env = "AFTERCOMMIT_HEALTH_URL", value_name = "URL")]
    url: Option<Uri>,
    /// Where the program in question serves, in a container that has the same environment
    #[arg(long, env = "AFTERCOMMIT_HTTP", hide = true)]
    http: Option<String>,
    /// How long the answer may take
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = humantime::parse_duration)]
    timeout: Duration,
}

/// The answer, and the exit status: 0 when it is well, 1 when it is not or nobody answers.
pub(super) async fn run(command: Health) -> Result<(String, ExitCode), Error> {
    let Health { url, http, timeout } = command;
    let url = match url {
        Some(url) => url,
        None => readiness(http.as_deref())?,
    };
    let refuse = |problem: &str| Error::new(ErrorKind::Config, format!("--url: {problem}"));
    if url.scheme_str() != Some("http") {
        return Err(refuse("it must begin with http://"));
    }
    let Some(authority) = url.authority().filter(|authority| !authority.as_str().contains('@')) else {
        return Err(refuse("it must name a host, and no user"));
    };
    let address = format!("{}:{}", authority.host(), authority.port_u16().unwrap_or(80));
    let path = url.path_and_query().map_or("/", |path| path.as_str());
    let (status, text) = match tokio::time::timeout(timeout, ask(&address, authority.as_str(), path)).await {
        Ok(answer) => answer.map_err(|error| {
            Error::with_source(ErrorKind::NotReady, format!("{url} does not answer as it should"), error)
        })?,
        Err(_) => {
            let problem = format!("{url} has not answered within {timeout:?}");
            return Err(Error::new(ErrorKind::NotReady, problem));
        }
    };
    let lines: String = text.lines().map(|line| plain(line) + "\n").collect();
    let exit = if status.is_success() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    Ok((lines, exit))
}

/// Where a program that serves at `http` says whether it is ready, asked from its own machine.
fn readiness(http: Option<&str>) -> Result<Uri, Error> {
    let address = match http.map(|http| http.rsplit_once(':').unwrap_or((http, ""))) {
        None => "127.0.0.1:9464".into(),
        // All addresses of the machine.
        Some(("0.0.0.0", port)) => format!("127.0.0.1:{port}"),
        Some(("[::]", port)) => format!("[::1]:{port}"),
        Some((host, port)) => format!("{host}:{port}"),
    };
    let url = format!("http://{address}/readyz");
    url.parse().map_err(|error| {
        Error::with_source(ErrorKind::Config, format!("{url} cannot be asked (AFTERCOMMIT_HTTP); give --url"), error)
    })
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

async fn ask(address: &str, host: &str, path: &str) -> Result<(hyper::StatusCode, String), Failure> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::get(path).header(hyper::header::HOST, host).body(Empty::<Bytes>::new())?;
    let answer = async {
        let answer = sender.send_request(request).await?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), SHOWN).collect().await?.to_bytes();
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    };
    tokio::select! {
        answer = answer => answer,
        Err(error) = connection => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_asked_where_its_environment_says_that_it_serves() {
        let asked = |http| readiness(http).map(|url| url.to_string());
        assert_eq!(asked(None).unwrap(), "http://127.0.0.1:9464/readyz");
        assert_eq!(asked(Some("0.0.0.0:9465")).unwrap(), "http://127.0.0.1:9465/readyz");
        assert_eq!(asked(Some("[::]:9465")).unwrap(), "http://[::1]:9465/readyz");
        assert_eq!(asked(Some("10.0.0.7:9465")).unwrap(), "http://10.0.0.7:9465/readyz");
        assert!(asked(Some("not an address:x")).is_err());
    }
}
