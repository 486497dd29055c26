//! A client process as the drill holds it: its log is read as it comes, and it is
//! always ended and waited for.

use super::MonotonicNs;
use super::checks::silent_since;
use super::env::ClientPipes;
use super::log::{ClientLog, LINE_BYTES_MAX, Line};
use std::io::{BufRead, BufReader, Read};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A client process and the thread that reads its log.
pub(super) struct Clients {
    input: Option<Box<dyn std::io::Write + Send>>,
    child: Option<std::process::Child>,
    log: Arc<Mutex<ClientLog>>,
    reader: Option<JoinHandle<()>>,
}

impl Clients {
    pub(super) fn new(pipes: ClientPipes) -> std::io::Result<Self> {
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
        })
    }

    fn log(&self) -> MutexGuard<'_, ClientLog> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until each client was answered after `since`. False if it took too long.
    pub(super) fn wait_answers(
        &self,
        clients: u16,
        since: MonotonicNs,
        limit: Duration,
        look_every: Duration,
    ) -> bool {
        let end = Instant::now() + limit;
        loop {
            if silent_since(&self.log().answers, clients, since) == 0 {
                return true;
            }
            if Instant::now() > end {
                return false;
            }
            std::thread::sleep(look_every);
        }
    }

    /// Ends the process in good order and gives what it wrote.
    pub(super) fn finish(mut self) -> ClientLog {
        self.end();
        std::mem::take(&mut self.log())
    }

    fn end(&mut self) {
        self.input = None;
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        if let Some(mut child) = self.child.take() {
            let _ = child.wait();
        }
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.end();
    }
}

fn read_log(output: Box<dyn Read + Send>, log: &Mutex<ClientLog>) {
    let mut reader = BufReader::new(output);
    let mut line = String::new();
    loop {
        line.clear();
        match reader
            .by_ref()
            .take(LINE_BYTES_MAX as u64)
            .read_line(&mut line)
        {
            Ok(bytes) if bytes > 0 => {}
            _ => return,
        }
        // A bad line ends the reading; the log then lacks its end, and the drill fails for it.
        let Ok(parsed) = Line::parse(line.trim_end()) else {
            return;
        };
        log.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .add(parsed);
    }
}
