//! The command lines of the binaries.

pub mod operator;

use crate::config::PostgresConfig;

/// Where PostgreSQL is.
#[derive(clap::Args)]
struct PostgresArgs {
    /// The database, as postgres://user:password@host:5432/database
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, default_value = "", hide_default_value = true)]
    database_url: String,
}

impl PostgresArgs {
    fn config(self) -> PostgresConfig {
        PostgresConfig { url: self.database_url }
    }
}
