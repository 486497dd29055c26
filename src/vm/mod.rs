//! QEMU: spec to command line, process, QMP.

pub mod qmp;
