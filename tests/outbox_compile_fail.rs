//! Publishing needs an open transaction, and the compiler sees to it.

#[test]
fn only_an_open_transaction_is_taken() {
    trybuild::TestCases::new().compile_fail("tests/compile_fail/*.rs");
}
