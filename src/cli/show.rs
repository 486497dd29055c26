//! Status as text for people.

use crate::api::types::{HostInfo, HostStatus, Percentiles, Role, VmStatus};
use std::fmt::Write;

/// Microseconds as a person reads them.
pub(super) fn micros(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} us"),
        1_000..10_000 => format!("{}.{:02} ms", us / 1_000, us % 1_000 / 10),
        10_000..10_000_000 => format!("{} ms", us / 1_000),
        _ => format!("{} s", us / 1_000_000),
    }
}

pub(super) fn host_info(info: &HostInfo) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "host         {}", info.name);
    let _ = writeln!(out, "fingerprint  {}", info.fingerprint);
    let _ = writeln!(out, "pollux       {}", info.version);
    let _ = writeln!(out, "QEMU         {}", info.qemu);
    let mirror = info
        .cannot_mirror
        .as_deref()
        .map_or("yes".into(), |why| format!("no: {why}"));
    let _ = writeln!(out, "can mirror   {mirror}");
    out
}

pub(super) fn host_status(status: &HostStatus) -> String {
    let mut out = format!("host {} (QEMU {})\n", status.host.name, status.host.qemu);
    if let Some(why) = &status.host.cannot_mirror {
        let _ = writeln!(out, "  WARNING cannot mirror: {why}");
    }
    if status.partners.is_empty() {
        out.push_str("no partners; make a link with `pollux link create`\n");
    }
    for p in &status.partners {
        let session = if p.connected {
            "connected"
        } else {
            "not connected"
        };
        let heard = p.heard_us_ago.map_or("never heard".into(), |us| {
            format!("heard {} ago", micros(us))
        });
        let rtt = p
            .rtt_us
            .map_or(String::new(), |us| format!(", round trip {}", micros(us)));
        let _ = writeln!(
            out,
            "partner {}: {session}, {}, {heard}{rtt}",
            p.name, p.verdict
        );
        if let Some(e) = p.last_error.as_ref().filter(|_| !p.connected) {
            let _ = writeln!(out, "  {e}");
        }
        if !p.realtime {
            let _ = writeln!(out, "  WARNING heartbeats run without real-time priority");
        }
    }
    out.push_str(&vm_table(&status.vms));
    out
}

pub(super) fn vm_table(vms: &[VmStatus]) -> String {
    if vms.is_empty() {
        return "no VMs; take one in with `pollux vm create`\n".into();
    }
    let mut out = format!(
        "{:<16} {:<8} {:<14} {:<10} {:>4} {:>9} {:>9} {:>7}\n",
        "VM", "ROLE", "STATE", "PROTECTION", "GEN", "COMMITTED", "LAG", "AGE"
    );
    for vm in vms {
        let role = match vm.role {
            Role::Primary => "primary",
            Role::Standby => "standby",
            Role::Stopped => "-",
        };
        let lag = vm
            .lag_us
            .filter(|_| vm.role == Role::Primary)
            .map_or("-".into(), micros);
        let _ = writeln!(
            out,
            "{:<16} {:<8} {:<14} {:<10} {:>4} {:>9} {:>9} {:>7}",
            vm.name,
            role,
            vm.state,
            vm.protection,
            vm.generation,
            vm.committed,
            lag,
            micros(vm.age_us)
        );
        for warning in &vm.warnings {
            let _ = writeln!(out, "  WARNING {warning}");
        }
    }
    out
}

fn row(out: &mut String, name: &str, p: Percentiles, show: fn(u64) -> String) {
    let _ = writeln!(
        out,
        "  {name:<22} {:>10} {:>10} {:>10} {:>10}",
        show(p.p50),
        show(p.p90),
        show(p.p99),
        show(p.max)
    );
}

pub(super) fn vm_details(vm: &VmStatus) -> String {
    let mut out = vm_table(std::slice::from_ref(vm));
    let _ = writeln!(out, "uuid        {}", vm.uuid);
    if let Some(partner) = &vm.partner {
        let _ = writeln!(out, "partner     {partner}");
    }
    let _ = writeln!(out, "memory      {} MiB", vm.memory_bytes >> 20);
    if let Some(bytes) = vm.resident_bytes {
        let _ = writeln!(out, "resident    {} MiB", bytes >> 20);
    }
    for disk in &vm.disks {
        let _ = writeln!(out, "disk        {disk}");
    }
    if let Some(s) = &vm.seeding {
        let _ = writeln!(
            out,
            "seeding     {} of {} MiB, round {}",
            s.done_bytes >> 20,
            s.total_bytes >> 20,
            s.round
        );
    }
    if let Some(e) = &vm.epochs {
        let _ = writeln!(
            out,
            "epochs      {} committed; the last {}:\n  {:<22} {:>10} {:>10} {:>10} {:>10}",
            e.committed, e.window, "", "p50", "p90", "p99", "max"
        );
        row(&mut out, "pause", e.pause_us, micros);
        row(&mut out, "  stop", e.stop_us, micros);
        row(&mut out, "  capture", e.capture_us, micros);
        row(&mut out, "  save", e.save_us, micros);
        row(&mut out, "  cont", e.cont_us, micros);
        row(&mut out, "commit", e.commit_us, micros);
        row(&mut out, "replication lag", e.lag_us, micros);
        row(&mut out, "epoch length", e.length_us, micros);
        row(&mut out, "dirty pages", e.pages, |n| n.to_string());
        row(&mut out, "bytes on the wire", e.wire_bytes, |n| {
            n.to_string()
        });
    }
    if let Some(e) = vm.epochs.as_ref().and_then(|e| e.encoding.as_ref()) {
        let _ = writeln!(
            out,
            "encoding    {} -> {} KiB ({:.1} to 1), {} an epoch; pages: {} zero, {} unchanged, {} differences, {} compressed, {} as they are",
            e.raw_bytes >> 10,
            e.encoded_bytes >> 10,
            e.ratio().unwrap_or(1.0),
            micros(e.encode_us.p50),
            e.pages_zero,
            e.pages_unchanged,
            e.pages_delta,
            e.pages_compressed,
            e.pages_raw,
        );
    }
    if let Some(lag) = &vm.link_lag {
        let drains = lag.drains_us.map_or("?".into(), micros);
        let _ = writeln!(
            out,
            "links       behind by {} KiB, {drains}; the guest is held back {} % of its time",
            lag.bytes >> 10,
            lag.held_permille / 10
        );
    }
    if let Some(f) = &vm.last_failover {
        let span = |from: u64, to: u64| micros(to.saturating_sub(from) / 1000);
        let _ = writeln!(
            out,
            "{}    from epoch {} of generation {}: detection {}, claim {}, promotion {}",
            f.kind,
            f.from_epoch,
            f.from_generation,
            span(f.last_heard_ns, f.suspected_ns),
            span(f.claim_started_ns, f.claim_won_ns),
            span(f.promote_started_ns, f.running_ns),
        );
    }
    if !vm.events.is_empty() {
        out.push_str("events (seconds since the host's start)\n");
    }
    for event in vm.events.iter().rev().take(20).rev() {
        let ms = event.at_ns / 1_000_000;
        let _ = writeln!(out, "  {:>8}.{:03}  {}", ms / 1000, ms % 1000, event.what);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::micros;

    #[test]
    fn durations_read_well() {
        let shown: Vec<_> = [0, 999, 1_234, 9_999, 12_345, 9_999_999, 12_000_000]
            .map(micros)
            .into();
        assert_eq!(
            shown,
            [
                "0 us", "999 us", "1.23 ms", "9.99 ms", "12 ms", "9999 ms", "12 s"
            ]
        );
    }
}
