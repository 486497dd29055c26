//! Where the fuzzers begin: small valid inputs of each target, made by the code that writes them
//! where there is such code. The corpus holds them under their names.

use super::decisions::name;
use crate::ha::report::{Heard, Path, RegistryView, Report};
use crate::ha::restart::{Candidate, Plan, Target, place};
use crate::ha::state::{Coordinator, Member, PoolState, Proof, Standing};
use crate::ha::time::Millis;
use crate::mirror::VmRecord;
use crate::pool::spec::RestartPriority;
use crate::pool::spec::VmSpec;
use crate::pool::{Generation, HostId, Incarnation, Seq, VmId};
use std::collections::BTreeMap;

/// An input and its name.
pub type Seed = (&'static str, Vec<u8>);

const HOST_FILE: &str = "\
name = \"a\"
registry_dir = \"r\"
detection_ms = 200
";

const HOST_STATEFILE: &str = "\
name = \"a\"
[registry]
kind = \"statefile\"
disks = [\"/dev/sdb\", \"/dev/sdc\", \"/dev/sdd\"]
slot = 0
[pool]
networks = [\"management\", \"private\"]
devices = { private = \"eth1\" }
gateway = \"10.77.0.1\"
fencing = \"fencing.toml\"
watchdog = \"/dev/watchdog\"
timing = { lease_ms = 6000 }
[[pool.host]]
name = \"a\"
id = 0
addresses = { management = \"10.77.0.101\", private = \"[fd00::1]:7000\" }
[[pool.host]]
name = \"b\"
id = 1
addresses = { management = \"10.77.0.102\" }
";

const HOST_ETCD: &str = "\
name = \"a\"
[registry]
kind = \"etcd\"
endpoints = [\"https://10.0.0.1:2379\"]
pool = \"p\"
ca = \"ca.pem\"
";

const FENCING: &str = "\
agents_dir = \"/run/lab/agents\"
[[host]]
name = \"b\"
[[host.level]]
[[host.level.device]]
agent = \"fence_ipmilan\"
timeout_s = 40
retries = 1
password_file = \"/etc/pollux/b-bmc\"
parameters = { ip = \"192.0.2.7\", username = \"pollux\", lanplus = \"1\" }
[[host.level]]
[[host.level.device]]
agent = \"fence_lab\"
parameters = { plug = \"b\" }
";

const METADATA: &str = "<?xml version=\"1.0\" ?>
<resource-agent name=\"fence_lab\"><actions>
<action name=\"on\" automatic=\"0\"/>
<action name='off' />
<action  timeout=\"1\" name=\"status\" />
</actions></resource-agent>
";

const SCENARIO: &str = "\
about = \"every kind of sentence\"
[[case]]
name = \"faults\"
hosts = [3, 5]
registry = \"statefile-3\"
fencing = \"1.5 s\"
stalls = \"100 ms\"
run = \"1 min\"
seeds_max = 5
events = [
 \"1 s: freeze the coordinator for 20 s\", \"2 s: cut a from b\", \"3 s: cut a to c one way\",
 \"4 s: cut the management network of another host\", \"5 s: heal the networks\",
 \"6 s: lose 3 percent of all packets\", \"7 s: take the registry from all\",
 \"8 s: give the registry back to all\", \"9 s: take disk 1 from a\", \"10 s: give disk 1 back to a\",
 \"11 s: take the gateway from b\", \"12 s: give the gateway back to b\", \"13 s: crash c\",
 \"14 s: power c on\",
]
expect = [
 \"the VMs of c may restart within 15 s\", \"the VMs of a are not restarted\", \"nobody else resets\",
 \"all stay\", \"c is given up within 4 s\", \"c is proved dead by its power\",
]
random = { faults = 3, within = \"20 s\" }
[[case]]
name = \"etcd\"
hosts = 2
registry = \"etcd\"
watchdog = false
events = [\"5 s: stop the leader of etcd\"]
expect = [\"nobody resets\", \"all are members within 1 h\", \"another host coordinates within 9 s\"]
xenserver = \"50 s\"
";

const SPEC: &str = "\
name = \"orders\"
uuid = \"6f1c0a52-3f0e-4b0c-9a39-3d6a2c1f6f11\"
memory = \"512 MiB\"
vcpus = 2
kernel = \"/boot/vmlinuz\"
initrd = \"/boot/initrd.img\"
cmdline = \"console=ttyS0\"
protection = \"mirrored\"
[[disk]]
name = \"root\"
path = \"/var/lib/pollux/orders.raw\"
size = \"4 GiB\"
[[nic]]
name = \"lan\"
bridge = \"br0\"
[mirror]
partner = \"host-b\"
";

/// The seeds of the target of this name.
#[must_use]
pub fn seeds(target: &str) -> Vec<Seed> {
    let text = |name, text: &str| (name, text.as_bytes().to_vec());
    match target {
        "beat_network" => crate::beat::fuzz::network_seeds(),
        "beat_storage" => crate::beat::fuzz::storage_seeds(),
        "etcd_answer" => crate::registry::etcd::fuzz::answer_seeds(),
        "etcd_watch" => vec![text("stream", crate::registry::etcd::fuzz::STREAM)],
        "fence_config" => vec![text("levels", FENCING)],
        "fence_metadata" => vec![text("agent", METADATA)],
        "ha_report" => reports(),
        "host_config" => vec![
            text("file", HOST_FILE),
            text("statefile", HOST_STATEFILE),
            text("etcd", HOST_ETCD),
        ],
        "pool_key" => crate::beat::fuzz::keys_seeds(),
        "pool_state" => states(),
        "restart_plan" => plans(),
        "scenario" => vec![text("sentences", SCENARIO)],
        "statefile_block" => crate::registry::statefile::fuzz::block_seeds(),
        "statefile_value" => crate::registry::statefile::fuzz::value_seeds(),
        "vm_record" => records(),
        "vm_spec" => {
            let spec = VmSpec::parse(SPEC, "seed").map(|spec| spec.to_toml());
            vec![
                text("written", SPEC),
                text("emitted", &spec.unwrap_or_default()),
            ]
        }
        _ => Vec::new(),
    }
}

fn reports() -> Vec<Seed> {
    let heard = |ages: &[(Path, u64)]| Heard {
        incarnation: Incarnation(7),
        seq: Seq(41),
        ages: ages.iter().map(|(path, ms)| (*path, Millis(*ms))).collect(),
    };
    let (net, disk) = (Path::Network(0), Path::Storage(0));
    let first = Report {
        host: HostId(1),
        incarnation: Incarnation(3),
        seq: Seq(1),
        heard: BTreeMap::new(),
        gateway_age: None,
        registry: RegistryView {
            age: None,
            version: u64::MAX,
            ..RegistryView::default()
        },
        storage_ok: true,
        standby_lag: None,
        weight: 0,
        watchdog: None,
        farewell: false,
    };
    let usual = Report {
        seq: Seq(99),
        heard: [
            (HostId(0), heard(&[(net, 120), (disk, 490)])),
            (HostId(2), heard(&[(Path::Network(3), 0)])),
        ]
        .into(),
        gateway_age: Some(Millis(40)),
        registry: RegistryView {
            age: Some(Millis(210)),
            version: 12,
            vouches: [(HostId(0), (Incarnation(1), Seq(5)))].into(),
            promise: true,
            promised: [HostId(0), HostId(2)].into(),
            former: true,
        },
        standby_lag: Some(Millis(10)),
        weight: 77,
        watchdog: Some(Millis(5000)),
        ..first.clone()
    };
    let farewell = Report {
        farewell: true,
        storage_ok: false,
        ..usual.clone()
    };
    vec![
        ("first", first.encode()),
        ("usual", usual.encode()),
        ("farewell", farewell.encode()),
    ]
}

fn states() -> Vec<Seed> {
    let member = |n: u8, standing, former| {
        let member = Member {
            name: name(n),
            incarnation: Incarnation(4),
            standing,
            former,
            watchdog: (n > 0).then_some(Millis(5000)),
            unbound: (n > 1).then_some(9),
        };
        (HostId(n), member)
    };
    let watchdog = Millis(5000);
    let mut state = PoolState {
        term: 2,
        coordinator: Some(Coordinator {
            host: HostId(0),
            incarnation: Incarnation(4),
        }),
        members: [
            member(0, Standing::In, Some((Incarnation(3), Proof::PowerOff))),
            member(1, Standing::Ousted, None),
            member(2, Standing::Dead(Proof::WatchdogBound { watchdog }), None),
            member(3, Standing::Away, Some((Incarnation(1), Proof::Farewell))),
            member(4, Standing::Dead(Proof::LeaseRevoked), None),
        ]
        .into(),
        ..PoolState::default()
    };
    state.admit(|_, _| true);
    state.decide(HostId(0), HostId(1), "ousted", "nobody hears it");
    vec![
        ("new", PoolState::default().to_bytes()),
        ("all", state.to_bytes()),
    ]
}

fn plans() -> Vec<Seed> {
    let vm = |n: u8, memory| Candidate {
        vm: VmId([n; 16]),
        name: format!("v{n}"),
        memory,
        priority: RestartPriority::Always,
        order: n.into(),
        delay_s: 10,
        version: 7,
    };
    let target = Target {
        host: name(1),
        memory: 4 << 30,
        used: 1 << 30,
    };
    let mut plan = Plan::default();
    let vms = vec![vm(0, 2 << 30), vm(1, 2 << 30)];
    place(&mut plan, &name(0), "its power is off", vms, &[target]);
    vec![
        ("new", Plan::default().to_bytes()),
        ("placed-and-left", plan.to_bytes()),
    ]
}

fn records() -> Vec<Seed> {
    let solo = VmRecord::started(name(0), None);
    let mirrored = VmRecord {
        generation: Generation(9),
        standby: Some(name(1)),
        ..solo.clone()
    };
    vec![("solo", solo.to_bytes()), ("mirrored", mirrored.to_bytes())]
}
