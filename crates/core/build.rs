//! A new migration changes no source file, so Cargo has to be told that the library holds the folder.

fn main() {
    println!("cargo::rerun-if-changed=migrations");
}
