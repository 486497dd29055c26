//! What can go wrong with a lab, in words that say what to do.

use crate::pool::HostName;
use std::path::PathBuf;

/// Why a lab could not be made, reached, changed or taken down.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// Namespaces and links need root.
    #[error("a lab needs root (network and pid namespaces); run it as root or with sudo")]
    NotRoot,
    /// iproute2 is not installed.
    #[error("the program `ip` was not found; install iproute2 (`apt-get install iproute2`)")]
    IpMissing,
    /// Another lab of this name is alive.
    #[error("lab `{name}` is up already in {}; take it down with `pollux lab down {name}` or choose another name", dir.display())]
    NameTaken {
        /// The name both want.
        name: String,
        /// Where the living one is.
        dir: PathBuf,
    },
    /// No lab is alive under this name.
    #[error("lab `{name}` is not up (looked in {}); start it with `pollux lab up {name}`", dir.display())]
    NotUp {
        /// The name asked for.
        name: String,
        /// Where it would be.
        dir: PathBuf,
    },
    /// The directory holds something that no lab made.
    #[error("{} exists but is not a lab's directory; move it away or choose another --dir", dir.display())]
    ForeignDir {
        /// The directory in the way.
        dir: PathBuf,
    },
    /// The spec asks for something a lab cannot be.
    #[error("lab spec: {0}")]
    Spec(String),
    /// The lab has no such host.
    #[error("lab `{lab}` has no host `{host}`; it has {have}")]
    NoSuchHost {
        /// The lab's name.
        lab: String,
        /// The host asked for.
        host: HostName,
        /// Its hosts, comma separated.
        have: String,
    },
    /// The host is in the wrong state for what was asked.
    #[error("host `{host}` is {is}; {todo}")]
    HostState {
        /// The host.
        host: HostName,
        /// What it is now.
        is: &'static str,
        /// What to do first.
        todo: String,
    },
    /// The lab's keeper refused or failed; it says at which step.
    #[error("lab `{lab}`: {step}: {message} (the keeper's log: {})", log.display())]
    Keeper {
        /// The lab's name.
        lab: String,
        /// What it was doing.
        step: String,
        /// What happened.
        message: String,
        /// Where to read more.
        log: PathBuf,
    },
    /// The keeper could not be talked to.
    #[error(
        "lab `{lab}`: cannot talk to its keeper: {source}; if it hangs, `pollux lab down {lab}`"
    )]
    Control {
        /// The lab's name.
        lab: String,
        /// The socket's error.
        source: std::io::Error,
    },
    /// The hosts' statefile cannot be made.
    #[error("the lab's statefile: {0}")]
    Statefile(#[source] crate::registry::statefile::MakeError),
    /// A file or system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was done, on what.
        what: String,
        /// The system's word on it.
        source: std::io::Error,
    },
}

impl LabError {
    /// An [`LabError::Io`] with its context.
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}
