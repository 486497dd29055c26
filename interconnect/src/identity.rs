//! Who a host is on the interconnect, and the pinning of exactly one partner.
//!
//! A host has one self-signed certificate. There is no authority: a pair trusts
//! exactly each other's fingerprints, exchanged once by a person. Names and dates
//! in the certificate mean nothing; the fingerprint covers all of it.
//!
//! What this must never do: accept another certificate than the pinned one, a
//! handshake without a signature by its key, or TLS below 1.3; resume a session
//! (a resumed one shows no certificate); leave a half-written identity behind.

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CipherSuite, DigitallySignedStruct, DistinguishedName, SignatureScheme};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// File in the identity folder: certificate and key together, so that neither can
/// be there without the other.
pub const IDENTITY_FILE: &str = "identity.pem";
/// Largest identity file read; a P-256 pair takes about 1 KiB.
const IDENTITY_BYTES_MAX: u64 = 64 << 10;
/// Protocol name in the TLS handshake (ALPN): nothing else answers to it.
const ALPN: &[u8] = b"pollux-interconnect";

/// SHA-256 of a host's certificate in DER; text form `sha256:` and 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Fingerprint(pub [u8; 32]);

/// Text that is not a fingerprint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a fingerprint: it looks like sha256: followed by 64 hex digits, as `pollux link create` prints it"
)]
pub struct BadFingerprint(pub String);

impl Fingerprint {
    /// Of a certificate.
    fn of(certificate: &CertificateDer<'_>) -> Self {
        let digest = ring::digest::digest(&ring::digest::SHA256, certificate);
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest.as_ref());
        Self(bytes)
    }
}

impl std::str::FromStr for Fingerprint {
    type Err = BadFingerprint;
    fn from_str(text: &str) -> Result<Self, BadFingerprint> {
        let bad = || BadFingerprint(text.chars().take(100).collect());
        let digits = text.strip_prefix("sha256:").ok_or_else(bad)?.as_bytes();
        if digits.len() != 64 {
            return Err(bad());
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |at: usize| {
                char::from(pair[at])
                    .to_digit(16)
                    .and_then(|d| u8::try_from(d).ok())
            };
            *byte = digit(0).ok_or_else(bad)? << 4 | digit(1).ok_or_else(bad)?;
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for Fingerprint {
    type Error = BadFingerprint;
    fn try_from(text: String) -> Result<Self, BadFingerprint> {
        text.parse()
    }
}

impl From<Fingerprint> for String {
    fn from(fingerprint: Fingerprint) -> Self {
        fingerprint.to_string()
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Why a host has no identity.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// A file or folder could not be used.
    #[error("cannot {what} {path}: {source}")]
    File {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Others on this host may read the key.
    #[error(
        "{path} holds this host's private key and has mode {mode:04o}: run `chmod 0600` on it, and make a new identity if others may have read it"
    )]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file is not an identity.
    #[error(
        "{path} is not a usable identity ({reason}): move it away to make a new one, then pin the new fingerprint on the partner"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// A new identity could not be made.
    #[error("cannot make a new identity: {0}")]
    Generate(String),
}

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
    /// Load the identity in `dir`, or make one and keep it there: folder mode 0700,
    /// file mode 0600. Two processes that do this at once get the same identity.
    ///
    /// # Errors
    /// [`IdentityError`]; an existing identity is never replaced.
    pub fn load_or_create(dir: &Path) -> Result<Self, IdentityError> {
        let path = dir.join(IDENTITY_FILE);
        if let Some(identity) = Self::load(&path)? {
            return Ok(identity);
        }
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|source| IdentityError::File {
                what: "make the folder",
                path: dir.to_owned(),
                source,
            })?;
        let (_, pem) = Self::make()?;
        keep(dir, &path, &pem)?;
        Self::load(&path)?.ok_or_else(|| IdentityError::Damaged {
            path,
            reason: "it vanished".to_owned(),
        })
    }

    /// A new identity that is kept nowhere (tests, the lab).
    ///
    /// # Errors
    /// [`IdentityError::Generate`].
    pub fn generate() -> Result<Self, IdentityError> {
        Self::make().map(|(identity, _)| identity)
    }

    fn make() -> Result<(Self, String), IdentityError> {
        let generate = |error: rcgen::Error| IdentityError::Generate(error.to_string());
        let pair = rcgen::generate_simple_self_signed(["pollux".to_owned()]).map_err(generate)?;
        let pem = pair.cert.pem() + &pair.signing_key.serialize_pem();
        let identity = Self::parse(pem.as_bytes()).map_err(IdentityError::Generate)?;
        Ok((identity, pem))
    }

    /// `None` if there is no such file.
    fn load(path: &Path) -> Result<Option<Self>, IdentityError> {
        let read = |source| IdentityError::File {
            what: "read",
            path: path.to_owned(),
            source,
        };
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(read(error)),
        };
        let mode = file.metadata().map_err(read)?.permissions().mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(IdentityError::Mode {
                path: path.to_owned(),
                mode,
            });
        }
        let mut pem = Vec::new();
        file.take(IDENTITY_BYTES_MAX)
            .read_to_end(&mut pem)
            .map_err(read)?;
        Self::parse(&pem)
            .map(Some)
            .map_err(|reason| IdentityError::Damaged {
                path: path.to_owned(),
                reason,
            })
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

    /// TLS as the side that dials, trusting `peer` alone.
    pub(crate) fn client_config(
        &self,
        peer: Fingerprint,
    ) -> Result<rustls::ClientConfig, rustls::Error> {
        let mut config = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(PinnedPeer::new(peer)))
            .with_client_auth_cert(vec![self.certificate.clone()], self.key.clone_key())?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        // A resumed session is authenticated by an old ticket, not by the pinned
        // certificate, and 0-RTT data can be replayed.
        config.resumption = rustls::client::Resumption::disabled();
        config.enable_early_data = false;
        Ok(config)
    }

    /// TLS as the side that accepts, trusting `peer` alone.
    pub(crate) fn server_config(
        &self,
        peer: Fingerprint,
    ) -> Result<rustls::ServerConfig, rustls::Error> {
        let mut config = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::new(PinnedPeer::new(peer)))
            .with_single_cert(vec![self.certificate.clone()], self.key.clone_key())?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Ok(config)
    }
}

/// ring with AES-128-GCM before ChaCha20: the fastest where the processor has AES,
/// which is every KVM host; AES-256 gains nothing on a private link. QUIC itself
/// asks for the first.
fn provider() -> Arc<CryptoProvider> {
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
}

/// Write `pem` to `path` in `dir` so that after a crash there is all of it or
/// nothing; leaves an identity that is there already.
fn keep(dir: &Path, path: &Path, pem: &str) -> Result<(), IdentityError> {
    let partial = dir.join(format!("{IDENTITY_FILE}.{}.partial", std::process::id()));
    let file_error = |what, path: &Path| {
        let path = path.to_owned();
        move |source| IdentityError::File { what, path, source }
    };
    let written = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&partial)
        .and_then(|mut file| {
            file.write_all(pem.as_bytes())
                .and_then(|()| file.sync_all())
        });
    written.map_err(file_error("write", &partial))?;
    let here = nix::fcntl::AT_FDCWD;
    let flags = nix::fcntl::RenameFlags::RENAME_NOREPLACE;
    match nix::fcntl::renameat2(here, &partial, here, path, flags) {
        Ok(()) => {}
        Err(nix::errno::Errno::EEXIST) => {
            // Another process was first; its identity counts. A partial file left
            // behind is harmless and overwritten by the next attempt.
            let _ = fs::remove_file(&partial);
        }
        Err(error) => return Err(file_error("rename into place", path)(error.into())),
    }
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(file_error("sync the folder", dir))
}

/// Accepts exactly one certificate, on either side of a handshake.
#[derive(Debug)]
struct PinnedPeer {
    pinned: Fingerprint,
    algorithms: WebPkiSupportedAlgorithms,
}

impl PinnedPeer {
    fn new(pinned: Fingerprint) -> Self {
        Self {
            pinned,
            algorithms: provider().signature_verification_algorithms,
        }
    }

    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        let presented = Fingerprint::of(certificate);
        if presented == self.pinned {
            return Ok(());
        }
        Err(rustls::Error::General(format!(
            "wrong identity: expected {}, the peer presented {presented}; if the partner was set up anew, run `pollux link create` again",
            self.pinned
        )))
    }

    fn check_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }
}

fn no_tls12() -> rustls::Error {
    rustls::Error::General("TLS 1.2 is not spoken on the interconnect".to_owned())
}

impl ServerCertVerifier for PinnedPeer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(end_entity)
            .map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.check_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for PinnedPeer {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check(end_entity)
            .map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.check_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_made_once_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("pollux/identity");
        let first = Identity::load_or_create(&dir).unwrap().fingerprint();
        assert_eq!(Identity::load_or_create(&dir).unwrap().fingerprint(), first);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&dir), mode(&dir.join(IDENTITY_FILE))), (0o700, 0o600));
        assert_eq!(
            fs::read_dir(&dir).unwrap().count(),
            1,
            "nothing partial stays"
        );
    }

    #[test]
    fn many_at_once_get_the_same_identity() {
        let dir = tempfile::tempdir().unwrap();
        let (_, pem) = Identity::make().unwrap();
        let path = dir.path().join(IDENTITY_FILE);
        keep(dir.path(), &path, &pem).unwrap();
        let before = Identity::load(&path).unwrap().unwrap().fingerprint();
        keep(dir.path(), &path, &Identity::make().unwrap().1).unwrap();
        assert_eq!(
            Identity::load(&path).unwrap().unwrap().fingerprint(),
            before
        );
    }

    #[test]
    fn a_damaged_or_open_identity_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        Identity::load_or_create(dir.path()).unwrap();
        let path = dir.path().join(IDENTITY_FILE);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(
            Identity::load_or_create(dir.path()),
            Err(IdentityError::Mode { mode: 0o640, .. })
        ));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let pem = fs::read_to_string(&path).unwrap();
        let (_, other) = Identity::make().unwrap();
        let key_of_other = &other[other.find("-----BEGIN PRIVATE").unwrap()..];
        let cut = pem.find("-----BEGIN PRIVATE").unwrap();
        for damaged in [
            String::new(),
            pem[..cut].to_owned(),
            pem[..cut].to_owned() + key_of_other,
        ] {
            fs::write(&path, &damaged).unwrap();
            assert!(matches!(
                Identity::load_or_create(dir.path()),
                Err(IdentityError::Damaged { .. })
            ));
            assert_eq!(fs::read_to_string(&path).unwrap(), damaged);
        }
    }

    #[test]
    fn fingerprints_are_text_and_back() {
        let fingerprint = Identity::generate().unwrap().fingerprint();
        assert_eq!(fingerprint.to_string().parse(), Ok(fingerprint));
        assert_eq!(fingerprint.to_string().len(), 71);
        for bad in [
            "",
            "sha256:",
            "sha256:zz",
            &"sha256:+".repeat(9),
            &"0".repeat(71),
        ] {
            assert!(bad.parse::<Fingerprint>().is_err(), "{bad}");
        }
        let signs = format!("sha256:{}", "+1".repeat(32));
        assert!(signs.parse::<Fingerprint>().is_err());
    }
}
