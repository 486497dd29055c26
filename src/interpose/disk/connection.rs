//! One NBD connection: handshake, then requests until it ends.
//!
//! All requests that have arrived are carried out before their replies go out in one write. What
//! is answered from memory or page cache is done in place; a read that misses the page cache and
//! a sync of the file go to another thread, so that they delay nothing behind them (NBD replies
//! may come in any order, "Ordering of messages and writes").

use super::Disk;
use super::extents::{DiskWrite, WriteData};
use super::guest::{GuestIoError, Patience};
use super::nbd::{self, Command, Errno, ProtocolError, Request, command_flag, option, reply};
use super::server::{Job, offload};
use bytes::Bytes;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A client that has not finished its handshake by then is none.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// A client that takes no reply for this long is stuck.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);

/// Read from the socket at once: QEMU's 16 requests in flight with 16 KiB each.
const IN_BUFFER_BYTES: usize = 256 << 10;

/// Replies gathered before they are sent anyway.
const OUT_BUFFER_BYTES: usize = 256 << 10;

/// Why a connection ended other than by the client's wish.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    #[error("the client does not speak NBD as we do: {0}")]
    Protocol(#[from] ProtocolError),
    #[error("the client's socket failed: {0}")]
    Socket(#[from] io::Error),
}

/// Serve one client until it goes.
pub(super) fn serve(
    mut stream: UnixStream,
    disk: &Arc<Disk>,
    jobs: &SyncSender<Job>,
) -> Result<(), ConnectionError> {
    stream.set_read_timeout(Some(HANDSHAKE_TIMEOUT))?;
    stream.set_write_timeout(Some(SEND_TIMEOUT))?;
    if !handshake(&mut stream, disk.len())? {
        return Ok(());
    }
    stream.set_read_timeout(None)?;
    let replies = Arc::new(Replies {
        out: Mutex::default(),
        stream: stream.try_clone()?,
    });
    let mut input = Input {
        stream,
        buffer: vec![0; IN_BUFFER_BYTES],
        start: 0,
        end: 0,
    };
    let mut arrived = Instant::now();
    loop {
        let Some(header) = input.take_buffered::<{ nbd::REQUEST_BYTES }>() else {
            replies.send()?;
            if !input.fill()? {
                return Ok(());
            }
            arrived = Instant::now();
            continue;
        };
        let request = nbd::parse_request(&header)?;
        if request.command == Command::Disconnect {
            return Ok(());
        }
        let payload = if request.command == Command::Write {
            let len = request.len as usize;
            if input.buffered() < len {
                replies.send()?;
            }
            input.payload(len)?
        } else {
            Bytes::new()
        };
        Exchange {
            disk,
            replies: &replies,
            jobs,
            request,
            arrived,
        }
        .carry_out(payload)?;
    }
}

/// "Newstyle negotiation". Answers whether transmission begins.
fn handshake(stream: &mut UnixStream, disk_bytes: u64) -> Result<bool, ConnectionError> {
    stream.write_all(&nbd::greeting())?;
    let mut flags = [0; 4];
    stream.read_exact(&mut flags)?;
    let no_zeroes = nbd::parse_client_flags(flags)?;
    let mut out = Vec::new();
    for _ in 0..nbd::OPTIONS_MAX {
        let mut header = [0; nbd::OPTION_BYTES];
        stream.read_exact(&mut header)?;
        let (number, len) = nbd::parse_option(&header)?;
        let mut data = vec![0; len];
        stream.read_exact(&mut data)?;
        let mut answer = |kind, data: &[u8]| nbd::put_option_reply(&mut out, number, kind, data);
        let mut go = false;
        match number {
            option::EXPORT_NAME if data.is_empty() => {
                nbd::put_export_name(&mut out, disk_bytes, no_zeroes);
                go = true;
            }
            option::EXPORT_NAME => {
                let name = String::from_utf8_lossy(&data[..data.len().min(64)]).into_owned();
                return Err(ProtocolError::UnknownExport(name).into());
            }
            option::ABORT => {
                answer(reply::ACK, &[]);
                stream.write_all(&out)?;
                return Ok(false);
            }
            option::LIST if data.is_empty() => {
                // One export whose name has length 0.
                answer(reply::SERVER, &[0; 4]);
                answer(reply::ACK, &[]);
            }
            option::LIST => answer(reply::ERR_INVALID, b"LIST takes no data"),
            option::INFO | option::GO => match nbd::parse_info(&data) {
                None => answer(reply::ERR_INVALID, b"malformed"),
                Some((b"", _)) => {
                    nbd::put_info(&mut out, number, disk_bytes);
                    go = number == option::GO;
                }
                Some(_) => answer(reply::ERR_UNKNOWN, b"the only export has the empty name"),
            },
            _ => answer(reply::ERR_UNSUP, b"not supported"),
        }
        stream.write_all(&out)?;
        out.clear();
        if go {
            return Ok(true);
        }
    }
    Err(ProtocolError::TooManyOptions.into())
}

/// Bytes from the client, read many at a time.
struct Input {
    stream: UnixStream,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Input {
    fn buffered(&self) -> usize {
        self.end - self.start
    }

    /// The next `N` bytes, if they are here already.
    fn take_buffered<const N: usize>(&mut self) -> Option<[u8; N]> {
        let taken = *self.buffer[self.start..self.end].first_chunk::<N>()?;
        self.start += N;
        Some(taken)
    }

    /// Read what has arrived, at least one byte. `false`: the client closed between requests.
    fn fill(&mut self) -> io::Result<bool> {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        match self.stream.read(&mut self.buffer[self.end..])? {
            0 if self.end == 0 => Ok(false),
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            got => {
                self.end += got;
                Ok(true)
            }
        }
    }

    /// A write's payload; `len` is within the protocol's limit.
    fn payload(&mut self, len: usize) -> io::Result<Bytes> {
        let here = self.buffered().min(len);
        let mut payload = Vec::with_capacity(len);
        payload.extend_from_slice(&self.buffer[self.start..self.start + here]);
        self.start += here;
        let missing = (len - here) as u64;
        if (&self.stream).take(missing).read_to_end(&mut payload)? as u64 != missing {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(payload.into())
    }
}

/// Replies on their way to the client, from several threads.
struct Replies {
    out: Mutex<Vec<u8>>,
    stream: UnixStream,
}

impl Replies {
    /// Append with `put`; sends at once if much has gathered.
    fn put(&self, put: impl FnOnce(&mut Vec<u8>)) -> io::Result<()> {
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        put(&mut out);
        if out.len() >= OUT_BUFFER_BYTES {
            self.send_locked(&mut out)
        } else {
            Ok(())
        }
    }

    fn send(&self) -> io::Result<()> {
        self.send_locked(&mut self.out.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn send_locked(&self, out: &mut Vec<u8>) -> io::Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        let sent = (&self.stream).write_all(out);
        out.clear();
        out.shrink_to(2 * OUT_BUFFER_BYTES);
        if sent.is_err() {
            // Part of a reply may be out: nothing after it would make sense. The connection's
            // thread learns of it by its next read.
            let _ = self.stream.shutdown(std::net::Shutdown::Both);
        }
        sent
    }

    /// From a slow thread: nobody else will send it.
    fn put_and_send(&self, put: impl FnOnce(&mut Vec<u8>)) {
        if let Err(error) = self.put(put).and_then(|()| self.send()) {
            tracing::debug!(%error, "an NBD reply had no taker");
        }
    }
}

/// One request being carried out.
struct Exchange<'a> {
    disk: &'a Arc<Disk>,
    replies: &'a Arc<Replies>,
    jobs: &'a SyncSender<Job>,
    request: Request,
    arrived: Instant,
}

impl Exchange<'_> {
    fn carry_out(&self, payload: Bytes) -> io::Result<()> {
        let Request {
            offset, len, flags, ..
        } = self.request;
        let len64 = u64::from(len);
        match self.request.command {
            Command::Read if len > nbd::PAYLOAD_BYTES_MAX => self.answer(Errno::Overflow),
            Command::Read => self.read(),
            Command::Write => self.write(DiskWrite {
                offset,
                data: WriteData::Data(payload),
            }),
            Command::Trim => self.write(DiskWrite {
                offset,
                data: WriteData::Trim(len64),
            }),
            Command::WriteZeroes if flags & command_flag::NO_HOLE == 0 => self.write(DiskWrite {
                offset,
                data: WriteData::Trim(len64),
            }),
            Command::WriteZeroes => self.write(DiskWrite {
                offset,
                data: WriteData::Zero(len64),
            }),
            Command::Flush if self.disk.sync_waits() => {
                self.slow(|disk| errno(disk.guest_flush().map(|()| true), true));
                Ok(())
            }
            Command::Flush => self.answer(errno(self.disk.guest_flush().map(|()| true), true)),
            Command::Disconnect | Command::Other(_) => self.answer(Errno::Inval),
        }
    }

    fn read(&self) -> io::Result<()> {
        let Request {
            cookie,
            offset,
            len,
            ..
        } = self.request;
        let (disk, arrived) = (self.disk, self.arrived);
        let mut done = true;
        self.replies.put(|out| {
            done = put_read(out, disk, cookie, offset, len, Patience::CacheOnly, arrived);
        })?;
        if !done {
            let (disk, replies) = (Arc::clone(disk), Arc::clone(self.replies));
            offload(
                self.jobs,
                Box::new(move || {
                    let mut reply = Vec::new();
                    put_read(
                        &mut reply,
                        &disk,
                        cookie,
                        offset,
                        len,
                        Patience::Wait,
                        arrived,
                    );
                    replies.put_and_send(|out| out.append(&mut reply));
                }),
            );
        }
        Ok(())
    }

    fn write(&self, write: DiskWrite) -> io::Result<()> {
        let fua = self.request.flags & command_flag::FUA != 0;
        let arrived = self.arrived;
        if fua && self.disk.sync_waits() {
            self.slow(move |disk| {
                errno(disk.guest_write(write, true, arrived).map(|()| true), true)
            });
            return Ok(());
        }
        if self.disk.holds_back() {
            self.replies.send()?;
        }
        self.answer(errno(
            self.disk.guest_write(write, fua, arrived).map(|()| true),
            true,
        ))
    }

    fn answer(&self, errno: Errno) -> io::Result<()> {
        self.replies
            .put(|out| nbd::put_simple_reply(out, errno, self.request.cookie))
    }

    fn slow(&self, work: impl FnOnce(&Disk) -> Errno + Send + 'static) {
        let (disk, replies) = (Arc::clone(self.disk), Arc::clone(self.replies));
        let cookie = self.request.cookie;
        offload(
            self.jobs,
            Box::new(move || {
                let errno = work(&disk);
                replies.put_and_send(|out| nbd::put_simple_reply(out, errno, cookie));
            }),
        );
    }
}

/// Append a read's whole reply. `false`: it needs patience and nothing was appended.
fn put_read(
    out: &mut Vec<u8>,
    disk: &Disk,
    cookie: u64,
    offset: u64,
    len: u32,
    patience: Patience,
    arrived: Instant,
) -> bool {
    let before = out.len();
    nbd::put_simple_reply(out, Errno::Ok, cookie);
    let result = disk.guest_read(offset, len, out, patience, arrived);
    if let Ok(true) = result {
        return true;
    }
    out.truncate(before);
    let failed = result.is_err();
    if failed {
        nbd::put_simple_reply(out, errno(result, false), cookie);
    }
    failed
}

/// "Error values": what the client is told.
fn errno(result: Result<bool, GuestIoError>, writing: bool) -> Errno {
    let Err(error) = result else { return Errno::Ok };
    tracing::debug!(%error, "NBD request failed");
    match error {
        GuestIoError::OutOfRange(_) if writing => Errno::NoSpc,
        GuestIoError::OutOfRange(_) => Errno::Inval,
        GuestIoError::Standby => Errno::Perm,
        GuestIoError::Stopped => Errno::Shutdown,
        GuestIoError::Io(error) => match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => Errno::NoSpc,
            Some(libc::ENOMEM) => Errno::NoMem,
            _ => Errno::Io,
        },
    }
}
