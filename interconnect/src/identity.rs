//! skeleton
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
/// SHA-256 of a host's certificate in DER; text form `sha256:` and 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Fingerprint(pub [u8; 32]);
/// Text that is not a fingerprint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a fingerprint: it looks like sha256: followed by 64 hex digits, as `pollux link create` prints it"
)]
pub struct BadFingerprint(pub String);
impl std::str::FromStr for Fingerprint {
    type Err = BadFingerprint;
    fn from_str(_text: &str) -> Result<Self, BadFingerprint> {
        unimplemented!()
    }
}
impl TryFrom<String> for Fingerprint {
    type Error = BadFingerprint;
    fn try_from(text: String) -> Result<Self, BadFingerprint> {
        text.parse()
    }
}
impl From<Fingerprint> for String {
    fn from(fingerprint: Fingerprint) -> Self {
        fingerprint.to_string()
    }
}
impl std::fmt::Display for Fingerprint {
    fn fmt(&self, _f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        unimplemented!()
    }
}
impl std::fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}
/// Why a host has no identity.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// A file or folder could not be used.
    #[error("cannot {what} {path}: {source}")]
    File {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}
/// A host's certificate and key.
pub struct Identity {}
impl Identity {
    /// Load the identity in `dir`, or make one and keep it there.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn load_or_create(_dir: &Path) -> Result<Self, IdentityError> {
        unimplemented!()
    }
    /// A new identity that is kept nowhere (tests, the lab).
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn generate() -> Result<Self, IdentityError> {
        unimplemented!()
    }
    /// What the partner must pin.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        unimplemented!()
    }
}
