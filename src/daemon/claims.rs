//! The host's one thread that talks to the registry, so that nobody else ever waits for it.

use crate::mirror::{ClaimOutcome, VmRecord, record_key};
use crate::pool::VmId;
use crate::registry::{CasOutcome, Registry, RegistryError, Versioned};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

/// Operations that may wait for a registry that does not answer. Each VM has at most one
/// or two under way.
const QUEUE_MAX: usize = 1024;

/// Called on the registry thread with the outcome; must not block.
pub type Reply = Box<dyn FnOnce(ClaimOutcome) + Send>;

/// Done on the registry thread, with the registry, or with why there is none to be had; must
/// not block but for the registry.
pub type Work = Box<dyn FnOnce(Result<&mut dyn Registry, String>) + Send>;

enum Op {
    Read {
        vm: VmId,
        reply: Reply,
    },
    Claim {
        vm: VmId,
        expected: Option<u64>,
        value: VmRecord,
        reply: Reply,
    },
    Work(Work),
}

/// The way to the registry thread. Cheap to clone.
#[derive(Clone)]
pub struct Claims {
    ops: SyncSender<Op>,
}

impl Claims {
    /// Start the thread over `registry`.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn start(registry: Box<dyn Registry>) -> std::io::Result<Self> {
        let (ops, inbox) = sync_channel(QUEUE_MAX);
        std::thread::Builder::new()
            .name("registry".into())
            .spawn(move || serve(registry, &inbox))?;
        Ok(Self { ops })
    }

    /// Read a VM's record: the outcome is `Lost(what is there)` or `Unreachable`.
    pub fn read(&self, vm: VmId, reply: Reply) {
        self.put(Op::Read { vm, reply });
    }

    /// Compare-and-set a VM's record; `expected` None means that there must be none.
    pub fn claim(&self, vm: VmId, expected: Option<u64>, value: VmRecord, reply: Reply) {
        self.put(Op::Claim {
            vm,
            expected,
            value,
            reply,
        });
    }

    /// As [`Claims::read`], waiting for the outcome. Not from a tokio task.
    #[must_use]
    pub fn read_blocking(&self, vm: VmId) -> ClaimOutcome {
        wait(|reply| self.read(vm, reply))
    }

    /// As [`Claims::claim`], waiting for the outcome. Not from a tokio task.
    #[must_use]
    pub fn claim_blocking(&self, vm: VmId, expected: Option<u64>, value: VmRecord) -> ClaimOutcome {
        wait(|reply| self.claim(vm, expected, value, reply))
    }

    /// Do something else with the registry.
    pub fn work(&self, work: impl FnOnce(Result<&mut dyn Registry, String>) + Send + 'static) {
        self.put(Op::Work(Box::new(work)));
    }

    /// Nothing is asked any more; returns when those who wait for that have been told.
    pub fn leave(&self) {
        let (tx, rx) = sync_channel(1);
        self.work(move |registry| {
            if let Ok(registry) = registry {
                registry.leave();
            }
            let _ = tx.send(());
        });
        let _ = rx.recv();
    }

    fn put(&self, op: Op) {
        let (op, reason) = match self.ops.try_send(op) {
            Ok(()) => return,
            Err(TrySendError::Full(op)) => (
                op,
                format!("{QUEUE_MAX} operations already wait for the registry"),
            ),
            Err(TrySendError::Disconnected(op)) => (op, "the registry thread has ended".into()),
        };
        match op {
            Op::Read { reply, .. } | Op::Claim { reply, .. } => {
                reply(ClaimOutcome::Unreachable { reason });
            }
            Op::Work(work) => work(Err(reason)),
        }
    }
}

fn wait(ask: impl FnOnce(Reply)) -> ClaimOutcome {
    let (tx, rx) = sync_channel(1);
    ask(Box::new(move |outcome| {
        let _ = tx.send(outcome);
    }));
    rx.recv().unwrap_or_else(|_| ClaimOutcome::Unreachable {
        reason: "the registry thread ended without an answer".into(),
    })
}

fn serve(mut registry: Box<dyn Registry>, inbox: &Receiver<Op>) {
    while let Ok(op) = inbox.recv() {
        match op {
            Op::Read { vm, reply } => reply(match registry.read(&record_key(vm)) {
                Ok(found) => found_record(found),
                Err(e) => unreachable_because(&e),
            }),
            Op::Work(work) => work(Ok(registry.as_mut())),
            Op::Claim {
                vm,
                expected,
                value,
                reply,
            } => {
                reply(
                    match registry.compare_and_set(&record_key(vm), expected, &value.to_bytes()) {
                        Ok(CasOutcome::Won { version }) => {
                            ClaimOutcome::Won(Versioned { version, value })
                        }
                        Ok(CasOutcome::Lost(found)) => found_record(found),
                        Err(e) => unreachable_because(&e),
                    },
                );
            }
        }
    }
}

fn unreachable_because(e: &RegistryError) -> ClaimOutcome {
    ClaimOutcome::Unreachable {
        reason: e.to_string(),
    }
}

/// A record that cannot be read is as good as no answer: nobody may act on it.
fn found_record(found: Option<Versioned<Vec<u8>>>) -> ClaimOutcome {
    match found {
        None => ClaimOutcome::Lost(None),
        Some(Versioned { version, value }) => match VmRecord::from_bytes(&value) {
            Ok(value) => ClaimOutcome::Lost(Some(Versioned { version, value })),
            Err(e) => ClaimOutcome::Unreachable {
                reason: e.to_string(),
            },
        },
    }
}
