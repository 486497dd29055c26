//! What tests of pools share: the status as a host knows it, and a VM that may be restarted.

use super::{Bed, Guest, eventually, host};
use pollux::api::pool::PoolStatus;
use pollux::api::types::Role;

pub fn status(bed: &Bed, name: &str) -> Option<PoolStatus> {
    bed.api(name).get("/v1/pool").ok()
}

/// Look until the pool is as wanted, as this host knows it.
pub fn wait(bed: &Bed, name: &str, what: &str, wanted: impl Fn(&PoolStatus) -> bool) -> PoolStatus {
    eventually(what, || status(bed, name).filter(|status| wanted(status)))
}

pub fn standing<'s>(status: &'s PoolStatus, name: &str) -> &'s str {
    let found = status.hosts.iter().find(|h| h.name.as_str() == name);
    &found.unwrap().standing
}

/// A VM that may be restarted, its disk where all hosts reach it, running on `a`.
pub fn movable(bed: &Bed) -> Guest {
    let shared = &bed.lab.host(&host("a")).unwrap().shared_dir;
    let mut guest = Guest::new();
    let image = shared.join(format!("{}.raw", guest.name));
    std::fs::File::create(&image)
        .unwrap()
        .set_len(guest.disk_bytes)
        .unwrap();
    guest.protection = "restart";
    let spec = guest.toml().replace(
        &format!("path = \"{}.raw\"", guest.name),
        &format!("path = \"{}\"\nkind = \"shared\"", image.display()),
    );
    bed.api("a").create(&spec).unwrap();
    bed.api("a").command(&guest.name, "start").unwrap();
    guest
}

/// Where it runs of `hosts`, if anywhere, asking only those that answer.
pub fn runs_on_of<'h>(bed: &Bed, vm: &str, hosts: &[&'h str]) -> Vec<&'h str> {
    let runs = |name: &&str| {
        let status = bed.api(name).vm(vm);
        status.is_ok_and(|status| status.role == Role::Primary)
    };
    hosts.iter().copied().filter(runs).collect()
}
