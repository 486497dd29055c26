//! An identity on disk: made once, kept private, replaced only by a rotation.
//!
//! ```text
//!  identity.pem                        the identity this host shows
//!  identity.next.pem                   the one it will show, while a rotation is under way
//! ```
//!
//! Invariant: after a crash at any moment `identity.pem` is whole, and is the old or the
//! new identity; a file with a private key is never readable by others, not even while it
//! is written.

use super::Identity;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// File in the identity folder: certificate and key together, so that neither can
/// be there without the other.
pub const IDENTITY_FILE: &str = "identity.pem";
/// Beside it, while a rotation is under way: the identity that will replace it.
pub const NEXT_FILE: &str = "identity.next.pem";
/// Largest identity file read; a P-256 pair takes about 1 KiB.
const IDENTITY_BYTES_MAX: u64 = 64 << 10;

/// Why a host has no identity.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// A file or folder could not be used.
    #[error("cannot {what} {path}: {source}")]
    File {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Others on this host may read the key.
    #[error(
        "{path} holds this host's private key and has mode {mode:04o}: run `chmod 0600` on it, and make a new identity if others may have read it"
    )]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file is not an identity.
    #[error(
        "{path} is not a usable identity ({reason}): move it away to make a new one, then pin the new fingerprint on the partner"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// A new identity could not be made.
    #[error("cannot make a new identity: {0}")]
    Generate(String),
}

/// The folder that holds a host's identity.
#[derive(Debug, Clone)]
pub struct IdentityDir {
    dir: PathBuf,
}

impl IdentityDir {
    /// The folder at `dir`, which need not exist yet.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.into() }
    }

    /// Load the identity, or make one and keep it: folder mode 0700, file mode 0600. Two
    /// processes that do this at once get the same identity.
    ///
    /// # Errors
    /// [`IdentityError`]; an existing identity is never replaced.
    pub fn load_or_create(&self) -> Result<Identity, IdentityError> {
        self.load_or_make(IDENTITY_FILE)
    }

    /// The identity of a rotation that is under way.
    ///
    /// # Errors
    /// [`IdentityError`] if there is one and it cannot be used.
    pub fn next(&self) -> Result<Option<Identity>, IdentityError> {
        load(&self.dir.join(NEXT_FILE))
    }

    /// Begin a rotation: make the next identity and keep it beside the present one. If one
    /// is there already, that one counts: partners may have been told of it.
    ///
    /// # Errors
    /// [`IdentityError`]; the present identity is untouched.
    pub fn prepare_next(&self) -> Result<Identity, IdentityError> {
        self.load_or_make(NEXT_FILE)
    }

    /// Make the next identity the present one; the old one is gone for good. To be done
    /// only when every partner has pinned the next one.
    ///
    /// # Errors
    /// [`IdentityError`] if there is none or it cannot be used: nothing has changed then.
    pub fn switch(&self) -> Result<Identity, IdentityError> {
        let (next, present) = (self.dir.join(NEXT_FILE), self.dir.join(IDENTITY_FILE));
        let identity = load(&next)?.ok_or_else(|| missing(&next))?;
        fs::rename(&next, &present).map_err(failed("rename into place", &present))?;
        sync_folder(&self.dir)?;
        Ok(identity)
    }

    /// Give up a rotation that has not switched. Nothing to do is fine.
    ///
    /// # Errors
    /// [`IdentityError::File`].
    pub fn abandon_next(&self) -> Result<(), IdentityError> {
        let next = self.dir.join(NEXT_FILE);
        match fs::remove_file(&next) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(failed("remove", &next)(error)),
            Ok(()) => sync_folder(&self.dir),
        }
    }

    fn load_or_make(&self, name: &str) -> Result<Identity, IdentityError> {
        let path = self.dir.join(name);
        if let Some(identity) = load(&path)? {
            return Ok(identity);
        }
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)
            .map_err(failed("make the folder", &self.dir))?;
        let (_, pem) = Identity::make()?;
        keep(&self.dir, name, &pem)?;
        load(&path)?.ok_or_else(|| missing(&path))
    }
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> IdentityError + use<> {
    let path = path.to_owned();
    move |source| IdentityError::File { what, path, source }
}

fn missing(path: &Path) -> IdentityError {
    failed("use", path)(io::ErrorKind::NotFound.into())
}

fn sync_folder(dir: &Path) -> Result<(), IdentityError> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(failed("sync the folder", dir))
}

/// `None` if there is no such file.
fn load(path: &Path) -> Result<Option<Identity>, IdentityError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("read", path)(error)),
    };
    let mode = file.metadata().map_err(failed("read", path))?;
    let mode = mode.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(IdentityError::Mode {
            path: path.to_owned(),
            mode,
        });
    }
    let mut pem = Vec::new();
    file.take(IDENTITY_BYTES_MAX)
        .read_to_end(&mut pem)
        .map_err(failed("read", path))?;
    Identity::parse(&pem)
        .map(Some)
        .map_err(|reason| IdentityError::Damaged {
            path: path.to_owned(),
            reason,
        })
}

/// Write `pem` as `name` in `dir` so that after a crash there is all of it or
/// nothing; leaves an identity that is there already.
fn keep(dir: &Path, name: &str, pem: &str) -> Result<(), IdentityError> {
    let path = dir.join(name);
    let partial = dir.join(format!("{name}.{}.partial", std::process::id()));
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&partial)
        .and_then(|mut file| {
            file.write_all(pem.as_bytes())
                .and_then(|()| file.sync_all())
        })
        .map_err(failed("write", &partial))?;
    let here = nix::fcntl::AT_FDCWD;
    let flags = nix::fcntl::RenameFlags::RENAME_NOREPLACE;
    match nix::fcntl::renameat2(here, &partial, here, &path, flags) {
        Ok(()) => {}
        Err(nix::errno::Errno::EEXIST) => {
            // Another process was first; its identity counts. A partial file left
            // behind is harmless and overwritten by the next attempt.
            let _ = fs::remove_file(&partial);
        }
        Err(error) => return Err(failed("rename into place", &path)(error.into())),
    }
    sync_folder(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_made_once_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("pollux/identity");
        let first = Identity::load_or_create(&dir).unwrap().fingerprint();
        assert_eq!(Identity::load_or_create(&dir).unwrap().fingerprint(), first);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&dir), mode(&dir.join(IDENTITY_FILE))), (0o700, 0o600));
        assert_eq!(
            fs::read_dir(&dir).unwrap().count(),
            1,
            "nothing partial stays"
        );
    }

    #[test]
    fn many_at_once_get_the_same_identity() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(IDENTITY_FILE);
        keep(dir.path(), IDENTITY_FILE, &Identity::make().unwrap().1).unwrap();
        let before = load(&path).unwrap().unwrap().fingerprint();
        keep(dir.path(), IDENTITY_FILE, &Identity::make().unwrap().1).unwrap();
        assert_eq!(load(&path).unwrap().unwrap().fingerprint(), before);
    }

    #[test]
    fn a_damaged_or_open_identity_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        Identity::load_or_create(dir.path()).unwrap();
        let path = dir.path().join(IDENTITY_FILE);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(
            Identity::load_or_create(dir.path()),
            Err(IdentityError::Mode { mode: 0o640, .. })
        ));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let pem = fs::read_to_string(&path).unwrap();
        let (_, other) = Identity::make().unwrap();
        let key_of_other = &other[other.find("-----BEGIN PRIVATE").unwrap()..];
        let cut = pem.find("-----BEGIN PRIVATE").unwrap();
        for damaged in [
            String::new(),
            pem[..cut].to_owned(),
            pem[..cut].to_owned() + key_of_other,
        ] {
            fs::write(&path, &damaged).unwrap();
            assert!(matches!(
                Identity::load_or_create(dir.path()),
                Err(IdentityError::Damaged { .. })
            ));
            assert_eq!(fs::read_to_string(&path).unwrap(), damaged);
        }
    }

    #[test]
    fn a_rotation_replaces_the_identity_once_and_can_be_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let at = IdentityDir::new(dir.path());
        let old = at.load_or_create().unwrap().fingerprint();
        assert!(at.next().unwrap().is_none());
        assert!(at.switch().is_err(), "there is nothing to switch to");
        let given_up = at.prepare_next().unwrap().fingerprint();
        at.abandon_next().unwrap();
        at.abandon_next().unwrap();
        let next = at.prepare_next().unwrap().fingerprint();
        assert!(next != given_up && next != old);
        assert_eq!(at.prepare_next().unwrap().fingerprint(), next);
        let mode = fs::metadata(dir.path().join(NEXT_FILE)).unwrap();
        assert_eq!(mode.permissions().mode() & 0o777, 0o600);
        assert_eq!(at.load_or_create().unwrap().fingerprint(), old);
        assert_eq!(at.switch().unwrap().fingerprint(), next);
        assert_eq!(at.load_or_create().unwrap().fingerprint(), next);
        assert!(at.next().unwrap().is_none());
    }
}
