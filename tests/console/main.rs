//! The console without a browser: who may see what, what is refused, and what never shows.

mod access;
mod browser;
mod pages;
#[path = "../support/mod.rs"]
mod support;
