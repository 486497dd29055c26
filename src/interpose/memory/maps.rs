//! The memory map of another process, from /proc/PID/maps.
//!
//! Format: proc_pid_maps(5). Lines that do not parse are skipped: the callers
//! check that they found what they need.

use std::io;
use std::ops::Range;

/// One line of /proc/PID/maps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mapping {
    /// Addresses in the process.
    pub(super) addresses: Range<u64>,
    /// The process may run code here.
    pub(super) executable: bool,
    /// Stores reach the file (`MAP_SHARED`).
    pub(super) shared: bool,
    /// Byte offset in the mapped file.
    pub(super) offset: u64,
    /// Device of the mapped file, (major, minor).
    pub(super) device: (u32, u32),
    /// Inode of the mapped file, 0 for none.
    pub(super) inode: u64,
    /// File name or pseudo name such as `[vdso]`, may be empty.
    pub(super) name: String,
}

/// Reads and parses the map of process `pid`.
pub(super) fn read(pid: i32) -> io::Result<Vec<Mapping>> {
    let text = std::fs::read(format!("/proc/{pid}/maps"))?;
    Ok(String::from_utf8_lossy(&text)
        .lines()
        .filter_map(parse_line)
        .collect())
}

/// `7f00-7f40 rw-s 00000000 00:19 4711   /dev/shm/ram`
fn parse_line(line: &str) -> Option<Mapping> {
    let (addresses, rest) = line.split_once(' ')?;
    let (perms, rest) = rest.split_once(' ')?;
    let (offset, rest) = rest.split_once(' ')?;
    let (device, rest) = rest.split_once(' ')?;
    let (inode, name) = rest.split_once(' ').unwrap_or((rest, ""));
    let (start, end) = addresses.split_once('-')?;
    let (major, minor) = device.split_once(':')?;
    Some(Mapping {
        addresses: u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?,
        executable: perms.as_bytes().get(2) == Some(&b'x'),
        shared: perms.as_bytes().get(3) == Some(&b's'),
        offset: u64::from_str_radix(offset, 16).ok()?,
        device: (
            u32::from_str_radix(major, 16).ok()?,
            u32::from_str_radix(minor, 16).ok()?,
        ),
        inode: inode.parse().ok()?,
        name: name.trim_start().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_parsed_with_blanks_in_the_name() {
        let line = "7f0000001000-7f0000003000 rw-s 00002000 00:1a 4711                       /dev/shm/a ram";
        let mapping = parse_line(line).expect("parses");
        assert_eq!(mapping.addresses, 0x7f00_0000_1000..0x7f00_0000_3000);
        assert!(mapping.shared && !mapping.executable);
        assert_eq!((mapping.offset, mapping.inode), (0x2000, 4711));
        assert_eq!(mapping.device, (0, 0x1a));
        assert_eq!(mapping.name, "/dev/shm/a ram");
    }

    #[test]
    fn an_anonymous_line_and_garbage() {
        let mapping = parse_line("1000-2000 r-xp 00000000 00:00 0 ").expect("parses");
        assert!(mapping.executable && !mapping.shared && mapping.name.is_empty());
        for garbage in ["", "x", "1000 r-xp", "zz-yy r-xp 0 0:0 0", "1-2 r 0 00 0"] {
            assert_eq!(parse_line(garbage), None, "{garbage:?}");
        }
    }
}
