//! Publishing with sqlx 0.9.
//!
//! After [`set_pooled`](crate::set_pooled) its statements have no name, which works behind PgBouncer in transaction
//! mode.

crate::sqlx_versions::adapter!(sqlx);
