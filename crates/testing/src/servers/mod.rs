//! PostgreSQL, nats-server and PgBouncer for the length of a test.
//!
//! Each server is a process of its own on a free port of 127.0.0.1, with its data in a temporary directory. They
//! disappear when the value is dropped and when the test process ends, however it ends, and with them what a test has
//! mounted in that directory.
//!
//! Most tests use the servers that the whole test process shares, with a database and a stream of their own; a test
//! that kills or pauses a server starts one for itself:
//!
//! ```no_run
//! use aftercommit::testing::servers::{Nats, NatsOptions, Postgres};
//! use aftercommit::testing::unique_name;
//!
//! # async fn example() -> Result<(), aftercommit::Error> {
//! let database_url = Postgres::shared().await?.create_database().await?;
//! let (nats_url, stream) = (Nats::shared().await?.url(), unique_name("EVENTS"));
//!
//! let mut nats = Nats::start(NatsOptions::default()).await?;
//! nats.kill().await?;
//! nats.restart().await?;
//! # Ok(())
//! # }
//! ```
//!
//! | Variable | Meaning |
//! |---|---|
//! | `AFTERCOMMIT_PG_BIN` | The directory of `initdb` and `postgres`. Defaults to the `PATH`, then to the places where packages put them, newest version first. |
//! | `AFTERCOMMIT_NATS_SERVER` | The nats-server program. Defaults to the newest below `.cache/nats-server/` in this directory or one above it, then to the `PATH`. |
//! | `AFTERCOMMIT_NATS_VERSION` | Which version of nats-server to take when there are several, such as `2.12.8`. |

mod binaries;
mod cluster;
mod instance;
mod nats;
mod pgbouncer;
mod postgres;
mod processes;

pub use cluster::NatsCluster;
pub use nats::{Nats, NatsOptions};
pub use pgbouncer::PgBouncer;
pub use postgres::{Postgres, PostgresOptions};
