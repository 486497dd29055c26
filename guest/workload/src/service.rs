//! The TCP services: the counter's line protocol and the echo.
//!
//! One line in, one line out, in order; a client may send many lines at once (they are then
//! committed together).
//!
//! | request | answer |
//! |---|---|
//! | `INC <client> <seq>` | the counter's number for this request, after its record is flushed |
//! | `GET` | the number of the newest flushed record |
//! | `VERIFY` | `OK <records>` after all records were read back from the disk, or `BAD <what>` |
//! | `STATE` | one line of `key=value`: boot, number, workers' health, clocks |
//! | `TIME` | `CLOCK_MONOTONIC` in nanoseconds |
//! | `CPU` | `<iterations> <iterations per second since the start> <CLOCK_MONOTONIC ns>` |
//! | `SET <rate> <value>` | `OK`; rates: `disk_iops`, `mem_pages_s`, `cpu_threads` |
//! | `PING` | `PONG` |
//! | `REBOOT`, `POWEROFF` | `OK`, and the guest goes at once |
//!
//! Anything else is answered `ERR <why>`.

use crate::counter::Counter;
use crate::os::{self, End};
use crate::workers::{Health, Workers};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;

/// TCP port of the counter service.
pub const COUNTER_PORT: u16 = 7000;

/// TCP port of the echo service.
pub const ECHO_PORT: u16 = 7001;

/// Longest request line, in bytes; no request needs a tenth of it.
const LINE_BYTES_MAX: usize = 1024;

/// Stack of a client's thread, in bytes: many clients must fit into a small guest.
const CLIENT_STACK_BYTES: usize = 512 << 10;

/// What the counter service serves.
pub struct Service {
    /// The counter.
    pub counter: Counter,
    /// The workers, for `STATE`, `CPU` and `SET`.
    pub workers: Arc<Workers>,
    /// Which boot this is.
    pub boot: u64,
    /// Whether records go to a disk.
    pub on_disk: bool,
}

/// Accept clients for ever, each on its own thread.
pub fn listen(
    port: u16,
    serve: impl Fn(TcpStream) -> io::Result<()> + Send + Sync + 'static,
) -> io::Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    let serve = Arc::new(serve);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let serve = serve.clone();
            let started = stream.and_then(|stream| {
                stream.set_nodelay(true)?;
                thread::Builder::new()
                    .stack_size(CLIENT_STACK_BYTES)
                    .spawn(move || serve(stream))
            });
            if let Err(error) = started {
                eprintln!("workload: port {port}: a client was not served: {error}");
            }
        }
    });
    Ok(())
}

/// Send back what comes in.
pub fn echo(mut stream: TcpStream) -> io::Result<()> {
    let mut bytes = [0; 16 << 10];
    loop {
        match stream.read(&mut bytes)? {
            0 => return Ok(()),
            n => stream.write_all(&bytes[..n])?,
        }
    }
}

impl Service {
    /// Serve one client until it hangs up.
    pub fn serve(&self, mut stream: TcpStream) -> io::Result<()> {
        let mut input = Vec::new();
        let mut bytes = [0; 16 << 10];
        loop {
            let n = stream.read(&mut bytes)?;
            if n == 0 {
                return Ok(());
            }
            input.extend_from_slice(&bytes[..n]);
            let Some(end) = input.iter().rposition(|byte| *byte == b'\n') else {
                if input.len() > LINE_BYTES_MAX {
                    return stream.write_all(b"ERR line too long\n");
                }
                continue;
            };
            let rest = input.split_off(end + 1);
            let (answers, end) = self.answer(&String::from_utf8_lossy(&input));
            stream.write_all(answers.as_bytes())?;
            if let Some(how) = end {
                eprintln!("workload: {how:?} on a client's word");
                return Err(os::end(how));
            }
            input = rest;
        }
    }

    /// Answer these lines; requests to count that follow each other are committed together.
    fn answer(&self, lines: &str) -> (String, Option<End>) {
        let mut answers = String::new();
        let mut batch = Vec::new();
        let mut end = None;
        for line in lines.lines() {
            let words: Vec<_> = line.split_whitespace().collect();
            if let ["INC", client, seq] = words[..]
                && let (Ok(client), Ok(seq)) = (client.parse(), seq.parse())
            {
                batch.push((client, seq));
                continue;
            }
            self.commit(&mut batch, &mut answers);
            let answer = match words[..] {
                ["PING"] => "PONG".to_owned(),
                ["GET"] => self.counter.number().to_string(),
                ["TIME"] => os::mono_ns().to_string(),
                ["VERIFY"] => match self.counter.verify() {
                    Ok(count) => format!("OK {count}"),
                    Err(what) => format!("BAD {what}"),
                },
                ["STATE"] => self.state(),
                ["CPU"] => self.cpu(),
                ["SET", rate, value] => self.set(rate, value),
                ["REBOOT"] => {
                    end = Some(End::Reboot);
                    "OK".to_owned()
                }
                ["POWEROFF"] => {
                    end = Some(End::PowerOff);
                    "OK".to_owned()
                }
                ["INC", ..] => "ERR use: INC <client number> <request number>".to_owned(),
                _ => "ERR unknown request".to_owned(),
            };
            answers.push_str(&answer);
            answers.push('\n');
        }
        self.commit(&mut batch, &mut answers);
        (answers, end)
    }

    fn commit(&self, batch: &mut Vec<(u64, u64)>, answers: &mut String) {
        if batch.is_empty() {
            return;
        }
        let counted = self.counter.count(batch);
        for offset in 0..batch.len() as u64 {
            match &counted {
                Ok(first) => answers.push_str(&format!("{}\n", first + offset)),
                Err(reason) => answers.push_str(&format!("ERR {reason}\n")),
            }
        }
        batch.clear();
    }

    fn state(&self) -> String {
        let health = |name: &str, health: &Health| {
            let (writes, checks) = (health.writes.load(Relaxed), health.checks.load(Relaxed));
            let errors = health.errors.load(Relaxed);
            format!("{name}_writes={writes} {name}_checks={checks} {name}_errors={errors}")
        };
        format!(
            "boot={} number={} records={} {} {} mono_ns={} real_ns={}",
            self.boot,
            self.counter.number(),
            if self.on_disk { "disk" } else { "memory" },
            health("disk", &self.workers.disk),
            health("memory", &self.workers.memory),
            os::mono_ns(),
            os::real_ns(),
        )
    }

    fn cpu(&self) -> String {
        let iterations = self.workers.cpu_iterations.load(Relaxed);
        let now = os::mono_ns();
        let elapsed_ms = (now.saturating_sub(self.workers.cpu_start_ns) / 1_000_000).max(1);
        format!(
            "{iterations} {} {now}",
            iterations.saturating_mul(1000) / elapsed_ms
        )
    }

    fn set(&self, rate: &str, value: &str) -> String {
        let place = match rate {
            "disk_iops" => &self.workers.disk_iops,
            "mem_pages_s" => &self.workers.mem_pages_s,
            "cpu_threads" => &self.workers.cpu_threads,
            _ => return "ERR rates are disk_iops, mem_pages_s, cpu_threads".to_owned(),
        };
        match value.parse() {
            Ok(number) => {
                place.store(number, Relaxed);
                "OK".to_owned()
            }
            Err(_) => format!("ERR {rate}: not a number"),
        }
    }
}
