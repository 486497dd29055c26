//! What the machine is told, and what is to be done.

use super::WAITING_MAX;
use crate::registry::format::{ENTRIES_MAX, FILE_BYTES_MAX};
use crate::registry::pair::copy::{Epoch, OwnCopy};
use crate::registry::pair::message::Message;
use crate::registry::{Listing, Versioned};

/// A connection that was authenticated, by the order in which this host took them up.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SessionId(pub u64);

/// A client's call.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct CallId(pub u64);

/// An order to switch the partner off.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct OrderId(pub u64);

/// What is read.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Select {
    /// One key.
    Key(String),
    /// All keys that begin so.
    Prefix(String),
}

impl Select {
    pub(super) fn takes(&self, key: &str) -> bool {
        match self {
            Self::Key(own) => own == key,
            Self::Prefix(prefix) => key.starts_with(prefix.as_str()),
        }
    }
}

/// What happened.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Input {
    /// A session with the partner began; whatever was there before has ended.
    Up(SessionId),
    /// It ended.
    Down(SessionId),
    /// A message came in it.
    Heard(SessionId, Message),
    /// A client reads.
    Read(CallId, Select),
    /// A client compares and sets.
    Change {
        /// Its call.
        call: CallId,
        /// The key, of 1 to `KEY_BYTES_MAX` bytes.
        key: String,
        /// The version it must be at.
        expected: Option<u64>,
        /// The value, at most `VALUE_BYTES_MAX` bytes.
        value: Vec<u8>,
    },
    /// A client waits no longer.
    GiveUp(CallId),
    /// The partner is silent, this host reaches the gateway, and a fence agent is there.
    Silent,
    /// What became of an order. `confirmed`: the agent, asked anew, said that the power is off.
    Fenced {
        /// Which.
        order: OrderId,
        /// Whether it is off for certain.
        confirmed: bool,
    },
    /// This life is to end.
    Leave,
}

/// Why there is no answer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum Why {
    /// Not live.
    #[error(
        "this host has not been in sync with its partner since it started; it answers when the partner is there, and not before"
    )]
    NotInSync,
    /// Live, and no session.
    #[error(
        "the partner does not answer, and a change needs both hosts until the partner's power is confirmed off"
    )]
    PartnerSilent,
    /// The session ended under it.
    #[error("the partner went away before it took part")]
    PartnerWent,
    /// A change of this key is in doubt.
    #[error("a change of it was under way when the partner went away, and may count or not")]
    InDoubt,
    /// In time.
    #[error("there was no answer in time")]
    Late,
    /// It does not fit.
    #[error("the registry is full ({ENTRIES_MAX} keys or {FILE_BYTES_MAX} bytes)")]
    Full,
    /// Too many at once.
    #[error("{WAITING_MAX} changes already wait")]
    Busy,
    /// It has said farewell.
    #[error("this host's daemon ends")]
    Left,
}

/// An answer to a client.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Answer {
    /// What was read.
    Found(Listing),
    /// Written.
    Won {
        /// The key's version.
        version: u64,
    },
    /// At another version.
    Lost(Option<Versioned<Vec<u8>>>),
    /// Nothing was written, and nothing will be.
    NotDone(Why),
    /// It may have been written, or may yet be.
    Unknown(Why),
}

/// Why a session cannot be.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum Fault {
    /// Both copies stand alone.
    #[error(
        "both hosts have changed the registry without the other; an older copy was put back, or a fence agent lied. Stop both daemons and remove the copy of the one whose changes are to be lost"
    )]
    BothAlone,
    /// The partner's stands alone while this host lived.
    #[error(
        "one host went on alone while the other was alive: a fence agent lied. Stop the daemon of the other and remove its copy"
    )]
    AloneBesideLive,
    /// They are not of one history.
    #[error(
        "the copies of the two hosts do not belong together (epochs {ours:?} and {theirs:?}): one was put back from an earlier day. Stop its daemon and remove it; see docs/registry.md"
    )]
    Epochs {
        /// Of this host.
        ours: Epoch,
        /// Of the partner.
        theirs: Epoch,
    },
    /// Of one history, and one lacks what it had acknowledged.
    #[error(
        "a host's copy lacks changes that it had acknowledged: its disk lost writes, or an older copy was put back. See docs/registry.md"
    )]
    Behind,
    /// One has none and the other may be stale.
    #[error(
        "one host's copy is gone, and it may have been the newer one; `pollux pool alone` on the host whose copy is right, if it is (docs/registry.md)"
    )]
    CopyGone,
    /// The partner says what it cannot say.
    #[error("the partner does not keep to the protocol: {0}")]
    Protocol(&'static str),
}

/// What is to be done, in this order.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Output {
    /// Make this the durable copy. If that fails the life is over.
    Store(OwnCopy),
    /// Send it in the session; lost if the session is.
    Send(SessionId, Message),
    /// Tell the client.
    Answer(CallId, Answer),
    /// Switch the partner off, and make certain of it.
    Fence(OrderId),
    /// End the session.
    Hang(SessionId, Fault),
    /// End every connection there is, taken up or not: they are of a life that has ended.
    HangAll,
}
