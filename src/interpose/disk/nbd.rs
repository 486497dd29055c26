//! The NBD protocol, fixed-newstyle with simple replies. Pure: bytes in, values out.
//!
//! Source: the protocol document of the NBD project (`doc/proto.md`), sections "Newstyle
//! negotiation", "Fixed newstyle negotiation", "Transmission phase", "Option types", "Option
//! reply types", "Request types", "Values" and "Block size constraints"; named below where used.
//! All numbers are big-endian. Sizes are checked before anything is allocated for them.

use bytes::{Buf, BufMut};

/// `NBDMAGIC`, first bytes of the server ("Newstyle negotiation").
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, before every option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Before every option reply ("Fixed newstyle negotiation").
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Before every request ("Request message").
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Before every simple reply ("Simple reply message").
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

/// Handshake flags of both sides: fixed newstyle, no 124 zero bytes.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1;
/// See [`FLAG_FIXED_NEWSTYLE`].
pub const FLAG_NO_ZEROES: u16 = 2;

/// Bytes of a request's header.
pub const REQUEST_BYTES: usize = 28;
/// Bytes of a simple reply's header.
pub const SIMPLE_REPLY_BYTES: usize = 16;
/// Bytes of an option's header.
pub const OPTION_BYTES: usize = 16;
/// Padding after the answer to `NBD_OPT_EXPORT_NAME` without [`FLAG_NO_ZEROES`].
pub const EXPORT_NAME_PADDING_BYTES: usize = 124;

/// Largest read or write ("Block size constraints"): what QEMU's client splits to, and what
/// every client may assume without asking.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Preferred block: the page size.
pub const BLOCK_BYTES_PREFERRED: u32 = 4096;
/// Smallest block.
pub const BLOCK_BYTES_MIN: u32 = 1;
/// Longest option: an export name of 4,096 bytes ("Values", strings) and requests for every kind
/// of information fit many times; more is not a client of ours.
pub const OPTION_BYTES_MAX: u32 = 64 << 10;
/// Most options before a client must be served: real ones send about five.
pub const OPTIONS_MAX: u32 = 64;

/// Transmission flags we offer ("Transmission flags"): HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES,
/// CAN_MULTI_CONN (every connection reads and writes through the one [`super::Disk`], so a flush
/// on one covers all).
pub const TRANSMISSION_FLAGS: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 8;

/// "Option types".
#[allow(missing_docs)] // Names of the document.
pub mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
}

/// "Option reply types".
#[allow(missing_docs)] // Names of the document.
pub mod reply {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const ERR_UNSUP: u32 = 1 << 31 | 1;
    pub const ERR_INVALID: u32 = 1 << 31 | 3;
    pub const ERR_UNKNOWN: u32 = 1 << 31 | 6;
}

/// Information types of `NBD_REP_INFO`.
#[allow(missing_docs)] // Names of the document.
pub mod info {
    pub const EXPORT: u16 = 0;
    pub const BLOCK_SIZE: u16 = 3;
}

/// "Command flags" we know.
#[allow(missing_docs)] // Names of the document.
pub mod command_flag {
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 2;
}

/// "Error values": what a simple reply carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
#[allow(missing_docs)] // Names of the document.
pub enum Errno {
    Ok = 0,
    Perm = 1,
    Io = 5,
    NoMem = 12,
    Inval = 22,
    NoSpc = 28,
    Overflow = 75,
    Shutdown = 108,
}

/// Bytes that are not NBD.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ProtocolError {
    /// Not an option.
    #[error("expected an NBD option (magic {OPTION_MAGIC:#018x}), got {0:#018x}")]
    OptionMagic(u64),
    /// An option larger than any we know.
    #[error("NBD option {option} of {len} bytes is over the limit of {OPTION_BYTES_MAX}")]
    OptionTooLong {
        /// Its number.
        option: u32,
        /// Its stated length.
        len: u32,
    },
    /// The client negotiates without end.
    #[error("more than {OPTIONS_MAX} NBD options without starting transmission")]
    TooManyOptions,
    /// Flags we did not offer.
    #[error("client flags {0:#x} include some that were not offered")]
    ClientFlags(u32),
    /// Old-style client asks for what is not there.
    #[error("no export named {0:?} here: the only one has the empty name")]
    UnknownExport(String),
    /// Not a request.
    #[error("expected an NBD request (magic {REQUEST_MAGIC:#010x}), got {0:#010x}")]
    RequestMagic(u32),
    /// A write whose payload we will not take in.
    #[error("NBD write of {0} bytes is over the limit of {PAYLOAD_BYTES_MAX}")]
    WriteTooLong(u32),
}

/// "Request types".
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)] // Names of the document.
pub enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    WriteZeroes,
    /// One we do not offer: answered with EINVAL.
    Other(u16),
}

/// A request's header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// Command flags.
    pub flags: u16,
    /// What to do.
    pub command: Command,
    /// The client's name for it, returned in the reply.
    pub cookie: u64,
    /// Byte offset.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
}

/// Parse a request header; a write's payload follows it.
///
/// # Errors
/// Wrong magic, or a write longer than we take in: the stream cannot be followed any further.
pub fn parse_request(header: &[u8; REQUEST_BYTES]) -> Result<Request, ProtocolError> {
    let mut at = &header[..];
    let magic = at.get_u32();
    if magic != REQUEST_MAGIC {
        return Err(ProtocolError::RequestMagic(magic));
    }
    let flags = at.get_u16();
    let command = match at.get_u16() {
        0 => Command::Read,
        1 => Command::Write,
        2 => Command::Disconnect,
        3 => Command::Flush,
        4 => Command::Trim,
        6 => Command::WriteZeroes,
        other => Command::Other(other),
    };
    let cookie = at.get_u64();
    let offset = at.get_u64();
    let len = at.get_u32();
    if command == Command::Write && len > PAYLOAD_BYTES_MAX {
        return Err(ProtocolError::WriteTooLong(len));
    }
    Ok(Request {
        flags,
        command,
        cookie,
        offset,
        len,
    })
}

/// Append a simple reply's header; a successful read's data follows it.
pub fn put_simple_reply(out: &mut Vec<u8>, error: Errno, cookie: u64) {
    out.put_u32(SIMPLE_REPLY_MAGIC);
    out.put_u32(error as u32);
    out.put_u64(cookie);
}

/// The server's first bytes.
#[must_use]
pub fn greeting() -> [u8; 18] {
    let mut out = [0; 18];
    let mut at = &mut out[..];
    at.put_u64(INIT_MAGIC);
    at.put_u64(OPTION_MAGIC);
    at.put_u16(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
    out
}

/// Check the client's flags; answers whether it wants no zeroes.
///
/// # Errors
/// Flags that were not offered.
pub fn parse_client_flags(bytes: [u8; 4]) -> Result<bool, ProtocolError> {
    let flags = u32::from_be_bytes(bytes);
    let known = u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
    if flags & !known != 0 {
        return Err(ProtocolError::ClientFlags(flags));
    }
    Ok(flags & u32::from(FLAG_NO_ZEROES) != 0)
}

/// Parse an option's header: its number and the length of its data, which is within the limit.
///
/// # Errors
/// Wrong magic or too long.
pub fn parse_option(header: &[u8; OPTION_BYTES]) -> Result<(u32, usize), ProtocolError> {
    let mut at = &header[..];
    let magic = at.get_u64();
    if magic != OPTION_MAGIC {
        return Err(ProtocolError::OptionMagic(magic));
    }
    let option = at.get_u32();
    let len = at.get_u32();
    if len > OPTION_BYTES_MAX {
        return Err(ProtocolError::OptionTooLong { option, len });
    }
    Ok((option, len as usize))
}

/// Parse the data of `NBD_OPT_INFO` and `NBD_OPT_GO`: the export's name and the kinds of
/// information asked for. `None`: not well formed.
#[must_use]
pub fn parse_info(mut data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let name_len = data.try_get_u32().ok()? as usize;
    let (name, mut rest) = data.split_at_checked(name_len)?;
    let count = usize::from(rest.try_get_u16().ok()?);
    if rest.len() != count * 2 {
        return None;
    }
    let kinds = rest
        .chunks_exact(2)
        .map(|kind| u16::from_be_bytes([kind[0], kind[1]]))
        .collect();
    Some((name, kinds))
}

/// Append one option reply.
pub fn put_option_reply(out: &mut Vec<u8>, option: u32, reply: u32, data: &[u8]) {
    out.put_u64(OPTION_REPLY_MAGIC);
    out.put_u32(option);
    out.put_u32(reply);
    out.put_u32(u32::try_from(data.len()).unwrap_or(0));
    out.put_slice(data);
}

/// Append the answers to a good `NBD_OPT_INFO` or `NBD_OPT_GO`.
pub fn put_info(out: &mut Vec<u8>, option: u32, disk_bytes: u64) {
    let mut export = Vec::with_capacity(12);
    export.put_u16(info::EXPORT);
    export.put_u64(disk_bytes);
    export.put_u16(TRANSMISSION_FLAGS);
    put_option_reply(out, option, reply::INFO, &export);
    let mut blocks = Vec::with_capacity(14);
    blocks.put_u16(info::BLOCK_SIZE);
    blocks.put_u32(BLOCK_BYTES_MIN);
    blocks.put_u32(BLOCK_BYTES_PREFERRED);
    blocks.put_u32(PAYLOAD_BYTES_MAX);
    put_option_reply(out, option, reply::INFO, &blocks);
    put_option_reply(out, option, reply::ACK, &[]);
}

/// Append the answer to `NBD_OPT_EXPORT_NAME`.
pub fn put_export_name(out: &mut Vec<u8>, disk_bytes: u64, no_zeroes: bool) {
    out.put_u64(disk_bytes);
    out.put_u16(TRANSMISSION_FLAGS);
    if !no_zeroes {
        out.put_bytes(0, EXPORT_NAME_PADDING_BYTES);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_request_is_read_as_the_document_lays_it_out() {
        let mut bytes = Vec::new();
        bytes.put_u32(0x2560_9513);
        bytes.put_u16(1);
        bytes.put_u16(6);
        bytes.put_u64(77);
        bytes.put_u64(4096);
        bytes.put_u32(512);
        let header = <[u8; REQUEST_BYTES]>::try_from(&bytes[..]).expect("28 bytes");
        let request = parse_request(&header).expect("a request");
        assert_eq!(
            request,
            Request {
                flags: command_flag::FUA,
                command: Command::WriteZeroes,
                cookie: 77,
                offset: 4096,
                len: 512
            }
        );
    }

    #[test]
    fn too_long_writes_and_options_are_refused_before_their_bytes_are_read() {
        let mut header = [0; REQUEST_BYTES];
        header[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        header[7] = 1;
        header[24..].copy_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(
            parse_request(&header),
            Err(ProtocolError::WriteTooLong(u32::MAX))
        );
        let mut header = [0xff; OPTION_BYTES];
        header[..8].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        let error = parse_option(&header).expect_err("too long");
        assert!(matches!(error, ProtocolError::OptionTooLong { .. }));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse_info(&bytes);
            if let Ok(header) = <[u8; REQUEST_BYTES]>::try_from(&bytes[..bytes.len().min(28)]) {
                let _ = parse_request(&header);
            }
            if let Ok(header) = <[u8; OPTION_BYTES]>::try_from(&bytes[..bytes.len().min(16)]) {
                let _ = parse_option(&header);
            }
        }
    }
}
