//! A few threads that wait to help with a scan.
//!
//! Starting a thread in the pause would cost more than a small scan. The
//! calling thread works too, so that a helper the scheduler wakes late delays
//! nothing but the item it holds.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Work on item `i`, for i in 0..items, in any order, on any thread.
type Work<'a> = dyn Fn(usize) + Sync + 'a;

/// The helpers. Dropping ends them.
#[derive(Debug)]
pub(super) struct Crew {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// There is a job, or it is time to end.
    called: Condvar,
    /// A helper left the job.
    left: Condvar,
    /// The next item nobody has taken.
    next: AtomicUsize,
}

#[derive(Debug, Default)]
struct State {
    job: Option<Job>,
    /// Counts jobs, so that a helper joins each at most once.
    number: u64,
    /// Helpers inside the job.
    inside: usize,
    panicked: bool,
    ending: bool,
}

#[derive(Debug, Clone, Copy)]
struct Job {
    work: *const Work<'static>,
    items: usize,
}

// SAFETY: the pointer is to a `Sync` closure, used only while `Crew::run`,
// which owns it, waits.
unsafe impl Send for Job {}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work_on(&self, work: &Work<'_>, items: usize) {
        loop {
            let item = self.next.fetch_add(1, Ordering::Relaxed);
            if item >= items {
                return;
            }
            work(item);
        }
    }

    fn help(&self) {
        let mut seen = 0;
        let mut state = self.lock();
        loop {
            if state.ending {
                return;
            }
            let Some(job) = state.job.filter(|_| state.number != seen) else {
                state = self
                    .called
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            seen = state.number;
            state.inside += 1;
            drop(state);
            // SAFETY: `inside` was raised while the job stood, so `run` waits
            // for this thread to leave before the closure goes away.
            let work = unsafe { &*job.work };
            let outcome = catch_unwind(AssertUnwindSafe(|| self.work_on(work, job.items)));
            state = self.lock();
            state.inside -= 1;
            state.panicked |= outcome.is_err();
            self.left.notify_all();
        }
    }

    /// Withdraws the job and waits until every helper has left it.
    fn finish(&self) -> bool {
        let mut state = self.lock();
        state.job = None;
        while state.inside > 0 {
            state = self
                .left
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::take(&mut state.panicked)
    }
}

impl Crew {
    /// Starts up to `helpers` threads; fewer if the system refuses more.
    pub(super) fn new(helpers: usize) -> Self {
        let shared = Arc::new(Shared::default());
        let start = |number| {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name(format!("pollux-scan-{number}"))
                .spawn(move || shared.help())
                .ok()
        };
        let helpers = (1..=helpers).map_while(start).collect();
        Self { shared, helpers }
    }

    /// Runs `work` for each item and returns when all are done. A panic in
    /// `work` goes on here, after all threads have left it.
    pub(super) fn run(&mut self, items: usize, work: &Work<'_>) {
        if self.helpers.is_empty() || items < 2 {
            (0..items).for_each(work);
            return;
        }
        let erased: *const Work<'_> = work;
        // SAFETY: only the lifetime changes; `finish` below makes sure that no
        // helper uses the pointer after this call.
        let erased =
            unsafe { std::mem::transmute::<*const Work<'_>, *const Work<'static>>(erased) };
        self.shared.next.store(0, Ordering::Relaxed);
        let mut state = self.shared.lock();
        state.job = Some(Job {
            work: erased,
            items,
        });
        state.number += 1;
        drop(state);
        self.shared.called.notify_all();
        let own = catch_unwind(AssertUnwindSafe(|| self.shared.work_on(work, items)));
        let helper_panicked = self.shared.finish();
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        assert!(!helper_panicked, "a scan thread panicked");
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.shared.lock().ending = true;
        self.shared.called.notify_all();
        for helper in self.helpers.drain(..) {
            let _ = helper.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_done_exactly_once() {
        for helpers in [0, 1, 3] {
            let mut crew = Crew::new(helpers);
            for items in [0, 1, 2, 100, 1000] {
                let done: Vec<_> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                crew.run(items, &|item| {
                    done[item].fetch_add(1, Ordering::Relaxed);
                });
                assert!(done.iter().all(|n| n.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_crew_survives() {
        let mut crew = Crew::new(2);
        let caught = catch_unwind(AssertUnwindSafe(|| {
            crew.run(50, &|item| assert!(item != 20, "boom"));
        }));
        assert!(caught.is_err());
        let done = AtomicUsize::new(0);
        crew.run(50, &|_| {
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.into_inner(), 50);
    }
}
