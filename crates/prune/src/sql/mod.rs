//! The SQL that runs on users' tables. It is built from the catalogue's own names, quoted, and from the conditions of a spec.

pub(crate) mod catalogue;
pub(crate) mod indexes;
pub(crate) mod statement;
pub(crate) mod table;
