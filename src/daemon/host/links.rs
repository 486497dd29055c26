//! What a host does with its partners when the operator asks: pin, show, test, forget.

use super::{Host, lock, refused};
use crate::api::links::{PairStatus, TestRequest, TestStatus, VmEncoding};
use crate::api::types::{ApiError, Done, LinkConfig, Role, VmStatus};
use crate::daemon::keys::KeyAction;
use crate::daemon::linktest::{LinkTest, MirroredNow};
use crate::daemon::partner::{Hooks, Partner, PartnerSetup};
use crate::pool::HostName;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How long the removal of a link waits for its sockets: ten times what a connection in the
/// middle of its handshake takes to be given up on a busy host.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

impl Host {
    /// The pinned links.
    #[must_use]
    pub fn links(&self) -> Vec<LinkConfig> {
        self.all_partners().iter().map(|p| p.config()).collect()
    }

    pub(super) fn all_partners(&self) -> Vec<Arc<Partner>> {
        lock(&self.partners).values().cloned().collect()
    }

    pub(super) fn partner(&self, name: &HostName) -> Option<Arc<Partner>> {
        lock(&self.partners).get(name).cloned()
    }

    /// The partner an operator named.
    fn find_partner(&self, name: &str) -> Result<Arc<Partner>, ApiError> {
        let name = HostName::new(name).map_err(refused)?;
        self.partner(&name).ok_or_else(|| {
            let known: Vec<_> = self
                .all_partners()
                .iter()
                .map(|p| p.name.to_string())
                .collect();
            refused(if known.is_empty() {
                format!(
                    "host {} has no link to {name}, nor to any other; make one with `pollux link create`",
                    self.env.config.name
                )
            } else {
                format!(
                    "host {} has no link to {name}; it has links to: {}",
                    self.env.config.name,
                    known.join(", ")
                )
            })
        })
    }

    /// VMs mirrored with that partner, on either side.
    fn mirrored_with(&self, partner: &HostName) -> Vec<VmStatus> {
        let mut vms = self.status().vms;
        vms.retain(|vm| vm.role != Role::Stopped && vm.partner.as_ref() == Some(partner));
        vms
    }

    /// All about the interconnect with one partner.
    ///
    /// # Errors
    /// If there is no such partner.
    pub fn pair_status(&self, name: &str) -> Result<PairStatus, ApiError> {
        let partner = self.find_partner(name)?;
        let encoding = self
            .mirrored_with(&partner.name)
            .into_iter()
            .filter_map(|vm| {
                Some(VmEncoding {
                    vm: vm.name,
                    figures: vm.epochs?.encoding?,
                })
            })
            .collect();
        Ok(partner.pair_status(encoding))
    }

    /// Why this host may not be pinned, if so.
    pub(super) fn check_new_partner(&self, name: &HostName) -> Result<(), ApiError> {
        if *name == self.env.config.name {
            return Err(refused("a host cannot be its own partner"));
        }
        if self.partner(name).is_some() {
            return Err(refused(format!(
                "a link to {name} is pinned already; `pollux link remove {name}` first"
            )));
        }
        Ok(())
    }

    /// Pin a partner and connect to it.
    ///
    /// # Errors
    /// If it is pinned already, or an address cannot be used.
    pub fn link_create(self: &Arc<Self>, link: LinkConfig) -> Result<Done, ApiError> {
        self.check_new_partner(&link.partner)?;
        self.connect(link.clone()).map_err(refused)?;
        if let Err(e) = self.store.put_link(&link) {
            // What would not survive a restart is not there now either.
            self.disconnect(&link.partner);
            return Err(refused(e));
        }
        Ok(Done::default())
    }

    /// Forget a partner.
    ///
    /// # Errors
    /// If it is not known, or a VM is mirrored with it.
    pub fn link_remove(self: &Arc<Self>, partner: &str) -> Result<Done, ApiError> {
        let name = self.find_partner(partner)?.name.clone();
        if let Some(vm) = self.mirrored_with(&name).into_iter().next() {
            return Err(refused(format!(
                "VM `{}` is mirrored with {name}; `pollux vm unprotect {}` first",
                vm.name, vm.name
            )));
        }
        self.store.delete_link(&name).map_err(refused)?;
        self.disconnect(&name);
        Ok(Done::default())
    }

    fn disconnect(self: &Arc<Self>, name: &HostName) {
        lock(&self.env.peers).remove(name);
        let removed = lock(&self.partners).remove(name);
        if let Some(partner) = removed {
            // An operator who is told that the link is gone may pin the partner again at once.
            let closed = partner.close();
            let closed = async { tokio::time::timeout(CLOSE_PATIENCE, closed).await };
            if self.runtime.block_on(closed).is_err() {
                tracing::warn!(partner = %name, "the sockets of a removed link are still open");
            }
        }
        lock(&self.tests).remove(name);
        let mut keys = lock(&self.keys);
        let actions = keys.partner_removed(name);
        self.carry_out(&mut keys, actions);
    }

    pub(super) fn connect(self: &Arc<Self>, link: LinkConfig) -> Result<(), String> {
        let name = link.partner.clone();
        let identity = Arc::clone(&lock(&self.identity));
        let partner = Arc::new(Partner::start(PartnerSetup {
            config: link,
            identity,
            me: self.env.config.name.clone(),
            period: Duration::from_millis(self.env.config.heartbeat_ms),
            detection: Duration::from_millis(self.env.config.detection_ms),
            runtime: self.runtime.clone(),
            routes: self.env.routes.clone(),
            hooks: self.hooks(),
        })?);
        lock(&self.env.peers).insert(name.clone(), partner.peer());
        lock(&self.partners).insert(name.clone(), Arc::clone(&partner));
        let mut keys = lock(&self.keys);
        // The key may have been changed since it was looked at.
        partner
            .interconnect
            .set_identity(Arc::clone(&lock(&self.identity)));
        keys.partner_added(name.clone());
        // A session that came up before the partner was known here was told to nobody.
        if partner.interconnect.session().is_some() {
            let actions: Vec<KeyAction> = keys.session_up(&name);
            self.carry_out(&mut keys, actions);
        }
        Ok(())
    }

    /// What partners tell this host. Weakly: a partner must not keep its host alive.
    fn hooks(self: &Arc<Self>) -> Hooks {
        let (unrouted, session, key) = (
            Arc::downgrade(self),
            Arc::downgrade(self),
            Arc::downgrade(self),
        );
        Hooks {
            on_unrouted: Arc::new(move |from, vm, generation, message| {
                if let Some(host) = unrouted.upgrade() {
                    host.unrouted(from, vm, generation, message);
                }
            }),
            on_session: Arc::new(move |from| {
                if let Some(host) = session.upgrade() {
                    host.key_session(from);
                }
            }),
            on_key: Arc::new(move |from, message| {
                if let Some(host) = key.upgrade() {
                    host.key_message(from, message);
                }
            }),
        }
    }

    /// Begin a link test.
    ///
    /// # Errors
    /// If there is no such partner, it is not connected, or a test is under way.
    pub fn test_start(&self, name: &str, request: &TestRequest) -> Result<TestStatus, ApiError> {
        let partner = self.find_partner(name)?;
        let vms = self.mirrored_with(&partner.name);
        let encoders = || {
            vms.iter()
                .filter_map(|vm| vm.epochs.as_ref()?.encoding.as_ref())
        };
        let total = crate::api::links::EncodeFigures {
            raw_bytes: encoders().map(|e| e.raw_bytes).sum(),
            encoded_bytes: encoders().map(|e| e.encoded_bytes).sum(),
            ..Default::default()
        };
        let mirrored = MirroredNow {
            any: !vms.is_empty(),
            codec_ratio: total.ratio(),
        };
        let test = LinkTest::start(
            self.tests_begun.fetch_add(1, Ordering::Relaxed) + 1,
            &partner,
            request,
            mirrored,
            Duration::from_millis(self.env.config.heartbeat_ms),
        )
        .map_err(refused)?;
        lock(&self.tests).insert(partner.name.clone(), Arc::clone(&test));
        Ok(test.status())
    }

    /// The newest test with a partner.
    ///
    /// # Errors
    /// If there is no such partner or was no test.
    pub fn test_status(&self, name: &str) -> Result<TestStatus, ApiError> {
        let partner = self.find_partner(name)?;
        lock(&self.tests)
            .get(&partner.name)
            .map(|test| test.status())
            .ok_or_else(|| {
                refused(format!(
                    "no link test with {} was made since the daemon started; `pollux link test {}` makes one",
                    partner.name, partner.name
                ))
            })
    }

    /// End the test with a partner, if one is under way.
    ///
    /// # Errors
    /// As [`Host::test_status`].
    pub fn test_cancel(&self, name: &str) -> Result<TestStatus, ApiError> {
        self.find_partner(name)?.cancel_test();
        self.test_status(name)
    }
}
