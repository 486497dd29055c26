//! The client outside: one TCP connection per client, opened once and kept, one request
//! at a time on it (a closed loop), everything written down.
//!
//! A blackout as the client sees it is longer than the time the VM stands still: the
//! request that was on its way is lost with the dead host, or was answered by an epoch
//! that never committed, and somebody's TCP must send again. Linux does that after the
//! retransmission timeout, at least 200 ms (`TCP_RTO_MIN`, tcp(7); RFC 6298), doubled
//! each time in vain. The client keeps the system's settings, as real clients do, so
//! this is part of what is measured; `TCP_NODELAY` is set since every request is one
//! small segment.
//!
//! It never opens a second connection in silence: a broken one is written down before
//! the next is made.

use super::MonotonicNs;
use super::log::{Answer, Line};
use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Hidden subcommand of the client process.
pub const CLIENT_COMMAND: &str = "drill-client";
/// Most clients of one process; each has a thread.
pub const CLIENTS_MAX: u16 = 256;
/// One attempt to connect; the guest may still be booting.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Between two attempts to connect.
const CONNECT_PAUSE: Duration = Duration::from_millis(50);
/// Output is handed on at least this often, so that the drill can show progress.
const FLUSH_EVERY: Duration = Duration::from_millis(20);
/// After the end was asked for, requests that are out may still be answered for this long:
/// three of TCP's retransmissions (200, 400, 800 ms) and more.
const LAST_ANSWERS_MAX: Duration = Duration::from_secs(5);
/// Longest answer of a counter, bytes: 20 digits and the protocol's marks are far less.
const ANSWER_BYTES_MAX: u64 = 128;
/// Payload of an echo request: one full segment at MTU 1500.
const ECHO_BYTES: usize = 1400;

/// What the clients ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// `INC CLIENT SEQ\n`, answered by `NUMBER\n`.
    Counter,
    /// Redis: `INCR drill`, answered by `:NUMBER\r\n` (RESP2).
    Redis,
    /// Full-size segments that come back as they are.
    Echo,
}

/// What a client process does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientOptions {
    /// The service.
    pub mode: Mode,
    /// Where it is.
    pub address: SocketAddr,
    /// Connections.
    pub clients: u16,
    /// Between an answer and the next request.
    pub think: Duration,
}

impl ClientOptions {
    /// As arguments of the hidden subcommand, its name first.
    #[must_use]
    pub fn args(&self) -> Vec<OsString> {
        let mode = match self.mode {
            Mode::Counter => "counter",
            Mode::Redis => "redis",
            Mode::Echo => "echo",
        };
        [
            CLIENT_COMMAND,
            mode,
            &self.address.to_string(),
            &self.clients.to_string(),
            &self.think.as_micros().to_string(),
        ]
        .map(OsString::from)
        .to_vec()
    }

    pub(crate) fn parse(args: &[OsString]) -> Result<Self, String> {
        let texts: Vec<&str> = args.iter().filter_map(|a| a.to_str()).collect();
        let [mode, address, clients, think] = texts[..] else {
            return Err(
                "usage: pollux drill-client counter|redis|echo ADDRESS:PORT CLIENTS THINK_US"
                    .into(),
            );
        };
        let mode = match mode {
            "counter" => Mode::Counter,
            "redis" => Mode::Redis,
            "echo" => Mode::Echo,
            other => return Err(format!("mode `{other}`: use counter, redis or echo")),
        };
        let clients = clients
            .parse()
            .ok()
            .filter(|c| (1..=CLIENTS_MAX).contains(c));
        Ok(Self {
            mode,
            address: address
                .parse()
                .map_err(|e| format!("address `{address}`: {e}"))?,
            clients: clients.ok_or_else(|| format!("clients: use 1 to {CLIENTS_MAX}"))?,
            think: Duration::from_micros(
                think
                    .parse()
                    .map_err(|e| format!("think time `{think}`: {e}"))?,
            ),
        })
    }
}

/// The hidden subcommand: runs until standard input closes, writes its log to standard
/// output. Exit status 2 if the arguments are wrong, 1 if the output cannot be written.
#[must_use]
pub fn client_main(args: &[OsString]) -> i32 {
    match ClientOptions::parse(args) {
        Err(message) => {
            eprintln!("{message}");
            2
        }
        Ok(options) => match run_clients(&options, io::stdin(), io::stdout()) {
            Ok(()) => 0,
            Err(e) => {
                eprintln!("pollux {CLIENT_COMMAND}: writing the log: {e}");
                1
            }
        },
    }
}

/// What the clients' threads share.
struct Shared {
    ending: AtomicBool,
    /// Each client's connection, to wake its thread at the very end.
    streams: Mutex<Vec<Option<TcpStream>>>,
}

/// Runs clients until `input` ends; the log goes to `output`.
///
/// # Errors
/// If `output` cannot be written.
pub fn run_clients(
    options: &ClientOptions,
    mut input: impl Read + Send + 'static,
    mut output: impl Write,
) -> io::Result<()> {
    let (sender, lines) = mpsc::channel();
    let shared = Arc::new(Shared {
        ending: AtomicBool::new(false),
        streams: Mutex::new((0..options.clients).map(|_| None).collect()),
    });
    writeln!(
        output,
        "{}",
        Line::Hello {
            clients: options.clients
        }
    )?;
    for client in 0..options.clients {
        let (options, shared, sender) = (options.clone(), Arc::clone(&shared), sender.clone());
        std::thread::Builder::new()
            .name(format!("client-{client}"))
            .spawn(move || one_client(&options, client, &shared, &sender))?;
    }
    drop(sender);
    let ender = Arc::clone(&shared);
    std::thread::Builder::new()
        .name("end".into())
        .spawn(move || {
            // Whatever is written there means nothing; the end of it is the end.
            let _ = io::copy(&mut input, &mut io::sink());
            ender.ending.store(true, Ordering::Relaxed);
        })?;
    write_log(&lines, &shared, &mut output)
}

fn write_log(lines: &Receiver<Line>, shared: &Shared, output: &mut impl Write) -> io::Result<()> {
    let mut buffer = String::new();
    let mut flushed = Instant::now();
    let mut asked_to_end: Option<Instant> = None;
    loop {
        let got = lines.recv_timeout(FLUSH_EVERY);
        if let Ok(line) = &got {
            buffer.push_str(&line.to_string());
            buffer.push('\n');
        }
        if got == Err(RecvTimeoutError::Disconnected) {
            buffer.push_str(&format!(
                "{}\n",
                Line::End {
                    at_ns: MonotonicNs::now()
                }
            ));
            output.write_all(buffer.as_bytes())?;
            return output.flush();
        }
        if flushed.elapsed() >= FLUSH_EVERY {
            output.write_all(buffer.as_bytes())?;
            output.flush()?;
            buffer.clear();
            flushed = Instant::now();
        }
        if shared.ending.load(Ordering::Relaxed)
            && asked_to_end.get_or_insert_with(Instant::now).elapsed() > LAST_ANSWERS_MAX
        {
            for stream in shared
                .streams
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .iter()
                .flatten()
            {
                // Wakes the thread that waits for an answer; it reports the request as open.
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
    }
}

fn one_client(options: &ClientOptions, client: u16, shared: &Shared, log: &Sender<Line>) {
    let ending = || shared.ending.load(Ordering::Relaxed);
    let mut seq = 0;
    while !ending() {
        let Ok(stream) = TcpStream::connect_timeout(&options.address, CONNECT_TIMEOUT) else {
            std::thread::sleep(CONNECT_PAUSE);
            continue;
        };
        let Ok(keep) = stream.set_nodelay(true).and_then(|()| stream.try_clone()) else {
            continue;
        };
        if let Some(slot) = shared
            .streams
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_mut(usize::from(client))
        {
            *slot = Some(keep);
        }
        let _ = log.send(Line::Up {
            client,
            at_ns: MonotonicNs::now(),
        });
        let mut reader = BufReader::new(stream);
        while !ending() {
            let sent_ns = MonotonicNs::now();
            match request(options.mode, client, seq, &mut reader) {
                Ok(number) => {
                    let answer = Answer {
                        client,
                        seq,
                        sent_ns,
                        answered_ns: MonotonicNs::now(),
                        number,
                    };
                    let _ = log.send(Line::Answer(answer));
                    seq += 1;
                }
                Err(_) if ending() => {
                    let _ = log.send(Line::Open {
                        client,
                        sent_ns,
                        seq,
                    });
                    return;
                }
                Err(e) => {
                    let _ = log.send(Line::Broken {
                        client,
                        at_ns: MonotonicNs::now(),
                        seq,
                        why: e.to_string(),
                    });
                    seq += 1;
                    break;
                }
            }
            if !options.think.is_zero() {
                std::thread::sleep(options.think);
            }
        }
    }
}

/// One request and its answer.
fn request(
    mode: Mode,
    client: u16,
    seq: u64,
    stream: &mut BufReader<TcpStream>,
) -> io::Result<u64> {
    let wrong = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    match mode {
        Mode::Echo => {
            let byte = seq.to_le_bytes()[0];
            stream.get_mut().write_all(&[byte; ECHO_BYTES])?;
            let mut back = [0; ECHO_BYTES];
            stream.read_exact(&mut back)?;
            let same = back.iter().all(|&b| b == byte);
            if same {
                Ok(ECHO_BYTES as u64)
            } else {
                Err(wrong(format!("echo of request {seq} came back changed")))
            }
        }
        Mode::Counter | Mode::Redis => {
            let text = match mode {
                Mode::Redis => "*2\r\n$4\r\nINCR\r\n$5\r\ndrill\r\n".to_owned(),
                _ => format!("INC {client} {seq}\n"),
            };
            stream.get_mut().write_all(text.as_bytes())?;
            let mut line = String::new();
            stream
                .by_ref()
                .take(ANSWER_BYTES_MAX)
                .read_line(&mut line)?;
            if line.is_empty() {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the guest closed the connection",
                ));
            }
            let number = if mode == Mode::Redis {
                line.strip_prefix(':')
            } else {
                Some(line.as_str())
            };
            number
                .and_then(|n| n.trim_end().parse().ok())
                .ok_or_else(|| wrong(format!("answer {line:?} is not a number")))
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::drill::log::ClientLog;
    use std::net::TcpListener;
    use std::sync::atomic::AtomicU64;

    /// A counter in the manner of the test guest (or of redis); `fault` may answer otherwise.
    pub(crate) fn serve(
        mode: Mode,
        fault: impl Fn(u64) -> Option<String> + Send + Sync + 'static,
    ) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let counter = Arc::new(AtomicU64::new(0));
        let fault = Arc::new(fault);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (counter, fault, mut reader) = (
                    Arc::clone(&counter),
                    Arc::clone(&fault),
                    BufReader::new(stream.unwrap()),
                );
                std::thread::spawn(move || {
                    let mut line = String::new();
                    let last_line = if mode == Mode::Redis { "drill\r\n" } else { "" };
                    while reader.read_line(&mut line).unwrap_or(0) > 0 {
                        if line.ends_with(last_line) {
                            let number = counter.fetch_add(1, Ordering::Relaxed) + 1;
                            let plain = if mode == Mode::Redis {
                                format!(":{number}\r\n")
                            } else {
                                format!("{number}\n")
                            };
                            let answer = fault(number).unwrap_or(plain);
                            if answer.is_empty()
                                || reader.get_mut().write_all(answer.as_bytes()).is_err()
                            {
                                return;
                            }
                        }
                        line.clear();
                    }
                });
            }
        });
        address
    }

    /// Runs clients until `enough` says so.
    fn run(
        mode: Mode,
        address: SocketAddr,
        clients: u16,
        enough: fn(&ClientLog) -> bool,
    ) -> ClientLog {
        let options = ClientOptions {
            mode,
            address,
            clients,
            think: Duration::ZERO,
        };
        let (input, hold) = io::pipe().unwrap();
        let (output, log_writer) = io::pipe().unwrap();
        let runner = std::thread::spawn(move || run_clients(&options, input, log_writer));
        let mut hold = Some(hold);
        let mut log = ClientLog::default();
        for line in BufReader::new(output).lines() {
            log.add(Line::parse(&line.unwrap()).unwrap());
            if enough(&log) {
                hold = None;
            }
        }
        drop(hold);
        runner.join().unwrap().unwrap();
        assert!(log.ended);
        log
    }

    #[test]
    fn every_number_is_written_down_once_by_each_protocol() {
        for mode in [Mode::Counter, Mode::Redis] {
            let log = run(mode, serve(mode, |_| None), 4, |log| {
                log.answers.len() > 200
            });
            let mut numbers: Vec<u64> = log.answers.iter().map(|a| a.number).collect();
            numbers.sort_unstable();
            assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>());
            assert_eq!(
                (log.clients, log.ups, log.broken.len(), log.open.len()),
                (4, 4, 0, 0)
            );
            assert!(log.answers.iter().all(|a| a.sent_ns <= a.answered_ns));
        }
    }

    #[test]
    fn a_closed_connection_and_a_wrong_answer_are_written_down() {
        let closed = serve(Mode::Counter, |n| (n == 3).then(String::new));
        let log = run(Mode::Counter, closed, 1, |log| log.answers.len() > 5);
        assert_eq!((log.broken.len(), log.ups), (1, 2), "{:?}", log.broken);
        assert_eq!(log.broken[0].2, 2, "the third request, from 0");
        let garbage = serve(Mode::Counter, |n| (n == 3).then(|| "x".repeat(4000)));
        let log = run(Mode::Counter, garbage, 1, |log| log.answers.len() > 5);
        assert!(log.broken[0].3.contains("not a number"), "{:?}", log.broken);
    }

    #[test]
    fn options_travel_as_arguments() {
        let address = "10.77.0.10:7000".parse().unwrap();
        let options = ClientOptions {
            mode: Mode::Redis,
            address,
            clients: 3,
            think: Duration::from_micros(7),
        };
        assert_eq!(ClientOptions::parse(&options.args()[1..]).unwrap(), options);
        for bad in [
            &["counter", "nowhere", "1", "0"][..],
            &["x", "1.1.1.1:1", "1", "0"],
            &["echo", "1.1.1.1:1", "0", "0"],
            &[],
        ] {
            let bad: Vec<OsString> = bad.iter().map(OsString::from).collect();
            assert!(ClientOptions::parse(&bad).is_err());
        }
    }
}
