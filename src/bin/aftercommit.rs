//! The operator's tool. Everything it does is in `aftercommit::operator`.

use std::process::ExitCode;

fn main() -> ExitCode {
    aftercommit::cli::operator::main()
}
