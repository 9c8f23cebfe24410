//! Leg C.
/// x
pub struct InboxLeg;
