//! API sketch.
use std::path::Path;
/// Why a disk operation failed.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {}
/// Make a sparse raw image of `size` bytes for a replicated copy; refuses if it exists or the file system has less than `size` free.
///
/// # Errors
/// [`DiskError`].
#[allow(unused_variables)]
pub fn create_sparse(path: &Path, size: u64) -> Result<(), DiskError> { Ok(()) }
