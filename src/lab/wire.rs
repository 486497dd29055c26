//! What is said between a lab's users, its keeper and the hosts' inits: one JSON line
//! each way over a unix socket, file descriptors beside it (unix(7), `SCM_RIGHTS`).
//!
//! Both ends are the same binary on the same machine, so there is no version; lines are
//! capped all the same ([`LINE_BYTES_MAX`]).

use super::clock::MonotonicNs;
use super::spec::LabId;
use crate::pool::HostName;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{self, IoSlice, IoSliceMut};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

/// Longest line: a full plan of 16 hosts is under 64 KiB, a list of processes too.
pub(crate) const LINE_BYTES_MAX: usize = 1 << 20;

/// A request and the lab it is meant for: a handle may outlive its lab, and another
/// may live in the same directory by then.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Addressed {
    pub(crate) lab: LabId,
    pub(crate) request: Request,
}

/// linux: asm-generic/socket.h, since Linux 6.5.
const SO_PEERPIDFD: libc::c_int = 77;

/// Asked of the keeper.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    Status,
    /// For the place's pidfd; none = outside.
    Enter(Option<HostName>),
    PowerCut(HostName),
    PowerOn(HostName),
    SetLink {
        link: LinkName,
        wiring: Wiring,
    },
    /// Bytes a second that the link carries each way; none = all it can.
    ShapeLink {
        link: LinkName,
        bytes_per_s: Option<u64>,
    },
    /// A disk of the statefile is taken from a host, or given back.
    Disk {
        host: HostName,
        disk: usize,
        taken: bool,
    },
    Freeze(HostName),
    Thaw(HostName),
    Kill {
        host: HostName,
        pid: u32,
    },
    Processes(HostName),
    Down,
}

/// How a cable is plugged in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wiring {
    /// It carries.
    Well,
    /// Frames are lost at the switch; both ends still see a carrier.
    Silent,
    /// Both ends have lost their carrier.
    Unplugged,
}

/// A cable of the lab.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum LinkName {
    Lan(HostName),
    Private { a: HostName, b: HostName, index: u8 },
}

/// The keeper's answer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Reply {
    Done {
        at_ns: MonotonicNs,
    },
    Status(LabStatus),
    Processes(Vec<Process>),
    HostState {
        host: HostName,
        is: HostPower,
        todo: String,
    },
    Failed {
        step: String,
        message: String,
    },
    /// Another lab lives here now.
    OtherLab,
}

/// Keeper to a host's init.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum InitRequest {
    /// The links are in; configure them and start the daemon.
    Wired,
    Freeze,
    Thaw,
    Kill(u32),
    Processes,
    Daemon,
}

/// A host's init to the keeper.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum InitReply {
    /// Namespaces and mounts are made.
    Born,
    Done {
        at_ns: MonotonicNs,
    },
    Processes(Vec<Process>),
    Daemon(DaemonState),
    Failed {
        step: String,
        message: String,
    },
}

/// A host's power.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostPower {
    /// Running.
    On,
    /// All its processes stand still.
    Frozen,
    /// Cut, or its init died.
    Off,
}

impl HostPower {
    /// The state in one word or two.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::Frozen => "frozen",
            Self::Off => "without power",
        }
    }
}

/// What became of the program that a host's init started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DaemonState {
    /// The spec names no program.
    None,
    /// It runs, with this pid inside the host's pid namespace.
    Running(u32),
    /// It ended: its exit status, or 128 + the signal that killed it.
    Ended(i32),
    /// The host is off or frozen, so nobody can say.
    Unknown,
}

/// One host now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostStatus {
    /// The host.
    pub name: HostName,
    /// Its power.
    pub power: HostPower,
    /// Its daemon.
    pub daemon: DaemonState,
    /// Its address on the lan.
    pub management: Ipv4Addr,
    /// Where its API answers.
    pub api_socket: PathBuf,
    /// Where its daemon logs.
    pub daemon_log: PathBuf,
}

/// One private link now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkStatus {
    /// One end.
    pub a: HostName,
    /// The other.
    pub b: HostName,
    /// Which of their links, from 0.
    pub index: u8,
    /// Nothing passes.
    pub cut: bool,
    /// How it is plugged in.
    pub wiring: Wiring,
    /// Bytes a second it may carry each way, if it is slowed.
    pub bytes_per_s: Option<u64>,
}

/// A lab now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabStatus {
    /// Its name.
    pub name: String,
    /// Its directory.
    pub dir: PathBuf,
    /// Its hosts.
    pub hosts: Vec<HostStatus>,
    /// Its private links.
    pub links: Vec<LinkStatus>,
}

/// A process inside a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Pid inside the host's pid namespace.
    pub pid: u32,
    /// Its parent there; 0 if that is outside.
    pub parent: u32,
    /// Kernel's state letter (proc(5)): `R`, `S`, `T` stopped, `Z` zombie, …
    pub state: char,
    /// Its command line, joined by blanks, or its name in brackets.
    pub command: String,
}

/// Send one message and perhaps a descriptor.
pub(crate) fn send<T: Serialize>(
    stream: &UnixStream,
    message: &T,
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    let raw = fd.map(|f| [f.as_raw_fd()]);
    let mut sent = 0;
    while sent < line.len() {
        let control: Vec<ControlMessage<'_>> = match &raw {
            Some(raw) if sent == 0 => vec![ControlMessage::ScmRights(raw)],
            _ => Vec::new(),
        };
        sent += sendmsg::<()>(
            stream.as_raw_fd(),
            &[IoSlice::new(&line[sent..])],
            &control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
    }
    Ok(())
}

/// Receive one message and perhaps a descriptor. The stream carries one message per
/// turn, so nothing follows the line. The stream's read timeout holds.
pub(crate) fn receive<T: DeserializeOwned>(
    stream: &UnixStream,
) -> io::Result<(T, Option<OwnedFd>)> {
    let mut line = Vec::new();
    let mut passed = None;
    loop {
        let mut buffer = [0_u8; 16 * 1024];
        let mut space = nix::cmsg_space!([i32; 1]);
        let (bytes, fd) = {
            let mut slices = [IoSliceMut::new(&mut buffer)];
            let got = match recvmsg::<()>(
                stream.as_raw_fd(),
                &mut slices,
                Some(&mut space),
                MsgFlags::MSG_CMSG_CLOEXEC,
            ) {
                Err(nix::errno::Errno::EINTR) => continue,
                other => other?,
            };
            let mut fd = None;
            for message in got.cmsgs()? {
                if let ControlMessageOwned::ScmRights(fds) = message {
                    for raw in fds {
                        // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
                        fd = Some(unsafe { OwnedFd::from_raw_fd(raw) });
                    }
                }
            }
            (got.bytes, fd)
        };
        passed = fd.or(passed);
        if bytes == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the other side closed the connection",
            ));
        }
        line.extend_from_slice(&buffer[..bytes]);
        if line.last() == Some(&b'\n') {
            return Ok((serde_json::from_slice(&line)?, passed));
        }
        if line.len() > LINE_BYTES_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("a message over {LINE_BYTES_MAX} bytes"),
            ));
        }
    }
}

/// Kill the process that listens at the other end, by a pidfd from the socket itself.
pub(crate) fn kill_peer(stream: &UnixStream) -> io::Result<()> {
    let mut fd: libc::c_int = -1;
    let mut length = libc::socklen_t::try_from(size_of::<libc::c_int>()).unwrap_or(4);
    // SAFETY: `fd` and `length` are live and describe an int, which is what this option returns.
    let got = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut length,
        )
    };
    if got != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    let pidfd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: a signal to a pidfd; no memory is passed.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            libc::SIGKILL,
            0,
            0,
        )
    };
    if sent == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    #[test]
    fn a_descriptor_travels_beside_its_message() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        send(&a, &Request::Down, Some(writer.as_fd())).unwrap();
        drop(writer);
        let (request, fd) = receive::<Request>(&b).unwrap();
        assert!(matches!(request, Request::Down));
        let mut passed = std::fs::File::from(fd.unwrap());
        passed.write_all(b"x").unwrap();
        drop(passed);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");
    }

    #[test]
    fn an_endless_line_is_refused() {
        let (mut a, b) = UnixStream::pair().unwrap();
        let sender = std::thread::spawn(move || {
            let chunk = vec![b'x'; 64 * 1024];
            while a.write_all(&chunk).is_ok() {}
        });
        let error = receive::<Request>(&b).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        drop(b);
        sender.join().unwrap();
    }
}
