//! The two births of a lab: the launcher that forks the keeper, and the keeper's child
//! that becomes a host's init.
//!
//! Both fork without exec, so both must see to it that a child holds nothing it should
//! not: the launcher not the lock and not the life line, a host's init nothing at all
//! but its channel.

use super::KEEPER_COMMAND;
use super::init::host_init_main;
use super::keeper::keep;
use super::spec::{HostNet, LabPlan};
use super::wire::{Reply, receive, send};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork, setsid};
use std::ffi::{CString, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// What failed, and how.
pub(super) type StepError = (String, String);

/// Names the step that an error belongs to.
pub(super) fn step<E: std::fmt::Display>(what: impl Into<String>) -> impl FnOnce(E) -> StepError {
    move |e| (what.into(), e.to_string())
}

/// The hidden subcommand `lab-keeper`: takes the plan and the directory's lock from
/// the socket on its standard input, becomes the launcher and forks the keeper.
/// Returns the exit status. The process must have one thread.
#[must_use]
pub fn keeper_main(_args: &[OsString]) -> i32 {
    // SAFETY: descriptor 0 is ours alone; nothing in this process reads standard input.
    let life = UnixStream::from(unsafe { OwnedFd::from_raw_fd(0) });
    let (plan, lock) = match receive::<LabPlan>(&life) {
        Ok((plan, Some(lock))) => (plan, File::from(lock)),
        Ok((_, None)) | Err(_) => {
            eprintln!("pollux {}: started by `pollux lab up` only", KEEPER_COMMAND);
            return 2;
        }
    };
    match launch(&plan, &life, lock) {
        Ok(status) => status,
        Err((step, message)) => {
            eprintln!("keeper: {step}: {message}");
            let _ = send(&life, &Reply::Failed { step, message }, None);
            1
        }
    }
}

fn launch(plan: &LabPlan, life: &UnixStream, lock: File) -> Result<i32, StepError> {
    // Away from the creator's terminal: its Ctrl-C is not for us.
    setsid().map_err(step("starting a session"))?;
    unshare(CloneFlags::CLONE_NEWPID).map_err(step("making the lab's pid namespace"))?;
    let (watch, alive) = io::pipe().map_err(step("making a pipe"))?;
    // SAFETY: this process has one thread, so the child may do anything.
    match unsafe { fork() }.map_err(step("forking the keeper"))? {
        ForkResult::Parent { child } => {
            drop((lock, watch));
            let _alive = alive;
            // Let go of the life line: only the keeper holds it from here on.
            // SAFETY: 0 is a valid descriptor that `life` owns; it is replaced, not freed, so that stays true.
            unsafe {
                libc::dup2(
                    File::open("/dev/null")
                        .map_err(step("opening /dev/null"))?
                        .as_raw_fd(),
                    0,
                )
            };
            loop {
                match waitpid(child, None) {
                    Ok(WaitStatus::Exited(_, code)) => return Ok(code),
                    Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(128 + signal as i32),
                    Ok(_) | Err(Errno::EINTR) => {}
                    Err(e) => return Err(("waiting for the keeper".into(), e.to_string())),
                }
            }
        }
        ForkResult::Child => {
            drop(alive);
            let done = keep(plan, life, &lock, &watch);
            if let Err((step, message)) = &done {
                eprintln!("keeper: {step}: {message}");
                let _ = send(
                    life,
                    &Reply::Failed {
                        step: step.clone(),
                        message: message.clone(),
                    },
                    None,
                );
            }
            // Never return into the launcher's frames; the kernel ends every host with us.
            std::process::exit(i32::from(done.is_err()));
        }
    }
}

/// In the forked child: keep the channel and the standard three, nothing else.
pub(super) fn become_init(plan: &LabPlan, host: &HostNet, channel: UnixStream) -> ! {
    const CHANNEL: i32 = 3;
    let raw = channel.into_raw_fd();
    // SAFETY: plain descriptor calls. Every descriptor from 3 on belongs to values of the
    // keeper's that this process never touches again, since this function never returns.
    let channel = unsafe {
        if raw != CHANNEL {
            libc::dup2(raw, CHANNEL);
        }
        libc::fcntl(CHANNEL, libc::F_SETFD, libc::FD_CLOEXEC);
        libc::close_range(4, libc::c_uint::MAX, 0);
        // The life line on 0 is the keeper's alone.
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR);
        libc::dup2(null, 0);
        libc::close(null);
        UnixStream::from_raw_fd(CHANNEL)
    };
    if let Ok(name) = CString::new(format!("pollux-{}", host.name)) {
        let _ = prctl::set_name(&name);
    }
    std::process::exit(host_init_main(plan, host, &channel))
}
