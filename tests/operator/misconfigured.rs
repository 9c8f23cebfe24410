//! Mistakes that people make with a deployment, each on a system that `aftercommit doctor` finds all right: doctor names it with
//! the remedy, says nothing else, and is content again when the remedy was applied as it is written.

mod broker;
mod database;
mod system;
