//! The change of this host's key, carried out; what decides is [`crate::daemon::keys`].

use super::{Host, lock, refused};
use crate::api::links::{PartnerRotation, RotationState, RotationStatus};
use crate::api::types::ApiError;
use crate::daemon::control::ControlMsg;
use crate::daemon::keys::{KeyAction, KeyChange, KeyWord, PartnerKey};
use crate::daemon::partner::KeyMessage;
use crate::pool::HostName;
use std::sync::Arc;

impl Host {
    /// A session with a partner has come up.
    pub(super) fn key_session(self: &Arc<Self>, name: &HostName) {
        let mut keys = lock(&self.keys);
        let actions = keys.session_up(name);
        self.carry_out(&mut keys, actions);
    }

    /// A partner says something about keys.
    pub(super) fn key_message(self: &Arc<Self>, from: &HostName, message: KeyMessage) {
        match message {
            KeyMessage::Own(word) => self.repin(from, word),
            KeyMessage::Pinned(fingerprint) => {
                let mut keys = lock(&self.keys);
                let actions = keys.pinned(from, fingerprint);
                self.carry_out(&mut keys, actions);
            }
        }
    }

    /// A partner says which identities it shows: pin those, on disk first.
    fn repin(&self, from: &HostName, word: KeyWord) {
        let Some(partner) = self.partner(from) else {
            return;
        };
        let pinned = partner.repinned(word).and_then(|config| {
            if let Some(config) = config {
                self.store.put_link(&config).map_err(|e| e.to_string())?;
                partner.event(match &config.next_fingerprint {
                    Some(next) => format!("{from} changes its key: {next} is pinned as well"),
                    None => format!("{from} has the key {} alone", config.fingerprint),
                });
                partner.pin(config)?;
            }
            Ok(())
        });
        match (pinned, word) {
            (Ok(()), KeyWord::New { next, .. }) => partner.say(&ControlMsg::NewKeyPinned { next }),
            (Ok(()), KeyWord::Only { .. }) => {}
            (Err(reason), _) => {
                tracing::error!(partner = %from, "its new key is not pinned: {reason}");
                partner.event(format!("its new key is not pinned: {reason}"));
            }
        }
    }

    /// Do what was decided. `keys` is held all the while.
    pub(super) fn carry_out(self: &Arc<Self>, keys: &mut KeyChange, actions: Vec<KeyAction>) {
        let mut todo = std::collections::VecDeque::from(actions);
        while let Some(action) = todo.pop_front() {
            match action {
                KeyAction::Say(name, word) => {
                    let Some(partner) = self.partner(&name) else {
                        continue;
                    };
                    // An older build would only log that it does not understand.
                    if partner.interconnect.stats().version == 1 {
                        continue;
                    }
                    partner.say(&match word {
                        KeyWord::New { present, next } => ControlMsg::NewKey { present, next },
                        KeyWord::Only { present } => ControlMsg::OnlyKey { present },
                    });
                }
                KeyAction::Switch => match self.identity_dir.switch() {
                    Ok(identity) => {
                        let identity = Arc::new(identity);
                        tracing::info!("this host's key is {} now", identity.fingerprint());
                        *lock(&self.identity) = Arc::clone(&identity);
                        for partner in self.all_partners() {
                            partner.interconnect.set_identity(Arc::clone(&identity));
                        }
                        todo.extend(keys.switched());
                    }
                    Err(e) => tracing::error!("this host's key stays as it is: {e}"),
                },
                KeyAction::Redial(name) => self.redial(name),
            }
        }
    }

    /// Dial a partner's links anew; takes a while, so not here.
    fn redial(self: &Arc<Self>, name: HostName) {
        let host = Arc::clone(self);
        self.runtime.spawn_blocking(move || {
            let Some(partner) = host.partner(&name) else {
                return;
            };
            match partner.redial() {
                Ok(()) => {
                    let mut keys = lock(&host.keys);
                    let actions = keys.redialled(&name);
                    host.carry_out(&mut keys, actions);
                }
                // The partner keeps the old pin as well, which harms nothing, until the next
                // session tells it.
                Err(reason) => {
                    tracing::warn!(partner = %name, "{reason}");
                    partner.event(reason);
                }
            }
        });
    }

    fn connected(&self) -> Vec<HostName> {
        let partners = self.all_partners();
        let stands = |p: &&Arc<_>| -> bool {
            let p: &crate::daemon::partner::Partner = p;
            p.interconnect.session().is_some()
        };
        partners
            .iter()
            .filter(stands)
            .map(|p| p.name.clone())
            .collect()
    }

    /// How the change of this host's key stands.
    #[must_use]
    pub fn rotation(&self) -> RotationStatus {
        // Not while it is locked: whoever holds it asks for partners.
        let partners = self.all_partners();
        let keys = lock(&self.keys);
        let states: Vec<_> = keys.partners().map(|(n, s)| (n.clone(), s)).collect();
        let (present, next) = (keys.present(), keys.next());
        drop(keys);
        let redialling = states.iter().any(|(_, s)| *s == PartnerKey::Redialling);
        let step = |name: &HostName, state| -> String {
            let partner = partners.iter().find(|p| p.name == *name);
            let stats = partner.map(|p| p.interconnect.stats());
            let stands = stats.as_ref().is_some_and(|s| s.session.is_some());
            match state {
                PartnerKey::Settled => "nothing to do".into(),
                PartnerKey::Pinned => "has pinned the next key".into(),
                PartnerKey::Redialling => "links are dialled anew with the new key".into(),
                PartnerKey::Untold { .. } if !stands => format!(
                    "is not connected: the change waits for it; `pollux link remove {name}` if it is gone for good"
                ),
                PartnerKey::Untold { .. } if stats.is_some_and(|s| s.version == 1) => {
                    "runs an older pollux that cannot take another key: bring it to the same version, or remove its link".into()
                }
                PartnerKey::Untold { .. } => "was told, has not answered yet".into(),
            }
        };
        RotationStatus {
            state: match (next, redialling) {
                (Some(_), _) => RotationState::Telling,
                (None, true) => RotationState::Switched,
                (None, false) => RotationState::Idle,
            },
            present: present.to_string(),
            next: next.map(|f| f.to_string()),
            partners: states
                .iter()
                .map(|(name, state)| PartnerRotation {
                    partner: name.clone(),
                    done: matches!(state, PartnerKey::Settled | PartnerKey::Pinned),
                    step: step(name, *state),
                })
                .collect(),
        }
    }

    /// Begin to change this host's key; one that is under way counts.
    ///
    /// # Errors
    /// If no next identity can be made and kept.
    pub fn rotation_begin(self: &Arc<Self>) -> Result<RotationStatus, ApiError> {
        {
            let mut keys = lock(&self.keys);
            if keys.next().is_none() {
                let next = self.identity_dir.prepare_next().map_err(refused)?;
                tracing::info!("this host's key is to be {}", next.fingerprint());
                let connected = self.connected();
                let actions = keys.begin(next.fingerprint(), &connected);
                self.carry_out(&mut keys, actions);
            }
        }
        Ok(self.rotation())
    }

    /// Keep the present key after all.
    ///
    /// # Errors
    /// If none is to come, or its file cannot be removed.
    pub fn rotation_give_up(self: &Arc<Self>) -> Result<RotationStatus, ApiError> {
        {
            let mut keys = lock(&self.keys);
            if keys.next().is_none() {
                return Err(refused(
                    "no change of this host's key waits for anybody; `pollux link rotate` begins one",
                ));
            }
            self.identity_dir.abandon_next().map_err(refused)?;
            let connected = self.connected();
            let actions = keys.given_up(&connected);
            self.carry_out(&mut keys, actions);
        }
        Ok(self.rotation())
    }
}
