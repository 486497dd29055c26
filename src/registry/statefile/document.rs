//! The bytes of a value: the whole pool document as of one instance. This module owns them:
//!
//! ```text
//! 0   magic    "pollxval"
//! 8   u32 LE   version: 1 = first
//! 12  u32 LE   number of proposals remembered, at most PROPOSALS_MAX
//! 16  u64 LE   instance that this document was proposed for
//! 24  per proposal, oldest first: u64 instance, u64 slot, u64 incarnation, u64 number
//! ..  the registry file (`registry/format.rs`): keys, versions, values
//! ```
//!
//! The last proposal is the document's own. The ones before it are the chosen instances below:
//! a host whose proposal was finished by another, while the pool went on, finds there whether
//! it won. The block that names a value has the XXH3-128 of all these bytes.

use super::super::format::{self, BadRegistryFile, Entries};
use super::paxos::{HostSlot, Incarnation, Instance, NUMBER_MAX, ValueId};
use std::collections::VecDeque;

/// Chosen proposals that a document remembers. A host that was so many changes behind when it
/// looked again would be told "unknown".
pub const PROPOSALS_MAX: usize = 64;

const MAGIC: [u8; 8] = *b"pollxval";
const VERSION: u32 = 1;
const HEAD_BYTES: usize = 24;
const PROPOSAL_BYTES: usize = 32;

/// Who proposed what was chosen in an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Proposal {
    /// The instance.
    pub instance: Instance,
    /// The host.
    pub host: HostSlot,
    /// Its run.
    pub incarnation: Incarnation,
    /// Counts the proposals of that run.
    pub number: u64,
}

/// The pool document.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Document {
    /// All keys.
    pub(in super::super) entries: Entries,
    /// The newest proposals, oldest first; the last one is this document.
    pub proposals: VecDeque<Proposal>,
}

/// What is wrong with a value.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadDocument {
    /// Not the bytes that the block names.
    #[error("the value is not the one that its block names")]
    Hash,
    /// Not a value, or of another version.
    #[error("it is no pool document of a version this pollux knows")]
    Head,
    /// Proposals out of order.
    #[error("its list of proposals makes no sense")]
    Proposals,
    /// The keys.
    #[error(transparent)]
    Entries(#[from] BadRegistryFile),
}

/// Which value these bytes are.
#[must_use]
pub fn id_of(bytes: &[u8]) -> ValueId {
    ValueId {
        hash: xxhash_rust::xxh3::xxh3_128(bytes),
        len: u32::try_from(bytes.len()).unwrap_or(u32::MAX),
    }
}

impl Document {
    /// This document with one key written, as `proposal`.
    #[must_use]
    pub(super) fn with(
        &self,
        key: &str,
        entry: super::super::Versioned<Vec<u8>>,
        proposal: Proposal,
    ) -> Self {
        let mut next = self.clone();
        next.entries.insert(key.to_owned(), entry);
        next.proposals.push_back(proposal);
        while next.proposals.len() > PROPOSALS_MAX {
            next.proposals.pop_front();
        }
        next
    }

    /// Whether `proposal` was chosen, if it is remembered.
    #[must_use]
    pub(super) fn was_chosen(&self, proposal: &Proposal) -> Option<bool> {
        self.proposals
            .iter()
            .find(|p| p.instance == proposal.instance)
            .map(|p| p == proposal)
    }

    /// Its bytes.
    ///
    /// # Errors
    /// What is too large.
    pub fn encode(&self) -> Result<Vec<u8>, BadRegistryFile> {
        let file = format::encode(&self.entries)?;
        let mut bytes =
            Vec::with_capacity(HEAD_BYTES + PROPOSALS_MAX * PROPOSAL_BYTES + file.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        let count = u32::try_from(self.proposals.len()).unwrap_or(u32::MAX);
        bytes.extend_from_slice(&count.to_le_bytes());
        let instance = self.proposals.back().map_or(0, |p| p.instance.0);
        bytes.extend_from_slice(&instance.to_le_bytes());
        for p in &self.proposals {
            let numbers = [p.instance.0, p.host.0.into(), p.incarnation.0, p.number];
            for number in numbers {
                bytes.extend_from_slice(&number.to_le_bytes());
            }
        }
        bytes.extend_from_slice(&file);
        Ok(bytes)
    }

    /// The document that the bytes of value `id` hold.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn decode(bytes: &[u8], id: ValueId) -> Result<Self, BadDocument> {
        if id_of(bytes) != id {
            return Err(BadDocument::Hash);
        }
        let (head, rest) = bytes
            .split_at_checked(HEAD_BYTES)
            .ok_or(BadDocument::Head)?;
        let number = |bytes: &[u8], at: usize| {
            let mut number = [0; 8];
            number.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(number)
        };
        let version_and_count = number(head, 8);
        if head[..8] != MAGIC || version_and_count & u64::from(u32::MAX) != u64::from(VERSION) {
            return Err(BadDocument::Head);
        }
        let count = usize::try_from(version_and_count >> 32)
            .ok()
            .filter(|count| (1..=PROPOSALS_MAX).contains(count))
            .ok_or(BadDocument::Proposals)?;
        let (proposals, file) = rest
            .split_at_checked(count * PROPOSAL_BYTES)
            .ok_or(BadDocument::Proposals)?;
        let proposals: VecDeque<Proposal> = proposals
            .chunks_exact(PROPOSAL_BYTES)
            .map(|p| {
                Some(Proposal {
                    instance: Some(number(p, 0))
                        .filter(|n| *n <= NUMBER_MAX)
                        .map(Instance)?,
                    host: HostSlot(u16::try_from(number(p, 8)).ok()?),
                    incarnation: Incarnation(number(p, 16)),
                    number: number(p, 24),
                })
            })
            .collect::<Option<_>>()
            .ok_or(BadDocument::Proposals)?;
        let follow = proposals
            .iter()
            .zip(proposals.iter().skip(1))
            .all(|(a, b)| a.instance.0 + 1 == b.instance.0);
        if !follow || proposals.back().map(|p| p.instance.0) != Some(number(head, 16)) {
            return Err(BadDocument::Proposals);
        }
        Ok(Self {
            entries: format::decode(file)?,
            proposals,
        })
    }
}
