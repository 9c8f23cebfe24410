//! What happens along the life of a row: [`hooks`] look at it before it is deleted.
#![warn(clippy::unwrap_used, clippy::expect_used)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

pub mod hooks;
