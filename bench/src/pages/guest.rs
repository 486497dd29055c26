//! The test guest alone: one QEMU with its RAM in a file, redis in it, and clients that keep
//! it busy. No lab, no host: nothing here is protected.

use anyhow::{Context, Result, bail};
use pollux::drill::lab_env::Guest as Images;
use pollux::vm::qmp::Qmp;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// RAM of the guest, in MiB.
pub const RAM_MIB: u64 = 256;
/// Booting under TCG on a busy machine.
const BOOT_MAX: Duration = Duration::from_secs(180);
/// One QMP command.
const STEP_MAX: Duration = Duration::from_secs(30);
/// redis' port in the guest.
const REDIS_PORT: u16 = 6379;
/// Keys the clients write, and the bytes of a value: a data set of some 20 MiB.
pub const KEYS: u64 = 60_000;
/// Requests sent at once: what a client library's pipeline does.
const PIPELINE: u64 = 16;
/// Clients.
pub const CLIENTS: u64 = 4;

/// A running guest; ends with the value.
pub struct Guest {
    child: Child,
    folder: TempDir,
    redis: SocketAddr,
    /// One monitor, for whoever drives it.
    pub qmp: Qmp,
}

impl Guest {
    /// Boot it and wait until redis answers.
    ///
    /// # Errors
    /// What could not be started, with the end of the guest's console.
    pub fn boot() -> Result<Self> {
        let images = Images::find_images()?;
        let folder = tempfile::Builder::new()
            .prefix("pollux-pages-")
            .tempdir_in("/dev/shm")?;
        let path = |name: &str| folder.path().join(name);
        File::create(path("ram"))?.set_len(RAM_MIB << 20)?;
        // Asked for and given back: the port is free in all likelihood.
        let redis = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let tsc = pollux::interpose::checkpoint::ticks_per_second() / 1000;
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-accel", "tcg,thread=multi", "-nodefaults", "-display", "none", "-vga", "none"])
            .args(["-machine", "q35,memory-backend=ram,suppress-vmdesc=on"])
            .arg("-object")
            .arg(format!(
                "memory-backend-file,id=ram,size={RAM_MIB}M,share=on,mem-path={}",
                path("ram").display()
            ))
            .args(["-m", &format!("{RAM_MIB}M"), "-smp", "1"])
            .arg("-serial")
            .arg(format!("file:{}", path("console").display()))
            .arg("-kernel")
            .arg(images.join("vmlinuz"))
            .arg("-initrd")
            .arg(images.join("initrd-redis"))
            .arg("-append")
            .arg(format!(
                "console=ttyS0 quiet oops=panic reboot=t tsc=reliable no_timer_check \
                 cryptomgr.notests rcupdate.rcu_expedited=1 tsc_early_khz={tsc} \
                 pollux.ip=10.77.0.10/24 pollux.mode=counter,redis"
            ))
            .arg("-netdev")
            .arg(format!(
                "user,id=n0,restrict=on,net=10.77.0.0/24,host=10.77.0.2,hostfwd=tcp:{redis}-10.77.0.10:{REDIS_PORT}"
            ))
            .args(["-device", "virtio-net-pci,netdev=n0,disable-modern=on"])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", path("qmp").display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(path("stderr"))?);
        // SAFETY: prctl with these arguments only sets a flag of the new process; it is
        // async-signal-safe and allocates nothing.
        unsafe {
            command.pre_exec(|| {
                nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
                Ok(())
            });
        }
        let mut child = command.spawn().context("qemu-system-x86_64")?;
        let ready = Qmp::connect(&path("qmp"), BOOT_MAX)
            .map_err(anyhow::Error::from)
            .and_then(|qmp| wait_redis(redis, &mut child).map(|()| qmp));
        match ready {
            Ok(qmp) => Ok(Self {
                child,
                folder,
                redis,
                qmp,
            }),
            Err(e) => {
                let _ = child.kill();
                let _ = child.wait();
                let tail = |name| std::fs::read_to_string(path(name)).unwrap_or_default();
                Err(e.context(format!(
                    "the guest does not come up: {}\n{}",
                    tail("stderr"),
                    tail("console")
                )))
            }
        }
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its RAM.
    #[must_use]
    pub fn ram_file(&self) -> PathBuf {
        self.folder.path().join("ram")
    }

    /// A folder that goes with it.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// One QMP command.
    ///
    /// # Errors
    /// What QEMU answered, or that it did not.
    pub fn qmp(&mut self, command: &str, args: serde_json::Value) -> Result<serde_json::Value> {
        self.qmp
            .execute_within(command, args, STEP_MAX)
            .with_context(|| format!("QMP `{command}`"))
    }

    /// Keep redis busy until the value goes.
    ///
    /// # Errors
    /// If a client cannot connect.
    pub fn load(&self) -> Result<Load> {
        Load::start(self.redis)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait_redis(redis: SocketAddr, child: &mut Child) -> Result<()> {
    let end = Instant::now() + BOOT_MAX;
    loop {
        if let Some(status) = child.try_wait()? {
            bail!("QEMU ended: {status}");
        }
        if ping(redis).is_ok() {
            return Ok(());
        }
        if Instant::now() > end {
            bail!("redis does not answer within {} s", BOOT_MAX.as_secs());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn ping(redis: SocketAddr) -> Result<()> {
    let mut client = Client::connect(redis)?;
    client.ask("PING\r\n", 1)
}

struct Client(BufReader<TcpStream>);

impl Client {
    fn connect(redis: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&redis, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        stream.set_nodelay(true)?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Send requests and read as many one-line answers.
    fn ask(&mut self, requests: &str, answers: u64) -> Result<()> {
        self.0.get_mut().write_all(requests.as_bytes())?;
        for _ in 0..answers {
            let mut line = String::new();
            if self.0.read_line(&mut line)? == 0 {
                bail!("redis closed the connection");
            }
            if line.starts_with('-') {
                bail!("redis says {line}");
            }
        }
        Ok(())
    }
}

/// Clients at work.
pub struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    clients: Vec<JoinHandle<Result<()>>>,
}

impl Load {
    fn start(redis: SocketAddr) -> Result<Self> {
        let (stop, done) = (Arc::default(), Arc::default());
        let mut load = Self {
            stop,
            done,
            clients: Vec::new(),
        };
        for number in 0..CLIENTS {
            let mut client = Client::connect(redis)?;
            let (stop, done) = (Arc::clone(&load.stop), Arc::clone(&load.done));
            load.clients.push(
                std::thread::Builder::new()
                    .name("redis-client".into())
                    .spawn(move || {
                        let mut seed = number + 1;
                        while !stop.load(Ordering::Relaxed) {
                            client.ask(&requests(&mut seed), PIPELINE)?;
                            done.fetch_add(PIPELINE, Ordering::Relaxed);
                        }
                        Ok(())
                    })?,
            );
        }
        Ok(load)
    }

    /// Requests answered so far.
    #[must_use]
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// End the clients.
    ///
    /// # Errors
    /// If one was not answered.
    pub fn stop(mut self) -> Result<()> {
        self.join()
    }

    fn join(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients.drain(..) {
            client
                .join()
                .map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        Ok(())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.join();
    }
}

/// A mix as a cache or session store sees it: counters, short records, list entries.
fn requests(seed: &mut u64) -> String {
    let mut text = String::new();
    for _ in 0..PIPELINE {
        *seed ^= *seed << 13;
        *seed ^= *seed >> 7;
        *seed ^= *seed << 17;
        let (key, kind) = ((*seed >> 8) % KEYS, *seed % 8);
        let _ = match kind {
            0..=2 => write!(text, "INCR hits:{key}\r\n"),
            3..=5 => write!(
                text,
                "SET session:{key} user={key};name=client-{:05};seen={};cart=3,17,{};theme=dark;lang=en;token={:016x}{:016x}\r\n",
                key % 977,
                *seed % 100_000_007,
                *seed % 90,
                *seed,
                seed.wrapping_mul(0x9e37_79b9_7f4a_7c15),
            ),
            6 => write!(text, "HINCRBY visits:{} page:{} 1\r\n", key % 500, key % 40),
            _ => write!(text, "LPUSH log:{} GET/item/{key}/200\r\n", key % 300),
        };
    }
    text
}
