//! The change of a host's key while its partners stay connected. Pure: decides, does nothing.
//!
//! ```text
//!   the host that changes its key                      each partner
//!
//!   Idle
//!    | begin: next identity made and kept
//!    v
//!   Telling --- NewKey { present, next } ------------> pins {present, next}, durably
//!    |     <-- NewKeyPinned { next } ----------------- and says so
//!    | all partners have pinned it
//!    v
//!   switch: next becomes the present identity (one rename), then every link is dialled
//!    |      anew with it, one after the other
//!    v
//!   Idle  ----- OnlyKey { present } -----------------> pins {present}
//! ```
//!
//! Invariant **pinned**: the identity a host has on its disk as the present one is among
//! those its partner has pinned on its own disk, whatever has crashed at whatever moment.
//! It holds because a partner changes its pins to exactly what the host says of itself,
//! and the host says `present` of what is on its disk, always; `next` becomes that only
//! after all partners have it. Nothing but the two identity files has to survive a crash of
//! the host: with a next identity it is in Telling, without in Idle, and whoever connects is
//! told again.
//!
//! A partner that is away holds up the change for as long as it is away; it could not
//! connect afterwards. Who does not want to wait for it removes its link.

use crate::pool::HostName;
use interconnect::identity::Fingerprint;
use std::collections::BTreeMap;

/// What a host says of its own key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyWord {
    /// It shows `present`, and is going to show `next`.
    New {
        /// In use.
        present: Fingerprint,
        /// To come.
        next: Fingerprint,
    },
    /// It shows this one and no other.
    Only {
        /// In use.
        present: Fingerprint,
    },
}

/// What a partner has pinned of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pins {
    /// The one in use, as far as known.
    pub present: Fingerprint,
    /// The one to come.
    pub next: Option<Fingerprint>,
}

impl Pins {
    /// Whether a host with this identity is let in.
    #[must_use]
    pub fn accept(&self, fingerprint: Fingerprint) -> bool {
        self.present == fingerprint || self.next == Some(fingerprint)
    }

    /// All of them, the one in use first.
    #[must_use]
    pub fn all(&self) -> Vec<Fingerprint> {
        [Some(self.present), self.next]
            .into_iter()
            .flatten()
            .collect()
    }

    /// What to pin after the host said `word` over a connection these pins let in. `None`
    /// if it speaks of a present identity that was never pinned: nothing is changed then.
    #[must_use]
    pub fn after(&self, word: KeyWord) -> Option<Self> {
        let after = match word {
            KeyWord::New { present, next } => Self {
                present,
                next: Some(next).filter(|next| *next != present),
            },
            KeyWord::Only { present } => Self {
                present,
                next: None,
            },
        };
        self.accept(after.present).then_some(after)
    }
}

/// What the host has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyAction {
    /// Say this to that partner.
    Say(HostName, KeyWord),
    /// Make the next identity the present one, on disk and for new connections, and call
    /// [`KeyChange::switched`].
    Switch,
    /// Dial every link to that partner anew, one after the other, and call
    /// [`KeyChange::redialled`].
    Redial(HostName),
}

/// How far one partner is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PartnerKey {
    /// Nothing is wanted of it.
    Settled,
    /// It is to pin the next identity; `told` if it was asked and has not answered.
    Untold {
        /// Whether it was asked in the session that stands.
        told: bool,
    },
    /// It has pinned the next identity.
    Pinned,
    /// Its links are to stand with the new identity before the old one is forgotten.
    Redialling,
}

/// A host's own key and how its partners stand to it.
#[derive(Debug, Clone)]
pub struct KeyChange {
    present: Fingerprint,
    next: Option<Fingerprint>,
    partners: BTreeMap<HostName, PartnerKey>,
}

impl KeyChange {
    /// After a start, from what is on disk.
    #[must_use]
    pub const fn new(present: Fingerprint, next: Option<Fingerprint>) -> Self {
        Self {
            present,
            next,
            partners: BTreeMap::new(),
        }
    }

    /// The identity in use.
    #[must_use]
    pub const fn present(&self) -> Fingerprint {
        self.present
    }

    /// The one to come.
    #[must_use]
    pub const fn next(&self) -> Option<Fingerprint> {
        self.next
    }

    /// Partners and how far each is.
    pub fn partners(&self) -> impl Iterator<Item = (&HostName, PartnerKey)> {
        self.partners.iter().map(|(name, state)| (name, *state))
    }

    /// A partner is pinned here now.
    pub fn partner_added(&mut self, name: HostName) {
        let state = self.fresh();
        self.partners.insert(name, state);
    }

    /// A partner is not pinned here any more: nobody waits for it.
    #[must_use]
    pub fn partner_removed(&mut self, name: &HostName) -> Vec<KeyAction> {
        self.partners.remove(name);
        self.when_all_pinned()
    }

    const fn fresh(&self) -> PartnerKey {
        match self.next {
            Some(_) => PartnerKey::Untold { told: false },
            None => PartnerKey::Settled,
        }
    }

    /// The next identity is made and kept; tells the partners in `connected`.
    #[must_use]
    pub fn begin(&mut self, next: Fingerprint, connected: &[HostName]) -> Vec<KeyAction> {
        self.next = Some(next);
        for state in self.partners.values_mut() {
            *state = PartnerKey::Untold { told: false };
        }
        let mut actions: Vec<_> = connected.iter().flat_map(|n| self.session_up(n)).collect();
        // Without a partner there is nobody to wait for.
        actions.extend(self.when_all_pinned());
        actions
    }

    /// The next identity is gone from the disk again.
    #[must_use]
    pub fn given_up(&mut self, connected: &[HostName]) -> Vec<KeyAction> {
        self.next = None;
        for state in self.partners.values_mut() {
            *state = PartnerKey::Settled;
        }
        connected.iter().flat_map(|n| self.session_up(n)).collect()
    }

    /// A session with this partner has come up: what it was told in an older one may be lost,
    /// and it may have been set up anew.
    #[must_use]
    pub fn session_up(&mut self, name: &HostName) -> Vec<KeyAction> {
        let Some(state) = self.partners.get_mut(name) else {
            return Vec::new();
        };
        let present = self.present;
        let word = match self.next {
            Some(next) => {
                *state = PartnerKey::Untold { told: true };
                KeyWord::New { present, next }
            }
            // Dialled anew as a whole: with the identity in use.
            None => {
                *state = PartnerKey::Settled;
                KeyWord::Only { present }
            }
        };
        vec![KeyAction::Say(name.clone(), word)]
    }

    /// A partner says that it has pinned `fingerprint`.
    #[must_use]
    pub fn pinned(&mut self, name: &HostName, fingerprint: Fingerprint) -> Vec<KeyAction> {
        if self.next != Some(fingerprint) {
            return Vec::new();
        }
        match self.partners.get_mut(name) {
            Some(state @ PartnerKey::Untold { .. }) => *state = PartnerKey::Pinned,
            _ => return Vec::new(),
        }
        self.when_all_pinned()
    }

    fn when_all_pinned(&self) -> Vec<KeyAction> {
        let all = self.partners.values().all(|s| *s == PartnerKey::Pinned);
        match self.next {
            Some(_) if all => vec![KeyAction::Switch],
            _ => Vec::new(),
        }
    }

    /// The next identity is the present one on disk and for new connections.
    #[must_use]
    pub fn switched(&mut self) -> Vec<KeyAction> {
        let Some(next) = self.next.take() else {
            return Vec::new();
        };
        self.present = next;
        self.partners
            .iter_mut()
            .map(|(name, state)| {
                *state = PartnerKey::Redialling;
                KeyAction::Redial(name.clone())
            })
            .collect()
    }

    /// All links to a partner stand with the present identity.
    #[must_use]
    pub fn redialled(&mut self, name: &HostName) -> Vec<KeyAction> {
        match self.partners.get_mut(name) {
            Some(state @ PartnerKey::Redialling) => *state = PartnerKey::Settled,
            _ => return Vec::new(),
        }
        let present = self.present;
        vec![KeyAction::Say(name.clone(), KeyWord::Only { present })]
    }
}

#[cfg(test)]
mod tests;
