#![no_main]

#[allow(dead_code, reason = "each target uses a part")]
#[path = "../../tests/outbox/inputs/checks.rs"]
mod checks;

libfuzzer_sys::fuzz_target!(|input: &[u8]| checks::command_line(input));
