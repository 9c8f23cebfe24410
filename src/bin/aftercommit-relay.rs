//! The relay.

fn main() -> std::process::ExitCode {
    aftercommit::cli::relay::main()
}
