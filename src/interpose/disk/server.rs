//! API sketch.
use super::Disk;
use std::path::Path;
use std::sync::Arc;
/// Who may connect to a socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Owner { /// user id
 pub uid: u32, /// group id
 pub gid: u32 }
/// Why a server could not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {}
/// An NBD server for one disk on one unix socket; stops and removes the socket when dropped.
pub struct DiskServer {}
impl DiskServer {
    /// Listen on `socket_path` (mode 0600, given to `owner`) and serve `disk`.
    ///
    /// # Errors
    /// [`ServerError`].
    #[allow(unused_variables, clippy::todo)]
    pub fn start(socket_path: &Path, owner: Option<Owner>, disk: Arc<Disk>) -> Result<Self, ServerError> { todo!() }
}
