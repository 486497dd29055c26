//! Real etcd clusters on loopback, and servers that only pretend to be etcd.
//!
//! Each cluster has an address of its own in 127.0.0.0/8, taken from the process's id, so that
//! tests of two processes never want the same port. Every etcd ends with its guard, or with the
//! thread that started it.

use super::{EtcdClientCertificate, EtcdOptions, EtcdRegistry, EtcdTls};
use crate::registry::Registry;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// Longest wait for etcd to do what it will do. Only a broken test waits this long.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// A call's deadline in tests: longer than etcd's own limit for a request, 5 s and two
/// elections, so that a slow machine makes no test fail.
const DEADLINE: Duration = Duration::from_secs(15);
/// Between two looks at something that will come.
const LOOK: Duration = Duration::from_millis(10);

/// Look until `look` finds something.
pub(super) fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "{what} did not come in {PATIENCE:?}");
        std::thread::sleep(LOOK);
    }
}

fn own_address() -> Ipv4Addr {
    static CLUSTERS: AtomicU32 = AtomicU32::new(0);
    let n = CLUSTERS.fetch_add(1, Ordering::Relaxed) % 64;
    // 22 bits in 127.64.0.0/10.
    let host = (std::process::id() % 65_536) * 64 + n;
    Ipv4Addr::from_bits(Ipv4Addr::new(127, 64, 0, 0).to_bits() | host)
}

fn free_port(ip: Ipv4Addr) -> u16 {
    let probe = TcpListener::bind((ip, 0)).unwrap();
    probe.local_addr().unwrap().port()
}

/// One etcd, ended by its guard.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Member {
    client: SocketAddr,
    args: Vec<String>,
    log: PathBuf,
    process: Option<Process>,
}

/// What a member says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Status {
    pub id: u64,
    /// 0: it knows none.
    pub leader: u64,
    pub term: u64,
}

/// A cluster of etcd.
pub(super) struct Cluster {
    members: Vec<Member>,
    pub tls: Option<EtcdTls>,
    pub runtime: Runtime,
    /// Data, logs and certificates; gone with the cluster.
    _dir: TempDir,
}

impl Cluster {
    /// A cluster of `count` that answers.
    pub(super) fn start(count: usize) -> Self {
        Self::prepare(count, false)
    }

    /// One etcd that speaks TLS and asks for a certificate.
    pub(super) fn with_tls() -> Self {
        Self::prepare(1, true)
    }

    fn prepare(count: usize, tls: bool) -> Self {
        // In memory if possible: other tests keep the disks busy.
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
        let dir = dir.unwrap();
        let ip = own_address();
        let peers: Vec<_> = (0..count).map(|_| free_port(ip)).collect();
        let everybody: Vec<_> = peers
            .iter()
            .enumerate()
            .map(|(n, port)| format!("m{n}=http://{ip}:{port}"))
            .collect();
        let tls = tls.then(|| make_certificates(dir.path(), ip));
        let scheme = if tls.is_some() { "https" } else { "http" };
        let member = |(n, peer): (usize, &u16)| {
            let client = SocketAddr::from((ip, free_port(ip)));
            let mut args: Vec<String> = [
                format!("--name=m{n}"),
                format!("--data-dir={}", dir.path().join(format!("m{n}")).display()),
                format!("--listen-client-urls={scheme}://{client}"),
                format!("--advertise-client-urls={scheme}://{client}"),
                format!("--listen-peer-urls=http://{ip}:{peer}"),
                format!("--initial-advertise-peer-urls=http://{ip}:{peer}"),
                format!("--initial-cluster={}", everybody.join(",")),
                "--initial-cluster-state=new".into(),
                "--logger=zap".into(),
                "--log-outputs=stderr".into(),
            ]
            .into();
            if count == 1 {
                args.extend(["--heartbeat-interval=50", "--election-timeout=500"].map(Into::into));
            }
            if tls.is_some() {
                for (flag, file) in [
                    ("cert-file", "server.pem"),
                    ("key-file", "server.key"),
                    ("trusted-ca-file", "ca.pem"),
                ] {
                    args.push(format!("--{flag}={}", dir.path().join(file).display()));
                }
                args.push("--client-cert-auth".into());
            }
            Member {
                client,
                args,
                log: dir.path().join(format!("m{n}.log")),
                process: None,
            }
        };
        let members = peers.iter().enumerate().map(member).collect();
        let mut cluster = Self {
            members,
            tls,
            runtime: tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap(),
            _dir: dir,
        };
        for n in 0..count {
            cluster.run(n);
        }
        for n in 0..count {
            cluster.wait_ready(n);
        }
        cluster
    }

    /// Start a member that does not run.
    pub(super) fn run(&mut self, n: usize) {
        let member = &mut self.members[n];
        assert!(member.process.is_none(), "member {n} runs");
        let log = File::options()
            .create(true)
            .append(true)
            .open(&member.log)
            .unwrap();
        let mut command = Command::new("etcd");
        command
            .args(&member.args)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        // SAFETY: prctl with these arguments only sets a flag of the new process; it is
        // async-signal-safe and allocates nothing.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        match command.spawn() {
            Ok(child) => member.process = Some(Process(child)),
            Err(e) => panic!("etcd cannot be started ({e}); run `make setup`, which installs it"),
        }
    }

    /// Wait until member `n` answers a linearizable read.
    pub(super) fn wait_ready(&mut self, n: usize) {
        let mut registry = self.open_at(&[n]);
        let member = &mut self.members[n];
        until("an answer of etcd", || {
            if let Some(process) = &mut member.process
                && let Some(status) = process.0.try_wait().unwrap()
            {
                let log = fs::read_to_string(&member.log).unwrap_or_default();
                let tail: Vec<_> = log.lines().rev().take(5).collect();
                panic!("etcd ended with {status}; its last words: {tail:#?}");
            }
            registry.read("ready").ok()
        });
    }

    /// End a member as a power cut would.
    pub(super) fn kill(&mut self, n: usize) {
        assert!(self.members[n].process.take().is_some(), "{n} runs not");
    }

    pub(super) fn address(&self, n: usize) -> SocketAddr {
        self.members[n].client
    }

    pub(super) fn options(&self, members: &[usize]) -> EtcdOptions {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let url = |n: &usize| format!("{scheme}://{}", self.members[*n].client);
        EtcdOptions {
            tls: self.tls.clone(),
            deadline: DEADLINE,
            ..EtcdOptions::new("test", members.iter().map(url).collect())
        }
    }

    pub(super) fn open_with(&self, options: &EtcdOptions) -> EtcdRegistry {
        EtcdRegistry::new(options, self.runtime.handle().clone()).unwrap()
    }

    /// A registry that knows these members, the first one first.
    pub(super) fn open_at(&self, members: &[usize]) -> EtcdRegistry {
        self.open_with(&self.options(members))
    }

    /// A registry that knows all members.
    pub(super) fn registry(&self) -> EtcdRegistry {
        let all: Vec<_> = (0..self.members.len()).collect();
        self.open_at(&all)
    }

    /// What a member of a cluster without TLS says of itself; none if it does not answer.
    pub(super) fn status(&self, n: usize) -> Option<Status> {
        let said = post(self.members[n].client, "/v3/maintenance/status", "{}")?;
        let said: serde_json::Value = serde_json::from_str(&said).ok()?;
        let number = |value: &serde_json::Value| match value.as_str() {
            Some(text) => text.parse().unwrap(),
            None => 0,
        };
        Some(Status {
            id: number(&said["header"]["member_id"]),
            leader: number(&said["leader"]),
            term: number(&said["raftTerm"]),
        })
    }

    /// Wait until all running members follow one leader, which is one of them; its place and
    /// its term.
    pub(super) fn leader(&self) -> (usize, u64) {
        let running: Vec<_> = (0..self.members.len())
            .filter(|n| self.members[*n].process.is_some())
            .collect();
        until("a leader", || {
            let said: Option<Vec<_>> = running.iter().map(|n| self.status(*n)).collect();
            let said = said?;
            let one = said[0];
            let agreed = said
                .iter()
                .all(|s| (s.leader, s.term) == (one.leader, one.term));
            let place = said.iter().position(|s| s.id == one.leader)?;
            agreed.then_some((running[place], one.term))
        })
    }

    /// Make etcd forget its history up to `revision`.
    pub(super) fn compact(&self, revision: u64) {
        let ask = format!(r#"{{"revision":"{revision}","physical":true}}"#);
        post(self.members[0].client, "/v3/kv/compaction", &ask).expect("compaction");
    }
}

impl crate::registry::suite::Store for Cluster {
    fn open(&self) -> Box<dyn Registry> {
        Box::new(self.registry())
    }
}

/// One call without the code under test; none unless the answer is 200.
fn post(to: SocketAddr, path: &str, body: &str) -> Option<String> {
    let mut stream = TcpStream::connect(to).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    let length = body.len();
    write!(
        stream,
        "POST {path} HTTP/1.0\r\nContent-Length: {length}\r\n\r\n{body}"
    )
    .ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    head.split(' ')
        .nth(1)
        .is_some_and(|s| s == "200")
        .then(|| body.to_owned())
}

/// An authority, a server's certificate for `ip` and one for this host.
pub(super) fn make_certificates(dir: &Path, ip: Ipv4Addr) -> EtcdTls {
    use rcgen::{
        BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    };
    let ca_key = KeyPair::generate().unwrap();
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_pem = ca.self_signed(&ca_key).unwrap().pem();
    fs::write(dir.join("ca.pem"), ca_pem).unwrap();
    let issuer = Issuer::new(ca, ca_key);
    for name in ["server", "client"] {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([ip.to_string()]).unwrap();
        // etcd's gateway shows the server's certificate to etcd as a client does.
        params.extended_key_usages = [
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ]
        .into();
        let certificate = params.signed_by(&key, &issuer).unwrap();
        fs::write(dir.join(format!("{name}.pem")), certificate.pem()).unwrap();
        fs::write(dir.join(format!("{name}.key")), key.serialize_pem()).unwrap();
    }
    EtcdTls {
        ca: dir.join("ca.pem"),
        client: Some(EtcdClientCertificate {
            certificate: dir.join("client.pem"),
            key: dir.join("client.key"),
        }),
    }
}

/// A server on loopback that does with each connection what a test wants.
pub(super) struct Impostor {
    pub address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Impostor {
    pub(super) fn start(mut serve: impl FnMut(TcpStream) + Send + 'static) -> Self {
        let listener = TcpListener::bind((own_address(), 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    break;
                }
                let stream = stream.unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                serve(stream);
            }
        });
        Self {
            address,
            stop,
            thread: Some(thread),
        }
    }

    /// One that gives `answer` to every request and then hangs up.
    pub(super) fn answering(answer: Vec<u8>) -> Self {
        Self::start(move |mut stream| {
            read_request(&mut stream);
            let _ = stream.write_all(&answer);
        })
    }

    pub(super) fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for Impostor {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The bytes of one request; what came of it if it broke off.
pub(super) fn read_request(stream: &mut TcpStream) -> Vec<u8> {
    let mut request = Vec::new();
    let mut some = [0; 4096];
    loop {
        let text = String::from_utf8_lossy(&request).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head
                .lines()
                .filter_map(|line| line.split_once(": "))
                .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
                .map_or(0, |(_, length)| length.parse().unwrap());
            if body.len() >= length {
                return request;
            }
        }
        match stream.read(&mut some) {
            Ok(n) if n > 0 => request.extend_from_slice(&some[..n]),
            _ => return request,
        }
    }
}
