# Short names for the commands of CONTRIBUTING.md. Everything works without just, too.

# List the recipes
_list:
    @just --list --unsorted

# Find or install PostgreSQL, PgBouncer, libfaketime and nats-server for the tests
setup:
    scripts/setup

# Run formatting, lints, all tests and the documentation; arguments go to scripts/test, such as --postgres 14
test *arguments:
    scripts/test {{arguments}}

# Run the tests of one program whose names hold a text, such as: just one worker handover::
one program name:
    cargo test --all-features --test {{program}} -- {{name}}

# Check formatting and lints
lint:
    cargo fmt --check
    cargo clippy --workspace --all-targets --features cli,testing -- -D warnings

# Send pgbench's transactions through the whole chain, with processes killed on the way
demo *arguments:
    scripts/demo {{arguments}}

# Run every benchmark briefly, to see that it works; its figures mean nothing
bench:
    scripts/bench --quick

# Check alerts and dashboards with promtool
alerts *arguments:
    scripts/alerts {{arguments}}

# Play random faults against the whole system, such as: just faults --seed 7 --minutes 5
faults *arguments:
    scripts/faults {{arguments}}

# Check the models of the protocols
model:
    cargo test --manifest-path model/Cargo.toml

# Build the documentation of the code; warnings are errors
docs:
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --features cli,testing --no-deps

# Feed the parsers with random input, such as: just fuzz url --minutes 1 (needs a nightly compiler)
fuzz *arguments:
    scripts/fuzz {{arguments}}
