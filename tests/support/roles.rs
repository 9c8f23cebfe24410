//! The roles of deploy/postgres/roles.sql, under names of the test's own.

use std::process::Command;

use aftercommit::testing::servers::Postgres;
use aftercommit::testing::unique_name;

use super::{Database, succeeded};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/postgres/roles.sql");

/// What the names of a database's roles begin with.
pub struct Roles(pub String);

impl Roles {
    /// Makes the roles. Names are unique, because roles are the server's and not the database's.
    pub fn of(database: &Database) -> Self {
        let roles = Self(unique_name("ac") + "_");
        roles.grant(database);
        roles
    }

    /// Runs the script, as a superuser who sees what others have made in a schema before PostgreSQL's own.
    pub fn grant(&self, database: &Database) {
        let mut psql = Command::new(Postgres::program("psql").unwrap());
        psql.env("PGOPTIONS", "-c search_path=planted,public,pg_catalog");
        psql.args(["--no-psqlrc", "--file", SCRIPT, "--dbname", &database.config.url]);
        succeeded(psql.args(["--set", &format!("prefix={}", self.0)]).output().unwrap());
    }

    /// Makes a login with some of the roles and returns its name.
    pub async fn login(&self, database: &Database, name: &str, roles: &[&str]) -> String {
        let login = format!("{}{name}_login", self.0);
        let roles: Vec<String> = roles.iter().map(|role| format!("{}{role}", self.0)).collect();
        database.execute(&format!("create role {login} login in role {}", roles.join(", "))).await;
        login
    }
}
