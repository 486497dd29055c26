//! One host of the pair as a state machine without sockets, clocks, threads or files: inputs in,
//! outputs to be carried out **in their order**, each durable before the next.
//!
//! # Who serves
//! A host is **live** if it has been in sync with its partner in this life, or its copy stands
//! durably alone. Only a live host answers reads, fences, or goes alone. Once live it stays so
//! until its life ends, whatever becomes of the session.
//!
//! ```text
//!                        hello, hello
//!          .-------------------+----------------------------.
//!   one live or better copy    |                       both live
//!          |                   |                            |
//!   Sourcing --copy--> Sinking (Joining, durable)      lower: Resume --> higher
//!   (Paired,  <--held---'                                   |
//!    durable) --in sync--> (Paired, durable)                |
//!          `-------------------+----------------------------'
//!                              v
//!                           Linked      changes go through both
//!                              | session lost: changes are refused, reads go on
//!                              | farewell, or power confirmed off
//!                              v
//!                  Alone (epoch + 1, durable)
//! ```
//!
//! # A change
//! The lower side puts changes in order, one at a time: probe, present, prepare, prepared
//! (durable), then it commits (durable), answers, and tells the higher side, which commits. So
//! **what counts is what the lower side has committed**, and each such change is held durably by
//! both. The higher side holds it in doubt between prepared and commit: reads of that key wait
//! and others go on (linearizability is local to a key: Herlihy and Wing 1990, section 3.2).
//! When the session is lost in between, both keep what they have, and the next session begins
//! with the lower side adopting what the higher one has prepared.
//!
//! A request of the higher side whose session ended and which it does not hold prepared is not
//! done for certain: the lower side commits nothing that the higher one has not acknowledged
//! holding, forgets requests with their session, and the higher side takes nothing of a session
//! that ended.
//!
//! # Alone
//! A live host goes alone when its partner's life has ended for certain: power confirmed off by
//! an order given after the partner fell silent and not revoked by a session that came up since,
//! or the partner's farewell. Nobody else serves then: the partner's next life is not live. The
//! higher side takes a prepared change in (the lower one may have committed it); the lower side
//! drops one that it only proposed, for the partner's copy, where it may be held, is stale now
//! and will be overwritten. Both cannot go alone: to be live each would have had to outlive the
//! other.
//!
//! # Every crash on the way back
//! An alone host A (epoch e) takes its partner B back:
//! 1. A sends its copy and holds its own changes back. Crash of either, or the session lost: A
//!    is alone at e; B has what it had, or is Joining, and is not live. It begins again.
//! 2. B holds the copy as **Joining**, durably. The same: a Joining copy is never a source.
//! 3. A becomes Paired at e + 1, durably. From here A changes nothing by itself. Crash of A: A is
//!    Paired, B Joining and not live: A is the source of the next session. Crash of B: A is live
//!    and may go alone again.
//! 4. A says that B is in sync; B becomes **Paired**, durably, and live. Lost before that: B is
//!    Joining, as in 3. After that: both Paired at e + 1, as after any crash.
//!
//! Two that are Paired and not live differ by at most one change. The higher side holds it
//! prepared: the lower side adopts it and is the source. Only the lower side has it: likewise. Only
//! the higher side has it, as it settled its doubt when the lower one came back without a life,
//! and the session was lost: then the higher side is the source.
//!
//! A copy that is gone (New beside Paired, nobody live) is refused: the lost one may have been
//! alone and newer. Only an operator can say.
//!
//! Must never: answer a read of a change that may not count; let a Joining or New copy serve;
//! take a message of an ended session; go alone without being live.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::super::{Listing, Versioned};
use super::copy::{Change, Epoch, OwnCopy, Side, Standing};
use super::message::Message;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

mod changing;
mod io;
mod meeting;

pub use io::{Answer, CallId, Fault, Input, OrderId, Output, Select, SessionId, Why};

/// Changes that wait for their turn: each client of a host has one under way, and a host has a
/// few. A partner that asks for more is not one of ours.
const WAITING_MAX: usize = 1024;
/// Bytes of an entry besides key and value, and of the file besides its entries, as the registry
/// file counts them.
const ENTRY_BYTES: usize = 2 + 8 + 4;
const FILE_BYTES: usize = 24 + 4;

/// Where a session is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Phase {
    /// Hello is sent, and not yet heard.
    Greeting,
    /// The copy is sent, and not yet held by the partner.
    Sourcing(Epoch),
    /// The copy is awaited, or held (`true`).
    Sinking(bool),
    /// Both are live, and the lower side says from where on.
    Resuming,
    /// In sync.
    Linked,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Session {
    id: SessionId,
    phase: Phase,
}

/// Who asks for a change.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Asker {
    Here(CallId),
    Partner { number: u64, life: u64 },
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Asked {
    asker: Asker,
    key: String,
    expected: Option<u64>,
    value: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Stage {
    /// The partner is asked whether it is there; nothing is sent yet.
    Probing,
    /// It may be held by the partner.
    Sent,
}

/// The change that the lower side has under way.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Proposal {
    change: Change,
    call: Option<CallId>,
    stage: Stage,
}

/// Rules left out on purpose, to see the model check find it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) enum Sabotage {
    #[default]
    None,
    /// An order that failed counts.
    AloneUnconfirmed,
    /// A prepared change is read.
    ReadPrepared,
    /// A host that is not live fences.
    StaleAlone,
    /// A paired copy is live from the start.
    #[cfg(test)]
    LiveAtStart,
    /// The lower side commits before the higher one holds it.
    CommitEarly,
    /// The copied side is live before it is told that it counts.
    LiveWhenHeld,
    /// The lower side does not adopt what is prepared.
    NoAdoption,
    /// Going alone, the higher side drops what is prepared.
    AloneForgets,
    /// An order outlives the session that came up since.
    OrderOutlives,
    /// An alone host goes on changing while its copy is on the way.
    ChangesWhileCopying,
    /// A joining copy counts as a paired one.
    JoiningCounts,
    /// Messages of an ended session are taken.
    OldSession,
}

/// The machine.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Core {
    side: Side,
    life: u64,
    copy: OwnCopy,
    live: bool,
    left: bool,
    session: Option<Session>,
    /// Lower: all that wait for their turn. Higher: those not yet sent.
    waiting: VecDeque<Asked>,
    /// Higher: requests under way, by number.
    sent: BTreeMap<u64, CallId>,
    proposal: Option<Proposal>,
    /// Reads that wait for a doubt to end.
    parked: Vec<(CallId, Select)>,
    numbers: u64,
    order: Option<OrderId>,
    orders: u64,
    out: Vec<Output>,
    #[cfg(test)]
    pub(super) sabotage: Sabotage,
}

impl Core {
    /// A life begins with the copy that is durable. `life` is no other life's.
    #[must_use]
    pub fn new(side: Side, life: u64, copy: OwnCopy) -> Self {
        Self {
            side,
            life,
            live: copy.standing == Standing::Alone,
            copy,
            left: false,
            session: None,
            waiting: VecDeque::new(),
            sent: BTreeMap::new(),
            proposal: None,
            parked: Vec::new(),
            numbers: 0,
            order: None,
            orders: 0,
            out: Vec::new(),
            #[cfg(test)]
            sabotage: Sabotage::None,
        }
    }

    #[cfg(test)]
    pub(super) fn sabotaged(mut self, sabotage: Sabotage) -> Self {
        self.sabotage = sabotage;
        self.live |= sabotage == Sabotage::LiveAtStart && self.copy.standing == Standing::Paired;
        self
    }

    #[cfg(test)]
    fn bad(&self, sabotage: Sabotage) -> bool {
        self.sabotage == sabotage
    }

    #[cfg(not(test))]
    #[expect(clippy::unused_self, reason = "in a test it is asked")]
    const fn bad(&self, _: Sabotage) -> bool {
        false
    }

    /// What it holds.
    #[must_use]
    pub const fn copy(&self) -> &OwnCopy {
        &self.copy
    }

    /// Whether it answers reads.
    #[must_use]
    pub const fn is_live(&self) -> bool {
        self.live
    }

    /// Whether changes go through both hosts now.
    #[must_use]
    pub fn is_linked(&self) -> bool {
        self.phase() == Some(Phase::Linked)
    }

    /// The order that still counts.
    #[must_use]
    pub const fn order(&self) -> Option<OrderId> {
        self.order
    }

    fn phase(&self) -> Option<Phase> {
        self.session.map(|session| session.phase)
    }

    /// Something happened; what is to be done, in this order.
    pub fn handle(&mut self, input: Input) -> Vec<Output> {
        match input {
            Input::Read(call, select) => self.read(call, select),
            Input::Change {
                call,
                key,
                expected,
                value,
            } => self.ask(Asked {
                asker: Asker::Here(call),
                key,
                expected,
                value,
            }),
            Input::GiveUp(call) => self.give_up(call),
            _ if self.left => {}
            Input::Up(id) => {
                self.session_ended();
                self.session = Some(Session {
                    id,
                    phase: Phase::Greeting,
                });
                self.send(Message::Hello {
                    standing: self.copy.standing,
                    epoch: self.copy.epoch,
                    seq: self.copy.seq,
                    live: self.live,
                    prepared: self.copy.prepared.clone(),
                });
            }
            Input::Down(id) => {
                if self.session.is_some_and(|session| session.id == id) {
                    self.session_ended();
                }
            }
            Input::Heard(id, message) => {
                let now = self.session.map(|session| session.id);
                if now == Some(id) || (self.bad(Sabotage::OldSession) && now.is_some()) {
                    self.heard(message);
                }
            }
            Input::Silent => {
                let may = (self.live || self.bad(Sabotage::StaleAlone))
                    && self.copy.standing == Standing::Paired;
                if may && !self.is_linked() && self.order.is_none() {
                    self.orders += 1;
                    self.order = Some(OrderId(self.orders));
                    self.out.push(Output::Fence(OrderId(self.orders)));
                }
            }
            Input::Fenced { order, confirmed } => {
                if self.order == Some(order) {
                    self.order = None;
                    if confirmed || self.bad(Sabotage::AloneUnconfirmed) {
                        self.go_alone();
                    }
                }
            }
            Input::Leave => self.leave(),
        }
        std::mem::take(&mut self.out)
    }

    // --- clients -----------------------------------------------------------------------------

    fn answer(&mut self, call: CallId, answer: Answer) {
        self.out.push(Output::Answer(call, answer));
    }

    fn select(&self, select: &Select) -> Listing {
        let mut seen = self.copy.entries.clone();
        if let (true, Some(change)) = (self.bad(Sabotage::ReadPrepared), &self.copy.prepared) {
            let entry = Versioned {
                version: change.version,
                value: change.value.clone(),
            };
            Arc::make_mut(&mut seen).insert(change.key.clone(), entry);
        }
        let found = |(key, entry): (&String, &Versioned<Vec<u8>>)| (key.clone(), entry.clone());
        match select {
            Select::Key(key) => seen.get_key_value(key).map(found).into_iter().collect(),
            Select::Prefix(_) => seen
                .iter()
                .filter(|(key, _)| select.takes(key))
                .map(found)
                .collect(),
        }
    }

    /// What a client would read now, if it can be told at once.
    ///
    /// # Errors
    /// Why not; [`Why::InDoubt`] may pass.
    pub fn look(&self, select: &Select) -> Result<Listing, Why> {
        let in_doubt = self
            .copy
            .prepared
            .as_ref()
            .is_some_and(|change| select.takes(&change.key));
        if self.left {
            Err(Why::Left)
        } else if !self.live {
            Err(Why::NotInSync)
        } else if in_doubt && !self.bad(Sabotage::ReadPrepared) {
            Err(Why::InDoubt)
        } else {
            Ok(self.select(select))
        }
    }

    fn leave(&mut self) {
        self.left = true;
        for (call, _) in std::mem::take(&mut self.parked) {
            self.answer(call, Answer::NotDone(Why::Left));
        }
        for asked in std::mem::take(&mut self.waiting) {
            if let Asker::Here(call) = asked.asker {
                self.answer(call, Answer::NotDone(Why::Left));
            }
        }
        for (_, call) in std::mem::take(&mut self.sent) {
            self.answer(call, Answer::Unknown(Why::Left));
        }
        if let Some(call) = self.proposal.take().and_then(|proposal| proposal.call) {
            self.answer(call, Answer::Unknown(Why::Left));
        }
        self.live = false;
        self.order = None;
        self.send(Message::Farewell);
    }

    // --- changes -----------------------------------------------------------------------------

    // --- the session -------------------------------------------------------------------------

    fn send(&mut self, message: Message) {
        if let Some(session) = self.session {
            self.out.push(Output::Send(session.id, message));
        }
    }

    fn become_phase(&mut self, phase: Phase) {
        if let Some(session) = &mut self.session {
            session.phase = phase;
        }
    }

    fn hang(&mut self, fault: Fault) {
        if let Some(session) = self.session {
            self.out.push(Output::Hang(session.id, fault));
            self.session_ended();
        }
    }

    // --- coming together ---------------------------------------------------------------------
}
