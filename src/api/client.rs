//! Asks a daemon over its unix socket.

use super::BODY_BYTES_MAX;
use super::types::{ApiError, Done, HostInfo, LinkAddrs, LinkConfig};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longest wait for an answer. No call blocks on a guest; long work is polled.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);

/// One daemon.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

/// Why a daemon's answer could not be had.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error(
        "no daemon answers at {socket}: {source}; start one with `pollux daemon`, or name its socket with --api"
    )]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The daemon refused.
    #[error(transparent)]
    Refused(#[from] ApiError),
    /// The connection broke or the answer was no answer.
    #[error("the daemon at {socket} did not answer {method} {path}: {reason}")]
    Broken {
        /// The socket.
        socket: PathBuf,
        /// The method.
        method: Method,
        /// The path asked for.
        path: String,
        /// Why.
        reason: String,
    },
}

impl Client {
    /// A client of the daemon at `socket`.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self {
            socket: socket.into(),
        }
    }

    /// Ask for `path`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::GET, path, Bytes::new()).await
    }

    /// Tell `path` to do something.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn post<B: Serialize + Sync, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body)
            .map_err(|e| self.broken(&Method::POST, path, e.to_string()))?;
        self.call(Method::POST, path, body.into()).await
    }

    /// Remove `path`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::DELETE, path, Bytes::new()).await
    }

    fn broken(&self, method: &Method, path: &str, reason: String) -> ClientError {
        ClientError::Broken {
            socket: self.socket.clone(),
            method: method.clone(),
            path: path.into(),
            reason,
        }
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<T, ClientError> {
        let exchange = self.exchange(&method, path, body);
        let (status, bytes) = tokio::time::timeout(ANSWER_DEADLINE, exchange)
            .await
            .map_err(|_| self.broken(&method, path, "no answer in 30 s".into()))??;
        if status.is_success() {
            serde_json::from_slice(&bytes)
                .map_err(|e| self.broken(&method, path, format!("answer not understood: {e}")))
        } else {
            let refusal: ApiError = serde_json::from_slice(&bytes).unwrap_or_else(|_| ApiError {
                error: format!("{status}: {}", String::from_utf8_lossy(&bytes)),
            });
            Err(refusal.into())
        }
    }

    async fn exchange(
        &self,
        method: &Method,
        path: &str,
        body: Bytes,
    ) -> Result<(hyper::StatusCode, Bytes), ClientError> {
        let stream = tokio::net::UnixStream::connect(&self.socket)
            .await
            .map_err(|source| ClientError::Connect {
                socket: self.socket.clone(),
                source,
            })?;
        let broken = |e: &dyn std::fmt::Display| self.broken(method, path, e.to_string());
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| broken(&e))?;
        let driver = tokio::spawn(connection);
        let request = Request::builder()
            .method(method.clone())
            .uri(path)
            .header("host", "pollux")
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|e| broken(&e))?;
        let response = sender.send_request(request).await.map_err(|e| broken(&e))?;
        let status = response.status();
        let bytes = Limited::new(response.into_body(), BODY_BYTES_MAX)
            .collect()
            .await
            .map_err(|e| broken(&e))?
            .to_bytes();
        drop(sender);
        driver.abort();
        Ok((status, bytes))
    }
}

/// Wait for one exchange with a daemon, for callers without a runtime.
pub fn block<T>(exchange: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime without worker threads needs only an epoll descriptor")
        .block_on(exchange)
}

/// Pin two daemons to each other: exchange fingerprints, tell both the `links` as
/// `here` writes them.
///
/// # Errors
/// [`ClientError`] of the first exchange that failed; `here` may be pinned already then.
pub async fn pin_both(
    here: &Client,
    there: &Client,
    links: &[LinkAddrs],
) -> Result<(HostInfo, HostInfo), ClientError> {
    let a: HostInfo = here.get("/v1/host").await?;
    let b: HostInfo = there.get("/v1/host").await?;
    let to_b = LinkConfig {
        partner: b.name.clone(),
        fingerprint: b.fingerprint.clone(),
        next_fingerprint: None,
        links: links.to_vec(),
    };
    let to_a = LinkConfig {
        partner: a.name.clone(),
        fingerprint: a.fingerprint.clone(),
        next_fingerprint: None,
        links: links.iter().map(|l| l.mirrored()).collect(),
    };
    let _: Done = here.post("/v1/links", &to_b).await?;
    let _: Done = there.post("/v1/links", &to_a).await?;
    Ok((a, b))
}
