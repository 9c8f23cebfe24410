//! What happens along the life of a row: [`capture`] publishes its changes, whoever makes them, [`hooks`] look at
//! it before it is deleted, [`fanout`] asks other services to do their part, and [`erase`] has them erase a tenant or a person.
#![warn(clippy::unwrap_used, clippy::expect_used)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

pub mod capture;
pub mod erase;
pub mod fanout;
pub mod hooks;
