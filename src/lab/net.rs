//! The lab's cables: scripts for `ip -batch` (set-up, not in a hurry), ioctls (cutting
//! and healing, at once) and `tc` (slowing).
//!
//! Every cable runs through a switch (a bridge) in `outside`, the private links too:
//! one with two ports for each link. Cutting takes the port off the switch, so frames
//! are lost in silence and the carrier stays up at both ends: the harder failure, and
//! the one a dead switch gives. Unplugging sets the ports down, and both ends lose
//! their carrier: what a pulled cable gives.

use super::LabError;
use super::spec::{GATEWAY, HOST_BRIDGE, HostNet, LAN_BRIDGE, LabPlan, PREFIX_LEN};
use super::wire::Wiring;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The lan end inside a host.
const HOST_LAN_PORT: &str = "lan";
/// No spanning tree, forwarding from the first frame on, no multicast learning.
const BRIDGE_OPTIONS: &str = "type bridge stp_state 0 forward_delay 0 mcast_snooping 0";
/// linux/sockios.h
const SIOCBRADDIF: libc::c_ulong = 0x89a2;
/// linux/sockios.h
const SIOCBRDELIF: libc::c_ulong = 0x89a3;

/// A port of a switch in `outside`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Port {
    pub(super) bridge: String,
    pub(super) name: String,
}

/// A program of iproute2.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

/// The program `ip`.
pub(super) fn find_ip() -> Result<PathBuf, LabError> {
    find("ip").ok_or(LabError::IpMissing)
}

/// Run a script in the namespace of the caller.
pub(super) fn ip_batch(ip: &Path, script: &str, force: bool) -> Result<(), String> {
    let mut command = Command::new(ip);
    if force {
        command.arg("-force");
    }
    command
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = command
        .spawn()
        .map_err(|e| format!("starting {}: {e}", ip.display()))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin
            .write_all(script.as_bytes())
            .map_err(|e| format!("writing to ip: {e}"))?;
    }
    let output = child
        .wait_with_output()
        .map_err(|e| format!("waiting for ip: {e}"))?;
    if output.status.success() || force {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    // iproute2 says "Command failed -:LINE"; name the command itself.
    let line = said
        .rsplit_once("-:")
        .and_then(|(_, n)| n.trim().parse::<usize>().ok());
    let command = line
        .and_then(|n| script.lines().nth(n.saturating_sub(1)))
        .unwrap_or("?");
    Err(format!(
        "`ip {command}`: {}",
        said.lines().next().unwrap_or("failed without a word")
    ))
}

/// No IPv6 in this namespace: the lab's plan is IPv4, and router solicitations and
/// duplicate address detection would only be noise on the cables.
pub(super) fn disable_ipv6() {
    for which in ["all", "default"] {
        // Absent where the kernel has no IPv6, which is as good.
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6"), "1");
    }
}

/// Everything of `outside` that does not depend on hosts being up.
pub(super) fn outside_script(plan: &LabPlan) -> String {
    let mut script = format!(
        "link set lo up\n\
         link add {LAN_BRIDGE} address {} {BRIDGE_OPTIONS}\n\
         addr add {GATEWAY}/{PREFIX_LEN} dev {LAN_BRIDGE}\n\
         link set {LAN_BRIDGE} up\n",
        mac(0, 0, 0)
    );
    for host in &plan.hosts {
        for (port, _, _) in private_ports(plan, host)
            .into_iter()
            .filter(|(_, partner, _)| host.index < *partner)
        {
            let _ = writeln!(
                script,
                "link add {} {BRIDGE_OPTIONS}\nlink set {} up",
                port.bridge, port.bridge
            );
        }
    }
    script
}

/// Cables from the switches in `outside` into the namespaces of the host whose init is `pid`.
pub(super) fn wire_script(plan: &LabPlan, host: &HostNet, pid: i32) -> String {
    let lan = lan_port(host);
    let mut script = format!(
        "link add {} type veth peer name {HOST_LAN_PORT} netns {pid}\nlink set {} up\n",
        lan.name, lan.name
    );
    for (port, _, link) in private_ports(plan, host) {
        let l = &host.links[link];
        // A fixed address: partners' ARP entries outlive a power cycle.
        let _ = writeln!(
            script,
            "link add {} mtu {mtu} type veth peer name {} address {} mtu {mtu} netns {pid}\nlink set {} up",
            port.name,
            l.interface,
            mac(1 + l.index, l.local.octets()[2], l.local.octets()[3]),
            port.name,
            mtu = l.mtu,
        );
    }
    script
}

/// Remove a host's cables.
pub(super) fn unwire_script(plan: &LabPlan, host: &HostNet) -> String {
    ports(plan, host)
        .iter()
        .fold(String::new(), |script, port| {
            script + "link del " + &port.name + "\n"
        })
}

/// The network inside a host.
pub(super) fn inside_script(host: &HostNet) -> String {
    let mut script = format!(
        "link set lo up\n\
         link add {HOST_BRIDGE} address {} {BRIDGE_OPTIONS}\n\
         link set {HOST_LAN_PORT} master {HOST_BRIDGE} up\n\
         link set {HOST_BRIDGE} up\n\
         addr add {}/{PREFIX_LEN} dev {HOST_BRIDGE}\n\
         route add default via {GATEWAY}\n",
        mac(0, 0, host.management.octets()[3]),
        host.management,
    );
    for link in &host.links {
        let _ = writeln!(
            script,
            "addr add {}/{PREFIX_LEN} dev {i}\nlink set {i} up",
            link.local,
            i = link.interface
        );
    }
    script
}

/// Locally administered addresses of the lab. Bridges get one too: by default a bridge
/// takes the lowest address among its ports and so changes it when a host dies.
fn mac(kind: u8, high: u8, low: u8) -> String {
    format!("02:70:6c:{kind:02x}:{high:02x}:{low:02x}")
}

/// All switch ports of a host.
pub(super) fn ports(plan: &LabPlan, host: &HostNet) -> Vec<Port> {
    let mut ports = vec![lan_port(host)];
    ports.extend(
        private_ports(plan, host)
            .into_iter()
            .map(|(port, _, _)| port),
    );
    ports
}

/// The host's port of the lan's switch.
pub(super) fn lan_port(host: &HostNet) -> Port {
    Port {
        bridge: LAN_BRIDGE.into(),
        name: format!("lan-{}", host.index),
    }
}

/// The host's ports of the private switches, each with the partner's index and the
/// place of the link in `host.links`.
pub(super) fn private_ports(plan: &LabPlan, host: &HostNet) -> Vec<(Port, usize, usize)> {
    let mut found = Vec::new();
    for (place, link) in host.links.iter().enumerate() {
        let Some(partner) = plan.hosts.iter().find(|h| h.name == link.partner) else {
            continue;
        };
        let (low, high) = (host.index.min(partner.index), host.index.max(partner.index));
        // At most "ic7-14-15-15": 12 of the 15 bytes an interface name may have.
        let bridge = format!("ic{}-{low}-{high}", link.index);
        let name = format!("{bridge}-{}", host.index);
        found.push((Port { bridge, name }, partner.index, place));
    }
    found
}

/// Plug a port in, or out, in either way, at once.
pub(super) fn wire_port(port: &Port, wiring: Wiring) -> io::Result<()> {
    set_up(port, wiring != Wiring::Unplugged)?;
    set_port(port, wiring != Wiring::Silent)
}

/// An ifreq with this interface name, which is at most 12 of 16 bytes here.
fn request_for(name: &str) -> libc::ifreq {
    // SAFETY: ifreq is plain data for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request
}

/// Set a port up or down: down, the end inside the host loses its carrier (netdevice(7)).
fn set_up(port: &Port, up: bool) -> io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    let mut request = request_for(&port.name);
    // SAFETY: `request` is a live ifreq with a zero-ended name; the kernel fills its flags.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let flag = libc::c_short::try_from(libc::IFF_UP).unwrap_or(1);
    // SAFETY: the kernel has just filled the flags of this union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = if up { flags | flag } else { flags & !flag };
    // SAFETY: as above; the kernel only reads it.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// What a slowed port may send at once, bytes: two of the largest packets that a host
/// hands over whole (64 KiB, GSO), so that none is refused for its size (tc-tbf(8)).
const SHAPE_BURST_BYTES: u64 = 128 << 10;
/// How long a packet waits in a slowed port before it is dropped: a shallow switch's queue.
const SHAPE_QUEUE_MS: u64 = 50;

/// Let a port carry this many bytes a second towards its host, or all it can.
pub(super) fn shape_port(port: &Port, bytes_per_s: Option<u64>) -> Result<(), String> {
    let tc = find("tc").ok_or("the program `tc` is missing; install iproute2")?;
    let mut command = Command::new(&tc);
    match bytes_per_s {
        Some(rate) => command
            .args(["qdisc", "replace", "dev", &port.name, "root", "tbf", "rate"])
            .arg(format!("{}bit", rate.saturating_mul(8)))
            .args(["burst", &SHAPE_BURST_BYTES.to_string()])
            .arg("latency")
            .arg(format!("{SHAPE_QUEUE_MS}ms")),
        None => command.args(["qdisc", "del", "dev", &port.name, "root"]),
    };
    let output = command
        .output()
        .map_err(|e| format!("starting {}: {e}", tc.display()))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(format!(
            "tc: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        ))
    }
}

/// Put a port on its switch or take it off, at once. Being there (or not) already is fine.
pub(super) fn set_port(port: &Port, on: bool) -> io::Result<()> {
    let index = nix::net::if_::if_nametoindex(port.name.as_str())?;
    // Any socket of the namespace will do for the ioctl.
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    let mut request = request_for(&port.bridge);
    request.ifr_ifru.ifru_ifindex = index.cast_signed();
    let which = if on { SIOCBRADDIF } else { SIOCBRDELIF };
    // SAFETY: `request` is a live ifreq with a zero-ended name (interface names here are
    // at most 12 of 16 bytes); the kernel only reads it.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), which, &raw mut request) };
    if done == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EBUSY) if on => Ok(()),
        Some(libc::EINVAL) if !on => Ok(()),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::LabSpec;
    use crate::pool::HostName;

    #[test]
    fn every_cable_has_two_ends_on_one_switch() {
        let mut spec = LabSpec::new("t", Box::new(|_, _| String::new())).unwrap();
        spec.hosts = (0..16)
            .map(|i| HostName::new(format!("h{i}")).unwrap())
            .collect();
        spec.private_links = 8;
        let plan = spec.plan().unwrap();
        let mut per_bridge = std::collections::BTreeMap::<String, usize>::new();
        for host in &plan.hosts {
            for (port, _, _) in private_ports(&plan, host) {
                assert!(port.name.len() <= 15, "{}", port.name);
                *per_bridge.entry(port.bridge).or_default() += 1;
            }
        }
        assert_eq!(per_bridge.len(), 120 * 8);
        assert!(per_bridge.values().all(|&ends| ends == 2));
        let script = outside_script(&plan);
        assert!(
            per_bridge
                .keys()
                .all(|b| script.matches(&format!("link add {b} ")).count() == 1)
        );
    }

    #[test]
    fn a_failing_ip_command_is_named() {
        let Ok(ip) = find_ip() else { return };
        let error =
            ip_batch(&ip, "link show dev lo\nlink show dev no-such-if\n", false).unwrap_err();
        assert!(error.contains("ip link show dev no-such-if"), "{error}");
    }
}
