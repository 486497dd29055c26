//! This host's watchdog through one life: armed when the host becomes a member, petted while its
//! lease holds, disarmed when nothing runs here any more.

use crate::api::pool::WatchdogView;
use crate::fence::watchdog::{BootNs, Device, PetState, Petter, Remote, Watchdog, WatchdogError};
use crate::ha::time::Millis;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A watchdog, armed or not.
pub(super) struct HostWatchdog {
    place: PathBuf,
    timeout: Duration,
    petter: Option<Petter>,
}

/// A moment of the boot-time clock as the watchdog takes it.
fn at(moment: Millis) -> BootNs {
    BootNs(moment.0.saturating_mul(1_000_000))
}

fn arm(place: &Path, timeout: Duration) -> Result<Box<dyn Watchdog>, WatchdogError> {
    let is_socket = std::fs::metadata(place).is_ok_and(|found| found.file_type().is_socket());
    Ok(if is_socket {
        Box::new(Remote::arm(place)?)
    } else {
        Box::new(Device::arm(place, timeout)?)
    })
}

impl HostWatchdog {
    /// The one at `place`, not armed; the pool is told that it fires within `timeout`.
    pub(super) fn new(place: &Path, timeout: Duration) -> Self {
        Self {
            place: place.into(),
            timeout,
            petter: None,
        }
    }

    /// Pet until then and no longer; arms it the first time.
    ///
    /// # Errors
    /// Why it cannot be armed: the host must not be a member then.
    pub(super) fn pet_until(&mut self, until: Millis) -> Result<(), String> {
        if let Some(petter) = &self.petter {
            petter.lease().set(at(until));
            return Ok(());
        }
        let watchdog = arm(&self.place, self.timeout).map_err(|e| e.to_string())?;
        let real = watchdog.timeout();
        if real > self.timeout {
            let place = self.place.display();
            let told = self.timeout;
            // Nothing runs yet.
            let _ = watchdog.disarm();
            return Err(format!(
                "watchdog {place} fires after {real:?}, but the pool counts on {told:?}; set `watchdog_ms` in [pool.timing] of all hosts to at least the former"
            ));
        }
        let petter = Petter::start(watchdog, at(until)).map_err(|e| e.to_string())?;
        if let Some(warning) = petter.warning() {
            tracing::warn!("{warning}");
        }
        tracing::info!(timeout = ?real, "watchdog {} is armed", self.place.display());
        self.petter = Some(petter);
        Ok(())
    }

    /// Nothing runs here any more, and nothing may be started.
    pub(super) fn disarm(&mut self) {
        if let Some(petter) = self.petter.take()
            && let Err(e) = petter.farewell()
        {
            tracing::error!("the watchdog could not be disarmed, and may reset this host: {e}");
        }
    }

    /// What is shown of it.
    pub(super) fn view(&self) -> WatchdogView {
        let state = match self.petter.as_ref().map(Petter::state) {
            None => "disarmed",
            Some(PetState::Petting) => "petting",
            Some(PetState::Expired) => "expired",
            Some(PetState::Failing) => "failing",
        };
        WatchdogView {
            place: Some(self.place.display().to_string()),
            timeout_ms: u64::try_from(self.timeout.as_millis()).ok(),
            state: state.into(),
        }
    }
}
