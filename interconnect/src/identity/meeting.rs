//! Two hosts that do not know each other yet meet on a link and get a code to compare.
//!
//! The side with the lower address dials, the other accepts, both for as long as the
//! person who started the meeting has patience. TLS proves that each has the key to the
//! certificate it shows and trusts nobody; what makes it safe is the code ([`super::code`])
//! that two people compare. Nothing is pinned here.
//!
//! What this must never do: start a second exchange once the own nonce is out.

use super::code::{Code, Exchange, MESSAGE_FIXED_BYTES, MeetingError, Message, Nonce, Party};
use super::pins::Judge;
use super::{ALPN_MEETING, Fingerprint, Identity};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{Connection, ConnectionError, Endpoint, RecvStream, SendStream, VarInt};
use rustls::pki_types::CertificateDer;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// Between two attempts of the side that dials: soon for a person.
const REDIAL: Duration = Duration::from_millis(250);
/// Time for one handshake and exchange on a private link.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(2);
/// Close code: the exchange is over and good.
const CODE_DONE: u32 = 0;
/// Close code: it is over and bad; the reason says why.
const CODE_FAILED: u32 = 1;
/// RFC 8446, 6.2: the TLS alert of a peer that does not speak the protocol asked for
/// (RFC 9001, 4.8: as a QUIC error 0x100 higher).
const NO_APPLICATION_PROTOCOL: u64 = 0x100 + 120;

/// What a meeting needs to know.
#[derive(Clone, Debug)]
pub struct Meeting {
    /// This host's identity.
    pub identity: Arc<Identity>,
    /// This host's name.
    pub me: String,
    /// Address and port of this host on the link, not the unspecified one.
    pub local: SocketAddr,
    /// Address and port of the partner on the link.
    pub peer: SocketAddr,
}

/// Whom this host met.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Met {
    /// What it says its name is.
    pub name: String,
    /// Of the certificate it showed.
    pub fingerprint: Fingerprint,
    /// To be compared by people.
    pub code: Code,
}

/// Why nobody was met.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MeetError {
    /// The addresses cannot be used to meet.
    #[error(
        "cannot meet between {local} and {peer}: give two different addresses, this host's own on the link first"
    )]
    Addresses {
        /// This host's.
        local: SocketAddr,
        /// The partner's.
        peer: SocketAddr,
    },
    /// The local address cannot be used.
    #[error(
        "cannot bind {addr}: {source}: give an address of this host on the link that no other pair uses"
    )]
    Bind {
        /// The address.
        addr: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// TLS or QUIC could not be set up.
    #[error("cannot set up TLS: {0}")]
    Tls(String),
    /// The exchange ended badly when it counted already: start again on both hosts.
    #[error("the meeting broke off: {0}; start it again on both hosts, and compare the new codes")]
    Broken(String),
    /// The exchange itself failed.
    #[error(transparent)]
    Exchange(#[from] MeetingError),
}

/// What became of one attempt.
enum Attempt {
    /// Over for good.
    Over(Result<Met, MeetError>),
    /// Nothing was given away: another attempt may be made.
    Again(String),
}

impl Meeting {
    /// Meet; waits for the partner without end (drop it to give up). `waiting` is told why
    /// nobody was met so far.
    ///
    /// # Errors
    /// [`MeetError`]; the meeting is over then and a person has to start another.
    pub async fn meet(&self, waiting: impl Fn(String)) -> Result<Met, MeetError> {
        let (local, peer) = (self.local, self.peer);
        let order = (local.ip(), local.port()).cmp(&(peer.ip(), peer.port()));
        let unspecified = local.ip().is_unspecified() || peer.ip().is_unspecified();
        if order.is_eq() || unspecified || local.is_ipv4() != peer.is_ipv4() {
            return Err(MeetError::Addresses { local, peer });
        }
        let (endpoint, client) = self.endpoint()?;
        let met = if order.is_lt() {
            self.dial(&endpoint, &client, waiting).await
        } else {
            self.accept(&endpoint, waiting).await
        };
        endpoint.close(VarInt::from_u32(CODE_DONE), b"the meeting is over");
        // The last words must reach the partner, and the address must be free again.
        let _ = tokio::time::timeout(EXCHANGE_TIMEOUT, endpoint.wait_idle()).await;
        met
    }

    fn endpoint(&self) -> Result<(Endpoint, quinn::ClientConfig), MeetError> {
        let tls = |error: &dyn std::fmt::Display| MeetError::Tls(error.to_string());
        let mut transport = quinn::TransportConfig::default();
        transport
            .max_concurrent_uni_streams(VarInt::from_u32(0))
            .max_concurrent_bidi_streams(VarInt::from_u32(1))
            .max_idle_timeout(quinn::IdleTimeout::try_from(EXCHANGE_TIMEOUT).ok())
            .datagram_receive_buffer_size(None);
        let transport = Arc::new(transport);
        let server = self
            .identity
            .server(Judge::anybody(), ALPN_MEETING)
            .map_err(|e| tls(&e))?;
        let server = QuicServerConfig::try_from(server).map_err(|e| tls(&e))?;
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(server));
        server
            .transport_config(Arc::clone(&transport))
            .migration(false)
            .max_incoming(1);
        let client = self
            .identity
            .client(Judge::anybody(), ALPN_MEETING)
            .map_err(|e| tls(&e))?;
        let client = QuicClientConfig::try_from(client).map_err(|e| tls(&e))?;
        let mut client = quinn::ClientConfig::new(Arc::new(client));
        client.transport_config(transport);
        let endpoint = Endpoint::server(server, self.local).map_err(|source| MeetError::Bind {
            addr: self.local,
            source,
        })?;
        Ok((endpoint, client))
    }

    async fn dial(
        &self,
        endpoint: &Endpoint,
        client: &quinn::ClientConfig,
        waiting: impl Fn(String),
    ) -> Result<Met, MeetError> {
        loop {
            let connecting = endpoint.connect_with(client.clone(), self.peer, "pollux");
            let attempt = match connecting {
                Err(error) => Attempt::Again(error.to_string()),
                Ok(connecting) => match tokio::time::timeout(EXCHANGE_TIMEOUT, connecting).await {
                    Err(_) => Attempt::Again(format!("{} does not answer", self.peer)),
                    Ok(Err(error)) => Attempt::Again(explain(&error)),
                    Ok(Ok(connection)) => self.talk(connection, true).await,
                },
            };
            match attempt {
                Attempt::Over(end) => return end,
                Attempt::Again(reason) => waiting(reason),
            }
            tokio::time::sleep(REDIAL).await;
        }
    }

    async fn accept(
        &self,
        endpoint: &Endpoint,
        waiting: impl Fn(String),
    ) -> Result<Met, MeetError> {
        waiting(format!("{} has not called yet", self.peer));
        while let Some(incoming) = endpoint.accept().await {
            if incoming.remote_address().ip() != self.peer.ip() {
                incoming.ignore();
                continue;
            }
            let attempt =
                match tokio::time::timeout(EXCHANGE_TIMEOUT, async { incoming.await }).await {
                    Err(_) => Attempt::Again(format!("{} did not finish its handshake", self.peer)),
                    Ok(Err(error)) => Attempt::Again(explain(&error)),
                    Ok(Ok(connection)) => self.talk(connection, false).await,
                };
            match attempt {
                Attempt::Over(end) => return end,
                Attempt::Again(reason) => waiting(reason),
            }
        }
        Err(MeetError::Broken("the endpoint closed".to_owned()))
    }

    /// One exchange on a connection.
    async fn talk(&self, connection: Connection, dials: bool) -> Attempt {
        let me = Party {
            fingerprint: self.identity.fingerprint(),
            name: self.me.clone(),
        };
        let exchange = shown(&connection)
            .ok_or(MeetingError::Message("no certificate"))
            .and_then(|peer| Exchange::new(dials, me, peer, Nonce::random()?));
        let mut exchange = match exchange {
            Ok(exchange) => exchange,
            Err(error) => return Attempt::Over(Err(self.end(&connection, error.into()))),
        };
        let talked = tokio::time::timeout(
            EXCHANGE_TIMEOUT,
            exchange_on(&connection, dials, &mut exchange),
        )
        .await
        .unwrap_or_else(|_| Err(MeetError::Broken("the partner fell silent".to_owned())));
        match talked {
            Ok((peer, code)) => Attempt::Over(Ok(Met {
                name: peer.name,
                fingerprint: peer.fingerprint,
                code,
            })),
            Err(MeetError::Broken(reason)) if !exchange.counts() => Attempt::Again(reason),
            Err(error) => Attempt::Over(Err(self.end(&connection, error))),
        }
    }

    /// Tell the partner why.
    fn end(&self, connection: &Connection, error: MeetError) -> MeetError {
        connection.close(VarInt::from_u32(CODE_FAILED), error.to_string().as_bytes());
        error
    }
}

async fn exchange_on(
    connection: &Connection,
    dials: bool,
    exchange: &mut Exchange,
) -> Result<(Party, Code), MeetError> {
    let broken = |error: ConnectionError| MeetError::Broken(explain(&error));
    let (mut send, mut receive) = if dials {
        connection.open_bi().await.map_err(broken)?
    } else {
        connection.accept_bi().await.map_err(broken)?
    };
    if let Some(message) = exchange.begin() {
        write(&mut send, &message, connection).await?;
    }
    loop {
        let message = read(&mut receive, connection).await?;
        let progress = exchange.handle(message)?;
        if let Some(message) = progress.send {
            write(&mut send, &message, connection).await?;
        }
        let Some(met) = progress.code else { continue };
        if dials {
            // The acceptor ends the connection when it has checked what was revealed.
            return match connection.closed().await {
                ConnectionError::ApplicationClosed(close)
                    if close.error_code == VarInt::from_u32(CODE_DONE) =>
                {
                    Ok(met)
                }
                other => Err(broken(other)),
            };
        }
        connection.close(VarInt::from_u32(CODE_DONE), b"met");
        return Ok(met);
    }
}

/// The identity the peer showed and proved to have.
fn shown(connection: &Connection) -> Option<Fingerprint> {
    let identity = connection.peer_identity()?;
    let chain = identity.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    chain.first().map(Fingerprint::of)
}

/// Why a stream broke is known to its connection.
fn broken_stream(connection: &Connection, error: &dyn std::fmt::Display) -> MeetError {
    MeetError::Broken(
        connection
            .close_reason()
            .map_or_else(|| error.to_string(), |reason| explain(&reason)),
    )
}

async fn write(
    stream: &mut SendStream,
    message: &Message,
    connection: &Connection,
) -> Result<(), MeetError> {
    stream
        .write_all(&message.to_bytes())
        .await
        .map_err(|error| broken_stream(connection, &error))
}

async fn read(stream: &mut RecvStream, connection: &Connection) -> Result<Message, MeetError> {
    let mut fixed = [0; MESSAGE_FIXED_BYTES];
    stream
        .read_exact(&mut fixed)
        .await
        .map_err(|error| broken_stream(connection, &error))?;
    let mut name = vec![0; Message::name_bytes(&fixed)?];
    stream
        .read_exact(&mut name)
        .await
        .map_err(|error| broken_stream(connection, &error))?;
    Ok(Message::parse(&fixed, &name)?)
}

fn explain(error: &ConnectionError) -> String {
    let code = match error {
        ConnectionError::TransportError(e) => u64::from(e.code),
        ConnectionError::ConnectionClosed(e) => u64::from(e.error_code),
        ConnectionError::ApplicationClosed(e) if !e.reason.is_empty() => {
            return String::from_utf8_lossy(&e.reason).into_owned();
        }
        _ => 0,
    };
    if code == NO_APPLICATION_PROTOCOL {
        return "the host at that address has pinned its partner already and waits for nobody: run `pollux link remove` there, or give this command the address of another".to_owned();
    }
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;
    use std::sync::Mutex;

    fn free_addr() -> SocketAddr {
        UdpSocket::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
    }

    fn pair() -> (Meeting, Meeting) {
        let (a, b) = (free_addr(), free_addr());
        let side = |me: &str, local, peer| Meeting {
            identity: Arc::new(Identity::generate().unwrap()),
            me: me.to_owned(),
            local,
            peer,
        };
        (side("castor", a, b), side("pollux", b, a))
    }

    fn run<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap()
            .block_on(work)
    }

    #[test]
    fn two_hosts_meet_and_have_one_code() {
        let (a, b) = pair();
        let (at_a, at_b) = run(async { tokio::join!(a.meet(|_| ()), b.meet(|_| ())) });
        let (at_a, at_b) = (at_a.unwrap(), at_b.unwrap());
        assert_eq!(at_a.code, at_b.code);
        assert_eq!(
            (at_a.name.as_str(), at_b.name.as_str()),
            ("pollux", "castor")
        );
        assert_eq!(at_a.fingerprint, b.identity.fingerprint());
        assert_eq!(at_b.fingerprint, a.identity.fingerprint());
    }

    #[test]
    fn addresses_that_cannot_meet_are_refused() {
        let (mut a, _) = pair();
        a.peer = a.local;
        assert!(matches!(
            run(a.meet(|_| ())),
            Err(MeetError::Addresses { .. })
        ));
        a.local = "0.0.0.0:7443".parse().unwrap();
        assert!(matches!(
            run(a.meet(|_| ())),
            Err(MeetError::Addresses { .. })
        ));
    }

    /// Somebody who breaks off once the acceptor's nonce is out gets no second one.
    #[test]
    fn breaking_off_after_the_answer_ends_the_meeting() {
        let (a, b) = pair();
        let (dialler, acceptor) = if (a.local.ip(), a.local.port()) < (b.local.ip(), b.local.port())
        {
            (a, b)
        } else {
            (b, a)
        };
        let end = run(async {
            let breaks_off = async {
                let (endpoint, client) = dialler.endpoint().unwrap();
                // Breaking off before anything was said costs nothing.
                for talk in [false, true] {
                    let connection = endpoint
                        .connect_with(client.clone(), acceptor.local, "pollux")
                        .unwrap()
                        .await
                        .unwrap();
                    let peer = shown(&connection).unwrap();
                    let me = Party {
                        fingerprint: dialler.identity.fingerprint(),
                        name: "castor".to_owned(),
                    };
                    let mut exchange =
                        Exchange::new(true, me, peer, Nonce::random().unwrap()).unwrap();
                    let (mut send, mut receive) = connection.open_bi().await.unwrap();
                    if talk {
                        let commit = exchange.begin().unwrap();
                        write(&mut send, &commit, &connection).await.unwrap();
                        read(&mut receive, &connection).await.unwrap();
                    }
                    connection.close(VarInt::from_u32(CODE_FAILED), b"changed my mind");
                }
                endpoint.wait_idle().await;
            };
            let told = Mutex::new(Vec::new());
            let (end, ()) = tokio::join!(
                acceptor.meet(|reason| told.lock().unwrap().push(reason)),
                breaks_off
            );
            assert!(
                told.lock().unwrap().iter().any(|r| r == "changed my mind"),
                "the first one cost nothing"
            );
            end
        });
        let error = end.unwrap_err().to_string();
        assert!(
            error.contains("changed my mind") && error.contains("compare the new codes"),
            "{error}"
        );
    }
}
