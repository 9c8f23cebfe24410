//! `aftercommit console`.

use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use tokio::net::TcpListener;

use crate::cli::run_role;
use crate::cli::servers::Servers;
use aftercommit_console::{Access, Console as Pages, ConsoleConfig, Proxy, PublicUrl, Role, hash_password, serve};
use aftercommit_core::config::{PostgresConfig, Schema};
use aftercommit_core::error::{Error, ErrorKind};

#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Console {
    #[command(subcommand)]
    command: Option<Command>,
    /// Serve the pages here, as host:port
    #[arg(long, env = "AFTERCOMMIT_CONSOLE_HTTP", value_name = "ADDR", default_value = "127.0.0.1:9466")]
    http: SocketAddr,
    /// Where browsers find them, such as https://ops.example.com/outbox. Defaults to http:// and the address of --http
    #[arg(long, env = "AFTERCOMMIT_CONSOLE_URL", value_name = "URL")]
    public_url: Option<PublicUrl>,
    /// A file with the users who may log in; without it and without --trust-proxy a loopback address is open to whoever reaches it
    #[arg(long, env = "AFTERCOMMIT_CONSOLE_USERS", value_name = "FILE", conflicts_with = "trust_proxy")]
    users: Option<PathBuf>,
    /// The addresses of a proxy that logs people in and names them in headers; may be given several times, or separated by commas
    #[arg(long, env = "AFTERCOMMIT_CONSOLE_TRUST_PROXY", value_name = "IP", value_delimiter = ',', requires = "roles")]
    trust_proxy: Vec<IpAddr>,
    /// Which group of the proxy has which role (viewer, reader, operator, admin), such as ops=reader; several times, or separated by commas
    #[arg(
        long = "group-role",
        env = "AFTERCOMMIT_CONSOLE_GROUP_ROLES",
        value_name = "GROUP=ROLE",
        value_delimiter = ','
    )]
    #[arg(value_parser = group_role)]
    roles: Vec<(String, Role)>,
    /// The proxy's header with the user's name
    #[arg(long, env = "AFTERCOMMIT_CONSOLE_USER_HEADER", value_name = "NAME", default_value = "x-forwarded-user")]
    user_header: String,
    /// The proxy's header with the user's groups, separated by commas
    #[arg(long, env = "AFTERCOMMIT_CONSOLE_GROUPS_HEADER", value_name = "NAME", default_value = "x-forwarded-groups")]
    groups_header: String,
    /// A subscriber's database, when it is not the publisher's; may be given several times, in the environment with spaces in between
    #[arg(long, env = "SUBSCRIBER_DATABASE_URL", hide_env_values = true, value_name = "URL", value_delimiter = ' ')]
    subscriber_database: Vec<String>,
    /// The schema of aftercommit there. Defaults to --schema
    #[arg(long, env = "SUBSCRIBER_SCHEMA", value_name = "NAME")]
    subscriber_schema: Option<Schema>,
    /// The HTTP monitoring port of a NATS server, such as http://127.0.0.1:8222, for the page of the doctor
    #[arg(long, env = "NATS_MONITOR", value_name = "URL")]
    nats_monitor: Option<String>,
    #[command(flatten)]
    servers: Servers,
}

#[derive(Subcommand)]
enum Command {
    /// Make the hash of a password for the users file; the password is read from standard input
    #[command(after_help = "Example:\n  aftercommit console hash-password <password.txt")]
    HashPassword,
}

fn group_role(text: &str) -> Result<(String, Role), String> {
    let (group, name) = text.rsplit_once('=').ok_or("it is not of the form GROUP=ROLE")?;
    let role = Role::ALL.into_iter().find(|role| role.name() == name);
    let known = || Role::ALL.map(Role::name).join(", ");
    Ok((group.into(), role.ok_or_else(|| format!("unknown role {name}: use one of {}", known()))?))
}

impl Console {
    fn config(self) -> Result<ConsoleConfig, Error> {
        let (publisher, nats, naming) = self.servers.config()?;
        let public_url = match self.public_url {
            Some(url) => url,
            None => format!("http://{}", self.http)
                .parse()
                .map_err(|problem| Error::new(ErrorKind::Config, format!("--public-url is needed: {problem}")))?,
        };
        let access = match self.users {
            Some(file) => Access::Users(file),
            None if self.trust_proxy.is_empty() => Access::Loopback,
            None => Access::Proxy(Proxy {
                user_header: self.user_header,
                groups_header: self.groups_header,
                ..Proxy::new(self.trust_proxy, self.roles)
            }),
        };
        let schema = self.subscriber_schema.unwrap_or_else(|| publisher.schema.clone());
        let urls = self.subscriber_database.into_iter().filter(|url| !url.is_empty());
        Ok(ConsoleConfig {
            subscribers: urls.map(|url| PostgresConfig { url, schema: schema.clone(), ..publisher.clone() }).collect(),
            nats_monitor: self.nats_monitor,
            access,
            ..ConsoleConfig::new(publisher, nats, naming, public_url)
        })
    }
}

/// Serves the console until a signal ends it, or makes a hash. The exit status is 0 after an orderly stop, 2 when a setting is at fault.
pub(super) fn go_on(command: Console) -> ExitCode {
    if let Some(Command::HashPassword) = command.command {
        return match hash() {
            Ok(hash) => {
                println!("{hash}");
                ExitCode::SUCCESS
            }
            Err(error) => crate::cli::fail("aftercommit", &error),
        };
    }
    run_role("aftercommit", async |shutdown| {
        let http = command.http;
        let config = command.config()?;
        let url = config.public_url.clone();
        let pages = Pages::start(config, &shutdown)?;
        let listener = TcpListener::bind(http).await.map_err(|error| {
            Error::with_source(ErrorKind::Config, format!("cannot listen on {http} (--http)"), error)
        })?;
        tracing::info!(address = %url, "serving the console");
        serve(listener, pages.router(), shutdown).await;
        Ok(())
    })
}

fn hash() -> Result<String, Error> {
    let mut password = String::new();
    std::io::stdin()
        .read_to_string(&mut password)
        .map_err(|error| Error::with_source(ErrorKind::Config, "the password cannot be read", error))?;
    hash_password(password.trim_end_matches(['\r', '\n']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_has_a_role_by_name() {
        assert_eq!(group_role("team=ops=reader"), Ok(("team=ops".into(), Role::Reader)));
        assert!(group_role("ops").is_err() && group_role("ops=root").is_err_and(|problem| problem.contains("viewer")));
    }
}
