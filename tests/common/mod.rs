//! What whole-product tests share: a lab of two linked hosts with their daemons, guests in
//! it, clients outside, and waiting for what is to come.
//!
//! Nothing here waits for a length of time, only for a state, with a limit that a loaded
//! machine of two cores never reaches. Needs root and a test guest (built when missing).

// Every test file uses its own part of this one.
#![allow(dead_code, clippy::unwrap_used, clippy::missing_panics_doc)]

pub mod pool;

use pollux::api::client::{Client, ClientError};
use pollux::api::types::{CreateVm, Done, HostStatus, Protect, Role, Start, VmStatus};
use pollux::lab::daemons::{daemon_spec, up_linked};
use pollux::lab::{KeepPolicy, Lab, LabSpec, Place, in_network};
use pollux::pool::HostName;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Far beyond what anything here takes; only something broken gets here.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// Between two looks at a state.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// The product.
pub const POLLUX: &str = env!("CARGO_BIN_EXE_pollux");
/// The guest's counter service.
const COUNTER_PORT: u16 = 7000;

/// Look until there is something to see.
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(Instant::now() < end, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(LOOK_EVERY);
    }
}

pub fn host(name: &str) -> HostName {
    HostName::new(name).unwrap()
}

pub fn at(name: &str) -> Place {
    name.parse().unwrap()
}

/// A name that no other test and no copy of this one uses.
pub fn fresh_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!(
        "t{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    )
}

/// Two hosts, `a` and `b`, each with a daemon, linked unless said otherwise.
pub struct Bed {
    pub lab: Lab,
}

impl Bed {
    /// A lab that dies with this process, or with the returned value.
    pub fn up() -> Self {
        Self {
            lab: up_linked(Self::spec()).unwrap(),
        }
    }

    /// The spec of [`Bed::up`], for tests that change it or bring it up without links.
    pub fn spec() -> LabSpec {
        let hosts = vec![host("a"), host("b")];
        let mut spec = daemon_spec(&fresh_name(), hosts, 1, KeepPolicy::WithCreator).unwrap();
        // The running program is the test, not the product.
        spec.program = POLLUX.into();
        spec.daemon_argv[0] = POLLUX.into();
        spec
    }

    pub fn api(&self, host_name: &str) -> Api {
        Api {
            client: Client::new(&self.socket(host_name)),
            host: host_name.into(),
        }
    }

    pub fn socket(&self, host_name: &str) -> PathBuf {
        self.lab.host(&host(host_name)).unwrap().api_socket.clone()
    }

    /// The command line, asking this host's daemon.
    pub fn cli(&self, host_name: &str, args: &[&str]) -> Output {
        Command::new(POLLUX)
            .arg("--api")
            .arg(self.socket(host_name))
            .args(args)
            .output()
            .unwrap()
    }

    /// Run a program on a host, in its namespaces; it must succeed.
    pub fn on(&self, host_name: &str, argv: &[&str]) {
        let out = self.lab.command(&at(host_name), argv).output().unwrap();
        assert!(
            out.status.success(),
            "{argv:?} on {host_name}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
    }

    /// Take in a VM on host `a`, its blank disk made, and clean up after it.
    pub fn vm<'b>(&'b self, guest: &Guest) -> Vm<'b> {
        let images = self.lab.host(&host("a")).unwrap().state_dir.join("images");
        std::fs::create_dir_all(&images).unwrap();
        let image = images.join(format!("{}.raw", guest.name));
        std::fs::File::create(&image)
            .unwrap()
            .set_len(guest.disk_bytes)
            .unwrap();
        let vm = Vm {
            bed: self,
            name: guest.name.clone(),
            ip: guest.ip,
            image,
        };
        self.api("a").create(&guest.toml()).unwrap();
        vm
    }
}

/// What went on, for the reader of a failed test.
impl Drop for Bed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for net in &self.lab.plan().hosts {
                let log = std::fs::read_to_string(&net.daemon_log).unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                let last = &lines[lines.len().saturating_sub(60)..];
                eprintln!("--- daemon of {} ---\n{}", net.name, last.join("\n"));
            }
        }
    }
}

fn block<T>(exchange: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(exchange)
}

/// One daemon's API, blocking.
pub struct Api {
    client: Client,
    host: String,
}

impl Api {
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        block(self.client.get(path))
    }

    pub fn post<B: Serialize + Sync>(&self, path: &str, body: &B) -> Result<Done, ClientError> {
        block(self.client.post(path, body))
    }

    pub fn delete(&self, path: &str) -> Result<Done, ClientError> {
        block(self.client.delete(path))
    }

    pub fn status(&self) -> HostStatus {
        self.get("/v1/status").unwrap()
    }

    pub fn create(&self, spec: &str) -> Result<Done, ClientError> {
        self.post(
            "/v1/vms",
            &CreateVm {
                spec: spec.into(),
                origin: "vm.toml".into(),
            },
        )
    }

    /// `start`, `stop`, `unprotect` or `switchover`.
    pub fn command(&self, vm: &str, command: &str) -> Result<Done, ClientError> {
        let path = format!("/v1/vms/{vm}/{command}");
        match command {
            "start" => self.post(&path, &Start { force: false }),
            _ => self.post(&path, &()),
        }
    }

    pub fn protect(&self, vm: &str) -> Result<Done, ClientError> {
        self.post(&format!("/v1/vms/{vm}/protect"), &Protect { partner: None })
    }

    pub fn vm(&self, vm: &str) -> Result<VmStatus, ClientError> {
        self.get(&format!("/v1/vms/{vm}"))
    }

    /// Poll a VM until it is as wanted; gives its status then.
    pub fn wait(&self, vm: &str, what: &str, wanted: impl Fn(&VmStatus) -> bool) -> VmStatus {
        let end = Instant::now() + PATIENCE;
        loop {
            let status = self.vm(vm);
            match &status {
                Ok(status) if wanted(status) => return status.clone(),
                _ => {}
            }
            assert!(
                Instant::now() < end,
                "VM {vm} on {} is not {what} within {PATIENCE:?}: {status:#?}",
                self.host
            );
            std::thread::sleep(LOOK_EVERY);
        }
    }

    pub fn wait_mirrored(&self, vm: &str) -> VmStatus {
        self.wait(vm, "mirrored", |s| s.role == Role::Primary && s.mirrored)
    }

    pub fn wait_stopped(&self, vm: &str) -> VmStatus {
        self.wait(vm, "stopped", |s| s.role == Role::Stopped)
    }
}

/// True if one of the VM's events says `words`.
pub fn told(status: &VmStatus, words: &str) -> bool {
    status.events.iter().any(|event| event.what.contains(words))
}

/// The test guest's kernel and initial RAM disk, and its kernel parameters.
struct GuestFiles {
    folder: PathBuf,
    cmdline: String,
}

static GUEST: LazyLock<GuestFiles> = LazyLock::new(|| {
    let run = |args: &[&str]| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let out = Command::new(root.join(args[0]))
            .args(&args[1..])
            .current_dir(root)
            .output()
            .unwrap();
        assert!(
            out.status.success(),
            "{args:?}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        String::from_utf8(out.stdout).unwrap().trim().to_owned()
    };
    GuestFiles {
        folder: run(&["guest/build"]).into(),
        cmdline: format!(
            "{} tsc_early_khz={}",
            run(&["guest/cmdline"]),
            run(&["guest/cmdline", "--tsc-khz"])
        ),
    }
});

/// What a VM of the test guest is to be.
pub struct Guest {
    pub name: String,
    pub ip: Ipv4Addr,
    pub memory: String,
    pub disk_bytes: u64,
    /// Modes and rates, as `pollux.mode=counter`.
    pub parameters: String,
    /// `none` or `mirrored`.
    pub protection: &'static str,
    /// Further lines at the top of the spec.
    pub more: String,
    /// Further disks, as `[[disk]]` tables.
    pub disks: String,
}

impl Guest {
    /// A small guest that counts and works its disk and memory a little. Its name and
    /// address are its own.
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        Self {
            name: format!("vm{n}"),
            ip: Ipv4Addr::new(10, 77, 0, 10 + u8::try_from(n).unwrap()),
            memory: "128 MiB".into(),
            disk_bytes: 64 << 20,
            parameters: "pollux.mode=counter,disk,memory pollux.disk_iops=50 pollux.mem_pages_s=300 pollux.mem_mb=8".into(),
            protection: "none",
            more: String::new(),
            disks: String::new(),
        }
    }

    pub fn toml(&self) -> String {
        let n = self.ip.octets()[3];
        let boot = format!(
            "kernel = \"{0}/vmlinuz\"\ninitrd = \"{0}/initrd\"\ncmdline = \"{1} pollux.ip={2}/24 {3}\"",
            GUEST.folder.display(),
            GUEST.cmdline,
            self.ip,
            self.parameters
        );
        format!(
            "name = \"{0}\"\nuuid = \"{n:02x}{1:06x}-3f0e-4b0c-9a39-3d6a2c1f6f11\"\nmemory = \"{2}\"\n\
             vcpus = 1\naccel = \"tcg\"\n{boot}\nprotection = \"{3}\"\n{4}\n\
             [[disk]]\nname = \"data\"\npath = \"{0}.raw\"\nsize = {5}\n{6}[[nic]]\nname = \"lan\"\nbridge = \"br0\"\n",
            self.name,
            std::process::id() & 0xff_ffff,
            self.memory,
            self.protection,
            self.more,
            self.disk_bytes,
            self.disks,
        )
    }
}

/// A VM of a test: ended and forgotten on both hosts when dropped.
pub struct Vm<'b> {
    bed: &'b Bed,
    pub name: String,
    pub ip: Ipv4Addr,
    /// Its image on host `a`.
    pub image: PathBuf,
}

impl Vm<'_> {
    /// Start it on `a` and wait until its guest answers; gives a client.
    pub fn start(&self) -> Counter {
        self.bed.api("a").command(&self.name, "start").unwrap();
        self.client()
    }

    /// A client outside, once the guest answers.
    pub fn client(&self) -> Counter {
        self.client_of("boot=")
    }

    /// A client outside, once the guest has booted so often. One that is about to reboot
    /// may still take connections, and answer.
    pub fn client_of_boot(&self, boot: u64) -> Counter {
        self.client_of(&format!("boot={boot} "))
    }

    fn client_of(&self, state: &str) -> Counter {
        let outside = self.bed.lab.place_fd(&Place::Outside).unwrap();
        let address = SocketAddr::from((self.ip, COUNTER_PORT));
        let limit = Duration::from_secs(1);
        let mut counter = eventually("the guest answers", || {
            let connect = || TcpStream::connect_timeout(&address, limit);
            let stream = in_network(outside.as_fd(), connect).unwrap().ok()?;
            stream.set_read_timeout(Some(limit)).unwrap();
            stream.set_nodelay(true).unwrap();
            let mut counter = Counter {
                stream: BufReader::new(stream),
                requests: 0,
            };
            counter
                .try_ask("STATE")
                .ok()?
                .starts_with(state)
                .then_some(counter)
        });
        counter
            .stream
            .get_mut()
            .set_read_timeout(Some(PATIENCE))
            .unwrap();
        counter
    }
}

impl Drop for Vm<'_> {
    fn drop(&mut self) {
        for host in ["a", "b"] {
            let api = self.bed.api(host);
            if api.vm(&self.name).is_ok_and(|vm| vm.role == Role::Primary) {
                let _ = api.command(&self.name, "stop");
            }
        }
        let gone = |api: &Api| match api.vm(&self.name) {
            Ok(vm) if vm.role == Role::Stopped => {
                api.delete(&format!("/v1/vms/{}", self.name)).is_ok()
            }
            Ok(_) => false,
            Err(_) => true,
        };
        let end = Instant::now() + PATIENCE;
        for host in ["a", "b"] {
            let api = self.bed.api(host);
            while !gone(&api) && Instant::now() < end && !std::thread::panicking() {
                std::thread::sleep(LOOK_EVERY);
            }
        }
    }
}

/// One connection to the guest's counter.
pub struct Counter {
    stream: BufReader<TcpStream>,
    requests: u64,
}

impl Counter {
    /// One request and its answer.
    pub fn ask(&mut self, request: &str) -> String {
        self.try_ask(request)
            .unwrap_or_else(|e| panic!("{request}: {e}"))
    }

    /// The same, where the connection may break.
    pub fn try_ask(&mut self, request: &str) -> std::io::Result<String> {
        self.stream
            .get_mut()
            .write_all(format!("{request}\n").as_bytes())?;
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end().to_owned())
    }

    /// Count one on: flushed to the guest's disk when the answer comes.
    pub fn count(&mut self) -> u64 {
        self.requests += 1;
        let request = format!("INC 1 {}", self.requests);
        self.ask(&request).parse().unwrap()
    }

    /// Count `n` times; the numbers must follow `from` without gap or repeat.
    pub fn count_on(&mut self, from: u64, n: u64) -> u64 {
        for expected in from + 1..=from + n {
            assert_eq!(self.count(), expected);
        }
        from + n
    }

    /// The guest's own word on itself: which boot, and that no worker found a fault.
    pub fn check(&mut self, boot: u64) {
        let state = self.ask("STATE");
        assert!(state.starts_with(&format!("boot={boot} ")), "{state}");
        assert!(
            state.contains("disk_errors=0") && state.contains("memory_errors=0"),
            "{state}"
        );
        let verdict = self.ask("VERIFY");
        assert!(verdict.starts_with("OK "), "{verdict}");
    }
}
