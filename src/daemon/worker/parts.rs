//! Everything a VM has on one host: QEMU, its monitors, RAM, disks and NICs.
//!
//! Made whole or not at all: whatever was made is given back when a later step fails or
//! when the parts are dropped (QEMU killed, RAM file and sockets removed, taps gone).

use super::{Env, WorkerConfig, WorkerEvent};
use crate::interpose::checkpoint::{CutOptions, Monitors};
use crate::interpose::disk::{
    self, Disk, DiskHooks, DiskOptions, DiskServer, Mode, Owner, Pulse, create_sparse,
};
use crate::interpose::net::{MacAddr, NetHooks, NetMode, NetPort, NetPortConfig, TapSource};
use crate::mirror::primary::PressureKind;
use crate::pool::Generation;
use crate::pool::spec::{Disk as DiskSpec, VmSpec};
use crate::vm::argv::{Side, VmPaths, command_line};
use crate::vm::process::{Qemu, SpawnOpts};
use crate::vm::qmp::Qmp;
use crate::vm::room;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use super::ingress::IngressTap;

/// How long a fresh QEMU may take to answer its monitor: 50 to 90 ms are usual
/// (QEMU.md section 5); a loaded host under TCG may need much longer.
const MONITOR_DEADLINE: Duration = Duration::from_secs(20);

/// Interface name of a tap: `p` + 8 digits of the uuid + `-` + NIC; the kernel allows 15 bytes.
fn tap_name(spec: &VmSpec, nic: usize) -> String {
    let id: String = spec.uuid.0[..4]
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    format!("p{id}-{nic}")
}

/// All of a VM on this host.
pub struct Parts {
    /// Where everything is.
    pub paths: VmPaths,
    /// The process. Dropped (killed) before the sockets it uses.
    pub qemu: Arc<Qemu>,
    /// One per disk of the spec.
    pub disks: Vec<Arc<Disk>>,
    /// One per NIC of the spec.
    pub ports: Vec<Arc<NetPort>>,
    /// Where frames delivered to the guest are told to the standby.
    pub ingress: Arc<IngressTap>,
    /// Image files, one per disk.
    pub images: Vec<PathBuf>,
    servers: Vec<DiskServer>,
}

/// The image file of a disk on this host.
pub fn image_path(env: &Env, disk: &DiskSpec) -> PathBuf {
    env.config.images_dir().join(&disk.path)
}

fn say<E: std::fmt::Display>(e: E) -> String {
    e.to_string()
}

impl Parts {
    /// Make everything and start QEMU: a primary runs at once, a standby waits. Also
    /// returns the monitor for queries and everything that is not urgent.
    ///
    /// # Errors
    /// What failed, on what, and what to do.
    pub fn make(
        env: &Arc<Env>,
        config: &WorkerConfig,
        side: Side,
        generation: Generation,
        inbox: &Sender<WorkerEvent>,
    ) -> Result<(Self, Qmp), String> {
        let spec = &config.spec;
        let (uid, gid) = (env.config.qemu_uid, env.config.qemu_gid);
        let owner = Owner { uid, gid };
        let vm_dir = env.config.run_dir.join(spec.name.as_str());
        let mut paths = VmPaths::new(spec, &vm_dir, &env.config.ram_dir).map_err(say)?;
        std::fs::create_dir_all(&env.config.ram_dir).map_err(|e| {
            format!(
                "cannot create the RAM directory {}: {e}",
                env.config.ram_dir.display()
            )
        })?;
        room::check_memory_room(&env.config.ram_dir, spec.memory.get()).map_err(say)?;
        room::prepare_run_dir(&vm_dir, uid, gid).map_err(say)?;
        let ram =
            room::create_ram_file(&paths.ram_file, spec.memory.get(), uid, gid).map_err(say)?;
        let ram_guard = RemoveOnFailure(Some(paths.ram_file.clone()));
        drop(ram);
        room::stage_boot_files(&mut paths, uid, gid).map_err(say)?;

        let mut disks = Vec::new();
        let mut images = Vec::new();
        let mut servers = Vec::new();
        for (i, disk) in spec.disks.iter().enumerate() {
            let image = image_path(env, disk);
            if side == Side::Standby {
                fresh_copy(&image, disk.size.get())?;
            }
            let mode = if side == Side::Standby {
                Mode::Standby
            } else {
                Mode::Direct
            };
            let opened = Disk::open(
                &image,
                disk.size.get(),
                DiskOptions {
                    mode,
                    generation,
                    durability: disk::Durability::Memory,
                    overlay_bytes_max: spec.mirror.overlay_max.get(),
                    hooks: disk_hooks(inbox),
                },
            )
            .map_err(|e| format!("disk `{}`: {e}", disk.name))?;
            servers.push(
                DiskServer::start(&paths.nbd[i], Some(owner), Arc::clone(&opened)).map_err(say)?,
            );
            disks.push(opened);
            images.push(image);
        }
        let ingress = Arc::new(IngressTap::new(spec.uuid));
        let mut ports = Vec::new();
        for (i, nic) in spec.nics.iter().enumerate() {
            let port = NetPort::start(NetPortConfig {
                nic: i,
                tap: TapSource::Create {
                    name: tap_name(spec, i),
                    mtu: 1500,
                    bridge: Some(nic.bridge.clone()),
                },
                pollux_sock: paths.nics[i].gate.clone(),
                qemu_sock: paths.nics[i].qemu.clone(),
                owner: Some(owner),
                mac: MacAddr(nic.mac.bytes()),
                mode: if side == Side::Standby {
                    NetMode::Standby
                } else {
                    NetMode::Direct
                },
                generation,
                held_packets_max: usize::try_from(spec.mirror.held_packets_max)
                    .unwrap_or(usize::MAX),
                hooks: net_hooks(inbox, &ingress),
            })
            .map_err(|e| format!("NIC `{}`: {e}", nic.name))?;
            ports.push(Arc::new(port));
        }

        let mut cmd = command_line(spec, &config.machine, side, &paths, config.accel);
        cmd[0] = env.qemu.clone().into_os_string();
        let qemu = Qemu::spawn(
            &cmd,
            SpawnOpts {
                uid,
                gid,
                groups: room::kvm_group().into_iter().collect(),
                log: paths.qemu_log.clone(),
                cwd: vm_dir,
            },
        )
        .map_err(say)?;
        let qemu = Arc::new(qemu);
        let control = Qmp::connect(&paths.qmp.control, MONITOR_DEADLINE).map_err(|e| {
            let end = qemu.wait_exit(Some(Duration::from_millis(100)));
            match end {
                Some(exit) => format!("QEMU ended at once: {exit}"),
                None => format!("QEMU does not answer: {e}\n{}", qemu.log_tail()),
            }
        })?;
        watch(&qemu, inbox);
        ram_guard.keep();
        Ok((
            Self {
                paths,
                qemu,
                disks,
                ports,
                ingress,
                images,
                servers,
            },
            control,
        ))
    }

    /// The storage of each disk.
    #[must_use]
    pub fn pulses(&self) -> Vec<Arc<Pulse>> {
        self.disks.iter().map(|disk| disk.pulse()).collect()
    }

    /// The monitors and options of a checkpointer.
    ///
    /// # Errors
    /// If QEMU does not answer.
    pub fn cut_setup(&self) -> Result<(Monitors, CutOptions), String> {
        let connect = |path| Qmp::connect(path, MONITOR_DEADLINE).map_err(say);
        Ok((
            Monitors {
                stop: connect(&self.paths.qmp.run)?,
                save: connect(&self.paths.qmp.save)?,
                cont: connect(&self.paths.qmp.spare)?,
            },
            CutOptions {
                qemu_pid: self.qemu.pid(),
                // QEMU's working folder is the one of its files.
                state_name: self
                    .paths
                    .state_file
                    .file_name()
                    .map_or_else(|| self.paths.state_file.clone(), Into::into),
                state_file: self.paths.state_file.clone(),
                repair_clock: true,
            },
        ))
    }
}

/// Thread ids of the vCPUs.
///
/// # Errors
/// If QEMU does not answer.
pub fn vcpu_threads(control: &mut Qmp) -> Result<Vec<i32>, String> {
    let answer = control
        .execute("query-cpus-fast", serde_json::json!({}))
        .map_err(say)?;
    Ok(answer
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|cpu| cpu.get("thread-id")?.as_i64())
        .filter_map(|tid| i32::try_from(tid).ok())
        .collect())
}

impl Drop for Parts {
    fn drop(&mut self) {
        self.qemu.kill();
        let _ = self.qemu.wait_exit(None);
        self.servers.clear();
        let _ = std::fs::remove_file(&self.paths.ram_file);
        let _ = std::fs::remove_file(&self.paths.state_file);
    }
}

/// Removes a file unless told to keep it.
struct RemoveOnFailure(Option<PathBuf>);

impl RemoveOnFailure {
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for RemoveOnFailure {
    fn drop(&mut self) {
        if let Some(path) = self.0.take() {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A standby's copy starts empty: seeding sends only what the primary has allocated, so
/// nothing older may be left in between.
fn fresh_copy(image: &std::path::Path, size: u64) -> Result<(), String> {
    if let Some(folder) = image.parent() {
        std::fs::create_dir_all(folder)
            .map_err(|e| format!("cannot create the image folder {}: {e}", folder.display()))?;
    }
    if let Ok(meta) = std::fs::metadata(image)
        && !meta.is_file()
    {
        return Err(format!(
            "the standby's copy {} is not a regular file, and only files are replaced by seeding; give the disk a file on this host",
            image.display()
        ));
    }
    match std::fs::remove_file(image) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => {
            return Err(format!(
                "cannot replace the stale copy {}: {e}",
                image.display()
            ));
        }
    }
    create_sparse(image, size).map_err(say)
}

fn disk_hooks(inbox: &Sender<WorkerEvent>) -> DiskHooks {
    let pressure = inbox.clone();
    DiskHooks {
        on_pressure: Some(Arc::new(move || {
            let _ = pressure.send(WorkerEvent::Pressure(PressureKind::Overlay));
        })),
        on_write_error: Some(Arc::new(|e| {
            tracing::error!("a committed epoch cannot be written to its image, trying on: {e}")
        })),
    }
}

fn net_hooks(inbox: &Sender<WorkerEvent>, ingress: &Arc<IngressTap>) -> NetHooks {
    let (waiting, pressure, tap) = (inbox.clone(), inbox.clone(), Arc::clone(ingress));
    NetHooks {
        on_output_waiting: Some(Arc::new(move |_| {
            let _ = waiting.send(WorkerEvent::OutputWaiting);
        })),
        on_ingress: Some(Arc::new(move |nic, frame| tap.delivered(nic, frame))),
        on_pressure: Some(Arc::new(move |_| {
            let _ = pressure.send(WorkerEvent::Pressure(PressureKind::Gate));
        })),
    }
}

/// Tell the worker when QEMU ends.
fn watch(qemu: &Arc<Qemu>, inbox: &Sender<WorkerEvent>) {
    let (qemu, inbox) = (Arc::clone(qemu), inbox.clone());
    let watcher = move || {
        if let Some(exit) = qemu.wait_exit(None) {
            let _ = inbox.send(WorkerEvent::QemuExit {
                reason: exit.to_string(),
            });
        }
    };
    if let Err(e) = std::thread::Builder::new()
        .name("qemu-watch".into())
        .spawn(watcher)
    {
        tracing::error!("no thread to watch QEMU: {e}");
    }
}
