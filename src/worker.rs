//! The worker, to be run within a program: what `aftercommit-worker` runs, with handlers in Rust.

pub use aftercommit_worker::{
    BatchError, BatchHandler, Delivery, FailedModule, FailurePolicy, Handler, HandlerError, Module, Monitor, Queues,
    Registry, Start, StartError, Subscriber, SubscriberReport, Worker, WorkerReport, set_span_parent,
};

/// Reads the subscribers of a `worker.toml`, erasers among them; all steps of an eraser are one transaction.
///
/// # Errors
/// When the file cannot be read or is wrong; the message names the file, the line and the key.
#[cfg(feature = "cli")]
pub fn read_file(path: &std::path::Path) -> Result<Vec<Subscriber>, crate::Error> {
    crate::erasers::read_file(path, None)
}

/// The `main` of a service whose handlers are written in Rust: reads the command line and the environment as
/// `aftercommit-worker` does, without `--config`, and runs until a signal ends it. It takes a [`Registry`], or a list of
/// subscribers.
///
/// With `--provision` it creates or corrects the consumers instead, with `--reconcile <NAME>` it runs a reconciler now
/// (`--key <KEY>` for single items, `--full` for everything, `--report` to change nothing) and prints what came of it.
///
/// ```no_run
/// # use aftercommit::Event;
/// # use aftercommit::worker::{Delivery, Handler, HandlerError, Subscriber};
/// # #[derive(serde::Serialize, serde::Deserialize)]
/// # struct OrderPlaced { order: i64 }
/// # impl Event for OrderPlaced { const TYPE: &'static str = "order.placed"; }
/// # struct SendReceipt;
/// # impl Handler<OrderPlaced> for SendReceipt {
/// #     async fn handle(&self, _: &mut sqlx::PgTransaction<'_>, _: &Delivery<OrderPlaced>) -> Result<(), HandlerError> { Ok(()) }
/// # }
/// fn main() -> std::process::ExitCode {
///     aftercommit::worker::main(vec![Subscriber::new("receipts").on::<OrderPlaced>(SendReceipt)])
/// }
/// ```
#[cfg(feature = "cli")]
pub fn main(subscribers: impl Into<Registry>) -> std::process::ExitCode {
    crate::cli::worker::serve(subscribers.into(), std::env::args_os())
}

/// The same with another command line than the process's: for tests that run it in a child of theirs.
#[cfg(all(feature = "cli", feature = "testing"))]
#[doc(hidden)]
pub fn main_of(subscribers: impl Into<Registry>, arguments: Vec<std::ffi::OsString>) -> std::process::ExitCode {
    crate::cli::worker::serve(subscribers.into(), arguments)
}
