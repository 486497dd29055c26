//! For tests: a network namespace where addresses and interfaces come and go.

use std::process::Command;

/// `ip` in the namespace of the calling thread.
pub(super) fn ip(args: &str) {
    let status = Command::new("ip").args(args.split(' ')).status();
    assert!(status.expect("iproute2").success(), "ip {args}");
}

/// Run `test` in a thread with its own network namespace; it ends with the last thread in it.
pub(super) fn in_namespace(test: impl FnOnce() + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let run = move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("a namespace");
        ip("link set lo up");
        test();
    };
    if let Err(panic) = std::thread::spawn(run).join() {
        std::panic::resume_unwind(panic);
    }
}
