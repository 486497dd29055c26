//! Names of hosts.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Name of a host, unique in its pool: 1 to 63 of `a-z 0-9 -`, no leading or trailing `-`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostName(String);

/// A host name that is not one.
#[derive(Debug, thiserror::Error)]
#[error(
    "host name `{0}` is not valid: use 1 to 63 of a-z, 0-9 and '-', not starting or ending with '-'"
)]
pub struct BadHostName(String);

/// Longest host name, in bytes (RFC 1035, one label).
pub const HOST_NAME_BYTES_MAX: usize = 63;

impl HostName {
    /// Check and wrap a name.
    ///
    /// # Errors
    /// [`BadHostName`] if it is empty, too long or has other characters.
    pub fn new(name: impl Into<String>) -> Result<Self, BadHostName> {
        let name = name.into();
        let ok = !name.is_empty()
            && name.len() <= HOST_NAME_BYTES_MAX
            && name
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !name.starts_with('-')
            && !name.ends_with('-');
        if ok {
            Ok(Self(name))
        } else {
            Err(BadHostName(name))
        }
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::str::FromStr for HostName {
    type Err = BadHostName;
    fn from_str(name: &str) -> Result<Self, BadHostName> {
        Self::new(name)
    }
}

impl TryFrom<String> for HostName {
    type Error = BadHostName;
    fn try_from(name: String) -> Result<Self, BadHostName> {
        Self::new(name)
    }
}

impl From<HostName> for String {
    fn from(name: HostName) -> Self {
        name.0
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::HostName;

    #[test]
    fn names_are_dns_labels() {
        for good in ["a", "host-1", "0"] {
            assert!(HostName::new(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", "ä", &"x".repeat(64)] {
            assert!(HostName::new(bad).is_err(), "{bad}");
        }
    }
}
