//! Disks of the statefile that can be taken from one host and given back.
//!
//! Each host gets a loop device of its own over the same file, with direct I/O, so that all see
//! the same blocks. Taking it shrinks that device to nothing while it stays open: reads find its
//! end, writes no space, as from a disk that lost its medium. The keeper holds the devices;
//! with the last descriptor the kernel frees them, however the lab ends.

use super::launch::{StepError, step};
use super::spec::LabPlan;
use super::wire::Reply;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// linux/loop.h
const LOOP_CONTROL: &str = "/dev/loop-control";
/// linux/loop.h
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;
/// linux/loop.h
const LOOP_SET_STATUS64: libc::c_ulong = 0x4c04;
/// linux/loop.h, since Linux 5.8
const LOOP_CONFIGURE: libc::c_ulong = 0x4c0a;
/// linux/loop.h
const LO_FLAGS_AUTOCLEAR: u32 = 4;
/// linux/loop.h
const LO_FLAGS_DIRECT_IO: u32 = 16;
/// Another lab may take the same free device first.
const TRIES: usize = 64;
/// Least a device can have: one sector.
const NOTHING_BYTES: u64 = 512;

/// `struct loop_info64` of linux/loop.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

impl LoopInfo {
    const fn new(size_limit: u64) -> Self {
        Self {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        }
    }
}

/// `struct loop_config` of linux/loop.h.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// A loop device over `backing` that is gone when the last descriptor of it is.
pub(super) fn attach(backing: &Path) -> io::Result<(File, PathBuf)> {
    let file = OpenOptions::new().read(true).write(true).open(backing)?;
    let control = OpenOptions::new()
        .read(true)
        .write(true)
        .open(LOOP_CONTROL)?;
    for _ in 0..TRIES {
        // SAFETY: takes no memory; returns a number or an error.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE as _) };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = OpenOptions::new().read(true).write(true).open(&path)?;
        let config = LoopConfig {
            fd: u32::try_from(file.as_raw_fd()).unwrap_or(u32::MAX),
            block_size: 0,
            info: LoopInfo::new(0),
            reserved: [0; 8],
        };
        // SAFETY: `config` is laid out as the kernel's struct and only read by it.
        let made =
            unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE as _, &raw const config) };
        if made == 0 {
            return Ok((device, path));
        }
        let e = io::Error::last_os_error();
        if e.raw_os_error() != Some(libc::EBUSY) {
            return Err(e);
        }
    }
    Err(io::Error::other("no free loop device after many tries"))
}

/// Shrink a device to nothing, or give it its whole size back.
fn set_taken(device: &File, taken: bool) -> io::Result<()> {
    let info = LoopInfo::new(if taken { NOTHING_BYTES } else { 0 });
    // SAFETY: `info` is laid out as the kernel's struct and only read by it.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_SET_STATUS64 as _, &raw const info) };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The loop devices of a lab, by host and disk, held open by its keeper.
pub(super) struct Disks(Vec<Vec<File>>);

impl Disks {
    /// Open those of the plan.
    pub(super) fn open(plan: &LabPlan) -> Result<Self, StepError> {
        if !plan.takeable_disks {
            return Ok(Self(Vec::new()));
        }
        let open = |path: &PathBuf| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .open(path)
                .map_err(step(format!("opening {}", path.display())))
        };
        let hosts = plan
            .hosts
            .iter()
            .map(|host| host.statefile.iter().map(open).collect());
        hosts.collect::<Result<_, _>>().map(Self)
    }

    /// Take a disk from a host, or give it back.
    pub(super) fn set(&self, host: usize, disk: usize, taken: bool) -> Result<(), Reply> {
        let failed = |message: String| Reply::Failed {
            step: format!("disk {disk} of the statefile"),
            message,
        };
        let device = self
            .0
            .get(host)
            .and_then(|disks| disks.get(disk))
            .ok_or_else(|| failed("the lab was made without disks that can be taken".into()))?;
        set_taken(device, taken).map_err(|e| failed(e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_taken_disk_fails_for_one_and_works_for_the_other_and_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let backing = dir.path().join("disk");
        std::fs::write(&backing, vec![7; 64 << 10]).unwrap();
        let (here, path) = attach(&backing).unwrap();
        let (there, _) = attach(&backing).unwrap();
        let byte = |device: &File| {
            let mut byte = [0];
            device.read_exact_at(&mut byte, 40_000).map(|()| byte[0])
        };
        assert!(matches!((byte(&here), byte(&there)), (Ok(7), Ok(7))));
        set_taken(&here, true).unwrap();
        assert!(byte(&here).is_err() && here.write_at(&[1], 40_000).is_err());
        assert_eq!(byte(&there).unwrap(), 7);
        set_taken(&here, false).unwrap();
        assert_eq!(byte(&here).unwrap(), 7);
        drop(here);
        // Freed with its last descriptor: nothing is behind it any more.
        let again = File::open(&path).unwrap();
        assert_ne!(byte(&again).ok(), Some(7));
    }
}
