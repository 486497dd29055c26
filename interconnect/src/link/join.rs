//! To which session a connection belongs: the Join exchange of protocol version 2.
//!
//! ```text
//!  dialler                             acceptor
//!    New(nonce)     ───────────────▶   nonce never seen: the old session is over, a new one
//!                   ◀───────────────   Joined
//!    Resume(nonce)  ───────────────▶   the session that stands: one more connection of it
//!                   ◀───────────────   Joined, or Unknown: the dialler's session is over
//! ```
//!
//! A session is between two running processes: one that restarts knows no nonce, so what it
//! has lost is never taken for what the other still holds. Only one `New` is on its way at a
//! time, and `Resume` only follows its answer; so both sides always mean the same process.

use super::event::Hello;
use super::keeper::{ESTABLISH_TIMEOUT, Failed, Shared};
use super::member::Joined;
use super::outgoing::Member;
use super::plain::{CODE_DONE, CODE_LINK, CODE_PROTOCOL, Established, heartbeat_key};
use super::session::{Founding, Session};
use crate::lane::wire::{FEATURES, JOIN_BYTES, Join, JoinKind};
use crate::lane::{LANE_WINDOW_BYTES, LinkIndex};
use quinn::{Connection, RecvStream, SendStream, VarInt};
use ring::rand::SecureRandom;
use std::collections::VecDeque;
use std::sync::Arc;

/// Nonces of former sessions that are remembered, so that an old `New` starts nothing.
const SPENT_MAX: usize = 64;

/// The session that connections join.
#[derive(Default)]
pub(super) struct Association {
    session: Option<Arc<Session>>,
    spent: VecDeque<[u8; 16]>,
}

impl Association {
    /// The session, if it is not over.
    fn standing(&self) -> Option<Arc<Session>> {
        self.session.clone().filter(|session| !session.is_over())
    }

    /// End the session, if there is one.
    pub(super) fn end(&mut self, reason: &str) {
        if let Some(session) = self.session.take() {
            session.end(CODE_DONE, reason);
        }
    }

    fn found(&mut self, session: Arc<Session>) {
        self.spent.push_back(session.nonce);
        while self.spent.len() > SPENT_MAX {
            self.spent.pop_front();
        }
        self.end("replaced by a newer session");
        self.session = Some(session);
    }
}

fn broken(reason: impl ToString) -> Failed {
    Failed::Broken(reason.to_string())
}

fn link_index(link: usize) -> LinkIndex {
    LinkIndex(u8::try_from(link).unwrap_or(u8::MAX))
}

async fn write(send: &mut SendStream, join: &Join) -> Result<(), Failed> {
    send.write_all(&join.encode()).await.map_err(broken)
}

async fn read(receive: &mut RecvStream) -> Result<Join, Failed> {
    let mut bytes = [0; JOIN_BYTES];
    receive.read_exact(&mut bytes).await.map_err(broken)?;
    Join::parse(&bytes).map_err(broken)
}

fn own(kind: JoinKind, link: usize, nonce: [u8; 16]) -> Join {
    Join {
        kind,
        link: link_index(link),
        nonce,
        window_bytes: LANE_WINDOW_BYTES,
        features: FEATURES,
    }
}

/// The connection does not become one of a session: say why and end it.
fn close(connection: &Connection, code: u32, reason: String) -> Failed {
    connection.close(VarInt::from_u32(code), reason.as_bytes());
    Failed::Broken(reason)
}

impl Shared {
    fn session_of(
        self: &Arc<Self>,
        nonce: [u8; 16],
        hello: Hello,
        connection: &Connection,
        dialled: bool,
        window_bytes: u64,
    ) -> Result<Arc<Session>, Failed> {
        let key = heartbeat_key(connection, dialled)
            .map_err(|reason| close(connection, CODE_PROTOCOL, reason))?;
        Ok(Session::found(
            self,
            Founding {
                id: self.next_session(),
                nonce,
                peer: hello,
                key,
                window_bytes,
            },
        ))
    }

    fn joined_as(&self, established: Established) -> Joined {
        let Established {
            connection,
            link,
            send,
            receive,
            ..
        } = established;
        Joined {
            member: Member::new(link_index(link), self.next_connection(), connection),
            send,
            receive,
        }
    }

    /// As the side that dialled: join the session that stands, or start one.
    pub(super) async fn join(self: &Arc<Self>, mut established: Established) -> Result<(), Failed> {
        let connection = established.connection.clone();
        let link = established.link;
        let mut association = self.association.lock().await;
        if let Some(session) = association.standing() {
            drop(association);
            write(
                &mut established.send,
                &own(JoinKind::Resume, link, session.nonce),
            )
            .await?;
            let answer = read(&mut established.receive).await;
            let answer = answer.map_err(|failed| joining_failed(&connection, failed))?;
            if answer.kind == JoinKind::Unknown {
                let reason = "the partner knows nothing of the session: it was started anew";
                session.end(CODE_PROTOCOL, reason);
                return Err(close(&connection, CODE_LINK, reason.to_owned()));
            }
            if (answer.kind, answer.nonce) != (JoinKind::Joined, session.nonce) {
                let reason = "the partner's answer to a Join makes no sense".to_owned();
                return Err(close(&connection, CODE_PROTOCOL, reason));
            }
            if established.hello.version != session.version() {
                let reason = "the partner changed its version within a session".to_owned();
                return Err(close(&connection, CODE_PROTOCOL, reason));
            }
            session.join(self.joined_as(established));
            return Ok(());
        }
        let mut nonce = [0; 16];
        ring::rand::SystemRandom::new()
            .fill(&mut nonce)
            .map_err(|_| broken("the system gave no random bytes for a session"))?;
        write(&mut established.send, &own(JoinKind::New, link, nonce)).await?;
        let answer = read(&mut established.receive).await;
        let answer = answer.map_err(|failed| joining_failed(&connection, failed))?;
        if (answer.kind, answer.nonce) != (JoinKind::Joined, nonce) {
            let reason = "the partner's answer to a Join makes no sense".to_owned();
            return Err(close(&connection, CODE_PROTOCOL, reason));
        }
        let hello = established.hello.clone();
        let session = self.session_of(nonce, hello, &connection, true, answer.window_bytes)?;
        session.join(self.joined_as(established));
        association.found(session);
        Ok(())
    }

    /// As the side that accepted: do what the Join asks.
    pub(super) async fn joined(
        self: &Arc<Self>,
        mut established: Established,
    ) -> Result<(), Failed> {
        let connection = established.connection.clone();
        let link = established.link;
        let join = match read(&mut established.receive).await {
            Ok(join) => join,
            Err(failed) => return Err(joining_failed(&connection, failed)),
        };
        let mut association = self.association.lock().await;
        match join.kind {
            JoinKind::Resume => {
                let session = association
                    .standing()
                    .filter(|session| session.nonce == join.nonce);
                drop(association);
                let Some(session) = session else {
                    let answer = own(JoinKind::Unknown, link, join.nonce);
                    write(&mut established.send, &answer).await?;
                    // The dialler closes when it has read it; closing first could overtake it.
                    let _ = tokio::time::timeout(ESTABLISH_TIMEOUT, connection.closed()).await;
                    return Ok(());
                };
                write(
                    &mut established.send,
                    &own(JoinKind::Joined, link, join.nonce),
                )
                .await?;
                session.join(self.joined_as(established));
                Ok(())
            }
            JoinKind::New if association.spent.contains(&join.nonce) => {
                let reason = "a Join wants to start a session that was before".to_owned();
                Err(close(&connection, CODE_PROTOCOL, reason))
            }
            JoinKind::New => {
                if let Some(old) = self.current() {
                    old.close(CODE_DONE, "replaced by a newer session");
                }
                write(
                    &mut established.send,
                    &own(JoinKind::Joined, link, join.nonce),
                )
                .await?;
                let hello = established.hello.clone();
                let (nonce, window) = (join.nonce, join.window_bytes);
                let session = self.session_of(nonce, hello, &connection, false, window)?;
                session.join(self.joined_as(established));
                association.found(session);
                Ok(())
            }
            JoinKind::Invalid | JoinKind::Joined | JoinKind::Unknown => {
                let reason = format!(
                    "a Join of the kind {:?} from the side that dials",
                    join.kind
                );
                Err(close(&connection, CODE_PROTOCOL, reason))
            }
        }
    }
}

/// Why no Join came: the connection's own reason says more than its stream.
fn joining_failed(connection: &Connection, failed: Failed) -> Failed {
    if let Some(error) = connection.close_reason() {
        return Failed::from(error);
    }
    let (Failed::Broken(reason) | Failed::Refused(reason)) = failed;
    close(connection, CODE_PROTOCOL, reason)
}
