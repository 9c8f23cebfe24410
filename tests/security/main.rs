//! G8: no role can do more than its job, and each does its job with deploy/postgres/roles.sql and deploy/nats/accounts.conf
//! as they are shipped.

#[path = "../support/mod.rs"]
mod support;

mod canary;
mod database;
mod erasure;
mod forget;
mod letters;
mod lookalikes;
mod nats;
mod nats_tooling;
mod replies;
mod row_security;
mod stage;
mod types;
mod work;
