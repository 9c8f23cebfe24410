//! G8: no role can do more than its job, and each does its job with deploy/postgres/roles.sql and deploy/nats/accounts.conf
//! as they are shipped.

#[path = "../support/mod.rs"]
mod support;

mod canary;
mod database;
mod nats;
mod stage;
mod work;
