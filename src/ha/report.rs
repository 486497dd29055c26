//! What every host says of itself and of the others with every heartbeat.
//!
//! The layout, version 3, little-endian; a frame around it (not this file's) has the sender's
//! name, incarnation and number, and authenticates all:
//!
//! ```text
//!  u8 version | u8 host | u64 incarnation | u64 seq | u8 flags (1 storage, 2 farewell, 4 promise, 8 former)
//!  u16 gateway age | u16 registry age | u64 state version | u64 promised (a bit a host)
//!  u16 standby lag | u32 weight
//!  u16 watchdog | u8 n, n x heard | u8 m, m x vouch
//!  heard: u8 host | u64 incarnation | u64 seq | u8 k, k x (u8 path | u16 age)
//!  vouch: u8 host | u64 incarnation | u64 seq
//! ```
//!
//! Versions: 1, the first; 2 has promises; 3 tells of those of a former life.
//!
//! Ages and lengths are in units of 10 ms; 0xffff is "never, none". A path below 0x80 is a
//! network, from there on a storage.
//!
//! Hosts and paths are in rising order. Must never: allocate by a number in the bytes, take a host
//! twice, panic.

use super::time::Millis;
use crate::pool::{HostId, Incarnation, POOL_HOSTS_MAX, Seq};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

/// Layout version that is written.
pub const REPORT_VERSION: u8 = 3;
/// Most bytes of a report: sealed (`beat::PACKET_BYTES_MAX`), it fits a host's block of the
/// statefile.
pub const REPORT_BYTES_MAX: usize = 3744;
/// Most networks of a pool.
pub const NETWORKS_MAX: u8 = 4;
/// Most storage paths: three disks of a statefile, or etcd.
pub const STORAGES_MAX: u8 = 3;

const HEAD_BYTES: usize = 1 + 1 + 8 + 8 + 1 + 2 + 2 + 8 + 8 + 2 + 4 + 2;
const REFERENCE_BYTES: usize = 1 + 8 + 8;
const PATH_BYTES: usize = 3;
const PATHS_MAX: usize = NETWORKS_MAX as usize + STORAGES_MAX as usize;
const _: () = assert!(
    HEAD_BYTES + 2 + (POOL_HOSTS_MAX - 1) * (2 * REFERENCE_BYTES + 1 + PATHS_MAX * PATH_BYTES)
        <= REPORT_BYTES_MAX
);

const _: () = assert!(POOL_HOSTS_MAX == 64, "a bit a host");
const UNIT_MS: u64 = 10;
const NEVER: u16 = u16::MAX;
const FLAG_STORAGE: u8 = 1;
const FLAG_FAREWELL: u8 = 2;
const FLAG_PROMISE: u8 = 4;
const FLAG_FORMER: u8 = 8;
const STORAGE_BASE: u8 = 0x80;

/// One way for a host's reports to come here.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Path {
    /// A network, by its index in the pool's settings, below [`NETWORKS_MAX`].
    Network(u8),
    /// A disk of the statefile, or etcd, below [`STORAGES_MAX`].
    Storage(u8),
}

/// What a host has heard of another.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Heard {
    /// The life it is in.
    pub incarnation: Incarnation,
    /// Its newest report.
    pub seq: Seq,
    /// Age of the newest report on each path on which there ever was one.
    pub ages: BTreeMap<Path, Millis>,
}

/// How a host stands with the registry.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RegistryView {
    /// Age of its newest successful read, counted from the read's begin.
    pub age: Option<Millis>,
    /// Version of the pool state it saw.
    pub version: u64,
    /// For each host that this read showed as a member: the newest report heard from it before
    /// the read began. See [`super::lease`].
    pub vouches: BTreeMap<HostId, (Incarnation, Seq)>,
    /// It promises to give nobody up; see [`super::pact`].
    pub promise: bool,
    /// The members at that version whose newest word here is a promise at that version.
    pub promised: BTreeSet<HostId>,
    /// A former life of it promised as one of two: that it is over counts only once this life has
    /// joined and said so.
    pub former: bool,
}

/// One report of one host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Report {
    /// Who says it.
    pub host: HostId,
    /// In which life.
    pub incarnation: Incarnation,
    /// Its number.
    pub seq: Seq,
    /// Whom it hears.
    pub heard: BTreeMap<HostId, Heard>,
    /// Age of the gateway's newest answer.
    pub gateway_age: Option<Millis>,
    /// The registry.
    pub registry: RegistryView,
    /// Whether the storage of its VMs answers.
    pub storage_ok: bool,
    /// The largest replication lag among the standbys it keeps.
    pub standby_lag: Option<Millis>,
    /// Sum of the weights of its VMs.
    pub weight: u32,
    /// The watchdog's timeout, if one is armed and the host is really reset by it.
    pub watchdog: Option<Millis>,
    /// All its VMs are stopped, and none will be started in this incarnation.
    pub farewell: bool,
}

/// Bytes that are no report.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadReport {
    /// Written by a newer pollux.
    #[error(
        "report of version {0}, this pollux reads {REPORT_VERSION}; bring the hosts to the same version"
    )]
    Version(u8),
    /// Too short, too long, or with bytes behind its end.
    #[error("report of {0} bytes does not end where it says")]
    Length(usize),
    /// A number that cannot be.
    #[error("report with {what} {value}")]
    Value {
        /// Which.
        what: &'static str,
        /// The number.
        value: u64,
    },
}

/// Said of the state's version while a write of the host is under way or in doubt.
pub const IN_DOUBT: u64 = u64::MAX;

impl Report {
    /// Whether the sender's standbys are fresher than that of `other`, or its VMs heavier; and only
    /// last, whether its number is lower.
    #[must_use]
    pub fn matters_more_than(&self, other: &Self) -> bool {
        let matters = |report: &Self| {
            let lag = report.standby_lag.unwrap_or(Millis(u64::MAX));
            (lag, Reverse(report.weight), report.host)
        };
        matters(self) < matters(other)
    }

    /// Whether the gateway answered within `fresh`.
    #[must_use]
    pub fn reaches_gateway(&self, fresh: Millis) -> bool {
        self.gateway_age.is_some_and(|age| age < fresh)
    }

    /// The bytes of it, at most [`REPORT_BYTES_MAX`].
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(REPORT_BYTES_MAX);
        out.extend([REPORT_VERSION, self.host.0]);
        out.extend(self.incarnation.0.to_le_bytes());
        out.extend(self.seq.0.to_le_bytes());
        let storage = if self.storage_ok { FLAG_STORAGE } else { 0 };
        let farewell = if self.farewell { FLAG_FAREWELL } else { 0 };
        let promise = if self.registry.promise {
            FLAG_PROMISE
        } else {
            0
        };
        let former = if self.registry.former { FLAG_FORMER } else { 0 };
        out.push(storage | farewell | promise | former);
        put_length(&mut out, self.gateway_age);
        put_length(&mut out, self.registry.age);
        out.extend(self.registry.version.to_le_bytes());
        let promised = self.registry.promised.iter();
        let promised = promised.filter(|host| usize::from(host.0) < POOL_HOSTS_MAX);
        let bits = promised.fold(0_u64, |bits, host| bits | 1 << host.0);
        out.extend(bits.to_le_bytes());
        put_length(&mut out, self.standby_lag);
        out.extend(self.weight.to_le_bytes());
        put_length(&mut out, self.watchdog);
        out.push(count(self.heard.len()));
        for (host, heard) in self.heard.iter().take(POOL_HOSTS_MAX - 1) {
            put_reference(&mut out, *host, heard.incarnation, heard.seq);
            out.push(count(heard.ages.len().min(PATHS_MAX)));
            for (path, age) in heard.ages.iter().take(PATHS_MAX) {
                out.push(match path {
                    Path::Network(n) => *n,
                    Path::Storage(n) => STORAGE_BASE | n,
                });
                put_length(&mut out, Some(*age));
            }
        }
        out.push(count(self.registry.vouches.len()));
        for (host, (incarnation, seq)) in self.registry.vouches.iter().take(POOL_HOSTS_MAX - 1) {
            put_reference(&mut out, *host, *incarnation, *seq);
        }
        out
    }

    /// Read it back.
    ///
    /// # Errors
    /// [`BadReport`]: bytes from other hosts may be anything.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadReport> {
        if bytes.len() > REPORT_BYTES_MAX {
            return Err(BadReport::Length(bytes.len()));
        }
        let mut cursor = Cursor { bytes, at: 0 };
        let version = cursor.u8()?;
        if version != REPORT_VERSION {
            return Err(BadReport::Version(version));
        }
        let host = cursor.host()?;
        let incarnation = Incarnation(cursor.u64()?);
        let seq = Seq(cursor.u64()?);
        let flags = cursor.u8()?;
        if flags & !(FLAG_STORAGE | FLAG_FAREWELL | FLAG_PROMISE | FLAG_FORMER) != 0 {
            return Err(value("flags", flags));
        }
        let gateway_age = cursor.length()?;
        let registry_age = cursor.length()?;
        let version = cursor.u64()?;
        let bits = cursor.u64()?;
        let standby_lag = cursor.length()?;
        let weight = cursor.u32()?;
        let watchdog = cursor.length()?;
        let mut heard = BTreeMap::new();
        for _ in 0..cursor.count()? {
            let (host, incarnation, seq) = cursor.reference()?;
            let entry = Heard {
                incarnation,
                seq,
                ages: cursor.ages()?,
            };
            if heard
                .last_key_value()
                .is_some_and(|(last, _)| *last >= host)
            {
                return Err(value("hosts twice or out of order:", host.0));
            }
            heard.insert(host, entry);
        }
        let mut vouches = BTreeMap::new();
        for _ in 0..cursor.count()? {
            let (host, incarnation, seq) = cursor.reference()?;
            if vouches
                .last_key_value()
                .is_some_and(|(last, _)| *last >= host)
            {
                return Err(value("vouches twice or out of order:", host.0));
            }
            vouches.insert(host, (incarnation, seq));
        }
        if cursor.at != bytes.len() {
            return Err(BadReport::Length(bytes.len()));
        }
        Ok(Self {
            host,
            incarnation,
            seq,
            heard,
            gateway_age,
            registry: RegistryView {
                age: registry_age,
                version,
                vouches,
                promise: flags & FLAG_PROMISE != 0,
                promised: hosts_of(bits),
                former: flags & FLAG_FORMER != 0,
            },
            storage_ok: flags & FLAG_STORAGE != 0,
            standby_lag,
            weight,
            watchdog,
            farewell: flags & FLAG_FAREWELL != 0,
        })
    }
}

/// A bit a host.
fn hosts_of(bits: u64) -> BTreeSet<HostId> {
    (0..64).filter(|n| bits >> n & 1 == 1).map(HostId).collect()
}

fn value(what: &'static str, value: u8) -> BadReport {
    BadReport::Value {
        what,
        value: u64::from(value),
    }
}

fn count(n: usize) -> u8 {
    u8::try_from(n.min(POOL_HOSTS_MAX - 1)).unwrap_or(0)
}

/// Rounded up: an age must not look younger than it is.
fn put_length(out: &mut Vec<u8>, length: Option<Millis>) {
    let units = length.map_or(NEVER, |length| {
        u16::try_from(length.0.div_ceil(UNIT_MS)).map_or(NEVER - 1, |units| units.min(NEVER - 1))
    });
    out.extend(units.to_le_bytes());
}

fn put_reference(out: &mut Vec<u8>, host: HostId, incarnation: Incarnation, seq: Seq) {
    out.push(host.0);
    out.extend(incarnation.0.to_le_bytes());
    out.extend(seq.0.to_le_bytes());
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], BadReport> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let Some(found) = rest.first_chunk::<N>() else {
            return Err(BadReport::Length(self.bytes.len()));
        };
        self.at += N;
        Ok(*found)
    }

    fn u8(&mut self) -> Result<u8, BadReport> {
        self.take().map(|[byte]: [u8; 1]| byte)
    }

    fn u32(&mut self) -> Result<u32, BadReport> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, BadReport> {
        self.take().map(u64::from_le_bytes)
    }

    fn length(&mut self) -> Result<Option<Millis>, BadReport> {
        let units = self.take().map(u16::from_le_bytes)?;
        Ok((units != NEVER).then(|| Millis(u64::from(units) * UNIT_MS)))
    }

    fn host(&mut self) -> Result<HostId, BadReport> {
        let id = self.u8()?;
        if usize::from(id) >= POOL_HOSTS_MAX {
            return Err(value("host", id));
        }
        Ok(HostId(id))
    }

    fn count(&mut self) -> Result<u8, BadReport> {
        let n = self.u8()?;
        if usize::from(n) >= POOL_HOSTS_MAX {
            return Err(value("number of hosts", n));
        }
        Ok(n)
    }

    fn reference(&mut self) -> Result<(HostId, Incarnation, Seq), BadReport> {
        let host = self.host()?;
        Ok((host, Incarnation(self.u64()?), Seq(self.u64()?)))
    }

    fn ages(&mut self) -> Result<BTreeMap<Path, Millis>, BadReport> {
        let n = self.u8()?;
        if usize::from(n) > PATHS_MAX {
            return Err(value("number of paths", n));
        }
        let mut ages = BTreeMap::new();
        for _ in 0..n {
            let byte = self.u8()?;
            let path = match byte.checked_sub(STORAGE_BASE) {
                Some(n) if n < STORAGES_MAX => Path::Storage(n),
                None if byte < NETWORKS_MAX => Path::Network(byte),
                _ => return Err(value("path", byte)),
            };
            let age = self.length()?.ok_or(value("path without an age:", byte))?;
            if ages.last_key_value().is_some_and(|(last, _)| *last >= path) {
                return Err(value("paths twice or out of order:", byte));
            }
            ages.insert(path, age);
        }
        Ok(ages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn full() -> Report {
        let others = (0..63).map(|n| HostId(n + 1));
        let ages = (0..NETWORKS_MAX)
            .map(Path::Network)
            .chain((0..STORAGES_MAX).map(Path::Storage))
            .map(|path| (path, Millis(120)));
        let heard = Heard {
            incarnation: Incarnation(7),
            seq: Seq(u64::MAX),
            ages: ages.collect(),
        };
        Report {
            host: HostId(0),
            incarnation: Incarnation(3),
            seq: Seq(99),
            heard: others.clone().map(|host| (host, heard.clone())).collect(),
            gateway_age: Some(Millis(40)),
            registry: RegistryView {
                age: None,
                version: 12,
                vouches: others
                    .map(|host| (host, (Incarnation(7), Seq(5))))
                    .collect(),
                promise: true,
                promised: [HostId(0), HostId(63)].into(),
                former: true,
            },
            storage_ok: true,
            standby_lag: Some(Millis(10)),
            weight: 77,
            watchdog: Some(Millis(5000)),
            farewell: true,
        }
    }

    #[test]
    fn the_largest_report_fits_and_comes_back_as_it_was() {
        let report = full();
        let bytes = report.encode();
        assert!(bytes.len() <= REPORT_BYTES_MAX, "{}", bytes.len());
        assert_eq!(Report::decode(&bytes), Ok(report));
    }

    #[test]
    fn ages_never_look_younger() {
        let mut report = full();
        report.gateway_age = Some(Millis(41));
        report.standby_lag = Some(Millis(u64::MAX));
        let back = Report::decode(&report.encode()).unwrap();
        assert_eq!(back.gateway_age, Some(Millis(50)));
        assert_eq!(back.standby_lag, Some(Millis(655_340)));
    }

    #[test]
    fn a_report_cut_anywhere_or_longer_is_refused() {
        let bytes = full().encode();
        for end in 0..bytes.len() {
            assert!(Report::decode(&bytes[..end]).is_err(), "{end}");
        }
        let mut longer = bytes;
        longer.push(0);
        assert!(matches!(Report::decode(&longer), Err(BadReport::Length(_))));
        longer[0] = 1;
        assert_eq!(Report::decode(&longer), Err(BadReport::Version(1)));
    }

    #[test]
    fn a_host_told_of_twice_or_out_of_order_is_refused() {
        let mut report = full();
        report.heard.retain(|host, _| host.0 <= 2);
        report.registry.vouches.clear();
        let mut bytes = report.encode();
        let entry = REFERENCE_BYTES + 1 + PATHS_MAX * PATH_BYTES;
        for other in [1, 0] {
            bytes[HEAD_BYTES + 1 + entry] = other;
            assert!(matches!(
                Report::decode(&bytes),
                Err(BadReport::Value { .. })
            ));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Report::decode(&bytes);
        }

        #[test]
        fn whatever_a_changed_byte_makes_of_it_can_be_written_again(at in 0_usize..3700, to: u8) {
            let mut bytes = full().encode();
            if let Some(byte) = bytes.get_mut(at) {
                *byte = to;
            }
            if let Ok(report) = Report::decode(&bytes) {
                prop_assert_eq!(report.encode(), bytes);
            }
        }
    }
}
