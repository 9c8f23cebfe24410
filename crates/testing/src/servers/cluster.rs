//! Several nats-servers that keep streams together.

use futures_util::future::try_join_all;

use super::instance::free_port;
use super::nats::{Nats, NatsOptions};
use aftercommit_core::error::Error;

/// A cluster of nats-servers with JetStream, each with a store of its own. See [the module](super).
///
/// Clients are told of no server but the one that they connect to, so that a proxy in between stays in between: give
/// them [`NatsCluster::url`], or the addresses of the proxies.
#[derive(Debug)]
pub struct NatsCluster {
    /// Its servers, to be killed, paused and restarted one by one.
    pub members: Vec<Nats>,
}

impl NatsCluster {
    /// Starts so many servers, all with these options. Three are the fewest that go on when one is lost.
    ///
    /// # Errors
    /// Those of [`Nats::start`].
    pub async fn start(size: usize, options: NatsOptions) -> Result<Self, Error> {
        let ports: Vec<u16> = (0..size).map(|_| free_port()).collect();
        let routes: Vec<String> = ports.iter().map(|port| format!("\"nats://127.0.0.1:{port}\"")).collect();
        let routes = routes.join(", ");
        let block = |port: &u16| {
            format!(
                "cluster {{\n  name: test\n  listen: \"127.0.0.1:{port}\"\n  routes: [{routes}]\n  \
                 no_advertise: true\n}}"
            )
        };
        // None of them is ready before most of them run.
        let members = ports.iter().map(|port| Nats::start_in(options.clone(), Some(block(port))));
        Ok(Self { members: try_join_all(members).await? })
    }

    /// Where clients connect: all servers, separated by commas.
    pub fn url(&self) -> String {
        self.members.iter().map(Nats::url).collect::<Vec<_>>().join(",")
    }
}
