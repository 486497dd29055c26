//! A plain TCP stream, bare or under TLS, as the measure of what a link could carry.

use super::peer::{Report, say_ready};
use super::{PIECE_BYTES, cpu};
use anyhow::{Context, Result};
use nix::sys::socket::{setsockopt, sockopt};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{CipherSuite, ClientConfig, ClientConnection, ServerConfig, ServerConnection};
use serde::{Deserialize, Serialize};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Name in the certificate.
const NAME: &str = "wire";
/// What is read at a time.
const READ_BYTES: usize = 256 << 10;

/// A stream to measure.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Stream {
    /// Where the receiver listens.
    pub address: SocketAddr,
    /// Folder with the certificate ([`make_certificate`]); `None`: bare TCP.
    pub tls: Option<PathBuf>,
    /// Not measured at the start, in s.
    pub warm_up_s: f64,
    /// Measured, in s.
    pub seconds: f64,
}

/// Makes a certificate for [`Stream::tls`].
///
/// # Errors
/// If the files cannot be written.
pub fn make_certificate(folder: &Path) -> Result<()> {
    let made = rcgen::generate_simple_self_signed(vec![NAME.to_owned()])?;
    std::fs::write(folder.join("certificate.der"), made.cert.der())?;
    std::fs::write(folder.join("key.der"), made.signing_key.serialize_der())?;
    Ok(())
}

fn certificate(folder: &Path) -> Result<CertificateDer<'static>> {
    Ok(std::fs::read(folder.join("certificate.der"))?.into())
}

/// The one cipher that QUIC negotiates here too.
fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    let mut provider = rustls::crypto::ring::default_provider();
    provider
        .cipher_suites
        .retain(|suite| suite.suite() == CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

/// Takes a congestion control that does not pace: where the kernel's default is BBR, what it
/// reaches between two namespaces is anything from 0.4 to 3 GB/s by chance, and a comparison
/// with that would flatter us.
fn unpaced(stream: &TcpStream) {
    let cubic = std::ffi::OsString::from("cubic");
    // Not there: the default it is.
    let _ = setsockopt(stream, sockopt::TcpCongestion, &cubic);
}

/// Measures what arrives: skips the warm-up, then counts for the time given.
///
/// # Errors
/// If the stream ends before.
pub fn measure(
    warm_up_s: f64,
    seconds: f64,
    mut next: impl FnMut() -> Result<u64>,
) -> Result<Report> {
    let warm = Instant::now() + Duration::from_secs_f64(warm_up_s);
    while Instant::now() < warm {
        next()?;
    }
    let (start, cpu) = (Instant::now(), cpu::used()?);
    let end = start + Duration::from_secs_f64(seconds);
    let mut bytes = 0;
    loop {
        bytes += next()?;
        if Instant::now() >= end {
            break;
        }
    }
    Ok(Report {
        bytes,
        seconds: start.elapsed().as_secs_f64(),
        cpu_seconds: (cpu::used()? - cpu).as_secs_f64(),
        ..Report::default()
    })
}

/// Receives for the time of the plan.
///
/// # Errors
/// Of the sockets and TLS.
pub fn receive(plan: &Stream) -> Result<Report> {
    let listener = TcpListener::bind(plan.address)?;
    let server = match &plan.tls {
        None => None,
        Some(folder) => {
            let key = PrivatePkcs8KeyDer::from(std::fs::read(folder.join("key.der"))?);
            let config = ServerConfig::builder_with_provider(provider())
                .with_protocol_versions(&[&rustls::version::TLS13])?
                .with_no_client_auth()
                .with_single_cert(vec![certificate(folder)?], PrivateKeyDer::from(key))?;
            Some(ServerConnection::new(Arc::new(config))?)
        }
    };
    say_ready()?;
    let (stream, _) = listener.accept()?;
    unpaced(&stream);
    let mut stream: Box<dyn Read> = match server {
        None => Box::new(stream),
        Some(server) => Box::new(rustls::StreamOwned::new(server, stream)),
    };
    let mut buffer = vec![0; READ_BYTES];
    // The sender goes on until it finds this end closed.
    stream.read_exact(&mut buffer[..1])?;
    measure(plan.warm_up_s, plan.seconds, || {
        let read = stream.read(&mut buffer)?;
        anyhow::ensure!(read > 0, "the sender ended");
        Ok(read as u64)
    })
}

/// Sends until the receiver has enough.
///
/// # Errors
/// Of the sockets and TLS before anything flows.
pub fn send(plan: &Stream) -> Result<Report> {
    let stream = TcpStream::connect(plan.address).context("connect")?;
    stream.set_nodelay(true)?;
    unpaced(&stream);
    let mut stream: Box<dyn Write> = match &plan.tls {
        None => Box::new(stream),
        Some(folder) => {
            let mut roots = rustls::RootCertStore::empty();
            roots.add(certificate(folder)?)?;
            let config = ClientConfig::builder_with_provider(provider())
                .with_protocol_versions(&[&rustls::version::TLS13])?
                .with_root_certificates(roots)
                .with_no_client_auth();
            let name = ServerName::try_from(NAME)?;
            let client = ClientConnection::new(Arc::new(config), name)?;
            Box::new(rustls::StreamOwned::new(client, stream))
        }
    };
    let piece = vec![0x5a; PIECE_BYTES];
    let mut next = || stream.write_all(&piece).ok().map(|()| piece.len() as u64);
    let report = measure(plan.warm_up_s, plan.seconds * 0.9, || {
        next().context("the receiver went away early")
    })?;
    // The receiver closes when it has enough: that is this end's end, not a failure.
    while next().is_some() {}
    Ok(report)
}
