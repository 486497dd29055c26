//! The registry of a pool of two hosts that has neither shared storage nor etcd: held twice, a
//! copy on each host, changed by both together or, once the other's life has ended for certain, by
//! one alone. Reads are answered from the own copy.
//!
//! ```text
//!  PairRegistry (Registry) --> shell <--> core (pure)      what counts, who may go on alone
//!                               |  |  `-- judge (pure)     when the partner is silent
//!                               |  `----> store -- copy    the file
//!                             wires ----> message          the partner
//! ```
//!
//! The argument is [`core`]'s module doc, explored by its model check. `docs/registry.md` says what
//! such a pair can decide and what not, and has the file byte by byte.

pub mod copy;
pub mod core;
mod judge;
mod message;
mod shell;
mod store;
mod wires;

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;

pub use copy::{BadCopy, Side};
pub use judge::Patience;
pub use shell::{Connection, Surroundings};
pub use store::{StoreError, declare_alone};
pub use wires::{Route, WiresOptions};

use self::core::{Answer, Select, Why};
use super::format::{KEY_BYTES_MAX, VALUE_BYTES_MAX};
use super::watch::Seen;
use super::{CasOutcome, Listing, Registry, RegistryError, Versioned};
use copy::Owner;
use shell::{Changed, Event, Op, Shell};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel, sync_channel};
use std::time::{Duration, Instant};
use store::Store;

/// How long a call takes at most by default: a change is two exchanges and four fsyncs.
pub const CALL_WAIT: Duration = Duration::from_millis(1000);
/// How much later than its deadline an answer may come.
const ANSWER_SLACK: Duration = Duration::from_millis(500);
/// How long a farewell may take.
const LEAVE_WAIT: Duration = Duration::from_secs(2);

/// What a pair's registry needs.
#[derive(Clone, Debug)]
pub struct PairOptions {
    /// The pool.
    pub pool: [u8; 16],
    /// Which host this is: the one with the lower id, or the other.
    pub side: Side,
    /// The partner, for people.
    pub partner: String,
    /// The folder of this host's copy; on a disk of its own, never shared.
    pub dir: PathBuf,
    /// When the partner counts as silent.
    pub patience: Patience,
    /// How long a call takes at most.
    pub call_wait: Duration,
}

/// Why there is no such registry.
#[derive(Debug, thiserror::Error)]
pub enum PairError {
    /// The copy.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No thread.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
}

/// Ends the thread when the last handle is gone.
struct Owned {
    tell: Sender<Event>,
}

impl Drop for Owned {
    fn drop(&mut self) {
        let _ = self.tell.send(Event::End);
    }
}

/// The registry of a pair, as one host uses it. Cheap to clone.
#[derive(Clone)]
pub struct PairRegistry {
    owned: Arc<Owned>,
    changed: Arc<Changed>,
    place: String,
    call_wait: Duration,
}

impl PairRegistry {
    /// Take up this host's copy and look for the partner. It answers once the two are in sync,
    /// or at once if its copy stands alone.
    ///
    /// # Errors
    /// [`PairError`], with the file and what to do.
    pub fn start(
        options: PairOptions,
        wires: WiresOptions,
        surroundings: Box<dyn Surroundings>,
    ) -> Result<Self, PairError> {
        let (registry, tell) = Self::begin(options, surroundings)?;
        let used = Arc::downgrade(&registry.owned);
        wires::start(wires, tell, used).map_err(PairError::Thread)?;
        Ok(registry)
    }

    /// Without a connection: whoever has the sender makes them.
    fn begin(
        options: PairOptions,
        surroundings: Box<dyn Surroundings>,
    ) -> Result<(Self, Sender<Event>), PairError> {
        let owner = Owner {
            pool: options.pool,
            side: options.side,
        };
        let store = Store::open(&options.dir, owner)?;
        let changed = Arc::new(Changed::default());
        let place = format!("pair with {}", options.partner);
        let shell = Shell::new(
            owner,
            options.partner,
            store,
            options.patience,
            surroundings,
            Arc::clone(&changed),
        )?;
        let (tell, inbox) = channel();
        std::thread::Builder::new()
            .name("pair".into())
            .spawn(move || shell.run(&inbox))
            .map_err(PairError::Thread)?;
        let registry = Self {
            owned: Arc::new(Owned { tell: tell.clone() }),
            changed,
            place,
            call_wait: options.call_wait,
        };
        Ok((registry, tell))
    }

    fn call(&self, op: Op) -> Answer {
        let writes = matches!(op, Op::Change { .. });
        let (reply, answer) = sync_channel(1);
        let call = Event::Call {
            op,
            until: Instant::now() + self.call_wait,
            reply,
        };
        if self.owned.tell.send(call).is_err() {
            return Answer::NotDone(Why::Left);
        }
        match answer.recv_timeout(self.call_wait + ANSWER_SLACK) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) if writes => {
                Answer::Unknown(Why::Late)
            }
            Err(_) => Answer::NotDone(Why::Late),
        }
    }

    fn not_done(&self, what: String, why: impl ToString) -> RegistryError {
        RegistryError::NotDone {
            place: self.place.clone(),
            what,
            why: why.to_string(),
        }
    }

    fn found(&self, select: Select, what: String) -> Result<Listing, RegistryError> {
        match self.call(Op::Read(select)) {
            Answer::Found(found) => Ok(found),
            Answer::NotDone(why) | Answer::Unknown(why) => Err(self.not_done(what, why)),
            Answer::Won { .. } | Answer::Lost(_) => Err(self.not_done(what, Why::Late)),
        }
    }
}

impl Registry for PairRegistry {
    fn read(&mut self, key: &str) -> Result<Option<Versioned<Vec<u8>>>, RegistryError> {
        let found = self.found(Select::Key(key.to_owned()), format!("read of {key}"))?;
        Ok(found.into_iter().next().map(|(_, entry)| entry))
    }

    fn compare_and_set(
        &mut self,
        key: &str,
        expected: Option<u64>,
        value: &[u8],
    ) -> Result<CasOutcome, RegistryError> {
        let what = format!("compare-and-set of {key}");
        if key.is_empty() || key.len() > KEY_BYTES_MAX || value.len() > VALUE_BYTES_MAX {
            let why =
                format!("keys have 1 to {KEY_BYTES_MAX} bytes, values at most {VALUE_BYTES_MAX}");
            return Err(self.not_done(what, why));
        }
        let answer = self.call(Op::Change {
            key: key.to_owned(),
            expected,
            value: value.to_vec(),
        });
        let (place, why) = match answer {
            Answer::Won { version } => return Ok(CasOutcome::Won { version }),
            Answer::Lost(found) => return Ok(CasOutcome::Lost(found)),
            Answer::NotDone(why) => return Err(self.not_done(what, why)),
            Answer::Unknown(why) => (self.place.clone(), why.to_string()),
            Answer::Found(_) => (self.place.clone(), Why::Late.to_string()),
        };
        Err(RegistryError::Unknown { place, what, why })
    }

    fn list(&mut self, prefix: &str) -> Result<Listing, RegistryError> {
        self.found(
            Select::Prefix(prefix.to_owned()),
            format!("list of {prefix}"),
        )
    }

    fn watch(
        &mut self,
        prefix: &str,
        seen: &mut Seen,
        wait: Duration,
    ) -> Result<Listing, RegistryError> {
        let until = Instant::now() + wait;
        loop {
            // Counted before it is looked at: what changes in between wakes at once.
            let count = self.changed.now();
            let news = seen.news(self.list(prefix)?);
            let left = until.saturating_duration_since(Instant::now());
            if !news.is_empty() || left.is_zero() {
                return Ok(news);
            }
            self.changed.wait(count, left);
        }
    }

    fn leave(&mut self) {
        let (done, is_done) = sync_channel(1);
        if self.owned.tell.send(Event::Leave(done)).is_ok() {
            let _ = is_done.recv_timeout(LEAVE_WAIT);
        }
    }
}
