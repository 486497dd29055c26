//! What makes the hosts of a lab a pool: networks to hear each other on, keys, a watchdog that
//! really resets a host, and a fence agent that really takes its power.
//!
//! The watchdog of a host is a process of the keeper's, outside of the host; when it fires the
//! host dies at once and boots again after [`BOOT_TIME`]. The fence agent asks the keeper to cut
//! the power; a host that was fenced stays off until somebody gives it power again.

use super::handle::Lab;
use super::launch::{StepError, step};
use super::spec::{HostNet, LabPlan};
use super::wire::HostPower;
use super::{FENCE_COMMAND, LabError};
use crate::beat::{PoolKeys, save_first_keys};
use crate::pool::HostName;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::Read;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// From a reset by the watchdog until the host has power again: as firmware takes, and long after
/// the watchdog bound, so that a death is proved by it and not by the next life.
pub(super) const BOOT_TIME: Duration = Duration::from_secs(20);
/// A watchdog that does not listen by then will not.
const WATCHDOG_UP: Duration = Duration::from_secs(5);
/// Between two looks whether it does.
const WATCHDOG_LOOK: Duration = Duration::from_millis(1);
/// Name of the network that every host is on.
pub const MANAGEMENT: &str = "management";
/// Private links become heartbeat networks up to this many pairs: with the management network a
/// pool has four.
const PAIRS_MAX: usize = 3;
/// The agent's name; agents are looked up by it.
const AGENT: &str = "fence_lab";
/// Longest input of the agent, bytes.
const INPUT_BYTES_MAX: u64 = 64 << 10;

/// How the hosts of a lab are a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolLab {
    /// Every host has a watchdog with this timeout.
    pub watchdog: Option<Duration>,
    /// Hosts can be switched off by a fence agent.
    pub fencing: bool,
}

/// The pool as one host is told of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolNet {
    /// Networks in order.
    pub networks: Vec<String>,
    /// All hosts.
    pub hosts: Vec<PoolNetHost>,
    /// Socket of this host's watchdog, and its timeout in milliseconds.
    pub watchdog: Option<(PathBuf, u64)>,
    /// The file that says how hosts are fenced.
    pub fencing: Option<PathBuf>,
}

/// A host as its pool is told of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolNetHost {
    /// Its name.
    pub name: HostName,
    /// Its number.
    pub id: usize,
    /// Its address on each network it is on.
    pub addresses: BTreeMap<String, Ipv4Addr>,
}

/// Tell each of `hosts` of the pool they make.
pub(super) fn plan(pool: PoolLab, dir: &Path, hosts: &mut [HostNet]) {
    let count = hosts.len();
    let pairs: Vec<(usize, usize)> = (0..count)
        .flat_map(|low| (low + 1..count).map(move |high| (low, high)))
        .collect();
    let pairs = if pairs.len() <= PAIRS_MAX && hosts.iter().all(|host| !host.links.is_empty()) {
        pairs
    } else {
        Vec::new()
    };
    let name = |pair: &(usize, usize)| format!("{}-{}", hosts[pair.0].name, hosts[pair.1].name);
    let networks: Vec<String> = std::iter::once(MANAGEMENT.to_owned())
        .chain(pairs.iter().map(name))
        .collect();
    let known = hosts.iter().map(|host| {
        let mut addresses = BTreeMap::from([(MANAGEMENT.to_owned(), host.management)]);
        for pair in pairs.iter().filter(|(a, b)| [*a, *b].contains(&host.index)) {
            let other = &hosts[if pair.0 == host.index { pair.1 } else { pair.0 }].name;
            let link = host.links.iter().find(|link| link.partner == *other);
            addresses.extend(link.map(|link| (name(pair), link.local)));
        }
        PoolNetHost {
            name: host.name.clone(),
            id: host.index,
            addresses,
        }
    });
    let known: Vec<PoolNetHost> = known.collect();
    for host in hosts {
        let watchdog = pool.watchdog.map(|timeout| {
            let ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
            (host.dir.join("watchdog.sock"), ms)
        });
        host.pool = Some(PoolNet {
            networks: networks.clone(),
            hosts: known.clone(),
            watchdog,
            fencing: pool.fencing.then(|| dir.join("fence.toml")),
        });
    }
}

impl PoolNet {
    /// The table `[pool]` of a host's configuration.
    #[must_use]
    pub fn to_toml(&self, gateway: Ipv4Addr) -> String {
        let path = |p: &Path| toml::Value::String(p.display().to_string()).to_string();
        let networks: Vec<String> = self
            .networks
            .iter()
            .map(|name| format!("\"{name}\""))
            .collect();
        let mut text = format!(
            "\n[pool]\nnetworks = [{}]\ngateway = \"{gateway}\"\n",
            networks.join(", ")
        );
        if let Some((socket, timeout_ms)) = &self.watchdog {
            text.push_str(&format!(
                "watchdog = {}\ntiming = {{ watchdog_ms = {timeout_ms} }}\n",
                path(socket)
            ));
        }
        if let Some(file) = &self.fencing {
            text.push_str(&format!("fencing = {}\n", path(file)));
        }
        for host in &self.hosts {
            let addresses: Vec<String> = host
                .addresses
                .iter()
                .map(|(network, address)| format!("{network} = \"{address}\""))
                .collect();
            text.push_str(&format!(
                "\n[[pool.host]]\nname = \"{}\"\nid = {}\naddresses = {{ {} }}\n",
                host.name,
                host.id,
                addresses.join(", ")
            ));
        }
        text
    }
}

/// Make what the hosts of a pool find when they get power: keys, and how to fence.
pub(super) fn prepare(plan: &LabPlan, program: &Path) -> Result<(), LabError> {
    let Some(pool) = plan.hosts.first().and_then(|host| host.pool.as_ref()) else {
        return Ok(());
    };
    let key = |reason: String| LabError::Spec(format!("the pool's keys: {reason}"));
    let keys = PoolKeys::create().map_err(|e| key(e.to_string()))?;
    for host in &plan.hosts {
        save_first_keys(&host.state_dir, &keys).map_err(|e| key(e.to_string()))?;
    }
    if let Some(file) = &pool.fencing {
        let agents = plan.dir.join("agents");
        let io = |path: &Path| LabError::io(format!("making {}", path.display()));
        fs::create_dir_all(&agents).map_err(io(&agents))?;
        let agent = agents.join(AGENT);
        let script = format!(
            "#!/bin/sh\nexec '{}' {FENCE_COMMAND} '{}'\n",
            program.display(),
            plan.dir.display()
        );
        fs::write(&agent, script).map_err(io(&agent))?;
        fs::set_permissions(&agent, fs::Permissions::from_mode(0o755)).map_err(io(&agent))?;
        fs::write(file, fence_toml(plan, &agents)).map_err(io(file))?;
    }
    Ok(())
}

fn fence_toml(plan: &LabPlan, agents: &Path) -> String {
    let dir = toml::Value::String(agents.display().to_string());
    let mut text = format!("agents_dir = {dir}\n");
    for host in &plan.hosts {
        text.push_str(&format!(
            "\n[[host]]\nname = \"{0}\"\n[[host.level]]\n[[host.level.device]]\nagent = \"{AGENT}\"\ntimeout_s = 10\nparameters = {{ plug = \"{0}\" }}\n",
            host.name
        ));
    }
    text
}

/// Start the watchdog of a host whose init is `init`, in the keeper.
pub(super) fn start_watchdog(host: &HostNet, init: Pid) -> Result<(), StepError> {
    let Some((socket, timeout_ms)) = host.pool.as_ref().and_then(|pool| pool.watchdog.as_ref())
    else {
        return Ok(());
    };
    let what = format!("starting the watchdog of host `{}`", host.name);
    // The last power-on's.
    let _ = fs::remove_file(socket);
    Command::new("/proc/self/exe")
        .arg("watchdog")
        .arg("--socket")
        .arg(socket)
        .args(["--timeout-ms", &timeout_ms.to_string()])
        .args(["--kill-pid", &init.to_string()])
        .stdin(Stdio::null())
        .spawn()
        .map_err(step(what.clone()))?;
    // Reaped like every other child of the keeper.
    let end = Instant::now() + WATCHDOG_UP;
    while !socket.exists() {
        if Instant::now() > end {
            return Err((what, format!("it does not listen at {}", socket.display())));
        }
        std::thread::sleep(WATCHDOG_LOOK);
    }
    Ok(())
}

/// The hidden subcommand `lab-fence DIR`: the fence agent of the lab in DIR (`FenceAgentAPI`):
/// what to do comes on standard input, the exit status says how it went.
#[must_use]
pub fn fence_main(args: &[OsString]) -> i32 {
    let Some(dir) = args.first() else {
        eprintln!("{AGENT}: started by the fencing of a lab's host only");
        return 1;
    };
    let mut input = String::new();
    if let Err(e) = std::io::stdin()
        .take(INPUT_BYTES_MAX)
        .read_to_string(&mut input)
    {
        eprintln!("{AGENT}: reading what to do: {e}");
        return 1;
    }
    match fence(Path::new(dir), &input) {
        Ok(code) => code,
        Err(reason) => {
            eprintln!("{AGENT}: {reason}");
            1
        }
    }
}

/// Exit status of `status` for a host without power.
const OFF: i32 = 2;

fn fence(dir: &Path, input: &str) -> Result<i32, String> {
    let told = |key: &str| {
        input.lines().find_map(|line| {
            let (name, value) = line.split_once('=')?;
            (name.trim() == key).then(|| value.trim().to_owned())
        })
    };
    let action = told("action").unwrap_or_else(|| "reboot".into());
    if action == "metadata" {
        println!(
            "<?xml version=\"1.0\" ?>\n<resource-agent name=\"{AGENT}\" shortdesc=\"Power of a lab's hosts\">\n<actions>\n<action name=\"on\"/>\n<action name=\"off\"/>\n<action name=\"status\"/>\n<action name=\"monitor\"/>\n<action name=\"metadata\"/>\n</actions>\n</resource-agent>"
        );
        return Ok(0);
    }
    let say = |e: LabError| e.to_string();
    let lab = Lab::open_at(dir).map_err(say)?;
    let host = told("plug").ok_or("no `plug` names the host")?;
    let host = HostName::new(host).map_err(|e| e.to_string())?;
    lab.host(&host).map_err(say)?;
    let power = || -> Result<HostPower, String> {
        let status = lab.status().map_err(say)?;
        let found = status.hosts.into_iter().find(|found| found.name == host);
        Ok(found.map_or(HostPower::Off, |found| found.power))
    };
    match action.as_str() {
        "monitor" => power().map(|_| 0),
        "status" => Ok(if power()? == HostPower::Off { OFF } else { 0 }),
        "off" => match lab.power_cut(&host) {
            Ok(_) | Err(LabError::HostState { .. }) if power()? == HostPower::Off => Ok(0),
            Ok(_) => Err(format!("host {host} has power again")),
            Err(e) => Err(say(e)),
        },
        "on" => match lab.power_on(&host) {
            Ok(_) => Ok(0),
            Err(_) if power()? != HostPower::Off => Ok(0),
            Err(e) => Err(say(e)),
        },
        other => Err(format!("action `{other}` is not known")),
    }
}
