//! The operator's tool. Everything it does is in `aftercommit::admin`.

use std::process::ExitCode;

fn main() -> ExitCode {
    aftercommit::cli::operator::main()
}
