//! The thread that writes committed epochs to the file, oldest first.

use super::disk::{Core, State};
use super::overlay::Overlay;
use std::io;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Pause between attempts while the file refuses writes: often enough to notice a healed path
/// soon, seldom enough not to add to a sick array's load.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

pub(super) fn start(core: Arc<Core>) -> io::Result<JoinHandle<()>> {
    thread::Builder::new()
        .name("disk-writer".into())
        .spawn(move || run(&core))
}

fn run(core: &Core) {
    let mut state = core.lock();
    loop {
        let Some((epoch, map)) = state.overlay.as_ref().and_then(Overlay::next_to_write) else {
            if state.writer_stop {
                return;
            }
            state = core
                .writer_wake
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        drop(state);
        let writes = map.writes();
        let result = core.image.write(writes.iter());
        drop((writes, map));
        state = core.lock();
        match result {
            Ok(()) => finish(&mut state, epoch),
            Err(error) => {
                tracing::error!(
                    disk = %core.image.path.display(), %epoch, %error,
                    "committed epoch could not be written; it stays in memory and is retried",
                );
                state.write_error = Some(error.to_string());
                state.write_failures += 1;
                core.changed.notify_all();
                if state.writer_stop {
                    return;
                }
                drop(state);
                if let Some(hook) = &core.hooks.on_write_error {
                    hook(&error);
                }
                state = core
                    .writer_wake
                    .wait_timeout(core.lock(), RETRY_PAUSE)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
            }
        }
        core.changed.notify_all();
    }
}

/// The file holds the epoch: its layer may go, and its blocks have changed.
fn finish(guard: &mut MutexGuard<'_, State>, epoch: crate::pool::Epoch) {
    let state = &mut **guard;
    state.write_error = None;
    if let Some(overlay) = state.overlay.as_mut() {
        if let Some((_, map)) = overlay.next_to_write() {
            for range in map.ranges() {
                state.dirty.mark(&range);
            }
        }
        overlay.written(epoch);
    }
}
