//! The first message each side sends on the control lane, and the first bytes of
//! every other lane.
//!
//! Hello, little-endian:
//!
//! ```text
//! 4    magic `PLXH`
//! u16  lowest protocol version spoken
//! u16  highest protocol version spoken
//! u8   bytes of the host name      u8  bytes of the build
//! ...  host name, build            UTF-8
//! ```
//!
//! Start of a lane, 32 bytes, little-endian:
//!
//! ```text
//! 4    magic `PLXL`
//! u8   kind: 0 invalid, 1 epoch lane
//! u8   × 3 reserved, zero
//! 16   VM id
//! u64  generation
//! ```
//!
//! Protocol versions:
//! - 1: first. One connection; a stream for each lane, plain frames on it. The start of a
//!   lane above is its.
//! - 2: lanes over several connections ([`crate::lane::wire`]). Hello is as before, so that
//!   both are understood.

use super::event::Hello;
use crate::ids::{Generation, VmId};
use quinn::{RecvStream, SendStream};

/// Highest protocol version this build speaks.
pub(super) const PROTOCOL_VERSION: u16 = 2;
/// Lowest protocol version this build speaks.
pub(super) const PROTOCOL_VERSION_MIN: u16 = 1;
const _: () = assert!(PROTOCOL_VERSION_MIN <= PROTOCOL_VERSION);

const HELLO_MAGIC: [u8; 4] = *b"PLXH";
const HELLO_FIXED_BYTES: usize = 10;
const LANE_MAGIC: [u8; 4] = *b"PLXL";
const LANE_EPOCH: u8 = 1;
/// Bytes at the start of a lane.
pub(super) const LANE_BYTES: usize = 32;

/// What went wrong while saying hello.
pub(super) enum HelloError {
    /// The partner must not be talked to; somebody has to act.
    Refuse(String),
    /// The connection broke.
    Broken(String),
}

/// Send this side's hello. Offers the versions up to `version_max`.
pub(super) async fn send(
    stream: &mut SendStream,
    me: &str,
    build: &str,
    version_max: u16,
) -> Result<(), HelloError> {
    let mut out = Vec::with_capacity(HELLO_FIXED_BYTES + 2 * 255);
    out.extend_from_slice(&HELLO_MAGIC);
    out.extend_from_slice(&PROTOCOL_VERSION_MIN.to_le_bytes());
    out.extend_from_slice(&version_max.to_le_bytes());
    let (me, build) = (short(me), short(build));
    out.push(me.1);
    out.push(build.1);
    out.extend_from_slice(me.0);
    out.extend_from_slice(build.0);
    stream
        .write_all(&out)
        .await
        .map_err(|error| HelloError::Broken(error.to_string()))
}

/// At most 255 bytes of `text`, and how many.
fn short(text: &str) -> (&[u8], u8) {
    let mut end = text.len().min(255);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    (
        &text.as_bytes()[..end],
        u8::try_from(end).unwrap_or(u8::MAX),
    )
}

/// Read the partner's hello and agree on a version.
pub(super) async fn receive(
    stream: &mut RecvStream,
    expected: &str,
    version_max: u16,
) -> Result<Hello, HelloError> {
    let broken = |error: quinn::ReadExactError| HelloError::Broken(error.to_string());
    let mut fixed = [0; HELLO_FIXED_BYTES];
    stream.read_exact(&mut fixed).await.map_err(broken)?;
    let mut text = vec![0; usize::from(fixed[8]) + usize::from(fixed[9])];
    stream.read_exact(&mut text).await.map_err(broken)?;
    parse(&fixed, &text, expected, version_max).map_err(HelloError::Refuse)
}

fn parse(
    fixed: &[u8; HELLO_FIXED_BYTES],
    text: &[u8],
    expected: &str,
    version_max: u16,
) -> Result<Hello, String> {
    if fixed[..4] != HELLO_MAGIC {
        return Err(
            "the peer does not speak pollux's protocol: check the link's address and port"
                .to_owned(),
        );
    }
    let (low, high) = (
        u16::from_le_bytes([fixed[4], fixed[5]]),
        u16::from_le_bytes([fixed[6], fixed[7]]),
    );
    let (host, build) = text.split_at(usize::from(fixed[8]).min(text.len()));
    let host = String::from_utf8_lossy(host).into_owned();
    let build = String::from_utf8_lossy(build).into_owned();
    let version = high.min(version_max);
    if version < low.max(PROTOCOL_VERSION_MIN) {
        return Err(format!(
            "no common protocol version: {host} (build {build}) speaks {low} to {high}, this host {PROTOCOL_VERSION_MIN} to {version_max}; bring both hosts to the same pollux version"
        ));
    }
    if host != expected {
        return Err(format!(
            "the peer calls itself `{host}`, this pair is with `{expected}`: correct the name on one of the hosts"
        ));
    }
    Ok(Hello {
        host,
        build,
        version,
    })
}

/// First bytes of an epoch lane.
pub(super) fn lane_start(vm: VmId, generation: Generation) -> [u8; LANE_BYTES] {
    let mut out = [0; LANE_BYTES];
    out[..4].copy_from_slice(&LANE_MAGIC);
    out[4] = LANE_EPOCH;
    out[8..24].copy_from_slice(&vm.0);
    out[24..].copy_from_slice(&generation.0.to_le_bytes());
    out
}

/// Undo [`lane_start`].
pub(super) fn parse_lane_start(bytes: &[u8; LANE_BYTES]) -> Result<(VmId, Generation), String> {
    if bytes[..4] != LANE_MAGIC || bytes[5..8] != [0; 3] {
        return Err("a lane does not start as one".to_owned());
    }
    if bytes[4] != LANE_EPOCH {
        return Err(format!(
            "a lane of the unknown kind {}: run the same pollux version on both hosts",
            bytes[4]
        ));
    }
    let (mut vm, mut generation) = ([0; 16], [0; 8]);
    vm.copy_from_slice(&bytes[8..24]);
    generation.copy_from_slice(&bytes[24..]);
    Ok((VmId(vm), Generation(u64::from_le_bytes(generation))))
}

/// Read a Hello and a version-1 lane's start of any content.
pub(super) fn fuzz(data: &[u8]) {
    if let Some((fixed, text)) = data.split_first_chunk()
        && let Ok(hello) = parse(fixed, text, "pollux-b", PROTOCOL_VERSION)
    {
        assert!((PROTOCOL_VERSION_MIN..=PROTOCOL_VERSION).contains(&hello.version));
        assert_eq!(hello.host, "pollux-b");
    }
    if let Some(start) = data.first_chunk()
        && let Ok((vm, generation)) = parse_lane_start(start)
    {
        assert_eq!(lane_start(vm, generation), *start);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(low: u16, high: u16, host: &str) -> Result<Hello, String> {
        let mut fixed = [0; HELLO_FIXED_BYTES];
        fixed[..4].copy_from_slice(&HELLO_MAGIC);
        fixed[4..6].copy_from_slice(&low.to_le_bytes());
        fixed[6..8].copy_from_slice(&high.to_le_bytes());
        fixed[8] = u8::try_from(host.len()).unwrap();
        fixed[9] = 2;
        parse(
            &fixed,
            format!("{host}b1").as_bytes(),
            "pollux-b",
            PROTOCOL_VERSION,
        )
    }

    #[test]
    fn the_highest_common_version_is_spoken() {
        assert_eq!(hello(1, 9, "pollux-b").unwrap().version, PROTOCOL_VERSION);
        let error = hello(7, 9, "pollux-b").unwrap_err();
        assert!(
            error.contains("7 to 9") && error.contains("same pollux version"),
            "{error}"
        );
        assert!(hello(0, 0, "pollux-b").is_err());
    }

    #[test]
    fn another_host_is_refused_by_name() {
        let error = hello(1, 1, "castor").unwrap_err();
        assert!(
            error.contains("castor") && error.contains("pollux-b"),
            "{error}"
        );
        assert!(parse(&[0; 10], b"", "x", 2).is_err());
    }

    #[test]
    fn lanes_start_as_written() {
        let start = lane_start(VmId([3; 16]), Generation(9));
        assert_eq!(parse_lane_start(&start), Ok((VmId([3; 16]), Generation(9))));
        for at in 0..8 {
            let mut bad = start;
            bad[at] ^= 0x40;
            assert!(parse_lane_start(&bad).is_err(), "byte {at}");
        }
    }
}
