//! Calls to etcd: which member is asked, for how long, and what is known when it fails.
//!
//! A request that only reads is sent to one member after the other. One that writes is sent
//! again only if it is certain that nobody has acted on it: no byte of it left this host, or
//! etcd said that it refused. All else leaves the outcome open ([`Failure::sent`]).
//!
//! Must never send a write twice, never wait past the deadline, never read more than
//! [`BODY_BYTES_MAX`].

use super::endpoint::Endpoint;
use super::wire;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;

/// Longest answer. A page of a listing has at most 5.6 MiB (see [`super::PAGE_KEYS`]).
pub(super) const BODY_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Between two rounds over all members: a few of them in one election, which takes a second.
pub(super) const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// The part of a call's deadline that is left for the last round: a write that is under way when
/// the deadline comes has an unknown outcome, where one not begun would have a known one.
const LAST_SHARE: u32 = 4;
/// How much longer than a call's deadline the caller waits for the runtime to say so.
const GRACE: Duration = Duration::from_millis(500);

/// Refusals by a member that cannot serve now, where another one, or the same a little later,
/// can. etcd gives them before it proposes anything to the cluster (etcd 3.4 to 3.6,
/// `server/etcdserver/api/v3rpc/interceptor.go` and `v3_server.go`).
const NOT_NOW: [&str; 4] = [
    "etcdserver: no leader",
    "etcdserver: too many requests",
    "etcdserver: not capable",
    "etcdserver: rpc not supported for learner",
];
/// Refusals for good: etcd has checked the request and not done it.
const REFUSED: [&str; 8] = [
    "etcdserver: request is too large",
    "etcdserver: mvcc: database space exceeded",
    "etcdserver: permission denied",
    "etcdserver: user name is empty",
    "etcdserver: invalid auth token",
    "etcdserver: corrupt cluster",
    "etcdserver: requested lease not found",
    "etcdserver: mvcc: required revision has been compacted",
];

/// Whether a request may be sent to another member after it may have been acted upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Repeat {
    /// It only reads, or doing it twice is as good as once.
    Harmless,
    /// It writes.
    Never,
}

/// A call that had no answer that can be used.
#[derive(Debug)]
pub(super) struct Failure {
    /// etcd may have acted on the request, or may yet.
    pub sent: bool,
    /// Who said what.
    pub why: String,
}

/// What can be done after an attempt that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// Another member; nobody was there.
    Other,
    /// Another member, or after a pause the same.
    OtherOrLater,
    /// Nobody: all would refuse.
    Nobody,
}

/// One attempt that failed.
struct Attempt {
    sent: bool,
    /// Whom to ask next, if nobody can have acted on it.
    next: Next,
    why: String,
}

/// The task that moves a connection's bytes; ends with its owner.
pub(super) struct Driver(tokio::task::JoinHandle<hyper::Result<()>>);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Connection {
    sender: SendRequest<Full<Bytes>>,
    driver: Driver,
}

/// The way to one cluster.
pub(super) struct Client {
    endpoints: Vec<Endpoint>,
    tls: Option<TlsConnector>,
    handle: Handle,
    deadline: Duration,
    /// The member that answered last is asked first.
    first: AtomicUsize,
    /// Its connection, between calls.
    idle: Mutex<Option<(usize, Connection)>>,
}

/// Run `work` on the runtime and wait for it, at most `limit`. `None`: it did not end in time,
/// or the runtime is gone; it is stopped then.
pub(super) fn block<T: Send + 'static>(
    handle: &Handle,
    limit: Duration,
    work: impl Future<Output = T> + Send + 'static,
) -> Option<T> {
    let (tx, rx) = sync_channel(1);
    let task = handle.spawn(async move {
        let _ = tx.send(work.await);
    });
    let outcome = rx.recv_timeout(limit + GRACE).ok();
    if outcome.is_none() {
        task.abort();
    }
    outcome
}

impl Client {
    pub(super) fn new(
        endpoints: Vec<Endpoint>,
        tls: Option<TlsConnector>,
        handle: Handle,
        deadline: Duration,
    ) -> Self {
        Self {
            endpoints,
            tls,
            handle,
            deadline,
            first: AtomicUsize::new(0),
            idle: Mutex::new(None),
        }
    }

    pub(super) fn handle(&self) -> &Handle {
        &self.handle
    }

    /// The member that answered last did so with nonsense: begin with another.
    pub(super) fn distrust(&self) {
        let next = (self.first.load(Ordering::Relaxed) + 1) % self.endpoints.len();
        self.first.store(next, Ordering::Relaxed);
    }

    /// All members, for messages.
    pub(super) fn place(&self) -> String {
        let urls: Vec<_> = self.endpoints.iter().map(|e| e.url.as_str()).collect();
        format!("etcd {}", urls.join(" "))
    }

    /// Ask and wait for the whole answer, at most the deadline.
    pub(super) fn call(
        self: &Arc<Self>,
        repeat: Repeat,
        path: &'static str,
        ask: &Value,
    ) -> Result<Bytes, Failure> {
        let body = Bytes::from(ask.to_string());
        let sent = Arc::new(AtomicBool::new(false));
        let (me, told) = (self.clone(), sent.clone());
        let until = Instant::now() + self.deadline;
        let work = async move { me.ask_around(repeat, path, body, &told, until).await };
        block(&self.handle, self.deadline, work).unwrap_or_else(|| {
            Err(Failure {
                // With the work stopped, what it had not sent is never sent.
                sent: repeat == Repeat::Never && sent.load(Ordering::SeqCst),
                why: "the runtime did not run the call; it is overloaded or has ended".into(),
            })
        })
    }

    async fn ask_around(
        &self,
        repeat: Repeat,
        path: &'static str,
        body: Bytes,
        sent: &AtomicBool,
        until: Instant,
    ) -> Result<Bytes, Failure> {
        let count = self.endpoints.len();
        loop {
            let first = self.first.load(Ordering::Relaxed);
            let mut said = Vec::new();
            let mut reached = false;
            for n in 0..count {
                let at = (first + n) % count;
                let share = share(until, count - n);
                match self
                    .attempt(repeat, at, path, &body, sent, share, until)
                    .await
                {
                    Ok(answer) => {
                        self.first.store(at, Ordering::Relaxed);
                        return Ok(answer);
                    }
                    Err(failed) => {
                        let why = format!("{}: {}", self.endpoints[at].url, failed.why);
                        if repeat == Repeat::Never && failed.sent {
                            // Whoever is asked next should be another.
                            self.first.store((at + 1) % count, Ordering::Relaxed);
                            return Err(Failure { sent: true, why });
                        }
                        sent.store(false, Ordering::SeqCst);
                        if failed.next == Next::Nobody {
                            return Err(Failure { sent: false, why });
                        }
                        reached |= failed.next == Next::OtherOrLater;
                        said.push(why);
                    }
                }
            }
            if !reached || Instant::now() + RETRY_PAUSE + self.deadline / LAST_SHARE >= until {
                return Err(Failure {
                    sent: false,
                    why: said.join("; "),
                });
            }
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    }

    /// One exchange with one member. A write, once sent, may take until `until`, as nobody else
    /// can be asked any more; all else has its `share` of the time.
    #[allow(clippy::too_many_arguments)] // One caller; a struct would only name them twice.
    async fn attempt(
        &self,
        repeat: Repeat,
        at: usize,
        path: &'static str,
        body: &Bytes,
        sent: &AtomicBool,
        share: Instant,
        until: Instant,
    ) -> Result<Bytes, Attempt> {
        let failed = |next, why: String| Attempt {
            sent: sent.load(Ordering::SeqCst),
            next,
            why,
        };
        let answer_by = match repeat {
            Repeat::Harmless => share,
            Repeat::Never => until,
        };
        let late = |what: &str| failed(Next::OtherOrLater, format!("{what} in time"));
        let mut idle = self.take_idle(at);
        let (response, connection) = loop {
            let fresh = idle.is_none();
            let mut connection = match idle.take() {
                Some(connection) => connection,
                None => timeout_at(share, self.connect(at))
                    .await
                    .map_err(|_| failed(Next::Other, "no connection in time".into()))?
                    .map_err(|why| failed(Next::Other, why))?,
            };
            let request = self
                .request(at, path, body)
                .map_err(|why| failed(Next::Other, why))?;
            sent.store(true, Ordering::SeqCst);
            match timeout_at(answer_by, connection.sender.try_send_request(request)).await {
                Err(_) => return Err(late("it did not answer")),
                Ok(Ok(response)) => break (response, connection),
                Ok(Err(mut e)) => {
                    if e.take_message().is_some() {
                        // hyper gives back only what it has not begun to write.
                        sent.store(false, Ordering::SeqCst);
                        if !fresh {
                            continue; // The connection had ended between two calls.
                        }
                    }
                    return Err(failed(
                        Next::OtherOrLater,
                        format!("the connection broke: {}", causes(&e.into_error())),
                    ));
                }
            }
        };
        let status = response.status();
        let body = Limited::new(response.into_body(), BODY_BYTES_MAX).collect();
        let body = timeout_at(answer_by, body)
            .await
            .map_err(|_| late("its answer did not end"))?
            .map_err(|e| {
                let next = match e.is::<LengthLimitError>() {
                    true => Next::Other, // It would be no shorter later.
                    false => Next::OtherOrLater,
                };
                failed(next, format!("its answer broke off: {e}"))
            })?
            .to_bytes();
        if status != StatusCode::OK {
            let (why, verdict) = judge(status, &body);
            if let Some(next) = verdict {
                sent.store(false, Ordering::SeqCst);
                self.put_idle(at, connection);
                return Err(failed(next, why));
            }
            return Err(failed(Next::OtherOrLater, why));
        }
        self.put_idle(at, connection);
        Ok(body)
    }

    fn take_idle(&self, at: usize) -> Option<Connection> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.take()
            .filter(|(to, connection)| *to == at && !connection.sender.is_closed())
            .map(|(_, connection)| connection)
    }

    fn put_idle(&self, at: usize, connection: Connection) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        *idle = Some((at, connection));
    }

    fn request(
        &self,
        at: usize,
        path: &'static str,
        body: &Bytes,
    ) -> Result<Request<Full<Bytes>>, String> {
        Request::post(path)
            .header("host", self.host(at))
            .header("content-type", "application/json")
            // A member without a leader says so at once, instead of waiting for one.
            .header("grpc-metadata-hasleader", "true")
            .body(Full::new(body.clone()))
            .map_err(|e| e.to_string())
    }

    async fn connect(&self, at: usize) -> Result<Connection, String> {
        let endpoint = &self.endpoints[at];
        let tcp = TcpStream::connect((endpoint.host.as_str(), endpoint.port))
            .await
            .map_err(|e| format!("cannot connect: {e}"))?;
        tcp.set_nodelay(true).map_err(|e| e.to_string())?;
        let http = |e: hyper::Error| format!("cannot speak HTTP: {e}");
        let Some(name) = &endpoint.tls_name else {
            let (sender, connection) = http1::handshake(TokioIo::new(tcp)).await.map_err(http)?;
            let driver = Driver(tokio::spawn(connection));
            return Ok(Connection { sender, driver });
        };
        let tls = self.tls.as_ref().ok_or("there are no settings for TLS")?;
        let stream = tls
            .connect(name.clone(), tcp)
            .await
            .map_err(|e| format!("TLS failed: {e}"))?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
        let driver = Driver(tokio::spawn(connection));
        let mut connection = Connection { sender, driver };
        self.prove(at, &mut connection).await?;
        Ok(connection)
    }

    /// A server judges this host's certificate after the handshake has ended on this side
    /// (RFC 8446, section 2), so a first request may be refused by TLS. Let it be one that
    /// changes nothing: any answer proves that the next one will be read.
    async fn prove(&self, at: usize, connection: &mut Connection) -> Result<(), String> {
        let refused = |e: &dyn std::error::Error| {
            format!(
                "TLS failed after the handshake, does etcd accept this host's certificate? {}",
                causes(e)
            )
        };
        let request = Request::get("/version")
            .header("host", self.host(at))
            .body(Full::new(Bytes::new()))
            .map_err(|e| e.to_string())?;
        let response = connection.sender.send_request(request).await;
        let body = response.map_err(|e| refused(&e))?.into_body();
        let body = Limited::new(body, BODY_BYTES_MAX).collect().await;
        body.map_err(|e| refused(e.as_ref()))?;
        Ok(())
    }

    fn host(&self, at: usize) -> String {
        let Endpoint { host, port, .. } = &self.endpoints[at];
        match host.contains(':') {
            true => format!("[{host}]:{port}"),
            false => format!("{host}:{port}"),
        }
    }

    /// Ask any member for a stream, `turn` saying who is asked first; the connection is the
    /// stream's own.
    pub(super) async fn stream(
        &self,
        turn: usize,
        path: &'static str,
        ask: &Value,
    ) -> Result<(Incoming, Driver), String> {
        let at = turn % self.endpoints.len();
        let Connection { mut sender, driver } = self
            .connect(at)
            .await
            .map_err(|why| format!("{}: {why}", self.endpoints[at].url))?;
        let broken = |e: &dyn std::fmt::Display| format!("{}: {e}", self.endpoints[at].url);
        let request = self.request(at, path, &Bytes::from(ask.to_string()))?;
        let response: Response<Incoming> =
            sender.send_request(request).await.map_err(|e| broken(&e))?;
        let status = response.status();
        if status == StatusCode::OK {
            return Ok((response.into_body(), driver));
        }
        let body = Limited::new(response.into_body(), BODY_BYTES_MAX)
            .collect()
            .await;
        let body = body.map_err(|e| broken(&e))?.to_bytes();
        Err(broken(&judge(status, &body).0))
    }
}

/// An error and what caused it; hyper's own words leave the cause out.
fn causes(e: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(e.source(), |e| e.source());
    causes.fold(e.to_string(), |said, cause| format!("{said}: {cause}"))
}

/// The end of the next attempt's share of the time until `until`, with `left` attempts to make.
pub(super) fn share(until: Instant, left: usize) -> Instant {
    let now = Instant::now();
    let parts = u32::try_from(left.max(1)).unwrap_or(u32::MAX);
    now + until.saturating_duration_since(now) / parts
}

/// What an answer other than 200 says, and what to do if it is certain that etcd did not act.
fn judge(status: StatusCode, body: &[u8]) -> (String, Option<Next>) {
    let Some(message) = wire::refusal(body) else {
        return (format!("it answered {status} and is perhaps no etcd"), None);
    };
    let verdict = if NOT_NOW.contains(&message.as_str()) {
        Some(Next::OtherOrLater)
    } else if REFUSED.contains(&message.as_str()) {
        Some(Next::Nobody)
    } else {
        None
    };
    (message, verdict)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_refusal_that_etcd_gives_before_it_acts_is_one() {
        let judged = |message: &str| {
            let body = serde_json::json!({ "message": message }).to_string();
            judge(StatusCode::SERVICE_UNAVAILABLE, body.as_bytes()).1
        };
        assert_eq!(judged("etcdserver: no leader"), Some(Next::OtherOrLater));
        let full = "etcdserver: mvcc: database space exceeded";
        assert_eq!(judged(full), Some(Next::Nobody));
        for unclear in [
            "etcdserver: request timed out",
            "etcdserver: request timed out, possibly due to previous leader failure",
            "etcdserver: server stopped",
            "etcdserver: no leader of the pack",
        ] {
            assert_eq!(judged(unclear), None, "{unclear}");
        }
        assert_eq!(judge(StatusCode::BAD_GATEWAY, b"<html>").1, None);
    }

    #[test]
    fn work_on_a_runtime_that_has_ended_is_given_up() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let handle = runtime.handle().clone();
        assert_eq!(
            block(&handle, Duration::from_secs(60), async { 7 }),
            Some(7)
        );
        runtime.shutdown_background();
        assert_eq!(block(&handle, Duration::from_secs(60), async { 7 }), None);
    }
}
