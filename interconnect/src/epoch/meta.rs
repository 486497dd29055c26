//! skeleton
/// Sums over everything, for the audit that the standby equals the primary.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct AuditSums {
    /// Over the guest's RAM.
    pub memory: u64,
    /// Over each disk, in the order of the VM's spec.
    pub disks: Vec<u64>,
}
/// What the primary says about an epoch as it ends.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct EpochMeta {
    /// The guest flushed a disk in this epoch: under `durability = "disk"` it is
    /// acknowledged only after its writes are durable.
    pub flush: bool,
    /// The primary's `CLOCK_MONOTONIC` at the cut, in ns.
    pub clock_ns: u64,
    /// Size of the guest's RAM, in pages.
    pub guest_pages: u64,
    /// Sums at the cut, when the audit is on.
    pub audit: Option<AuditSums>,
}
