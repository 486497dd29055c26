//! The registry on one to three files or block devices that every host of the pool reaches:
//! Disk Paxos, of whose disks a majority suffices. No server, no lock, no lease: a host that
//! dies or freezes at any moment holds up nobody.
//!
//! ```text
//!  Statefile (Registry)  -->  shell  <-->  paxos (pure)        who is right
//!                               |  one thread per disk
//!                             worker --> disk --> device       what is on the disks
//!                                          layout, page, document: the bytes
//! ```
//!
//! The pool's document (all keys with their versions) is a sequence of Paxos instances; a
//! won compare-and-set is the next one. A read finds the newest chosen instance on a
//! majority of the disks, finishing one that may be chosen; nothing is answered from memory.
//!
//! Must never: call a write not done that another host could still finish; use a ballot
//! twice; count a disk that is not the one meant or that lost what it had acknowledged;
//! write anything outside this host's own blocks and area.
//!
//! `docs/statefile.md` has the format byte by byte, the algorithm by the sections of the
//! paper, limits, and a table of failures.

mod beats;
mod device;
mod disk;
mod document;
mod fault;
pub(crate) mod fuzz;
mod inspect;
mod layout;
mod make;
mod page;
pub mod paxos;
mod record;
mod shell;
mod worker;

#[cfg(test)]
mod layout_tests;
#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;

pub use beats::{BeatFault, Beats, BeatsOptions, HeardBeat};
pub use document::{BadDocument, Document, Proposal};
pub use fault::DiskFault;
pub use inspect::{DiskReport, HostReport, KeyReport, Problem, Report, Severity, inspect};
pub use layout::{
    BEAT_BYTES_MAX, BadBeat, Beat, Block, Geometry, Header, NAME_BYTES_MAX, SLOT_BYTES_DEFAULT,
    SLOT_BYTES_MAX, SLOTS_DEFAULT, VALUE_SLOTS, ValueRef,
};
pub use make::{MakeError, format, replace};
pub use page::{BadPage, PAGE_BYTES};

use super::format::{KEY_BYTES_MAX, VALUE_BYTES_MAX};
use super::{CasOutcome, Listing, Registry, RegistryError, Versioned};
use paxos::{HostSlot, Instance};
use shell::{Current, Shell, Stop};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How long a call takes at most by default: many times what a change takes on storage that
/// is well, and short enough that a takeover can try twice.
pub const CALL_WAIT: Duration = Duration::from_millis(1000);

/// What a [`Statefile`] needs.
#[derive(Clone, Debug)]
pub struct StatefileOptions {
    /// The disks in the order of their indexes, the same on every host: one or three.
    pub disks: Vec<PathBuf>,
    /// The pool; `None` takes the one that the disks say.
    pub pool: Option<Uuid>,
    /// This host's slot. No other process may use it.
    pub slot: HostSlot,
    /// This host's name, at most [`NAME_BYTES_MAX`] bytes.
    pub name: String,
    /// Take the slot though its blocks name another host, which must be gone for good.
    pub take_slot: bool,
    /// How long a call takes at most.
    pub call_wait: Duration,
}

/// Why a statefile cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Number of paths.
    #[error("a statefile has 1 or 3 disks, {0} were given (of 2, both would be needed)")]
    Disks(usize),
    /// No thread.
    #[error("cannot start a thread for a disk: {0}")]
    Thread(std::io::Error),
    /// Too few of them answer as disks of this pool.
    #[error("fewer than a majority of the disks can be used: {0}")]
    NoMajority(String),
    /// The set has another number of disks.
    #[error(
        "the set has {said} disks, {given} were given; give all, in the order of their indexes"
    )]
    SetOf {
        /// What the disks say.
        said: u16,
        /// How many paths.
        given: usize,
    },
    /// No such slot.
    #[error("host slot {slot} is not there: it was formatted with {slots} (0 is the first)")]
    Slot {
        /// Asked for.
        slot: u16,
        /// How many there are.
        slots: u16,
    },
    /// The slot is another host's.
    #[error(
        "host slot {slot} is that of host {other}: choose a free one (`pollux statefile show`), or take it if that host is gone for good"
    )]
    SlotOf {
        /// The slot.
        slot: u16,
        /// Who has it.
        other: String,
    },
    /// A value that this host had proposed is nowhere whole.
    #[error(
        "what this host had proposed cannot be read, and may be what the pool decided: {0}; run `pollux statefile check`"
    )]
    OwnValue(String),
    /// A name that does not fit.
    #[error("a host's name has 1 to {NAME_BYTES_MAX} bytes")]
    Name,
}

/// The registry on shared disks, as one host uses it.
pub struct Statefile {
    options: StatefileOptions,
    shell: Shell,
    /// Proposals of this run.
    proposals: u64,
}

impl Statefile {
    /// Take up this host's slot: reads its own record from a majority of the disks, so that
    /// no ballot is used twice. Takes up to `call_wait` if a disk does not answer.
    ///
    /// # Errors
    /// [`OpenError`] says which disks, and what to do.
    pub fn open(options: StatefileOptions) -> Result<Self, OpenError> {
        if options.name.is_empty() || options.name.len() > NAME_BYTES_MAX {
            return Err(OpenError::Name);
        }
        let shell = Shell::open(&options)?;
        Ok(Self {
            options,
            shell,
            proposals: 0,
        })
    }

    /// The pool that the disks belong to.
    #[must_use]
    pub fn pool(&self) -> Uuid {
        self.shell.expect.pool
    }

    /// How the disks are divided.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.shell.expect.geometry
    }

    /// What was wrong with each disk when it was last used; `None` if nothing was.
    #[must_use]
    pub fn faults(&self) -> &[Option<DiskFault>] {
        &self.shell.faults
    }

    fn place(&self) -> String {
        let paths: Vec<String> = self
            .options
            .disks
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        paths.join(",")
    }

    fn why(&self, stop: Stop) -> String {
        match stop {
            Stop::Deadline => format!(
                "no answer within {:?}: {}",
                self.options.call_wait,
                self.shell.describe(&self.options)
            ),
            Stop::NoMajority => format!(
                "fewer than a majority of the disks can be used: {}",
                self.shell.describe(&self.options)
            ),
            Stop::SlotTaken => format!(
                "another process writes to host slot {}; stop one of the two and start this one again",
                self.options.slot.0
            ),
            Stop::Contradiction => {
                "the disks contradict each other about what was decided; stop the pool's hosts and run `pollux statefile check`".to_owned()
            }
            Stop::NoDocument => {
                "the newest document is damaged wherever it is named; run `pollux statefile check`"
                    .to_owned()
            }
        }
    }

    fn not_done(&self, what: String, why: String) -> RegistryError {
        RegistryError::NotDone {
            place: self.place(),
            what,
            why,
        }
    }

    fn current(&mut self, what: &str, deadline: Instant) -> Result<Current, RegistryError> {
        self.shell
            .current(deadline)
            .map_err(|stop| self.not_done(what.to_owned(), self.why(stop)))
    }

    fn next_proposal(&mut self, base: Instance) -> Proposal {
        self.proposals += 1;
        Proposal {
            instance: Instance(base.0 + 1),
            host: self.shell.me,
            incarnation: self.shell.incarnation,
            number: self.proposals,
        }
    }
}

impl Registry for Statefile {
    fn read(&mut self, key: &str) -> Result<Option<Versioned<Vec<u8>>>, RegistryError> {
        let deadline = Instant::now() + self.options.call_wait;
        let current = self.current(&format!("read of {key}"), deadline)?;
        Ok(current.document.entries.get(key).cloned())
    }

    fn compare_and_set(
        &mut self,
        key: &str,
        expected: Option<u64>,
        value: &[u8],
    ) -> Result<CasOutcome, RegistryError> {
        let deadline = Instant::now() + self.options.call_wait;
        let what = format!("compare-and-set of {key}");
        if key.is_empty() || key.len() > KEY_BYTES_MAX || value.len() > VALUE_BYTES_MAX {
            let why =
                format!("keys have 1 to {KEY_BYTES_MAX} bytes, values at most {VALUE_BYTES_MAX}");
            return Err(self.not_done(what, why));
        }
        let version = expected.unwrap_or(0).saturating_add(1);
        // A proposal of this call that others may have seen, and may finish.
        let mut exposed: Option<Proposal> = None;
        loop {
            let stopped = |this: &Self, exposed: &Option<Proposal>, stop| {
                let (place, what, why) = (this.place(), what.clone(), this.why(stop));
                match exposed {
                    None => RegistryError::NotDone { place, what, why },
                    Some(_) => RegistryError::Unknown { place, what, why },
                }
            };
            let current = match self.shell.current(deadline) {
                Ok(current) => current,
                Err(stop) => return Err(stopped(self, &exposed, stop)),
            };
            if let Some(proposal) = &exposed {
                match current.document.was_chosen(proposal) {
                    Some(true) => return Ok(CasOutcome::Won { version }),
                    Some(false) => exposed = None,
                    None => {
                        return Err(RegistryError::Unknown {
                            place: self.place(),
                            what,
                            why: "the pool went on by more changes than it remembers".to_owned(),
                        });
                    }
                }
            }
            let found = current.document.entries.get(key);
            if found.map(|entry| entry.version) != expected {
                return Ok(CasOutcome::Lost(found.cloned()));
            }
            let proposal = self.next_proposal(current.instance);
            let entry = Versioned {
                version,
                value: value.to_vec(),
            };
            let bytes = match current.document.with(key, entry, proposal).encode() {
                Ok(bytes) => bytes,
                Err(e) => return Err(self.not_done(what, e.to_string())),
            };
            let most = self.geometry().slot_bytes;
            if bytes.len() as u64 > most {
                let why = format!(
                    "the document would have {} bytes, and a value slot has {most}; format new disks with larger ones",
                    bytes.len()
                );
                return Err(self.not_done(what, why));
            }
            let id = document::id_of(&bytes);
            let result = self.shell.propose(&current, id, bytes, deadline);
            if self.shell.own().proposed == Some(id) {
                exposed = Some(proposal);
            }
            match result {
                Ok(Some(chosen)) if chosen == id => return Ok(CasOutcome::Won { version }),
                Ok(Some(_)) => {}
                Ok(None) => {
                    if self.shell.pause(deadline).is_err() {
                        return Err(stopped(self, &exposed, Stop::Deadline));
                    }
                }
                Err(stop) => return Err(stopped(self, &exposed, stop)),
            }
        }
    }

    fn list(&mut self, prefix: &str) -> Result<Listing, RegistryError> {
        let deadline = Instant::now() + self.options.call_wait;
        let current = self.current(&format!("list of {prefix}"), deadline)?;
        Ok(current
            .document
            .entries
            .iter()
            .filter(|(key, _)| key.starts_with(prefix))
            .map(|(key, entry)| (key.clone(), entry.clone()))
            .collect())
    }
}
