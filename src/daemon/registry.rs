//! Opens the registry that the host's configuration names.

use super::config::{HostConfig, RegistryConfig};
use crate::registry::statefile::paxos::HostSlot;
use crate::registry::statefile::{CALL_WAIT, OpenError, Statefile, StatefileOptions};
use crate::registry::{FileRegistry, FileRegistryOptions, Registry};

/// The registry of the host's pool.
///
/// # Errors
/// If a statefile cannot be taken up; names the disk and what to do. A locked file is looked
/// at with the first call only.
pub(super) fn open(config: &HostConfig) -> Result<Box<dyn Registry>, OpenError> {
    match config.registry() {
        RegistryConfig::File { dir } => Ok(Box::new(FileRegistry::new(
            dir,
            FileRegistryOptions::default(),
        ))),
        RegistryConfig::Statefile { disks, slot } => {
            let statefile = Statefile::open(StatefileOptions {
                disks: disks.clone(),
                pool: None,
                slot: HostSlot(*slot),
                name: config.name.to_string(),
                take_slot: false,
                call_wait: CALL_WAIT,
            })?;
            for (disk, fault) in disks.iter().zip(statefile.faults()) {
                if let Some(fault) = fault {
                    tracing::error!(disk = %disk.display(), "statefile: {fault}; {}", fault.remedy());
                }
            }
            tracing::info!(pool = %statefile.pool(), slot, disks = disks.len(), "statefile taken up");
            Ok(Box::new(statefile))
        }
    }
}
