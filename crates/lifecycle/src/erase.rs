//! Erasing what is known of a tenant or a person.

pub mod forget;
