//! The test guest as the lab's VM: where its images are, and its spec.

use super::super::env::{EnvError, Service, Setting};
use super::{DISK_BYTES, GUEST, VM_NAME};
use std::path::{Path, PathBuf};

/// What the lab's VM is like.
#[derive(Debug, Clone)]
pub struct Guest {
    /// Folder with `vmlinuz`, `initrd` and `initrd-redis`.
    pub images: PathBuf,
    /// Guest RAM, MiB.
    pub memory_mib: u64,
    /// vCPUs.
    pub vcpus: u8,
    /// Machine type as in a spec.
    pub machine: String,
    /// More for the kernel's command line.
    pub cmdline: String,
}

impl Guest {
    /// The test guest in `images`: 512 MiB, one vCPU.
    #[must_use]
    pub fn new(images: &Path) -> Self {
        Self {
            images: images.into(),
            memory_mib: 512,
            vcpus: 1,
            machine: "auto".into(),
            cmdline: String::new(),
        }
    }

    /// The folder with the images: `POLLUX_GUEST`, else `target/guest/current` under the
    /// working folder or beside the running program.
    ///
    /// # Errors
    /// If there is none.
    pub fn find_images() -> Result<PathBuf, EnvError> {
        let beside = std::env::current_exe().ok().and_then(|exe| {
            let target = exe
                .ancestors()
                .find(|p| p.file_name().is_some_and(|n| n == "target"))?;
            Some(target.join("guest/current"))
        });
        let candidates = [
            std::env::var_os("POLLUX_GUEST").map(PathBuf::from),
            Some("target/guest/current".into()),
            beside,
        ];
        candidates
            .into_iter()
            .flatten()
            .find(|p| p.join("vmlinuz").exists())
            .and_then(|p| p.canonicalize().ok())
            .ok_or_else(|| {
                EnvError::new(
                    "finding the test guest",
                    "there is no target/guest/current here; run `make setup`, or name its folder in POLLUX_GUEST",
                )
            })
    }

    /// The VM's spec, TOML, for this load and service.
    pub(super) fn spec(&self, setting: &Setting) -> String {
        let (modes, initrd) = match setting.service {
            Service::Counter => ("counter,disk,memory,net,cpu", "initrd"),
            Service::Redis => ("counter,disk,memory,net,cpu,redis", "initrd-redis"),
        };
        let address = std::net::Ipv4Addr::from(GUEST);
        // Under TCG the guest's TSC is the host's, and a microvm has nothing to measure it by.
        let tsc = crate::interpose::checkpoint::ticks_per_second() / 1000;
        let load = &setting.load;
        let images = self.images.display();
        format!(
            r#"name = "{VM_NAME}"
uuid = "d0d0cafe-0000-4000-8000-00000000d111"
memory = "{} MiB"
vcpus = {}
machine = "{}"
accel = "tcg"
kernel = "{images}/vmlinuz"
initrd = "{images}/{initrd}"
cmdline = "console=ttyS0 quiet oops=panic reboot=t tsc=reliable no_timer_check cryptomgr.notests rcupdate.rcu_expedited=1 tsc_early_khz={tsc} pollux.ip={address}/24 pollux.mode={modes} pollux.disk_iops={} pollux.mem_pages_s={} pollux.cpu_threads=0 {}"
[[disk]]
name = "data"
path = "{VM_NAME}.raw"
size = "{} MiB"
durability = "memory"
[[nic]]
name = "lan"
bridge = "{}"
[mirror]
audit = {}
"#,
            self.memory_mib,
            self.vcpus,
            self.machine,
            load.disk_iops,
            load.mem_pages_s,
            self.cmdline,
            DISK_BYTES >> 20,
            crate::lab::HOST_BRIDGE,
            setting.audit,
        )
    }
}
