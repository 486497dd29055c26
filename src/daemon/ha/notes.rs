//! What a life writes down for the next one, on a thread of its own: a disk may be slow.

use super::Event;
use crate::beat::save_promised;
use crate::pool::Incarnation;
use std::path::PathBuf;
use std::sync::mpsc::{Sender, channel};

/// Where it is written; orders are carried out one after the other.
pub(super) struct Notes(Sender<Option<Incarnation>>);

impl Notes {
    /// Into the state folder; [`Event::Remembered`] goes to `tell`.
    pub(super) fn start(state_dir: PathBuf, tell: Sender<Event>) -> std::io::Result<Self> {
        let (orders, inbox) = channel();
        std::thread::Builder::new()
            .name("pool-notes".into())
            .spawn(move || {
                for promised in inbox {
                    let saved = save_promised(&state_dir, promised);
                    match &saved {
                        Err(e) if promised.is_some() => tracing::error!(
                            "{e}; this host promises nothing, and its partner cannot go on without the registry once this host has died"
                        ),
                        // It is removed with the next promise that is over; until then it costs
                        // the proof by a watchdog.
                        Err(e) => tracing::warn!("{e}"),
                        Ok(()) => {}
                    }
                    if promised.is_some() && tell.send(Event::Remembered(saved.is_ok())).is_err() {
                        return;
                    }
                }
            })?;
        Ok(Self(orders))
    }

    /// That `promised` promised as one of two, or that none did.
    pub(super) fn write(&self, promised: Option<Incarnation>) {
        // A thread that has ended answers nothing: then nothing is promised.
        let _ = self.0.send(promised);
    }
}
