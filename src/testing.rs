//! For the tests of services that publish and handle events. Behind the feature `testing`, which belongs under
//! `[dev-dependencies]`.

pub use aftercommit_testing::*;

#[cfg(feature = "cli")]
#[doc(hidden)]
pub use crate::parsers;
