//! QEMU: spec to command line, process, QMP.
