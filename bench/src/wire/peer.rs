//! Sender and receiver as processes inside the namespaces: they get one order as a line of
//! JSON, say `ready`, work, and answer with one line of JSON.

use super::net::{Net, Side};
use super::{cpu, epochs, lanes, relay, tcp};
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// First argument of a process that takes an order.
pub const PEER_ARGUMENT: &str = "wire-peer";

/// What a process is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Order {
    /// Receive a TCP stream.
    TcpReceive(tcp::Stream),
    /// Send one.
    TcpSend(tcp::Stream),
    /// Receive an epoch lane.
    LaneReceive(lanes::Plan),
    /// Fill one.
    LaneSend(lanes::Plan),
    /// Acknowledge epochs.
    EpochsReceive(epochs::Plan),
    /// Send epochs and wait for each acknowledgement.
    EpochsSend(epochs::Plan),
    /// Pass datagrams on, late and not all.
    Relay(relay::Plan),
}

/// What a stream was like, at one of its ends.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// Bytes of content in the measured time.
    pub bytes: u64,
    /// The measured time, in s.
    pub seconds: f64,
    /// Processor time of the process in that time, in s.
    pub cpu_seconds: f64,
    /// What else there is to tell, by name.
    pub notes: Vec<(String, f64)>,
    /// Times of single things, in µs, as they came.
    pub times_us: Vec<f64>,
}

impl Report {
    /// Bytes a second.
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.bytes as f64 / self.seconds
    }

    /// A note by its name.
    #[must_use]
    pub fn note(&self, name: &str) -> Option<f64> {
        self.notes.iter().find(|n| n.0 == name).map(|n| n.1)
    }
}

/// Runs as a peer if the arguments say so; `None` if they do not.
#[must_use]
pub fn hidden_main(arguments: &[std::ffi::OsString]) -> Option<Result<()>> {
    let first = arguments.first()?;
    (first == PEER_ARGUMENT).then(obey)
}

fn obey() -> Result<()> {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    let (core, order): (Option<usize>, Order) = serde_json::from_str(&line).context("the order")?;
    if let Some(core) = core {
        cpu::bind(core)?;
    }
    let report = match order {
        Order::TcpReceive(stream) => tcp::receive(&stream)?,
        Order::TcpSend(stream) => tcp::send(&stream)?,
        Order::LaneReceive(plan) => lanes::receive(&plan)?,
        Order::LaneSend(plan) => lanes::send(&plan)?,
        Order::EpochsReceive(plan) => epochs::receive(&plan)?,
        Order::EpochsSend(plan) => epochs::send(&plan)?,
        Order::Relay(plan) => relay::run(&plan)?,
    };
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}

/// Says that the other side may start. Once, from the process that was ordered.
///
/// # Errors
/// If nobody listens.
pub fn say_ready() -> Result<()> {
    say("ready")
}

/// Says a line to whoever gave the order.
///
/// # Errors
/// If nobody listens.
pub fn say(line: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()?;
    Ok(())
}

/// Waits until whoever gave the order wants this process to end.
pub fn wait_for_end() {
    let mut line = String::new();
    // An error means that nobody is there any more: the end as well.
    let _ = std::io::stdin().read_line(&mut line);
}

/// A process at work; ended and waited for when dropped.
#[derive(Debug)]
pub struct Peer {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    what: &'static str,
}

impl Peer {
    /// Starts a process on a host, bound to `core` if given.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(net: &Net, side: Side, core: Option<usize>, order: &Order) -> Result<Self> {
        let what = match order {
            Order::TcpReceive(_) => "TCP receiver",
            Order::TcpSend(_) => "TCP sender",
            Order::LaneReceive(_) => "lane's receiver",
            Order::LaneSend(_) => "lane's sender",
            Order::EpochsReceive(_) => "epochs' receiver",
            Order::EpochsSend(_) => "epochs' sender",
            Order::Relay(_) => "relay",
        };
        let mut child = Command::new("ip")
            .args(["netns", "exec", net.name(side)])
            .arg(std::env::current_exe()?)
            .arg(PEER_ARGUMENT)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start the {what}"))?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let mut peer = Self {
            input,
            output: BufReader::new(output.context("no pipe from the process")?),
            child,
            what,
        };
        let line = serde_json::to_string(&(core, order))?;
        let input = peer.input.as_mut().context("no pipe to the process")?;
        writeln!(input, "{line}")?;
        Ok(peer)
    }

    /// The next line it says.
    ///
    /// # Errors
    /// If it ended instead.
    pub fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            bail!("the {} ended early: see its words above", self.what);
        }
        Ok(line.trim_end().to_owned())
    }

    /// Waits until it is ready.
    ///
    /// # Errors
    /// If it ended or said something else.
    pub fn ready(&mut self) -> Result<()> {
        match self.line()?.as_str() {
            "ready" => Ok(()),
            other => bail!("the {} said `{other}`", self.what),
        }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Tells it to end (those that wait for it).
    pub fn end(&mut self) {
        self.input = None;
    }

    /// Its report.
    ///
    /// # Errors
    /// If it ended without one.
    pub fn report(mut self) -> Result<Report> {
        let line = self.line()?;
        serde_json::from_str(&line).with_context(|| format!("the {} said `{line}`", self.what))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.input = None;
        // `ip netns exec` becomes the process itself; gone already is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
