//! A mirrored pair on each kind of registry: the takeover after the loss of a host.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Bed, Guest, host};
use pollux::api::types::Role;
use pollux::lab::daemons::{host_config, up_linked};
use pollux::lab::{GATEWAY, Place};
use std::path::Path;
use std::process::{Child, Stdio};

/// Mirror a VM, cut the power of its host, and see that it counts on at the other.
fn survives(bed: &Bed, before: impl FnOnce()) {
    let (a, b) = (bed.api("a"), bed.api("b"));
    let vm = bed.vm(&Guest::new());
    let mut client = vm.start();
    a.protect(&vm.name).unwrap();
    let mirrored = a.wait_mirrored(&vm.name);
    let n = client.count_on(0, 5);
    before();
    let n = client.count_on(n, 5);
    bed.lab.power_cut(&host("a")).unwrap();
    client.count_on(n, 10);
    let status = b.wait(&vm.name, "promoted", |s| s.role == Role::Primary);
    assert!(status.generation > mirrored.generation, "{status:#?}");
}

#[test]
fn with_a_statefile_of_three_disks_one_may_be_lost_and_then_a_host() {
    let mut spec = Bed::spec();
    spec.statefile_disks = 3;
    let bed = Bed {
        lab: up_linked(spec).unwrap(),
    };
    let disks = bed.lab.host(&host("a")).unwrap().statefile.clone();
    assert_eq!(disks.len(), 3);
    survives(&bed, || {
        let lost = std::fs::File::options()
            .write(true)
            .open(&disks[1])
            .unwrap();
        lost.set_len(0).unwrap();
    });
    let check = bed.cli(
        "b",
        &[
            "statefile",
            "check",
            path(&disks[0]),
            path(&disks[1]),
            path(&disks[2]),
        ],
    );
    let told = String::from_utf8_lossy(&check.stdout);
    assert!(
        !check.status.success() && told.contains(path(&disks[1])),
        "{told}"
    );
}

/// etcd outside of both hosts, as the witness of the pair.
struct Witness(Child);

impl Drop for Witness {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn with_etcd_as_witness_a_pair_without_shared_storage_survives_the_loss_of_a_host() {
    let url = format!("http://{GATEWAY}:2379");
    let mut spec = Bed::spec();
    spec.statefile_disks = 0;
    let registry = format!(
        "[registry]\nkind = \"etcd\"\nendpoints = [\"{url}\"]\npool = \"lab\"\nallow_plain_http = true\n"
    );
    spec.host_config = Box::new(move |name, net| {
        let whole = host_config(name, net);
        let (before, _) = whole.split_once("[registry]").unwrap();
        format!("{before}{registry}")
    });
    let data = spec.dir.join("etcd");
    // The hosts come up without it, and say so; then it is there.
    let bed = Bed {
        lab: up_linked(spec).unwrap(),
    };
    let argv = [
        "etcd",
        "--data-dir",
        path(&data),
        "--listen-client-urls",
        &url,
        "--advertise-client-urls",
        &url,
        "--listen-peer-urls",
        "http://127.0.0.1:0",
        "--log-level",
        "error",
    ];
    let mut command = bed.lab.command(&Place::Outside, &argv);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let _witness = Witness(command.spawn().expect("etcd: run `make setup`"));
    survives(&bed, || ());
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}
