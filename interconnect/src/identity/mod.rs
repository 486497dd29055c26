//! Who a host is on the interconnect, and the pinning of its partner.
//!
//! A host has one self-signed certificate. There is no authority: a pair trusts
//! exactly each other's fingerprints, exchanged once by a person. Names and dates
//! in the certificate mean nothing; the fingerprint covers all of it.
//!
//! - [`IdentityDir`]: the identity on disk, and its replacement.
//! - [`Fingerprint`]: what is pinned. A set of them, because a partner that changes its
//!   key has two for a while.
//! - [`meeting`], [`code`]: how two hosts get to know each other, and the short code two
//!   people compare then.
//!
//! What this must never do: accept another certificate than a pinned one, a
//! handshake without a signature by its key, or TLS below 1.3; resume a session
//! (a resumed one shows no certificate); leave a half-written identity behind.

pub mod code;
mod files;
mod fingerprint;
pub mod meeting;
mod pins;

pub use files::{IDENTITY_FILE, IdentityDir, IdentityError, NEXT_FILE};
pub use fingerprint::{BadFingerprint, Fingerprint};

use pins::Judge;
use rustls::CipherSuite;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::fmt;
use std::path::Path;
use std::sync::{Arc, LazyLock};

/// Protocol name in the TLS handshake (ALPN): nothing else answers to it.
const ALPN: &[u8] = b"pollux-interconnect";
/// Protocol name of a meeting: a peer that was not authenticated can never be taken for a
/// pinned one, nor the other way round.
const ALPN_MEETING: &[u8] = b"pollux-meeting";

/// A host's certificate and key.
pub struct Identity {
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
    fingerprint: Fingerprint,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.fingerprint)
    }
}

impl Identity {
    /// [`IdentityDir::load_or_create`] of the folder `dir`.
    ///
    /// # Errors
    /// [`IdentityError`]; an existing identity is never replaced.
    pub fn load_or_create(dir: &Path) -> Result<Self, IdentityError> {
        IdentityDir::new(dir).load_or_create()
    }

    /// A new identity that is kept nowhere (tests, the lab).
    ///
    /// # Errors
    /// [`IdentityError::Generate`].
    pub fn generate() -> Result<Self, IdentityError> {
        Self::make().map(|(identity, _)| identity)
    }

    /// A new identity and its file's content.
    fn make() -> Result<(Self, String), IdentityError> {
        let generate = |error: rcgen::Error| IdentityError::Generate(error.to_string());
        let pair = rcgen::generate_simple_self_signed(["pollux".to_owned()]).map_err(generate)?;
        let pem = pair.cert.pem() + &pair.signing_key.serialize_pem();
        let identity = Self::parse(pem.as_bytes()).map_err(IdentityError::Generate)?;
        Ok((identity, pem))
    }

    fn parse(pem: &[u8]) -> Result<Self, String> {
        let certificate =
            CertificateDer::from_pem_slice(pem).map_err(|e| format!("no certificate: {e}"))?;
        let key = PrivateKeyDer::from_pem_slice(pem).map_err(|e| format!("no private key: {e}"))?;
        rustls::sign::CertifiedKey::from_der(
            vec![certificate.clone()],
            key.clone_key(),
            &provider(),
        )
        .map_err(|e| format!("certificate and key do not belong together: {e}"))?;
        let fingerprint = Fingerprint::of(&certificate);
        Ok(Self {
            certificate,
            key,
            fingerprint,
        })
    }

    /// What the partner must pin.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// A secret that only this identity has and that survives restarts, for `label`.
    pub(crate) fn secret(&self, label: &str) -> ring::hmac::Key {
        let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, self.key.secret_der());
        let tag = ring::hmac::sign(&key, label.as_bytes());
        ring::hmac::Key::new(ring::hmac::HMAC_SHA256, tag.as_ref())
    }

    /// TLS as the side that dials, trusting `pins` alone.
    pub(crate) fn client_config(
        &self,
        pins: &[Fingerprint],
    ) -> Result<rustls::ClientConfig, rustls::Error> {
        self.client(Judge::pinned(pins), ALPN)
    }

    /// TLS as the side that accepts, trusting `pins` alone.
    pub(crate) fn server_config(
        &self,
        pins: &[Fingerprint],
    ) -> Result<rustls::ServerConfig, rustls::Error> {
        self.server(Judge::pinned(pins), ALPN)
    }

    fn client(&self, judge: Judge, alpn: &[u8]) -> Result<rustls::ClientConfig, rustls::Error> {
        let mut config = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(judge))
            .with_client_auth_cert(vec![self.certificate.clone()], self.key.clone_key())?;
        config.alpn_protocols = vec![alpn.to_vec()];
        // A resumed session is authenticated by an old ticket, not by the pinned
        // certificate, and 0-RTT data can be replayed.
        config.resumption = rustls::client::Resumption::disabled();
        config.enable_early_data = false;
        Ok(config)
    }

    fn server(&self, judge: Judge, alpn: &[u8]) -> Result<rustls::ServerConfig, rustls::Error> {
        let mut config = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::new(judge))
            .with_single_cert(vec![self.certificate.clone()], self.key.clone_key())?;
        config.alpn_protocols = vec![alpn.to_vec()];
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Ok(config)
    }
}

/// ring with AES-128-GCM before ChaCha20: the fastest where the processor has AES,
/// which is every KVM host; AES-256 gains nothing on a private link. QUIC itself
/// asks for the first.
fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
        let mut provider = rustls::crypto::ring::default_provider();
        provider.cipher_suites.retain(|suite| {
            matches!(
                suite.suite(),
                CipherSuite::TLS13_AES_128_GCM_SHA256 | CipherSuite::TLS13_CHACHA20_POLY1305_SHA256
            )
        });
        provider
            .cipher_suites
            .sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
        Arc::new(provider)
    });
    Arc::clone(&PROVIDER)
}

fn no_tls12() -> rustls::Error {
    rustls::Error::General("TLS 1.2 is not spoken on the interconnect".to_owned())
}
