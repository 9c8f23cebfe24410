//! Whose a consumer or a stream is: the database in which the subscriber keeps its inbox, or the publisher its outbox.

use std::fmt;
use std::str::FromStr;

use aftercommit_outbox::schema::Schema;

/// A database, by what tells it from a copy of it: the cluster and the number that it has there. Its name is for people.
#[derive(Debug, Clone)]
pub struct Owner {
    /// The cluster's system identifier.
    pub cluster: String,
    /// The database's oid.
    pub database: u32,
    /// The database's name when this was written.
    pub name: String,
    /// The schema in it that has the inbox or outbox.
    pub schema: Schema,
}

/// Under what the metadata of a consumer or stream says whose it is.
pub(crate) const OWNER: &str = "aftercommit.owner";

/// A text that names no owner.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} names no owner")]
pub struct OwnerError(String);

impl PartialEq for Owner {
    /// A database that was renamed is the same.
    fn eq(&self, other: &Self) -> bool {
        (&self.cluster, self.database, &self.schema) == (&other.cluster, other.database, &other.schema)
    }
}

impl Eq for Owner {}

impl Owner {
    /// As it is written into the metadata of a consumer or stream: cluster, oid, the schema if it is not `aftercommit`, and name.
    pub(crate) fn stamp(&self) -> String {
        let Self { cluster, database, name, schema } = self;
        match *schema == Schema::default() {
            true => format!("{cluster}/{database}/{name}"),
            false => format!("{cluster}/{database}.{schema}/{name}"),
        }
    }
}

impl FromStr for Owner {
    type Err = OwnerError;

    fn from_str(stamp: &str) -> Result<Self, Self::Err> {
        let refuse = || OwnerError(stamp.chars().take(64).collect());
        let mut parts = stamp.splitn(3, '/');
        let mut part = || parts.next().filter(|part| !part.is_empty()).ok_or_else(refuse);
        let (cluster, database, name) = (part()?.to_string(), part()?, part()?.to_string());
        let (database, schema) = match database.split_once('.') {
            Some((database, schema)) => (database, schema.parse().map_err(|_| refuse())?),
            None => (database, Schema::default()),
        };
        Ok(Self { cluster, database: database.parse().map_err(|_| refuse())?, name, schema })
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cluster, database, name, schema } = self;
        let name = crate::text::plain(name);
        match *schema == Schema::default() {
            true => write!(f, "database {name} (oid {database} of cluster {cluster})"),
            false => write!(f, "database {name}, schema {schema} (oid {database} of cluster {cluster})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_tells_one_database_from_another_and_not_by_its_name() {
        let owner: Owner = "7412/16385/shop/eu".parse().unwrap();
        assert_eq!(
            (owner.stamp().as_str(), owner.to_string().as_str()),
            ("7412/16385/shop/eu", "database shop/eu (oid 16385 of cluster 7412)")
        );
        assert_eq!(owner, "7412/16385/renamed".parse().unwrap());
        assert_ne!(owner, "7412/16386/shop/eu".parse().unwrap());
        assert_ne!(owner, "7413/16385/shop/eu".parse().unwrap());
        for bad in ["", "7412", "7412/16385", "7412/x/shop", "/1/shop", "7412/16385/"] {
            assert!(bad.parse::<Owner>().is_err(), "{bad}");
        }
    }
}
