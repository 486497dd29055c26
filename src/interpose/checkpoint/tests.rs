//! Cuts and promotions of a real QEMU.

use super::testbed::{CopyAll, Counters, TestVm};
use super::*;
use crate::vm::qmp::{Qmp, QmpError};
use serde_json::{Value, json};
use std::time::Duration;

fn status(qmp: &mut Qmp) -> String {
    let answer = qmp.execute("query-status", Value::Null).expect("status");
    answer["status"].as_str().expect("a word").to_owned()
}

/// Primary with checkpoints, `kill -9`, standby, promotion, reboot on the new side.
fn fails_over(machine: &str) {
    let mut primary = TestVm::primary(machine, &[]);
    let mut control = primary.monitor("control");
    primary.until("the guest's first rounds", |c| {
        c.boots == 1 && c.rounds > 1000
    });
    control.execute("stop", Value::Null).expect("stop");
    let prefix = capture_blocks_prefix(&mut control).expect("prefix");
    assert!(
        prefix.len() > 64 * 1024,
        "holds the firmware: {}",
        prefix.len()
    );
    control
        .execute("cont", Value::Null)
        .expect("cont after the prefix");
    assert_eq!(status(&mut control), "running");

    let mut checkpointer = primary.checkpointer(true);
    let mut hooks = CopyAll::of(&primary);
    let mut last = Counters::of(&primary.ram()).rounds;
    let mut cut = None;
    for _ in 0..5 {
        primary.until("rounds before the cut", |c| c.rounds > last);
        let taken = checkpointer.cut(&mut hooks).expect("cut");
        assert!(taken.was_running);
        let rounds = Counters::of(&hooks.ram).rounds;
        assert!(rounds > last, "the guest ran between the cuts");
        last = rounds;
        cut = Some(taken);
    }
    assert_eq!((hooks.stopped, hooks.resumed), (5, 5));
    assert_eq!(checkpointer.clock_status(), ClockStatus::Repairing);
    primary.kill();

    let cut = cut.expect("five cuts");
    let standby = TestVm::standby(machine, &[], &hooks.ram);
    let incoming = Incoming::prepare(standby.monitor("control")).expect("prepare");
    let before = Counters::of(&hooks.ram);
    let mut seen = None;
    let (mut qmp, timings) = incoming
        .promote(&prefix, &cut.device_state, &mut || {
            seen = Some(standby.counters());
            Ok(())
        })
        .unwrap_or_else(|error| panic!("{error}; {}", standby.stderr()));
    assert_eq!(seen, Some(before), "not one instruction before the hook");
    eprintln!("{machine}: prefix {} {timings:?}", prefix.len());
    assert_eq!(status(&mut qmp), "running");
    let after = standby.until("rounds on the new side", |c| {
        c.rounds > before.rounds + 1000
    });
    assert_eq!(after.boots, 1, "it went on, it did not boot");
    assert!(after.ticks > before.ticks, "its tick counter went on");

    assert_eq!(reset_vector(&mut qmp), "0xe9 0x0d 0x00");
    qmp.execute("system_reset", Value::Null).expect("reset");
    standby.until("the reboot on the new side", |c| c.boots == 2);
    let rounds = standby.counters().rounds;
    standby.until("rounds after the reboot", |c| c.rounds > rounds);

    // The promoted VM can be checkpointed in turn.
    let mut again = standby.checkpointer(true);
    let mut hooks = CopyAll::of(&standby);
    assert!(
        again
            .cut(&mut hooks)
            .expect("cut of the promoted VM")
            .was_running
    );
    assert_eq!(again.clock_status(), ClockStatus::Repairing);
}

#[test]
fn a_killed_microvm_goes_on_elsewhere_and_reboots() {
    fails_over("microvm");
}

#[test]
fn a_killed_q35_goes_on_elsewhere_and_reboots() {
    fails_over("q35");
}

#[test]
fn a_killed_pc_goes_on_elsewhere_and_reboots() {
    fails_over("pc");
}

/// The three bytes at the reset vector, as the guest sees them.
fn reset_vector(qmp: &mut Qmp) -> String {
    let args = json!({ "command-line": "xp /3xb 0xfffffff0" });
    let shown = qmp.execute("human-monitor-command", args).expect("xp");
    let shown = shown.as_str().expect("text");
    shown
        .split_once(": ")
        .expect("address: bytes")
        .1
        .trim()
        .to_owned()
}

/// What the prefix is for: without it the firmware of the promoted VM is empty.
#[test]
fn without_the_prefix_there_is_no_firmware_to_boot() {
    let mut primary = TestVm::primary("microvm", &[]);
    let mut checkpointer = primary.checkpointer(true);
    let mut hooks = CopyAll::of(&primary);
    let cut = checkpointer.cut(&mut hooks).expect("cut");
    assert_eq!(
        reset_vector(&mut primary.monitor("control")),
        "0xe9 0x0d 0x00"
    );
    primary.kill();
    let standby = TestVm::standby("microvm", &[], &hooks.ram);
    let incoming = Incoming::prepare(standby.monitor("control")).expect("prepare");
    let (mut qmp, _) = incoming
        .promote(b"QEVM\0\0\0\x03", &cut.device_state, &mut || Ok(()))
        .expect("it loads all the same");
    assert_eq!(reset_vector(&mut qmp), "0x00 0x00 0x00");
}

#[test]
fn a_state_that_is_none_is_refused_before_the_standby_is_spent() {
    let standby = TestVm::standby("microvm", &[], &[]);
    let incoming = Incoming::prepare(standby.monitor("control")).expect("prepare");
    let error = incoming
        .promote(b"QEVM\0\0\0\x03", b"junk", &mut || Ok(()))
        .expect_err("junk is no state");
    assert!(error.to_string().contains("device state"), "{error}");
}

#[test]
fn a_standby_that_cannot_load_says_why() {
    let standby = TestVm::standby("microvm", &[], &[]);
    let stderr = standby.path("stderr");
    let incoming = Incoming::prepare(standby.monitor("control"))
        .expect("prepare")
        .with_stderr_tail(Box::new(move || {
            std::fs::read_to_string(&stderr).unwrap_or_default()
        }));
    // A state that begins well and then names a device this machine does not have.
    let mut state = b"QEVM\0\0\0\x03".to_vec();
    state.extend_from_slice(b"\x04\0\0\0\x02\x05timer\0\0\0\0\0\0\0\x02");
    state.extend_from_slice(&[0; 24]);
    state.extend_from_slice(b"\x7e\0\0\0\x02\x04\0\0\0\x03\x04what\0\0\0\0\0\0\0\x01");
    let error = incoming
        .promote(b"QEVM\0\0\0\x03", &state, &mut || Ok(()))
        .expect_err("no such device");
    assert!(matches!(error, PromoteError::Died { .. }), "{error}");
    assert!(
        error.to_string().contains("Unknown savevm section"),
        "{error}"
    );
}

#[test]
fn death_between_stop_and_save_is_named() {
    let vm = TestVm::primary("microvm", &[]);
    let mut checkpointer = vm.checkpointer(true);
    let mut hooks = CopyAll::of(&vm);
    // QEMU hangs opening a pipe nobody reads, so it surely dies before it has saved.
    nix::unistd::mkfifo(&vm.path("state"), nix::sys::stat::Mode::S_IRWXU).expect("mkfifo");
    let pid = nix::unistd::Pid::from_raw(vm.child.id().try_into().expect("a pid"));
    hooks.on_capture = Box::new(move || {
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL)?;
        Ok(())
    });
    let error = checkpointer.cut(&mut hooks).expect_err("QEMU dies");
    assert_eq!(error.step, CutStep::Save);
    assert!(!error.resumed);
    assert_eq!(hooks.resumed, 0);
    let text = error.to_string();
    assert!(text.contains("step save"), "{text}");
    assert!(text.contains("exited or was killed"), "{text}");
    let error = checkpointer.cut(&mut hooks).expect_err("it stays dead");
    assert!(
        matches!(error.step, CutStep::Arm | CutStep::Stop),
        "{error}"
    );
}

#[test]
fn a_failing_hook_drops_the_epoch_and_the_guest_runs_on() {
    let vm = TestVm::primary("microvm", &[]);
    let mut checkpointer = vm.checkpointer(true);
    let mut hooks = CopyAll::of(&vm);
    hooks.on_capture = Box::new(|| Err("staging is full".into()));
    let error = checkpointer.cut(&mut hooks).expect_err("the hook fails");
    assert_eq!(error.step, CutStep::Capture);
    assert!(error.resumed);
    assert!(error.to_string().contains("staging is full"), "{error}");
    assert_eq!(hooks.resumed, 0);
    let rounds = vm.counters().rounds;
    vm.until("rounds after the failed cut", |c| c.rounds > rounds);
    hooks.on_capture = Box::new(|| Ok(()));
    let cut = checkpointer.cut(&mut hooks).expect("the next cut is good");
    assert!(cut.was_running);
}

#[test]
fn an_unwritable_state_file_drops_the_epoch_and_the_guest_runs_on() {
    let vm = TestVm::primary("microvm", &[]);
    let mut checkpointer = vm.checkpointer(true);
    let mut hooks = CopyAll::of(&vm);
    std::fs::create_dir(vm.path("state")).expect("a folder in the way");
    let error = checkpointer.cut(&mut hooks).expect_err("cannot save");
    assert_eq!(error.step, CutStep::Save);
    assert!(error.resumed);
    assert_eq!(status(&mut vm.monitor("control")), "running");
    std::fs::remove_dir(vm.path("state")).expect("out of the way");
    checkpointer.cut(&mut hooks).expect("the next cut is good");
}

#[test]
fn monitors_come_back_with_nothing_typed_on_them() {
    let vm = TestVm::primary("microvm", &[]);
    let checkpointer = vm.checkpointer(false);
    let Monitors {
        mut stop,
        mut save,
        mut cont,
    } = checkpointer.into_monitors().expect("alive");
    for monitor in [&mut stop, &mut save, &mut cont] {
        assert_eq!(status(monitor), "running");
    }
}

#[test]
fn a_guest_stays_stopped_for_a_switchover_and_can_go_back() {
    let vm = TestVm::primary("microvm", &[]);
    let mut checkpointer = vm.checkpointer(true);
    let mut control = vm.monitor("control");
    let mut hooks = CopyAll::of(&vm);
    let cut = checkpointer.cut_and_stay(&mut hooks).expect("cut");
    assert!(cut.was_running);
    assert_eq!(status(&mut control), "paused");
    assert_eq!(Counters::of(&hooks.ram), vm.counters());
    checkpointer.resume(&mut hooks).expect("resume");
    assert_eq!(status(&mut control), "running");
    assert_eq!(hooks.resumed, 1);
    assert!(checkpointer.cut(&mut hooks).expect("cut").was_running);
}

#[test]
fn a_reset_or_a_stopped_guest_is_cut_like_any_other_and_left_as_it_was() {
    let vm = TestVm::primary("q35", &["-no-shutdown"]);
    let mut checkpointer = vm.checkpointer(true);
    let mut control = vm.monitor("control");
    let mut hooks = CopyAll::of(&vm);
    vm.until("the first boot", |c| c.boots == 1);
    control.execute("system_reset", Value::Null).expect("reset");
    assert!(checkpointer.cut(&mut hooks).expect("cut").was_running);
    vm.until("the second boot", |c| c.boots == 2);
    let mut names = Vec::new();
    while let Some(event) = checkpointer.poll_event() {
        names.push(event.name);
    }
    assert_eq!(names, ["RESET"]);

    checkpointer.stop().expect("stop");
    assert!(!checkpointer.cut(&mut hooks).expect("cut").was_running);
    assert_eq!(status(&mut control), "paused");
    checkpointer.cont().expect("cont");
    assert!(checkpointer.cut(&mut hooks).expect("cut").was_running);

    // The end of a guest that powers itself off, with `-no-shutdown`.
    control
        .execute("set-action", json!({ "reboot": "shutdown" }))
        .expect("reboot means off from now on");
    control.execute("system_reset", Value::Null).expect("reset");
    control
        .wait_event("SHUTDOWN", testbed::PATIENCE)
        .expect("the guest powers off");
    while status(&mut control) == "running" {
        std::thread::yield_now();
    }
    assert_eq!(status(&mut control), "shutdown");
    let cut = checkpointer.cut(&mut hooks).expect("the last cut");
    assert!(!cut.was_running);
    assert_eq!(status(&mut control), "shutdown");
}

/// How much the guest's clock falls behind the host's over many cuts, as a share of the
/// time. The stamp of one cut may be late, if this thread had to wait for a CPU, but
/// never early: so the least lag of several cuts is taken at both ends.
fn drift(repair: bool) -> f64 {
    const CUTS: usize = 200;
    const END: usize = 20;
    const EPOCH: Duration = Duration::from_millis(10);
    let vm = TestVm::primary("microvm", &[]);
    let mut checkpointer = vm.checkpointer(repair);
    let mut hooks = CopyAll::of(&vm);
    hooks.copy = false;
    // A pause that cannot be overlooked, whatever the machine.
    hooks.on_capture = Box::new(|| {
        std::thread::sleep(Duration::from_millis(2));
        Ok(())
    });
    let mut lags = Vec::new();
    for _ in 0..CUTS {
        std::thread::sleep(EPOCH);
        let clock = checkpointer.cut(&mut hooks).expect("cut").clock;
        lags.push((
            clock.host_monotonic_ns - clock.guest_clock_ns,
            clock.host_monotonic_ns,
        ));
    }
    let first = lags[..END].iter().min().expect("cuts");
    let last = lags[CUTS - END..].iter().min().expect("cuts");
    #[allow(clippy::cast_precision_loss)]
    let share = (last.0 as f64 - first.0 as f64) / (last.1 - first.1) as f64;
    eprintln!("repair {repair}: drift {:.4} %", share * 100.0);
    share
}

#[test]
fn the_guest_gets_the_time_of_its_pauses_back() {
    assert!(drift(true).abs() < 0.005);
}

#[test]
fn without_repair_the_guest_loses_every_pause() {
    assert!(drift(false) > 0.02);
}

#[test]
fn a_closed_monitor_is_told_from_a_refusal() {
    let mut vm = TestVm::primary("microvm", &[]);
    let mut control = vm.monitor("control");
    let refused = control
        .execute("no-such", Value::Null)
        .expect_err("refused");
    assert!(matches!(refused, QmpError::Refused { .. }) && !refused.is_fatal());
    vm.kill();
    let closed = control.execute("stop", Value::Null).expect_err("dead");
    assert!(closed.is_fatal(), "{closed}");
}
