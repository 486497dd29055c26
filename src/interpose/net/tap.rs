//! A tap device on the host's bridge (kernel: Documentation/networking/tuntap.rst, netdevice(7)).
//!
//! Made in the network namespace of the calling thread; gone when its descriptor is closed.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

/// Longest interface name: `IFNAMSIZ` counts the terminating zero.
const NAME_BYTES_MAX: usize = libc::IFNAMSIZ - 1;

/// Add an interface to a bridge (linux/sockios.h; not in libc).
const SIOCBRADDIF: libc::Ioctl = 0x89a2;

/// Why a tap could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Not a name an interface can have.
    #[error(
        "`{name}` is no interface name: 1 to {NAME_BYTES_MAX} bytes without '/', ':' or spaces"
    )]
    BadName {
        /// The name given.
        name: String,
    },
    /// No privilege.
    #[error("not allowed to {doing} tap {name}: run the daemon as root (it needs CAP_NET_ADMIN)")]
    NotAllowed {
        /// The step.
        doing: &'static str,
        /// The tap.
        name: String,
    },
    /// No tun driver.
    #[error("cannot open /dev/net/tun: {0}: load the module `tun`")]
    NoTun(io::Error),
    /// The name is taken.
    #[error("interface {name} exists and is in use: is this VM running already?")]
    Busy {
        /// The tap.
        name: String,
    },
    /// The bridge is not there.
    #[error(
        "bridge {bridge} for tap {name} does not exist: create it, or correct `bridge` of the NIC"
    )]
    NoBridge {
        /// The bridge.
        bridge: String,
        /// The tap.
        name: String,
    },
    /// What was named is no bridge.
    #[error("{bridge}, named as bridge for tap {name}, is not a bridge")]
    NotABridge {
        /// What was named.
        bridge: String,
        /// The tap.
        name: String,
    },
    /// A step failed.
    #[error("cannot {doing} tap {name}: {source}")]
    Step {
        /// The step.
        doing: &'static str,
        /// The tap.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A tap device, non-blocking, one frame per read or write, no header. Gone when dropped.
#[derive(Debug)]
pub struct Tap {
    name: String,
    file: File,
}

impl Tap {
    /// Create tap `name`, set its `mtu` (bytes), join `bridge` and bring it up. IPv6 is not
    /// configured on it by anyone but the kernel's defaults; a bridge port needs none.
    ///
    /// # Errors
    /// [`TapError`]; nothing is left behind then.
    pub fn create(name: &str, mtu: u32, bridge: Option<&str>) -> Result<Self, TapError> {
        let step = |doing: &'static str| {
            let name = name.to_owned();
            move |source: io::Error| match source.raw_os_error() {
                Some(libc::EPERM | libc::EACCES) => TapError::NotAllowed { doing, name },
                Some(libc::EBUSY) => TapError::Busy { name },
                _ => TapError::Step {
                    doing,
                    name,
                    source,
                },
            }
        };
        let mut request = named(name)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(|error| match error.raw_os_error() {
                Some(libc::EPERM | libc::EACCES) => step("open /dev/net/tun for")(error),
                _ => TapError::NoTun(error),
            })?;
        let flags = libc::IFF_TAP | libc::IFF_NO_PI;
        // The flags are two small bits of a C int.
        #[allow(clippy::cast_possible_truncation)]
        {
            request.ifr_ifru.ifru_flags = flags as libc::c_short;
        }
        ioctl(file.as_fd(), libc::TUNSETIFF, &mut request).map_err(step("create"))?;
        let tap = Self {
            name: name.to_owned(),
            file,
        };
        let socket = control_socket().map_err(step("configure"))?;
        let mut request = named(name)?;
        request.ifr_ifru.ifru_mtu = libc::c_int::try_from(mtu).unwrap_or(libc::c_int::MAX);
        ioctl(socket.as_fd(), libc::SIOCSIFMTU, &mut request).map_err(step("set the MTU of"))?;
        if let Some(bridge) = bridge {
            tap.join(&socket, bridge)?;
        }
        let mut request = named(name)?;
        ioctl(socket.as_fd(), libc::SIOCGIFFLAGS, &mut request).map_err(step("bring up"))?;
        // SAFETY: SIOCGIFFLAGS has just filled this member of the union.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        #[allow(clippy::cast_possible_truncation)] // One low bit.
        let up = libc::IFF_UP as libc::c_short;
        request.ifr_ifru.ifru_flags = flags | up;
        ioctl(socket.as_fd(), libc::SIOCSIFFLAGS, &mut request).map_err(step("bring up"))?;
        Ok(tap)
    }

    fn join(&self, socket: &OwnedFd, bridge: &str) -> Result<(), TapError> {
        let (bridge, name) = (bridge.to_owned(), self.name.clone());
        let failed = |doing| {
            let name = self.name.clone();
            move |source| TapError::Step {
                doing,
                name,
                source,
            }
        };
        let index = match index_of(socket, &self.name) {
            Ok(index) => index,
            Err(IndexError::Name(error)) => return Err(error),
            Err(IndexError::Kernel(source)) => return Err(failed("find the index of")(source)),
        };
        let mut request = named(&bridge)?;
        request.ifr_ifru.ifru_ifindex = index;
        ioctl(socket.as_fd(), SIOCBRADDIF, &mut request).map_err(|source| {
            match source.raw_os_error() {
                Some(libc::ENODEV | libc::ENXIO) => TapError::NoBridge { bridge, name },
                Some(libc::EOPNOTSUPP | libc::EINVAL) => TapError::NotABridge { bridge, name },
                Some(libc::EPERM) => TapError::NotAllowed {
                    doing: "join the bridge with",
                    name,
                },
                _ => failed("join the bridge with")(source),
            }
        })
    }

    /// The interface's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The descriptor: one frame per read or write.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }
}

/// `SIOCBRADDIF` and friends speak of an interface by its index.
enum IndexError {
    Name(TapError),
    Kernel(io::Error),
}

fn index_of(socket: &OwnedFd, name: &str) -> Result<libc::c_int, IndexError> {
    let mut request = named(name).map_err(IndexError::Name)?;
    ioctl(socket.as_fd(), libc::SIOCGIFINDEX, &mut request).map_err(IndexError::Kernel)?;
    // SAFETY: SIOCGIFINDEX has just filled this member of the union.
    Ok(unsafe { request.ifr_ifru.ifru_ifindex })
}

/// An interface request for `name`, everything else zero.
fn named(name: &str) -> Result<libc::ifreq, TapError> {
    let ok = !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && name != "."
        && name != ".."
        && name
            .bytes()
            .all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b':' | b'%'));
    if !ok {
        return Err(TapError::BadName {
            name: name.to_owned(),
        });
    }
    // SAFETY: `ifreq` is plain data for which all zeros are a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    Ok(request)
}

fn control_socket() -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just opened and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn ioctl(fd: BorrowedFd<'_>, number: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: every `number` used in this file reads or writes one `ifreq`, which `request` is.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), number, std::ptr::from_mut(request)) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
