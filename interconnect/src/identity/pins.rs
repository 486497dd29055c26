//! Which peers a handshake accepts: those whose certificate has a pinned fingerprint.
//!
//! One judge for both sides of a handshake. A partner that is changing its key has two
//! fingerprints for a while; an empty set accepts nobody.

use super::{Fingerprint, no_tls12, provider};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, SignatureScheme};
use std::fmt::Write;

/// Whom a handshake accepts.
#[derive(Debug)]
enum Accepts {
    /// Only these.
    Pinned(Vec<Fingerprint>),
    /// Anybody who has the key to the certificate shown: for getting to know each other,
    /// where a person compares a code afterwards.
    Anybody,
}

/// The judge of a handshake, on either side.
#[derive(Debug)]
pub(super) struct Judge {
    accepts: Accepts,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Judge {
    fn new(accepts: Accepts) -> Self {
        Self {
            accepts,
            algorithms: provider().signature_verification_algorithms,
        }
    }

    /// Accepts exactly these identities.
    pub(super) fn pinned(pins: &[Fingerprint]) -> Self {
        Self::new(Accepts::Pinned(pins.to_vec()))
    }

    /// Accepts every identity whose key the peer has.
    pub(super) fn anybody() -> Self {
        Self::new(Accepts::Anybody)
    }

    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        let Accepts::Pinned(pins) = &self.accepts else {
            return Ok(());
        };
        let presented = Fingerprint::of(certificate);
        if pins.contains(&presented) {
            return Ok(());
        }
        // The peer gets to read this as well: both fingerprints are on both sides then.
        let mut expected = String::new();
        for pin in pins {
            let or = if expected.is_empty() { "" } else { " or " };
            let _ = write!(expected, "{or}{pin}");
        }
        if expected.is_empty() {
            expected.push_str("nobody");
        }
        Err(rustls::Error::General(format!(
            "wrong identity: expected {expected}, the peer presented {presented}; if the partner was set up anew, run `pollux link create` again"
        )))
    }
}

/// What both traits ask alike: the peer must have the key, and TLS is 1.3.
macro_rules! signatures {
    () => {
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
            verify_tls13_signature(message, certificate, signature, &self.algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.algorithms.supported_schemes()
        }
    };
}

impl ServerCertVerifier for Judge {
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

    signatures!();
}

impl ClientCertVerifier for Judge {
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

    signatures!();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Identity;

    #[test]
    fn a_wrong_identity_is_named_with_all_that_would_have_been_right() {
        let [old, new, stranger] = [(); 3].map(|()| Identity::generate().unwrap());
        let judge = Judge::pinned(&[old.fingerprint(), new.fingerprint()]);
        judge.check(&old.certificate).unwrap();
        judge.check(&new.certificate).unwrap();
        let error = judge.check(&stranger.certificate).unwrap_err().to_string();
        for named in [&old, &new, &stranger] {
            assert!(error.contains(&named.fingerprint().to_string()), "{error}");
        }
        assert!(error.contains("pollux link create"), "{error}");
    }

    #[test]
    fn no_pin_accepts_nobody() {
        let one = Identity::generate().unwrap();
        let error = Judge::pinned(&[]).check(&one.certificate).unwrap_err();
        assert!(error.to_string().contains("expected nobody"), "{error}");
        Judge::anybody().check(&one.certificate).unwrap();
    }
}
