//! Each driver, as one connection.

mod diesel;
mod diesel_async;
mod sea_orm;
mod sqlx_versions;
mod tokio_postgres;

pub use diesel::Diesel;
pub use diesel_async::DieselAsync;
pub use sea_orm::SeaOrm;
pub use sqlx_versions::{Sqlx08, Sqlx09};
pub use tokio_postgres::TokioPostgres;
