//! A client process outside, as a bench holds it: latencies and throughput of a stretch of time.

use anyhow::{Context, Result, bail};
use pollux::drill::client::{ClientOptions, Mode};
use pollux::drill::env::{ClientPipes, Quantiles};
use pollux::drill::log::{ClientLog, Line};
use pollux::drill::stats::{micros, quantiles};
use pollux::drill::{MonotonicNs, checks};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::process::Child;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Between two looks at the log.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// TCP port of the guest's counter.
const COUNTER_PORT: u16 = 7000;
/// TCP port of the guest's echo.
const ECHO_PORT: u16 = 7001;

/// What clients did in a stretch of time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Served {
    /// Latency of requests sent and answered in it.
    pub latency: Quantiles,
    /// Answers per second, all clients together.
    pub per_second: f64,
}

/// A running client process; ended and waited for when dropped.
pub struct Load {
    input: Option<Box<dyn Write + Send>>,
    child: Option<Child>,
    log: Arc<Mutex<ClientLog>>,
    reader: Option<JoinHandle<()>>,
    clients: u16,
}

/// Arguments of `clients` clients of the guest at `guest`, each with one request at a time.
#[must_use]
pub fn options(mode: Mode, guest: [u8; 4], clients: u16) -> ClientOptions {
    let port = if mode == Mode::Echo {
        ECHO_PORT
    } else {
        COUNTER_PORT
    };
    let address = SocketAddr::from((guest, port));
    ClientOptions {
        mode,
        address,
        clients,
        think: Duration::ZERO,
    }
}

impl Load {
    /// Takes over a client process of `clients` clients.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn new(pipes: ClientPipes, clients: u16) -> Result<Self> {
        let log = Arc::new(Mutex::new(ClientLog::default()));
        let shared = Arc::clone(&log);
        let reader = std::thread::Builder::new()
            .name("client-log".into())
            .spawn(move || read_log(pipes.output, &shared))?;
        Ok(Self {
            input: Some(pipes.input),
            child: pipes.child,
            log,
            reader: Some(reader),
            clients,
        })
    }

    fn log(&self) -> MutexGuard<'_, ClientLog> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until every client was answered after `since`.
    ///
    /// # Errors
    /// If one was not within `limit`, or a connection broke.
    pub fn wait_answers(&self, since: MonotonicNs, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        loop {
            let (silent, broken) = {
                let log = self.log();
                // Only the newest answers can be after `since`.
                let newest = log
                    .answers
                    .len()
                    .saturating_sub(64 * usize::from(self.clients));
                let silent = checks::silent_since(&log.answers[newest..], self.clients, since);
                (silent, log.broken.first().map(|b| b.3.clone()))
            };
            if let Some(why) = broken {
                bail!("a client's connection broke: {why}");
            }
            if silent == 0 {
                return Ok(());
            }
            if Instant::now() > end {
                bail!("{silent} of {} clients are not answered", self.clients);
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Serves for `how_long` and says how it went.
    ///
    /// # Errors
    /// If a client is not answered any more.
    pub fn serve(&self, how_long: Duration) -> Result<Served> {
        let from = MonotonicNs::now();
        std::thread::sleep(how_long);
        let to = MonotonicNs::now();
        self.wait_answers(to, Duration::from_secs(10))
            .context("after a stretch of load")?;
        let log = self.log();
        let inside = |t: MonotonicNs| from <= t && t <= to;
        let times: Vec<u64> = log
            .answers
            .iter()
            .filter(|a| inside(a.sent_ns) && inside(a.answered_ns))
            .map(|a| micros(a.answered_ns.since(a.sent_ns)))
            .collect();
        let answered = log.answers.iter().filter(|a| inside(a.answered_ns)).count();
        Ok(Served {
            per_second: answered as f64 / to.since(from).as_secs_f64(),
            latency: quantiles(times),
        })
    }

    /// The longest any client waited over `[from, to]`, µs.
    #[must_use]
    pub fn blackout_us(&self, from: MonotonicNs, to: MonotonicNs) -> Option<u64> {
        checks::longest_gap(&self.log().answers, from, to).map(checks::Gap::us)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.input = None;
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        if let Some(mut child) = self.child.take() {
            let _ = child.wait();
        }
    }
}

fn read_log(output: Box<dyn Read + Send>, log: &Mutex<ClientLog>) {
    for line in BufReader::new(output).lines() {
        // A bad line ends the reading; then no client is answered any more.
        let Some(parsed) = line.ok().and_then(|l| Line::parse(l.trim_end()).ok()) else {
            return;
        };
        log.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .add(parsed);
    }
}
