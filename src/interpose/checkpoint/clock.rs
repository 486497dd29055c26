//! Guest time. QEMU stops the guest's clocks with the guest, so every pause is stolen
//! from them: 12 to 49 % of all time at 25 to 5 ms epochs, more than any NTP corrects.
//!
//! QEMU keeps two offsets (`TimersState`, softmmu/timers-state.h): while the guest is
//! stopped they hold the guest's tick counter T and its virtual clock C; `cont` subtracts
//! the host's. [`ClockRepair`] finds them in QEMU's memory by the values the first saved
//! state holds, and before each `cont` sets them to where they would be had the guest not
//! been stopped. The lead of the host's clocks over the guest's is fixed once, so that
//! errors of single cuts do not add up. [`patch_state_clock`] does the same to a saved
//! state at promotion.
//!
//! It must never write if it is not sure: the hits must be exactly one T and one C at the
//! known distance in QEMU's own data, and before every write they must hold what the
//! state just saved says.

use super::host_clock::{HostInstant, host_ticks};
use super::stream::{StreamError, at_timer_body};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes from `cpu_ticks_offset` to `cpu_clock_offset` in `TimersState`; equal in
/// QEMU 7.2 and 10.0.
const T_TO_C: u64 = 0x30;

/// Bytes from `cpu_ticks_prev` to `cpu_ticks_offset`.
const PREV_TO_T: u64 = 8;

/// `cpu_ticks_offset` in a saved state, from its first byte (header included).
const STATE_T_AT: usize = 27;
/// `cpu_clock_offset` in a saved state; eight unused bytes lie between the two.
const STATE_C_AT: usize = 43;

/// Writable data of one QEMU binary that is searched at most; 7.2 has about 6 MiB.
const SEARCH_BYTES_MAX: u64 = 256 << 20;

/// Furthest the guest's clock may lag at a cut before the lead is taken anew instead of
/// repaired: somebody else has stopped the guest, and that time is not ours to give back.
const SLIP_NS_MAX: i64 = 1_000_000_000;

/// How far the guest's clock may be ahead of the lead: rounding of two clock readings.
const AHEAD_NS_MAX: i64 = 1_000_000;

/// The guest's clock at the instant of a cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ClockStamp {
    /// QEMU's virtual clock, ns since the guest first ran.
    pub guest_clock_ns: u64,
    /// This host's `CLOCK_MONOTONIC` when `stop` had returned, ns.
    pub host_monotonic_ns: u64,
}

/// Why guest time is not repaired.
#[derive(Debug, thiserror::Error)]
pub enum ClockError {
    /// QEMU's memory could not be read or written.
    #[error("guest time: {what} of QEMU process {pid}: {source}")]
    Memory {
        /// Which file.
        what: &'static str,
        /// QEMU's process.
        pid: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// The saved state could not be read.
    #[error("guest time: saved state: {0}")]
    State(#[from] StreamError),
    /// The fields are not where they are in the QEMU versions known.
    #[error(
        "guest time: QEMU's clock fields not found for sure: the values occur {ticks_hits} and \
         {clock_hits} times, {pairs} times {T_TO_C:#x} apart (must be once, in one place)"
    )]
    NotFound {
        /// Places that hold T.
        ticks_hits: usize,
        /// Places that hold C.
        clock_hits: usize,
        /// Places where both fit.
        pairs: usize,
    },
    /// More writable data than this searches.
    #[error("guest time: QEMU has {bytes} bytes of writable data, more than {SEARCH_BYTES_MAX}")]
    TooLarge {
        /// How much.
        bytes: u64,
    },
    /// QEMU's memory and the state it saved disagree.
    #[error(
        "guest time: QEMU's memory holds ticks {memory_ticks}, clock {memory_clock_ns} ns, but its \
         saved state {state_ticks} and {state_clock_ns} ns; not touched any more"
    )]
    Disagree {
        /// T in memory.
        memory_ticks: i64,
        /// C in memory.
        memory_clock_ns: i64,
        /// T in the state.
        state_ticks: i64,
        /// C in the state.
        state_clock_ns: i64,
    },
    /// This CPU has no tick counter known here.
    #[error("guest time: only x86-64 hosts are known")]
    NoTicks,
}

/// The two offsets as a saved state or QEMU's memory holds them. While the guest is
/// stopped they are the guest's own counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TimerState {
    pub(super) ticks: i64,
    pub(super) clock_ns: i64,
}

impl TimerState {
    /// Reads them from a saved state (header included).
    pub(super) fn of(state: &[u8]) -> Result<Self, StreamError> {
        let mut body = at_timer_body(state)?;
        debug_assert_eq!(body.at, STATE_T_AT);
        let ticks = body.be64("section timer")?.cast_signed();
        body.be64("section timer")?;
        let clock_ns = body.be64("section timer")?.cast_signed();
        Ok(Self { ticks, clock_ns })
    }
}

/// How far the host's clocks are ahead of the guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Lead {
    ticks: i64,
    clock_ns: i64,
}

impl Lead {
    fn of(guest: TimerState, host: HostInstant) -> Self {
        Self {
            ticks: host.ticks.wrapping_sub(guest.ticks),
            clock_ns: host.monotonic_ns.wrapping_sub(guest.clock_ns),
        }
    }

    /// What the guest's clocks would be at `host` had they never stopped.
    fn guest_at(self, host: HostInstant) -> TimerState {
        TimerState {
            ticks: host.ticks.wrapping_sub(self.ticks),
            clock_ns: host.monotonic_ns.wrapping_sub(self.clock_ns),
        }
    }
}

/// What [`ClockRepair::repair`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repaired {
    /// The guest's clock was advanced by this many ns.
    Advanced {
        /// How far.
        ns: u64,
    },
    /// The guest had been stopped by somebody else for longer than pollux gives back, or
    /// has just been resumed by plain `cont`: its time goes on from here.
    LeadTakenAnew,
}

/// Gives the guest of one QEMU process its time back.
///
/// It holds the process's memory open, so a reused pid cannot be hit.
#[derive(Debug)]
pub struct ClockRepair {
    memory: File,
    pid: u32,
    ticks_at: u64,
    lead: Option<Lead>,
}

impl ClockRepair {
    /// Finds the two fields in QEMU process `pid`, which has just written `saved_state`
    /// and is still stopped; `stopped_at` is when it stopped.
    ///
    /// # Errors
    /// [`ClockError::NotFound`] unless the search is unambiguous; then run without repair
    /// and say so.
    pub fn find(pid: u32, saved_state: &[u8], stopped_at: HostInstant) -> Result<Self, ClockError> {
        host_ticks().ok_or(ClockError::NoTicks)?;
        let wanted = TimerState::of(saved_state)?;
        let error = |what| move |source| ClockError::Memory { what, pid, source };
        let memory = OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/proc/{pid}/mem"))
            .map_err(error("memory"))?;
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).map_err(error("mappings"))?;
        let exe = fs::read_link(format!("/proc/{pid}/exe")).map_err(error("binary"))?;
        let ranges = writable_data(&maps, &exe.to_string_lossy());
        let bytes = ranges.iter().map(|range| range.end - range.start).sum();
        if bytes > SEARCH_BYTES_MAX {
            return Err(ClockError::TooLarge { bytes });
        }
        let mut hits = Hits::default();
        for range in ranges {
            let len = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
            let mut data = vec![0; len];
            memory
                .read_exact_at(&mut data, range.start)
                .map_err(error("memory"))?;
            hits.search(&data, range.start, wanted);
        }
        let ticks_at = hits.only_pair()?;
        let lead = Some(Lead::of(wanted, stopped_at));
        Ok(Self {
            memory,
            pid,
            ticks_at,
            lead,
        })
    }

    /// Before `cont`, with the guest still stopped since `saved_state` was written: sets
    /// its clocks to where they would be without the pause.
    ///
    /// # Errors
    /// Nothing has been written, and nothing should be from now on: drop this repair.
    pub fn repair(
        &mut self,
        saved_state: &[u8],
        stopped_at: HostInstant,
    ) -> Result<Repaired, ClockError> {
        let state = TimerState::of(saved_state)?;
        let memory = self.read()?;
        if memory != state {
            return Err(ClockError::Disagree {
                memory_ticks: memory.ticks,
                memory_clock_ns: memory.clock_ns,
                state_ticks: state.ticks,
                state_clock_ns: state.clock_ns,
            });
        }
        let lead = *self.lead.get_or_insert(Lead::of(state, stopped_at));
        let lag_ns = lead
            .guest_at(stopped_at)
            .clock_ns
            .wrapping_sub(state.clock_ns);
        if !(-AHEAD_NS_MAX..=SLIP_NS_MAX).contains(&lag_ns) {
            self.lead = Some(Lead::of(state, stopped_at));
            return Ok(Repaired::LeadTakenAnew);
        }
        let now = lead.guest_at(HostInstant::now());
        // Never backwards; the two go together or not at all.
        if now.clock_ns <= state.clock_ns || now.ticks <= state.ticks {
            return Ok(Repaired::Advanced { ns: 0 });
        }
        self.write(now)?;
        let ns = (now.clock_ns - state.clock_ns).unsigned_abs();
        Ok(Repaired::Advanced { ns })
    }

    /// The guest was stopped on purpose and time shall not be given back: take the lead
    /// anew at the next cut.
    pub fn forget_lead(&mut self) {
        self.lead = None;
    }

    fn read(&self) -> Result<TimerState, ClockError> {
        let field = |at: u64| -> Result<i64, ClockError> {
            let mut bytes = [0; 8];
            self.memory
                .read_exact_at(&mut bytes, at)
                .map_err(|source| self.error(source))?;
            Ok(i64::from_ne_bytes(bytes))
        };
        Ok(TimerState {
            ticks: field(self.ticks_at)?,
            clock_ns: field(self.ticks_at + T_TO_C)?,
        })
    }

    fn write(&self, state: TimerState) -> Result<(), ClockError> {
        let field = |at: u64, value: i64| {
            self.memory
                .write_all_at(&value.to_ne_bytes(), at)
                .map_err(|source| self.error(source))
        };
        field(self.ticks_at, state.ticks)?;
        field(self.ticks_at + T_TO_C, state.clock_ns)
    }

    fn error(&self, source: io::Error) -> ClockError {
        ClockError::Memory {
            what: "memory",
            pid: self.pid,
            source,
        }
    }
}

/// Places that hold the values looked for.
#[derive(Debug, Default)]
struct Hits {
    ticks: Vec<u64>,
    clock: Vec<u64>,
}

impl Hits {
    fn search(&mut self, data: &[u8], base: u64, wanted: TimerState) {
        for (word, at) in data.chunks_exact(8).zip((base..).step_by(8)) {
            if word == wanted.ticks.to_ne_bytes() {
                self.ticks.push(at);
            }
            if word == wanted.clock_ns.to_ne_bytes() {
                self.clock.push(at);
            }
        }
    }

    /// The place of T: C occurs once, and T where it belongs to that C. Besides, T may stand
    /// in `cpu_ticks_prev`, just before: the last tick count given out, equal to T if
    /// somebody asked while the guest was stopped. Any other hit makes the search void.
    fn only_pair(&self) -> Result<u64, ClockError> {
        let paired = |&&ticks_at: &&u64| self.clock.contains(&(ticks_at + T_TO_C));
        let pairs: Vec<u64> = self.ticks.iter().filter(paired).copied().collect();
        let strange = |ticks_at: u64| {
            let known = |&&at: &&u64| at == ticks_at || at + PREV_TO_T == ticks_at;
            self.ticks.iter().filter(known).count() != self.ticks.len()
        };
        match (pairs.as_slice(), self.clock.len()) {
            (&[ticks_at], 1) if !strange(ticks_at) => Ok(ticks_at),
            _ => Err(ClockError::NotFound {
                ticks_hits: self.ticks.len(),
                clock_hits: self.clock.len(),
                pairs: pairs.len(),
            }),
        }
    }
}

/// The binary's own writable data: its file mappings that are private and writable, and
/// the anonymous memory that follows the last of them without a gap (its bss). See
/// proc_pid_maps(5).
fn writable_data(maps: &str, exe: &str) -> Vec<std::ops::Range<u64>> {
    let mut found: Vec<std::ops::Range<u64>> = Vec::new();
    let mut exe_end = None;
    for line in maps.lines() {
        let mut fields = line.split_ascii_whitespace();
        let (Some(range), Some(mode)) = (fields.next(), fields.next()) else {
            continue;
        };
        // The name is the sixth field and may hold blanks; offset, device, inode precede.
        let name = line.splitn(6, ' ').nth(5).unwrap_or("").trim();
        let Some((start, end)) = range.split_once('-') else {
            continue;
        };
        let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        else {
            continue;
        };
        let own = name == exe;
        let bss = name.is_empty() && exe_end == Some(start);
        if own || bss {
            exe_end = Some(end);
            if mode.starts_with("rw-p") && end > start {
                found.push(start..end);
            }
        }
    }
    found
}

/// Advances the guest's clocks in a saved state (header included) by `advance_ns`, for
/// promotion: what passed between the cut and the promoted guest's first instruction.
/// The state holds the guest's own counters, so only the elapsed time matters; `tsc_hz`
/// turns it into ticks ([`super::ticks_per_second`]).
///
/// # Errors
/// If the state does not begin with section `timer`; it is then unchanged.
pub fn patch_state_clock(
    state: &mut [u8],
    advance_ns: u64,
    tsc_hz: u64,
) -> Result<(), StreamError> {
    let timer = TimerState::of(state)?;
    let ticks = u128::from(advance_ns) * u128::from(tsc_hz) / 1_000_000_000;
    let ticks = u64::try_from(ticks).unwrap_or(u64::MAX).cast_signed();
    let mut put = |at: usize, value: i64| {
        state[at..at + 8].copy_from_slice(&value.to_be_bytes());
    };
    put(STATE_T_AT, timer.ticks.saturating_add(ticks));
    put(
        STATE_C_AT,
        timer.clock_ns.saturating_add_unsigned(advance_ns),
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATE: TimerState = TimerState {
        ticks: 0x1122_3344_5566,
        clock_ns: 0x0077_8899_aabb,
    };

    fn data(words: &[(usize, i64)]) -> Vec<u8> {
        let mut data = vec![0; 0x200];
        for &(at, value) in words {
            data[at..at + 8].copy_from_slice(&value.to_ne_bytes());
        }
        data
    }

    fn search(words: &[(usize, i64)]) -> Result<u64, ClockError> {
        let mut hits = Hits::default();
        hits.search(&data(words), 0x5000, STATE);
        hits.only_pair()
    }

    #[test]
    fn one_pair_at_the_known_distance_is_found() {
        let pair = [(0x40, STATE.ticks), (0x70, STATE.clock_ns)];
        assert_eq!(search(&pair).expect("found"), 0x5040);
        let with_prev = [(0x38, STATE.ticks), pair[0], pair[1]];
        assert_eq!(search(&with_prev).expect("found"), 0x5040);
    }

    #[test]
    fn anything_else_is_not_sure() {
        let (t, c) = (STATE.ticks, STATE.clock_ns);
        for words in [
            &[][..],
            &[(0x40, t)],
            &[(0x70, c)],
            &[(0x40, t), (0x78, c)],
            &[(0x40, t), (0x70, c), (0x100, c)],
            &[(0x40, t), (0x70, c), (0x100, t)],
            &[(0x40, t), (0x70, c), (0x100, t), (0x130, c)],
        ] {
            assert!(search(words).is_err(), "{words:x?}");
        }
    }

    #[test]
    fn only_the_binarys_own_data_is_searched() {
        let maps = "\
555500000000-555500100000 r-xp 00000000 fd:01 7 /usr/bin/my qemu
555500100000-555500180000 r--p 00100000 fd:01 7 /usr/bin/my qemu
555500180000-555500200000 rw-p 00180000 fd:01 7 /usr/bin/my qemu
555500200000-555500280000 rw-p 00000000 00:00 0 
555500290000-5555002a0000 rw-p 00000000 00:00 0 
555501000000-555501100000 rw-p 00000000 00:00 0 [heap]
7f0000000000-7f0010000000 rw-s 00000000 00:19 9 /dev/shm/ram
7f0020000000-7f0020100000 rw-p 00000000 fd:01 8 /usr/lib/libc.so.6
nonsense
";
        let found = writable_data(maps, "/usr/bin/my qemu");
        let expected = [
            0x5555_0018_0000..0x5555_0020_0000,
            0x5555_0020_0000..0x5555_0028_0000,
        ];
        assert_eq!(found, expected);
    }

    fn state() -> Vec<u8> {
        let mut state = b"QEVM\0\0\0\x03\x04\0\0\0\x01\x05timer\0\0\0\0\0\0\0\x02".to_vec();
        state.extend(STATE.ticks.to_be_bytes());
        state.extend([0; 8]);
        state.extend(STATE.clock_ns.to_be_bytes());
        state.extend(b"rest");
        state
    }

    #[test]
    fn a_patched_state_is_later_by_the_time_given() {
        let mut patched = state();
        assert_eq!(TimerState::of(&patched), Ok(STATE));
        patch_state_clock(&mut patched, 50_000_000, 2_600_000_000).expect("a state");
        let later = TimerState::of(&patched).expect("a state");
        assert_eq!(later.clock_ns - STATE.clock_ns, 50_000_000);
        assert_eq!(later.ticks - STATE.ticks, 130_000_000);
        let same = |range: std::ops::Range<usize>| patched[range.clone()] == state()[range];
        assert!(same(0..27) && same(35..43) && same(51..55));
    }

    #[test]
    fn a_strange_state_is_not_patched() {
        let good = state();
        for end in 0..51 {
            let mut short = good[..end].to_vec();
            assert!(patch_state_clock(&mut short, 1, 1).is_err(), "{end}");
            assert_eq!(short, good[..end]);
        }
        let mut other = good;
        other[14] = b'T';
        assert!(patch_state_clock(&mut other, 1, 1).is_err());
    }

    #[test]
    fn the_lead_is_undone_at_the_same_instant() {
        let host = HostInstant::now();
        let lead = Lead::of(STATE, host);
        assert_eq!(lead.guest_at(host), STATE);
        let later = HostInstant {
            ticks: host.ticks + 26,
            monotonic_ns: host.monotonic_ns + 10,
        };
        assert_eq!(lead.guest_at(later).clock_ns, STATE.clock_ns + 10);
        assert_eq!(lead.guest_at(later).ticks, STATE.ticks + 26);
    }

    /// A process that is no QEMU: its memory holds no such pair, so nothing is found.
    #[test]
    fn a_process_that_is_no_qemu_is_left_alone() {
        let error = ClockRepair::find(std::process::id(), &state(), HostInstant::now())
            .expect_err("this is a test binary");
        assert!(matches!(error, ClockError::NotFound { .. }), "{error}");
    }
}
