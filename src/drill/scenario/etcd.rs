//! An etcd of three members in the `outside` of a lab, as the hosts' registry.

use crate::lab::{GATEWAY, Lab, Place, in_network};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// Client ports of the members; each one's peer port follows it.
const PORTS: [u16; 3] = [2379, 2479, 2579];
/// The members find each other within.
const UP: Duration = Duration::from_secs(30);
/// Between two looks whether they have.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// One question to a member.
const ASK: Duration = Duration::from_secs(2);
/// Longest answer.
const ANSWER_BYTES_MAX: u64 = 64 << 10;

/// The members that run; they end when it is dropped.
pub(super) struct Cluster(Vec<(u16, Child)>);

impl Cluster {
    /// The table `[registry]` of the hosts.
    pub(super) fn config() -> String {
        let endpoints: Vec<String> = PORTS
            .iter()
            .map(|port| format!("\"http://{GATEWAY}:{port}\""))
            .collect();
        format!(
            "[registry]\nkind = \"etcd\"\nendpoints = [{}]\npool = \"lab\"\nallow_plain_http = true\n",
            endpoints.join(", ")
        )
    }

    /// Start the members, and wait for their leader.
    ///
    /// # Errors
    /// What failed and what to do.
    pub(super) fn start(lab: &Lab, data: &Path) -> Result<Self, String> {
        let peer = |port: u16| format!("http://{GATEWAY}:{}", port + 1);
        let cluster: Vec<String> = PORTS
            .iter()
            .map(|port| format!("m{port}={}", peer(*port)))
            .collect();
        let cluster = cluster.join(",");
        let mut members = Self(Vec::new());
        for port in PORTS {
            let client = format!("http://{GATEWAY}:{port}");
            let dir = data.join(port.to_string());
            let argv = [
                "etcd".to_owned(),
                format!("--name=m{port}"),
                format!("--data-dir={}", dir.display()),
                format!("--listen-client-urls={client}"),
                format!("--advertise-client-urls={client}"),
                format!("--listen-peer-urls={}", peer(port)),
                format!("--initial-advertise-peer-urls={}", peer(port)),
                format!("--initial-cluster={cluster}"),
                "--log-level=error".to_owned(),
            ];
            let child = lab
                .command(&Place::Outside, &argv)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .map_err(|e| format!("cannot start etcd: {e}; run `make setup`"))?;
            members.0.push((port, child));
        }
        let end = Instant::now() + UP;
        while members.leader(lab).is_none() {
            if Instant::now() > end {
                return Err(
                    "etcd's members chose no leader; is etcd installed (`make setup`)?".into(),
                );
            }
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(members)
    }

    /// Kill the member that leads.
    ///
    /// # Errors
    /// If nobody says that it does.
    pub(super) fn stop_leader(&mut self, lab: &Lab) -> Result<(), String> {
        let leader = self
            .leader(lab)
            .ok_or("no member of etcd says that it leads")?;
        let (_, child) = &mut self.0[leader];
        // What we started is the program that enters `outside` and becomes etcd.
        let killed = child.kill().and_then(|()| child.wait());
        killed.map(drop).map_err(|e| e.to_string())
    }

    /// The index of the member that says that it leads.
    fn leader(&self, lab: &Lab) -> Option<usize> {
        self.0.iter().position(|(port, _)| {
            let status = ask(lab, *port).unwrap_or(serde_json::Value::Null);
            let leader = &status["leader"];
            leader.is_string() && *leader == status["header"]["member_id"]
        })
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for (_, child) in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What a member says of itself (etcd's gRPC gateway, `/v3/maintenance/status`).
fn ask(lab: &Lab, port: u16) -> Option<serde_json::Value> {
    let outside = lab.place_fd(&Place::Outside).ok()?;
    let address = SocketAddr::from((GATEWAY, port));
    let connect = || TcpStream::connect_timeout(&address, ASK);
    let mut stream = in_network(outside.as_fd(), connect).ok()?.ok()?;
    stream.set_read_timeout(Some(ASK)).ok()?;
    let request = format!(
        "POST /v3/maintenance/status HTTP/1.0\r\nHost: {GATEWAY}\r\nContent-Length: 2\r\n\r\n{{}}"
    );
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    stream
        .take(ANSWER_BYTES_MAX)
        .read_to_string(&mut answer)
        .ok()?;
    let (_, body) = answer.split_once("\r\n\r\n")?;
    serde_json::from_str(body.trim()).ok()
}
