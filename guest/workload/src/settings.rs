//! What the guest does, from the kernel's command line.

use std::fmt;

/// Largest buffer of the memory worker, in MiB; a typo must not become an out-of-memory panic
/// in a guest of a few hundred MiB.
const MEM_MB_MAX: u64 = 65_536;

/// Modes and rates. `pollux.mode` is a comma-separated list; every other key has a default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// `pollux.mode` names `counter`: the counter service on TCP port 7000.
    pub counter: bool,
    /// `pollux.mode` names `disk`: the disk worker.
    pub disk: bool,
    /// `pollux.mode` names `memory`: the memory worker.
    pub memory: bool,
    /// `pollux.mode` names `net`: the echo service on TCP port 7001.
    pub net: bool,
    /// `pollux.mode` names `cpu`: the CPU worker.
    pub cpu: bool,
    /// `pollux.disk_iops`: writes per second of the disk worker (0 pauses it).
    pub disk_iops: u64,
    /// `pollux.disk_mb`: how much of its area the disk worker uses, in MiB.
    pub disk_mb: u64,
    /// `pollux.disk_depth`: threads of the disk worker = writes in flight.
    pub disk_depth: u64,
    /// `pollux.mem_pages_s`: pages written per second by the memory worker (0 pauses it).
    pub mem_pages_s: u64,
    /// `pollux.mem_mb`: buffer of the memory worker, in MiB.
    pub mem_mb: u64,
    /// `pollux.cpu_threads`: busy threads of the CPU worker (0 pauses it).
    pub cpu_threads: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            counter: true,
            disk: false,
            memory: false,
            net: true,
            cpu: false,
            disk_iops: 500,
            disk_mb: 32,
            disk_depth: 1,
            mem_pages_s: 2000,
            mem_mb: 64,
            cpu_threads: 1,
        }
    }
}

/// A `pollux.` parameter that cannot be used.
#[derive(Debug, PartialEq, Eq)]
pub enum BadSetting {
    /// No such key.
    Key(String),
    /// No such mode in `pollux.mode`.
    Mode(String),
    /// The value of this key is no number in its range.
    Number(String),
}

impl fmt::Display for BadSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key(key) => write!(f, "unknown kernel parameter {key}"),
            Self::Mode(mode) => write!(
                f,
                "unknown mode {mode:?} in pollux.mode: use counter, disk, memory, net, cpu, redis, shell"
            ),
            Self::Number(pair) => write!(f, "kernel parameter {pair}: not a number in range"),
        }
    }
}

impl Settings {
    /// Read `/proc/cmdline`'s text. Unusable `pollux.` parameters are returned beside the
    /// settings, not instead of them: a guest that boots and complains beats one that does not.
    pub fn parse(cmdline: &str) -> (Self, Vec<BadSetting>) {
        let mut settings = Self::default();
        let mut bad = Vec::new();
        for (key, value) in cmdline
            .split_whitespace()
            .filter_map(|word| word.split_once('='))
        {
            let Some(name) = key.strip_prefix("pollux.") else {
                continue;
            };
            if let Err(error) = settings.set(name, value) {
                bad.push(error);
            }
        }
        (settings, bad)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), BadSetting> {
        let place = match name {
            "mode" => return self.set_modes(value),
            // Read by /init.
            "ip" | "gw" => return Ok(()),
            "disk_iops" => &mut self.disk_iops,
            "disk_mb" => &mut self.disk_mb,
            "disk_depth" => &mut self.disk_depth,
            "mem_pages_s" => &mut self.mem_pages_s,
            "mem_mb" => &mut self.mem_mb,
            "cpu_threads" => &mut self.cpu_threads,
            _ => return Err(BadSetting::Key(format!("pollux.{name}"))),
        };
        let least = u64::from(matches!(name, "disk_mb" | "disk_depth" | "mem_mb"));
        let most = if name == "disk_depth" {
            256
        } else if name == "mem_mb" {
            MEM_MB_MAX
        } else {
            u64::from(u32::MAX)
        };
        match value.parse() {
            Ok(number) if (least..=most).contains(&number) => *place = number,
            _ => return Err(BadSetting::Number(format!("pollux.{name}={value}"))),
        }
        Ok(())
    }

    fn set_modes(&mut self, list: &str) -> Result<(), BadSetting> {
        (self.counter, self.disk, self.memory, self.net, self.cpu) =
            (false, false, false, false, false);
        for mode in list.split(',').filter(|mode| !mode.is_empty()) {
            match mode {
                "counter" => self.counter = true,
                "disk" => self.disk = true,
                "memory" => self.memory = true,
                "net" => self.net = true,
                "cpu" => self.cpu = true,
                // Read by /init.
                "redis" | "shell" => {}
                _ => return Err(BadSetting::Mode(mode.to_owned())),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_and_rates_are_read_and_the_rest_ignored() {
        let (settings, bad) = Settings::parse(
            "console=ttyS0 quiet pollux.ip=10.0.0.2/24 pollux.mode=disk,memory pollux.disk_iops=7\n",
        );
        let expected = Settings {
            counter: false,
            net: false,
            disk: true,
            memory: true,
            disk_iops: 7,
            ..Settings::default()
        };
        assert_eq!((settings, bad), (expected, vec![]));
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let (settings, bad) =
            Settings::parse("pollux.mem_mb=0 pollux.speed=9 pollux.mode=dsk pollux.disk_iops=fast");
        assert_eq!(settings.mem_mb, Settings::default().mem_mb);
        assert_eq!(
            bad,
            [
                BadSetting::Number("pollux.mem_mb=0".into()),
                BadSetting::Key("pollux.speed".into()),
                BadSetting::Mode("dsk".into()),
                BadSetting::Number("pollux.disk_iops=fast".into()),
            ]
        );
    }
}
