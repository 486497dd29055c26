//! Going into a place of a lab: a thread into its network, a program into all of it.

use super::LabError;
use super::handle::Lab;
use super::spec::Place;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// Runs `work` on a fresh thread whose network is that of `place` (a descriptor from
/// [`Lab::place_fd`]) and returns its result. Sockets made in it stay in that network.
///
/// # Errors
/// [`LabError::Io`] if the place is gone.
///
/// # Panics
/// If `work` does.
pub fn in_network<T: Send>(
    place: BorrowedFd<'_>,
    work: impl FnOnce() -> T + Send,
) -> Result<T, LabError> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            setns(place, CloneFlags::CLONE_NEWNET).map_err(|e| LabError::Io {
                what: "entering the network of a lab's place".into(),
                source: e.into(),
            })?;
            Ok(work())
        });
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The hidden subcommand `lab-exec DIR PLACE PROGRAM [ARGS]`: runs the program inside
/// the place, in its pid namespace too, so that it freezes and dies with it; it also
/// dies with this process. Gives the program's exit status, 128 + signal if a signal
/// ended it, 125 if the place could not be entered, 127 if the program is not there.
/// The process must have one thread.
#[must_use]
pub fn exec_main(args: &[OsString]) -> i32 {
    const NOT_ENTERED: i32 = 125;
    let [dir, place, program, rest @ ..] = args else {
        eprintln!(
            "usage: pollux {} DIR PLACE PROGRAM [ARGS]",
            super::EXEC_COMMAND
        );
        return NOT_ENTERED;
    };
    match exec(Path::new(dir), &place.to_string_lossy(), program, rest) {
        Ok(status) => status,
        Err(e) => {
            eprintln!("pollux lab exec: {e}");
            NOT_ENTERED
        }
    }
}

fn exec(dir: &Path, place: &str, program: &OsString, args: &[OsString]) -> Result<i32, LabError> {
    let place: Place = place
        .parse()
        .map_err(|e: crate::pool::host::BadHostName| LabError::Spec(e.to_string()))?;
    let fd = Lab::open_at(dir)?.place_fd(&place)?;
    let here = std::env::current_dir().unwrap_or_else(|_| "/".into());
    let all = CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWUTS;
    setns(&fd, all).map_err(|e| LabError::Io {
        what: format!("entering {place}"),
        source: e.into(),
    })?;
    // Joining a mount namespace moves us to its root.
    let _ = std::env::set_current_dir(here);
    let (watch, alive) = io::pipe().map_err(LabError::io("making a pipe"))?;
    // A pid namespace is joined by the children only, hence the fork.
    // SAFETY: this process has one thread.
    match unsafe { fork() }.map_err(|e| LabError::Io {
        what: "forking".into(),
        source: e.into(),
    })? {
        ForkResult::Child => {
            drop(alive);
            let _ = prctl::set_pdeathsig(Signal::SIGKILL);
            let mut gone = [PollFd::new(watch.as_fd(), PollFlags::POLLIN)];
            if poll(&mut gone, PollTimeout::ZERO).is_ok_and(|n| n > 0) {
                std::process::exit(1);
            }
            let error = Command::new(program).args(args).exec();
            eprintln!("pollux lab exec: starting {}: {error}", program.display());
            std::process::exit(127);
        }
        ForkResult::Parent { child } => {
            drop(watch);
            loop {
                match waitpid(child, None) {
                    Ok(WaitStatus::Exited(_, code)) => return Ok(code),
                    Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(128 + signal as i32),
                    Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                    Err(e) => {
                        return Err(LabError::Io {
                            what: "waiting for the program".into(),
                            source: e.into(),
                        });
                    }
                }
            }
        }
    }
}
