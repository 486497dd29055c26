//! The audit at promotion: is everything here what the primary's checkpoint was?

use super::receiver::Landing;
use crate::api::types::Failover;
use crate::daemon::clock::now_ns;
use crate::interpose::audit::{sum_of_file, sum_of_image};
use interconnect::epoch::AuditSums;
use std::path::PathBuf;

/// Threads that add up memory: the guest does not run yet, the host's cores are free.
const THREADS: usize = 2;

/// Compare all of RAM and of every image with the sums of the committed epoch. Runs
/// between load and `cont`; its time is part of the blackout and is reported.
pub fn audit(landing: &Landing, images: &[PathBuf], sums: &AuditSums, failover: &mut Failover) {
    let begun_ns = now_ns();
    let memory = {
        let ram = landing.ram();
        sum_of_image(&ram, THREADS)
    };
    failover.memory_equal = match memory {
        Ok(sum) => Some(sum == sums.memory),
        Err(e) => {
            tracing::warn!("memory could not be audited: {e}");
            None
        }
    };
    let mut equal = Some(images.len() == sums.disks.len());
    for (image, expected) in images.iter().zip(&sums.disks) {
        match sum_of_file(image) {
            Ok(sum) => equal = equal.map(|so_far| so_far && sum == *expected),
            Err(e) => {
                tracing::warn!("a disk could not be audited: {e}");
                equal = None;
            }
        }
    }
    failover.disks_equal = equal;
    failover.audit_us = now_ns().saturating_sub(begun_ns) / 1000;
}
