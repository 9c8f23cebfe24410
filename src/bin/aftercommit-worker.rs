//! Runs the subscribers of a `worker.toml`.

fn main() -> std::process::ExitCode {
    aftercommit::cli::worker::main()
}
