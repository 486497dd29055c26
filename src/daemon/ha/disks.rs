//! Whether the storage of this host's VMs answers.
//!
//! The disks know by what their guests ask of them ([`Pulse`]); a thread asks for those whose
//! guests rest. It alone waits for a storage that is gone; who looks here never does.
//!
//! Must never: hold a disk open that its VM has let go of for longer than one question.

use crate::daemon::Host;
use crate::interpose::disk::Pulse;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// A disk that has not been asked for so long is asked.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// The thread ends when this is dropped.
pub(super) struct Disks {
    vms: Weak<Host>,
    _ends: Sender<()>,
}

impl Disks {
    /// Start to ask.
    ///
    /// # Errors
    /// If there is no thread to be had.
    pub(super) fn start(vms: Weak<Host>) -> std::io::Result<Self> {
        let (ends, end) = channel();
        let asked = vms.clone();
        std::thread::Builder::new()
            .name("pool-disks".into())
            .spawn(move || ask(&asked, &end))?;
        Ok(Self { vms, _ends: ends })
    }

    /// What is wrong with the storage of any VM that runs here, for who waits for `patience`.
    pub(super) fn trouble(&self, patience: Duration) -> Option<String> {
        let pulses = self.vms.upgrade().map(|host| host.pulses());
        trouble(&pulses.unwrap_or_default(), patience)
    }
}

fn trouble(pulses: &[Arc<Pulse>], patience: Duration) -> Option<String> {
    let now = Instant::now();
    pulses.iter().find_map(|pulse| pulse.trouble(now, patience))
}

fn ask(vms: &Weak<Host>, end: &Receiver<()>) {
    while let Err(RecvTimeoutError::Timeout) = end.recv_timeout(ASK_EVERY) {
        // The host is not held while a disk is waited for.
        let pulses = vms.upgrade().map(|host| host.pulses());
        for pulse in pulses.unwrap_or_default() {
            pulse.probe(Instant::now(), ASK_EVERY);
        }
    }
}
