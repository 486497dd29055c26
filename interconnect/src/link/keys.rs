//! Who this host is on the interconnect and whom it accepts, both changeable while it runs.

use crate::identity::{Fingerprint, Identity};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{Connection, TransportConfig};
use rustls::pki_types::CertificateDer;
use std::sync::Arc;

/// Identity and pins as they hold for new connections.
#[derive(Clone)]
pub(super) struct Keys {
    pub(super) identity: Arc<Identity>,
    pub(super) pins: Vec<Fingerprint>,
}

/// Which side of a connection this host has to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Role {
    Dials,
    Accepts,
}

impl Keys {
    /// Whether this side may have to dial: the lower fingerprint does. While a key is
    /// changed the partner may have one of several; then both may try, and
    /// [`Keys::role`] settles it by the fingerprints actually shown.
    pub(super) fn may_dial(&self) -> bool {
        self.pins
            .iter()
            .any(|pin| self.identity.fingerprint() < *pin)
    }

    /// This side's role with the partner at the other end of an established connection.
    pub(super) fn role(&self, connection: &Connection) -> Role {
        let peer = peer_fingerprint(connection);
        if peer.is_none_or(|peer| self.identity.fingerprint() < peer) {
            Role::Dials
        } else {
            Role::Accepts
        }
    }

    pub(super) fn client(
        &self,
        transport: &Arc<TransportConfig>,
    ) -> Result<quinn::ClientConfig, String> {
        let client = self
            .identity
            .client_config(&self.pins)
            .map_err(|error| error.to_string())?;
        let client = QuicClientConfig::try_from(client).map_err(|error| error.to_string())?;
        let mut client = quinn::ClientConfig::new(Arc::new(client));
        client.transport_config(Arc::clone(transport));
        Ok(client)
    }

    pub(super) fn server(
        &self,
        transport: &Arc<TransportConfig>,
    ) -> Result<quinn::ServerConfig, String> {
        let server = self
            .identity
            .server_config(&self.pins)
            .map_err(|error| error.to_string())?;
        let server = QuicServerConfig::try_from(server).map_err(|error| error.to_string())?;
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(server));
        // A link is a cable: the partner's address on it does not change.
        server
            .transport_config(Arc::clone(transport))
            .migration(false);
        Ok(server)
    }
}

fn peer_fingerprint(connection: &Connection) -> Option<Fingerprint> {
    let certificates = connection
        .peer_identity()?
        .downcast::<Vec<CertificateDer<'static>>>()
        .ok()?;
    certificates.first().map(Fingerprint::of)
}
