//! A change, from the client that asks for it to the answer; and reads that wait for one.

use super::{
    Answer, Asked, Asker, CallId, Core, ENTRY_BYTES, FILE_BYTES, Output, Phase, Proposal, Sabotage,
    Select, Stage, WAITING_MAX, Why,
};
use crate::registry::format::{ENTRIES_MAX, Entries, FILE_BYTES_MAX};
use crate::registry::pair::copy::{Change, ChangeSeq, Origin, Side, Standing};
use crate::registry::pair::message::{Message, Refusal};

impl Core {
    pub(super) fn read(&mut self, call: CallId, select: Select) {
        match self.look(&select) {
            Ok(found) => self.answer(call, Answer::Found(found)),
            Err(Why::InDoubt) => self.parked.push((call, select)),
            Err(why) => self.answer(call, Answer::NotDone(why)),
        }
    }

    pub(super) fn ask(&mut self, asked: Asked) {
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

    pub(super) fn give_up(&mut self, call: CallId) {
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
    pub(super) fn unpark(&mut self) {
        for (call, select) in std::mem::take(&mut self.parked) {
            self.read(call, select);
        }
    }

    /// What the change would be; or why not.
    pub(super) fn judge(&self, asked: &Asked) -> Result<Change, Refusal> {
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

    pub(super) fn refuse(&mut self, asker: Asker, why: Refusal) {
        match (asker, why) {
            (Asker::Here(call), Refusal::Lost(found)) => self.answer(call, Answer::Lost(found)),
            (Asker::Here(call), Refusal::Full) => self.answer(call, Answer::NotDone(Why::Full)),
            (Asker::Partner { number, .. }, why) => self.send(Message::Refused { number, why }),
        }
    }

    /// Go on with what waits, as far as it can.
    pub(super) fn advance(&mut self) {
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

    pub(super) fn change_alone(&mut self, asked: Asked) {
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

    pub(super) fn request(&mut self, asked: Asked) {
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

    pub(super) fn propose(&mut self, asked: Asked) {
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
    pub(super) fn commit(&mut self, change: &Change) {
        self.copy.apply(change);
        self.copy.prepared = None;
        self.out.push(Output::Store(self.copy.clone()));
        self.unpark();
    }

    /// What the client of a committed change waits for.
    pub(super) fn won(&mut self, change: &Change) {
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
    pub(super) fn drop_proposal(&mut self) {
        if let Some(call) = self.proposal.take().and_then(|proposal| proposal.call) {
            self.answer(call, Answer::NotDone(Why::PartnerWent));
        }
    }
}

/// Whether the entries with this one more are still a registry.
pub(super) fn fits(entries: &Entries, key: &str, value: &[u8]) -> bool {
    let bytes = |key: &str, value: &[u8]| ENTRY_BYTES + key.len() + value.len();
    let others = entries.iter().filter(|(other, _)| *other != key);
    let (count, sum) = others.fold((0, 0), |(count, sum), (key, entry)| {
        (count + 1, sum + bytes(key, &entry.value))
    });
    count < ENTRIES_MAX && FILE_BYTES + sum + bytes(key, value) <= FILE_BYTES_MAX
}
