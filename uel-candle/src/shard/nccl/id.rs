//! What ranks find each other by.

use std::fmt;

use super::library::ID_BYTES;

/// What ranks find each other by: made on one of them, and given to the others in any way.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct NcclId([u8; ID_BYTES]);

impl NcclId {
    /// The id in bytes that another rank has sent.
    pub fn from_bytes(bytes: [u8; ID_BYTES]) -> Self {
        Self(bytes)
    }

    /// The bytes that other ranks need.
    pub fn as_bytes(&self) -> &[u8; ID_BYTES] {
        &self.0
    }
}

impl fmt::Debug for NcclId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // It holds the address and the secret by which a rank joins.
        f.write_str("NcclId(..)")
    }
}
