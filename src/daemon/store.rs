//! What a host keeps across restarts: VM specs and pinned links, one small file each.

use crate::api::types::LinkConfig;
use crate::pool::HostName;
use crate::pool::spec::VmSpec;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// The folders of a host's state.
pub struct Store {
    vms: PathBuf,
    links: PathBuf,
}

/// A file of the state that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {}: {reason}", path.display())]
pub struct StoreError {
    what: &'static str,
    path: PathBuf,
    reason: String,
}

fn failed(what: &'static str, path: &Path, reason: impl std::fmt::Display) -> StoreError {
    StoreError {
        what,
        path: path.into(),
        reason: reason.to_string(),
    }
}

impl Store {
    /// Open, making the folders if need be.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open(state_dir: &Path) -> Result<Self, StoreError> {
        let (vms, links, images) = (
            state_dir.join("vms"),
            state_dir.join("links"),
            state_dir.join("images"),
        );
        for dir in [&vms, &links, &images] {
            fs::create_dir_all(dir).map_err(|e| failed("create the folder", dir, e))?;
        }
        Ok(Self { vms, links })
    }

    /// All VM specs.
    ///
    /// # Errors
    /// [`StoreError`] for the first that cannot be read.
    pub fn specs(&self) -> Result<Vec<VmSpec>, StoreError> {
        texts(&self.vms)?
            .into_iter()
            .map(|(path, text)| {
                VmSpec::parse(&text, &path.display().to_string())
                    .map_err(|e| failed("understand the VM spec", &path, e))
            })
            .collect()
    }

    /// All links.
    ///
    /// # Errors
    /// [`StoreError`] for the first that cannot be read.
    pub fn links(&self) -> Result<Vec<LinkConfig>, StoreError> {
        texts(&self.links)?
            .into_iter()
            .map(|(path, text)| {
                toml::from_str(&text).map_err(|e| failed("understand the link", &path, e.message()))
            })
            .collect()
    }

    /// Keep a spec.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn put_spec(&self, spec: &VmSpec) -> Result<(), StoreError> {
        put(&self.vms, spec.name.as_str(), &spec.to_toml())
    }

    /// Forget a spec.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn delete_spec(&self, spec: &VmSpec) -> Result<(), StoreError> {
        delete(&self.vms, spec.name.as_str())
    }

    /// Keep a link.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn put_link(&self, link: &LinkConfig) -> Result<(), StoreError> {
        let text = toml::to_string(link).map_err(|e| failed("write the link", &self.links, e))?;
        put(&self.links, link.partner.as_str(), &text)
    }

    /// Forget a link.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn delete_link(&self, partner: &HostName) -> Result<(), StoreError> {
        delete(&self.links, partner.as_str())
    }
}

fn texts(dir: &Path) -> Result<Vec<(PathBuf, String)>, StoreError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| failed("list", dir, e))? {
        let path = entry.map_err(|e| failed("list", dir, e))?.path();
        if path.extension().is_some_and(|e| e == "toml") {
            let text = fs::read_to_string(&path).map_err(|e| failed("read", &path, e))?;
            found.push((path, text));
        }
    }
    found.sort();
    Ok(found)
}

/// Write beside, fsync, rename, fsync the folder: the old text or the new, never a part.
fn put(dir: &Path, name: &str, text: &str) -> Result<(), StoreError> {
    let path = dir.join(format!("{name}.toml"));
    let partial = dir.join(format!("{name}.partial"));
    let write = || -> io::Result<()> {
        let mut file = File::create(&partial)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&partial, &path)?;
        File::open(dir)?.sync_all()
    };
    write().map_err(|e| failed("write", &path, e))
}

fn delete(dir: &Path, name: &str) -> Result<(), StoreError> {
    let path = dir.join(format!("{name}.toml"));
    let remove = || -> io::Result<()> {
        fs::remove_file(&path)?;
        File::open(dir)?.sync_all()
    };
    remove().map_err(|e| failed("delete", &path, e))
}
