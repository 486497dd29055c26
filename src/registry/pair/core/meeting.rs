//! How the two come together, stay so, and part.

use super::{
    Answer, Asked, Asker, CallId, Core, Fault, Output, Phase, Proposal, Sabotage, Stage,
    WAITING_MAX, Why,
};
use crate::registry::pair::copy::{Change, ChangeSeq, Epoch, Origin, OwnCopy, Side, Standing};
use crate::registry::pair::message::Message;

/// How this session's copies come together, as this side does it.
pub(super) enum Part {
    Source(Epoch),
    Sink,
    Resume,
    Refuse(Fault),
}

/// What the partner's hello said.
pub(super) struct Theirs {
    standing: Standing,
    epoch: Epoch,
    seq: ChangeSeq,
    live: bool,
    prepared: Option<Change>,
}

impl Core {
    /// Whatever was under way in the session has no future; what may be held by both has.
    pub(super) fn session_ended(&mut self) {
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

    pub(super) fn heard(&mut self, message: Message) {
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
    pub(super) fn link(&mut self) {
        self.live = true;
        if !self.bad(Sabotage::OrderOutlives) {
            self.order = None;
        }
        self.become_phase(Phase::Linked);
        self.unpark();
        self.advance();
    }

    pub(super) fn present(&mut self) {
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

    pub(super) fn prepare(&mut self, change: Change) {
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

    pub(super) fn prepared(&mut self, seq: ChangeSeq) {
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

    pub(super) fn resume(&mut self, seq: ChangeSeq) {
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

    pub(super) fn part(&self, theirs: &Theirs) -> Part {
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

    pub(super) fn come_together(&mut self, theirs: &Theirs) {
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
    pub(super) fn settle(&mut self, theirs: &Theirs) {
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

    pub(super) fn go_alone(&mut self) {
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
