//! QEMU: spec to command line, process, QMP.
//!
//! What a host does to have a VM run: [`probe`], [`kernel`] and [`accel`] find out what
//! the host can, [`room`] makes place for the VM, [`argv`] writes the command line
//! (pure), [`process`] starts QEMU, watches it and ends it, [`qmp`] talks to it,
//! [`admission`] refuses to mirror what cannot be.
//!
//! Must never: change a running VM's memory, decide who may run a VM, or start a
//! QEMU that could outlive the daemon.

pub mod accel;
pub mod admission;
pub mod argv;
pub mod kernel;
pub mod probe;
pub mod process;
pub mod qmp;
pub mod room;
