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

use super::super::format::{ENTRIES_MAX, Entries, FILE_BYTES_MAX};
use super::super::{Listing, Versioned};
use super::copy::{Change, ChangeSeq, Epoch, Origin, OwnCopy, Side, Standing};
use super::message::{Message, Refusal};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// Changes that wait for their turn: each client of a host has one under way, and a host has a
/// few. A partner that asks for more is not one of ours.
const WAITING_MAX: usize = 1024;
/// Bytes of an entry besides key and value, and of the file besides its entries, as the registry
/// file counts them.
const ENTRY_BYTES: usize = 2 + 8 + 4;
const FILE_BYTES: usize = 24 + 4;

/// A connection that was authenticated, by the order in which this host took them up.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SessionId(pub u64);

/// A client's call.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct CallId(pub u64);

/// An order to switch the partner off.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct OrderId(pub u64);

/// What is read.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Select {
    /// One key.
    Key(String),
    /// All keys that begin so.
    Prefix(String),
}

impl Select {
    fn takes(&self, key: &str) -> bool {
        match self {
            Self::Key(own) => own == key,
            Self::Prefix(prefix) => key.starts_with(prefix.as_str()),
        }
    }
}

/// What happened.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Input {
    /// A session with the partner began; whatever was there before has ended.
    Up(SessionId),
    /// It ended.
    Down(SessionId),
    /// A message came in it.
    Heard(SessionId, Message),
    /// A client reads.
    Read(CallId, Select),
    /// A client compares and sets.
    Change {
        /// Its call.
        call: CallId,
        /// The key, of 1 to `KEY_BYTES_MAX` bytes.
        key: String,
        /// The version it must be at.
        expected: Option<u64>,
        /// The value, at most `VALUE_BYTES_MAX` bytes.
        value: Vec<u8>,
    },
    /// A client waits no longer.
    GiveUp(CallId),
    /// The partner is silent, this host reaches the gateway, and a fence agent is there.
    Silent,
    /// What became of an order. `confirmed`: the agent, asked anew, said that the power is off.
    Fenced {
        /// Which.
        order: OrderId,
        /// Whether it is off for certain.
        confirmed: bool,
    },
    /// This life is to end.
    Leave,
}

/// Why there is no answer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum Why {
    /// Not live.
    #[error(
        "this host has not been in sync with its partner since it started; it answers when the partner is there, and not before"
    )]
    NotInSync,
    /// Live, and no session.
    #[error(
        "the partner does not answer, and a change needs both hosts until the partner's power is confirmed off"
    )]
    PartnerSilent,
    /// The session ended under it.
    #[error("the partner went away before it took part")]
    PartnerWent,
    /// A change of this key is in doubt.
    #[error("a change of it was under way when the partner went away, and may count or not")]
    InDoubt,
    /// In time.
    #[error("there was no answer in time")]
    Late,
    /// It does not fit.
    #[error("the registry is full ({ENTRIES_MAX} keys or {FILE_BYTES_MAX} bytes)")]
    Full,
    /// Too many at once.
    #[error("{WAITING_MAX} changes already wait")]
    Busy,
    /// It has said farewell.
    #[error("this host's daemon ends")]
    Left,
}

/// An answer to a client.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Answer {
    /// What was read.
    Found(Listing),
    /// Written.
    Won {
        /// The key's version.
        version: u64,
    },
    /// At another version.
    Lost(Option<Versioned<Vec<u8>>>),
    /// Nothing was written, and nothing will be.
    NotDone(Why),
    /// It may have been written, or may yet be.
    Unknown(Why),
}

/// Why a session cannot be.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum Fault {
    /// Both copies stand alone.
    #[error(
        "both hosts have changed the registry without the other; an older copy was put back, or a fence agent lied. Stop both daemons and remove the copy of the one whose changes are to be lost"
    )]
    BothAlone,
    /// The partner's stands alone while this host lived.
    #[error(
        "one host went on alone while the other was alive: a fence agent lied. Stop the daemon of the other and remove its copy"
    )]
    AloneBesideLive,
    /// They are not of one history.
    #[error(
        "the copies of the two hosts do not belong together (epochs {ours:?} and {theirs:?}): one was put back from an earlier day. Stop its daemon and remove it; see docs/registry.md"
    )]
    Epochs {
        /// Of this host.
        ours: Epoch,
        /// Of the partner.
        theirs: Epoch,
    },
    /// Of one history, and one lacks what it had acknowledged.
    #[error(
        "a host's copy lacks changes that it had acknowledged: its disk lost writes, or an older copy was put back. See docs/registry.md"
    )]
    Behind,
    /// One has none and the other may be stale.
    #[error(
        "one host's copy is gone, and it may have been the newer one; `pollux pool alone` on the host whose copy is right, if it is (docs/registry.md)"
    )]
    CopyGone,
    /// The partner says what it cannot say.
    #[error("the partner does not keep to the protocol: {0}")]
    Protocol(&'static str),
}

/// What is to be done, in this order.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Output {
    /// Make this the durable copy. If that fails the life is over.
    Store(OwnCopy),
    /// Send it in the session; lost if the session is.
    Send(SessionId, Message),
    /// Tell the client.
    Answer(CallId, Answer),
    /// Switch the partner off, and make certain of it.
    Fence(OrderId),
    /// End the session.
    Hang(SessionId, Fault),
    /// End every connection there is, taken up or not: they are of a life that has ended.
    HangAll,
}

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

/// How this session's copies come together, as this side does it.
enum Part {
    Source(Epoch),
    Sink,
    Resume,
    Refuse(Fault),
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

    fn read(&mut self, call: CallId, select: Select) {
        match self.look(&select) {
            Ok(found) => self.answer(call, Answer::Found(found)),
            Err(Why::InDoubt) => self.parked.push((call, select)),
            Err(why) => self.answer(call, Answer::NotDone(why)),
        }
    }

    fn ask(&mut self, asked: Asked) {
        let why = if self.left {
            Why::Left
        } else if !self.live {
            Why::NotInSync
        } else if self.waiting.len() >= WAITING_MAX {
            Why::Busy
        } else {
            self.waiting.push_back(asked);
            self.advance();
            return;
        };
        if let Asker::Here(call) = asked.asker {
            self.answer(call, Answer::NotDone(why));
        }
    }

    fn give_up(&mut self, call: CallId) {
        let asked = |asked: &Asked| asked.asker == Asker::Here(call);
        if let Some(at) = self.parked.iter().position(|(parked, _)| *parked == call) {
            self.parked.swap_remove(at);
            self.answer(call, Answer::NotDone(Why::InDoubt));
        } else if let Some(at) = self.waiting.iter().position(asked) {
            self.waiting.remove(at);
            self.answer(call, Answer::NotDone(Why::Late));
        } else if let Some((number, _)) = self.sent.iter().find(|(_, sent)| **sent == call) {
            let number = *number;
            self.sent.remove(&number);
            self.answer(call, Answer::Unknown(Why::Late));
        } else if let Some(proposal) = self.proposal.take_if(|p| p.call == Some(call)) {
            match proposal.stage {
                Stage::Probing => {
                    self.answer(call, Answer::NotDone(Why::Late));
                    self.advance();
                }
                Stage::Sent => {
                    self.answer(call, Answer::Unknown(Why::Late));
                    self.proposal = Some(Proposal {
                        call: None,
                        ..proposal
                    });
                }
            }
        }
    }

    /// A doubt has ended.
    fn unpark(&mut self) {
        for (call, select) in std::mem::take(&mut self.parked) {
            self.read(call, select);
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

    /// What the change would be; or why not.
    fn judge(&self, asked: &Asked) -> Result<Change, Refusal> {
        let found = self.copy.entries.get(&asked.key);
        if found.map(|entry| entry.version) != asked.expected {
            return Err(Refusal::Lost(found.cloned()));
        }
        if !fits(&self.copy.entries, &asked.key, &asked.value) {
            return Err(Refusal::Full);
        }
        let origin = match asked.asker {
            Asker::Here(_) => Origin {
                side: self.side,
                life: self.life,
                number: self.numbers,
            },
            Asker::Partner { number, life } => Origin {
                side: self.side.other(),
                life,
                number,
            },
        };
        Ok(Change {
            seq: ChangeSeq(self.copy.seq.0 + 1),
            origin,
            key: asked.key.clone(),
            version: asked.expected.unwrap_or(0) + 1,
            value: asked.value.clone(),
        })
    }

    fn refuse(&mut self, asker: Asker, why: Refusal) {
        match (asker, why) {
            (Asker::Here(call), Refusal::Lost(found)) => self.answer(call, Answer::Lost(found)),
            (Asker::Here(call), Refusal::Full) => self.answer(call, Answer::NotDone(Why::Full)),
            (Asker::Partner { number, .. }, why) => self.send(Message::Refused { number, why }),
        }
    }

    /// Go on with what waits, as far as it can.
    fn advance(&mut self) {
        while !self.waiting.is_empty() && self.proposal.is_none() {
            let holds_back = matches!(self.phase(), Some(Phase::Sourcing(_)))
                && !self.bad(Sabotage::ChangesWhileCopying);
            let alone = self.copy.standing == Standing::Alone;
            if alone && holds_back {
                return;
            }
            let Some(asked) = self.waiting.pop_front() else {
                return;
            };
            if alone {
                self.change_alone(asked);
            } else if !self.is_linked() {
                if let Asker::Here(call) = asked.asker {
                    self.answer(call, Answer::NotDone(Why::PartnerSilent));
                }
            } else if self.side == Side::Lower {
                self.propose(asked);
            } else {
                self.request(asked);
            }
        }
    }

    fn change_alone(&mut self, asked: Asked) {
        match self.judge(&asked) {
            Err(why) => self.refuse(asked.asker, why),
            Ok(change) => {
                self.commit(&change);
                if let Asker::Here(call) = asked.asker {
                    let version = change.version;
                    self.answer(call, Answer::Won { version });
                }
            }
        }
    }

    fn request(&mut self, asked: Asked) {
        if let Asker::Here(call) = asked.asker {
            self.numbers += 1;
            self.sent.insert(self.numbers, call);
            self.send(Message::Request {
                number: self.numbers,
                life: self.life,
                key: asked.key,
                expected: asked.expected,
                value: asked.value,
            });
        }
    }

    fn propose(&mut self, asked: Asked) {
        self.numbers += 1;
        match self.judge(&asked) {
            Err(why) => self.refuse(asked.asker, why),
            Ok(change) => {
                let call = match asked.asker {
                    Asker::Here(call) => Some(call),
                    Asker::Partner { .. } => None,
                };
                self.proposal = Some(Proposal {
                    change,
                    call,
                    stage: Stage::Probing,
                });
                self.send(Message::Probe);
            }
        }
    }

    /// The change counts; make it durable here.
    fn commit(&mut self, change: &Change) {
        self.copy.apply(change);
        self.copy.prepared = None;
        self.out.push(Output::Store(self.copy.clone()));
        self.unpark();
    }

    /// What the client of a committed change waits for.
    fn won(&mut self, change: &Change) {
        let version = change.version;
        let origin = change.origin;
        if let Some(proposal) = self.proposal.take_if(|p| p.change.origin == origin) {
            if let Some(call) = proposal.call {
                self.answer(call, Answer::Won { version });
            }
        } else if (origin.side, origin.life) == (self.side, self.life)
            && let Some(call) = self.sent.remove(&origin.number)
        {
            self.answer(call, Answer::Won { version });
        }
    }

    /// What was proposed and is not held by the partner will never be.
    fn drop_proposal(&mut self) {
        if let Some(call) = self.proposal.take().and_then(|proposal| proposal.call) {
            self.answer(call, Answer::NotDone(Why::PartnerWent));
        }
    }

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

    /// Whatever was under way in the session has no future; what may be held by both has.
    fn session_ended(&mut self) {
        self.session = None;
        self.waiting
            .retain(|asked| matches!(asked.asker, Asker::Here(_)));
        if self
            .proposal
            .as_ref()
            .is_some_and(|p| p.stage == Stage::Probing)
        {
            self.drop_proposal();
        }
        let held = self.copy.prepared.as_ref().map(|change| change.origin);
        let (side, life) = (self.side, self.life);
        let is_held = |number: u64| held == Some(Origin { side, life, number });
        let gone: Vec<CallId> = self
            .sent
            .extract_if(.., |number, _| !is_held(*number))
            .map(|(_, call)| call)
            .collect();
        for call in gone {
            self.answer(call, Answer::NotDone(Why::PartnerWent));
        }
        // A proposal in doubt holds up what waits; without a session that is refused as well.
        for asked in std::mem::take(&mut self.waiting) {
            if self.copy.standing == Standing::Alone {
                self.change_alone(asked);
            } else if let Asker::Here(call) = asked.asker {
                self.answer(call, Answer::NotDone(Why::PartnerSilent));
            }
        }
    }

    fn heard(&mut self, message: Message) {
        let Some(phase) = self.phase() else {
            return;
        };
        match (message, phase, self.side) {
            (
                Message::Hello {
                    standing,
                    epoch,
                    seq,
                    live,
                    prepared,
                },
                Phase::Greeting,
                _,
            ) => {
                let theirs = Theirs {
                    standing,
                    epoch,
                    seq,
                    live,
                    prepared,
                };
                self.come_together(&theirs);
            }
            (Message::Farewell, ..) => {
                if self.live && self.copy.standing == Standing::Paired {
                    self.go_alone();
                } else {
                    self.session_ended();
                }
            }
            (
                Message::Copy {
                    epoch,
                    seq,
                    entries,
                },
                Phase::Sinking(false),
                _,
            ) => {
                self.copy = OwnCopy {
                    standing: Standing::Joining,
                    epoch,
                    seq,
                    entries,
                    prepared: None,
                };
                self.live |= self.bad(Sabotage::LiveWhenHeld);
                self.become_phase(Phase::Sinking(true));
                self.out.push(Output::Store(self.copy.clone()));
                self.send(Message::Held);
            }
            (Message::Held, Phase::Sourcing(epoch), _) => {
                if (self.copy.standing, self.copy.epoch) != (Standing::Paired, epoch) {
                    (self.copy.standing, self.copy.epoch) = (Standing::Paired, epoch);
                    self.out.push(Output::Store(self.copy.clone()));
                }
                self.send(Message::InSync);
                self.link();
            }
            (Message::InSync, Phase::Sinking(true), _) => {
                self.copy.standing = Standing::Paired;
                self.out.push(Output::Store(self.copy.clone()));
                self.link();
            }
            (Message::Resume { seq }, Phase::Resuming, Side::Higher) => self.resume(seq),
            (Message::Probe, Phase::Linked, _) => self.send(Message::Present),
            (Message::Present, Phase::Linked, Side::Lower) => self.present(),
            (
                Message::Request {
                    number,
                    life,
                    key,
                    expected,
                    value,
                },
                Phase::Linked,
                Side::Lower,
            ) => {
                if self.waiting.len() >= WAITING_MAX {
                    self.hang(Fault::Protocol("it asks for too many changes at once"));
                } else {
                    let asker = Asker::Partner { number, life };
                    self.ask(Asked {
                        asker,
                        key,
                        expected,
                        value,
                    });
                }
            }
            (Message::Refused { number, why }, Phase::Linked, Side::Higher) => {
                if let Some(call) = self.sent.remove(&number) {
                    self.refuse(Asker::Here(call), why);
                }
            }
            (Message::Prepare(change), Phase::Linked, Side::Higher) => self.prepare(change),
            (Message::Prepared { seq }, Phase::Linked, Side::Lower) => self.prepared(seq),
            (Message::Commit { seq }, Phase::Linked, Side::Higher) => {
                match self.copy.prepared.take_if(|change| change.seq == seq) {
                    Some(change) => {
                        self.commit(&change);
                        self.won(&change);
                    }
                    None => self.hang(Fault::Protocol("it commits what was not prepared")),
                }
            }
            _ => self.hang(Fault::Protocol("a message that has no place here")),
        }
    }

    /// In sync: from here on both count.
    fn link(&mut self) {
        self.live = true;
        if !self.bad(Sabotage::OrderOutlives) {
            self.order = None;
        }
        self.become_phase(Phase::Linked);
        self.unpark();
        self.advance();
    }

    fn present(&mut self) {
        if let Some(proposal) = &mut self.proposal
            && proposal.stage == Stage::Probing
        {
            proposal.stage = Stage::Sent;
            let change = proposal.change.clone();
            self.send(Message::Prepare(change.clone()));
            if self.bad(Sabotage::CommitEarly) {
                self.commit(&change);
            }
        }
    }

    fn prepare(&mut self, change: Change) {
        let found = self.copy.entries.get(&change.key);
        let follows = found.map_or(0, |entry| entry.version).checked_add(1);
        if self.copy.prepared.is_some()
            || change.seq.0 != self.copy.seq.0 + 1
            || Some(change.version) != follows
        {
            self.hang(Fault::Protocol("it prepares what cannot be next"));
            return;
        }
        let seq = change.seq;
        self.copy.prepared = Some(change);
        self.out.push(Output::Store(self.copy.clone()));
        self.send(Message::Prepared { seq });
    }

    fn prepared(&mut self, seq: ChangeSeq) {
        let held = |p: &mut Proposal| p.stage == Stage::Sent && p.change.seq == seq;
        let Some(proposal) = self.proposal.take_if(held) else {
            self.hang(Fault::Protocol("it holds what was not sent"));
            return;
        };
        self.commit(&proposal.change);
        self.send(Message::Commit { seq });
        if let Some(call) = proposal.call {
            let version = proposal.change.version;
            self.answer(call, Answer::Won { version });
        }
        self.advance();
    }

    fn resume(&mut self, seq: ChangeSeq) {
        if let Some(change) = self.copy.prepared.take_if(|change| change.seq == seq) {
            self.commit(&change);
            self.won(&change);
        }
        if self.copy.seq != seq || self.copy.prepared.is_some() {
            self.hang(Fault::Protocol("it resumes where this host is not"));
            return;
        }
        self.link();
    }

    // --- coming together ---------------------------------------------------------------------

    fn part(&self, theirs: &Theirs) -> Part {
        use Standing::{Alone, Joining, New, Paired};
        let (ours_epoch, theirs_epoch) = (self.copy.epoch, theirs.epoch);
        let epochs = Fault::Epochs {
            ours: ours_epoch,
            theirs: theirs_epoch,
        };
        let counts = |standing| match standing {
            Joining if self.bad(Sabotage::JoiningCounts) => Paired,
            other => other,
        };
        let lower = self.side == Side::Lower;
        let (lower_seq, higher_seq) = match self.side {
            Side::Lower => (self.copy.seq, theirs.seq),
            Side::Higher => (theirs.seq, self.copy.seq),
        };
        let both = [self.copy.standing, theirs.standing];
        if both == [Paired; 2]
            && ours_epoch == theirs_epoch
            && (lower_seq.0.abs_diff(higher_seq.0) > 1
                || (self.live && theirs.live && higher_seq > lower_seq))
        {
            return Part::Refuse(Fault::Behind);
        }
        match (counts(self.copy.standing), counts(theirs.standing)) {
            (Alone, Alone) => Part::Refuse(Fault::BothAlone),
            (Alone, _) if theirs.live => Part::Refuse(Fault::AloneBesideLive),
            (_, Alone) if self.live => Part::Refuse(Fault::AloneBesideLive),
            (Alone, _) => Part::Source(Epoch(ours_epoch.0 + 1)),
            (_, Alone) => Part::Sink,
            _ if self.live && theirs.live => {
                if ours_epoch == theirs_epoch {
                    Part::Resume
                } else {
                    Part::Refuse(epochs)
                }
            }
            // The live one cannot have been outlived: whatever the other holds, it is no newer.
            (_, standing) if self.live => {
                if standing == Paired && theirs_epoch > ours_epoch {
                    Part::Refuse(epochs)
                } else {
                    Part::Source(ours_epoch)
                }
            }
            (standing, _) if theirs.live => {
                if standing == Paired && ours_epoch > theirs_epoch {
                    Part::Refuse(epochs)
                } else {
                    Part::Sink
                }
            }
            (Paired, Paired) if ours_epoch != theirs_epoch => Part::Refuse(epochs),
            // The lower side's, unless the higher one has settled a doubt without it.
            (Paired, Paired) if lower == (lower_seq >= higher_seq) => Part::Source(ours_epoch),
            (Paired, Paired) => Part::Sink,
            (Paired, Joining) if theirs_epoch <= ours_epoch => Part::Source(ours_epoch),
            (Joining, Paired) if ours_epoch <= theirs_epoch => Part::Sink,
            (Paired, Joining) | (Joining, Paired) => Part::Refuse(epochs),
            // The first time; a host that joined at the first time had nothing yet.
            (New, New) if lower => Part::Source(Epoch(1)),
            (New, New) => Part::Sink,
            (New, Joining) if lower && theirs_epoch == Epoch(1) => Part::Source(Epoch(1)),
            (Joining, New) if !lower && ours_epoch == Epoch(1) => Part::Sink,
            _ => Part::Refuse(Fault::CopyGone),
        }
    }

    fn come_together(&mut self, theirs: &Theirs) {
        match self.part(theirs) {
            Part::Refuse(fault) => self.hang(fault),
            Part::Sink => self.become_phase(Phase::Sinking(false)),
            Part::Source(epoch) => {
                self.settle(theirs);
                self.become_phase(Phase::Sourcing(epoch));
                self.send(Message::Copy {
                    epoch,
                    seq: self.copy.seq,
                    entries: self.copy.entries.clone(),
                });
            }
            Part::Resume => match self.side {
                Side::Higher => self.become_phase(Phase::Resuming),
                Side::Lower => {
                    self.settle(theirs);
                    self.send(Message::Resume { seq: self.copy.seq });
                    self.link();
                }
            },
        }
    }

    /// End a doubt before anything else is decided: what the higher side holds prepared counts.
    fn settle(&mut self, theirs: &Theirs) {
        let prepared = match self.side {
            // Of an alone host's partner it is stale.
            Side::Lower if self.copy.standing == Standing::Paired => theirs.prepared.clone(),
            Side::Lower => None,
            Side::Higher => self.copy.prepared.clone(),
        };
        let next = self.copy.seq.0 + 1;
        let same = theirs.epoch == self.copy.epoch || self.side == Side::Higher;
        let prepared = prepared.filter(|change| change.seq.0 == next && same);
        if let Some(change) = prepared.filter(|_| !self.bad(Sabotage::NoAdoption)) {
            self.commit(&change);
            self.won(&change);
        }
        self.drop_proposal();
    }

    fn go_alone(&mut self) {
        self.out.push(Output::HangAll);
        self.session_ended();
        let prepared = self.copy.prepared.take();
        let prepared = prepared.filter(|_| !self.bad(Sabotage::AloneForgets));
        if let Some(change) = &prepared {
            self.copy.apply(change);
        }
        self.copy.standing = Standing::Alone;
        self.copy.epoch = Epoch(self.copy.epoch.0 + 1);
        self.live |= self.bad(Sabotage::StaleAlone);
        self.out.push(Output::Store(self.copy.clone()));
        if let Some(change) = &prepared {
            self.won(change);
        }
        self.drop_proposal();
        self.order = None;
        self.unpark();
        self.advance();
    }
}

/// What the partner's hello said.
struct Theirs {
    standing: Standing,
    epoch: Epoch,
    seq: ChangeSeq,
    live: bool,
    prepared: Option<Change>,
}

/// Whether the entries with this one more are still a registry.
fn fits(entries: &Entries, key: &str, value: &[u8]) -> bool {
    let bytes = |key: &str, value: &[u8]| ENTRY_BYTES + key.len() + value.len();
    let others = entries.iter().filter(|(other, _)| *other != key);
    let (count, sum) = others.fold((0, 0), |(count, sum), (key, entry)| {
        (count + 1, sum + bytes(key, &entry.value))
    });
    count < ENTRIES_MAX && FILE_BYTES + sum + bytes(key, value) <= FILE_BYTES_MAX
}
