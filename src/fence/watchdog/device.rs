//! `/dev/watchdog` (Linux, Documentation/watchdog/watchdog-api.rst).

use super::{BootNs, Watchdog, WatchdogError, check_timeout};
use nix::errno::Errno;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

/// `struct watchdog_info` of linux/watchdog.h.
#[repr(C)]
#[derive(Default)]
pub struct Info {
    options: u32,
    firmware_version: u32,
    identity: [u8; 32],
}

/// `WDIOF_SETTIMEOUT`, `WDIOF_MAGICCLOSE`, `WDIOF_KEEPALIVEPING`.
const NEEDED: [(u32, &str); 3] = [
    (0x0080, "its timeout cannot be set"),
    (0x0100, "it cannot be disarmed by an orderly farewell"),
    (0x8000, "it cannot be petted"),
];
/// The kernel's softdog is a timer of the very kernel that may hang.
const SOFT: &str = "Software Watchdog";

nix::ioctl_read!(get_support, b'W', 0, Info);
nix::ioctl_read!(keep_alive, b'W', 5, libc::c_int);
nix::ioctl_readwrite!(set_timeout, b'W', 6, libc::c_int);
nix::ioctl_read!(get_timeout, b'W', 7, libc::c_int);

/// An armed hardware watchdog.
#[derive(Debug)]
pub struct Device {
    file: File,
    name: String,
    timeout: Duration,
}

impl Device {
    /// Open, and so arm, the device at `path` with `timeout`, whole seconds rounded down.
    /// What it then says its timeout is counts, if it is not longer.
    ///
    /// # Errors
    /// [`WatchdogError`]; a device that opened is disarmed again, unless its driver has
    /// `nowayout`.
    pub fn arm(path: &Path, timeout: Duration) -> Result<Self, WatchdogError> {
        let name = path.display().to_string();
        check_timeout(&name, timeout)?;
        let file = File::options()
            .write(true)
            .open(path)
            .map_err(|source| WatchdogError::Io {
                on: name.clone(),
                step: "opening (is its driver loaded, and is another program petting it?)",
                source,
            })?;
        let mut device = Self {
            file,
            name,
            timeout,
        };
        match device.set_up(timeout) {
            Ok(real) => {
                device.timeout = real;
                Ok(device)
            }
            Err(e) => {
                let _ = device.file.write_all(b"V");
                Err(e)
            }
        }
    }

    fn set_up(&self, asked: Duration) -> Result<Duration, WatchdogError> {
        let refused = |why: String| WatchdogError::Refused {
            on: self.name.clone(),
            why,
        };
        let fd = self.file.as_raw_fd();
        let mut info = Info::default();
        // SAFETY: WDIOC_GETSUPPORT writes one watchdog_info, which `Info` is.
        unsafe { get_support(fd, &raw mut info) }
            .map_err(self.step("WDIOC_GETSUPPORT (is this a watchdog?)"))?;
        support(&info).map_err(refused)?;
        let mut seconds = libc::c_int::try_from(asked.as_secs()).unwrap_or(0);
        // SAFETY: WDIOC_SETTIMEOUT reads and writes one int.
        unsafe { set_timeout(fd, &raw mut seconds) }.map_err(self.step("WDIOC_SETTIMEOUT"))?;
        // SAFETY: WDIOC_GETTIMEOUT writes one int.
        unsafe { get_timeout(fd, &raw mut seconds) }.map_err(self.step("WDIOC_GETTIMEOUT"))?;
        honoured(asked, seconds).map_err(refused)
    }

    fn step(&self, step: &'static str) -> impl FnOnce(Errno) -> WatchdogError {
        let on = self.name.clone();
        move |e| WatchdogError::Io {
            on,
            step,
            source: io::Error::from(e),
        }
    }
}

fn support(info: &Info) -> Result<(), String> {
    let end = info
        .identity
        .iter()
        .position(|b| *b == 0)
        .unwrap_or(info.identity.len());
    let identity = String::from_utf8_lossy(&info.identity[..end]);
    if identity == SOFT {
        return Err("softdog dies with the kernel it should reset; use a hardware watchdog".into());
    }
    match NEEDED.iter().find(|(bit, _)| info.options & bit == 0) {
        Some((_, why)) => Err(format!("{why} (`{identity}`)")),
        None => Ok(()),
    }
}

fn honoured(asked: Duration, seconds: libc::c_int) -> Result<Duration, String> {
    let real = Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
    if real.is_zero() || real > asked {
        return Err(format!(
            "asked for {asked:?} it set {real:?}; ask for a timeout it can keep"
        ));
    }
    Ok(real)
}

impl Watchdog for Device {
    fn timeout(&self) -> Duration {
        self.timeout
    }

    fn pet(&mut self, _permitted: BootNs) -> Result<(), WatchdogError> {
        let mut unused = 0;
        // SAFETY: WDIOC_KEEPALIVE writes at most one int.
        unsafe { keep_alive(self.file.as_raw_fd(), &raw mut unused) }
            .map(|_| ())
            .map_err(self.step("WDIOC_KEEPALIVE"))
    }

    fn disarm(mut self: Box<Self>) -> Result<(), WatchdogError> {
        self.file
            .write_all(b"V")
            .map_err(|source| WatchdogError::Io {
                on: self.name.clone(),
                step: "magic close",
                source,
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_watchdog_says_so_in_words() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let e = Device::arm(file.path(), Duration::from_secs(5))
            .unwrap_err()
            .to_string();
        assert!(
            e.contains("WDIOC_GETSUPPORT") && e.contains("Inappropriate ioctl"),
            "{e}"
        );
        // Refused, and the attempt to disarm it was made.
        assert_eq!(std::fs::read(file.path()).unwrap(), b"V");
    }

    #[test]
    fn a_watchdog_that_does_not_keep_its_word_is_refused() {
        let mut info = Info {
            options: 0x8180,
            ..Info::default()
        };
        assert!(support(&info).is_ok());
        info.options = 0x8080;
        assert!(support(&info).unwrap_err().contains("disarmed"));
        info.options = 0x8180;
        info.identity[..SOFT.len()].copy_from_slice(SOFT.as_bytes());
        assert!(support(&info).unwrap_err().contains("hardware"));
        let asked = Duration::from_secs(10);
        assert_eq!(honoured(asked, 8), Ok(Duration::from_secs(8)));
        for seconds in [0, -1, 11] {
            assert!(honoured(asked, seconds).is_err(), "{seconds}");
        }
    }
}
