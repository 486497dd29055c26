//! Leases: keys that vanish when their owner stops asking for them.
//!
//! A lease that etcd has revoked proves that its owner has not renewed it for its time to live.
//! It does not prove that the owner knows. So the owner counts from the moment it *sent* the
//! last renewal that was answered, and has stopped by [`Lease::ttl`] after that; etcd counts
//! from a later one, and after an election from the new leader's beginning, so it revokes later,
//! never sooner.
//!
//! A leased key vanishes and comes back at version 1, so none of them may decide who runs a VM:
//! they live apart from the registry's keys.

use super::client::Repeat;
use super::wire::{self, LeaseAnswer, Line, RevokeAnswer};
use super::{EtcdRegistry, KeyValue, Space, refuse_limits};
use crate::registry::RegistryError;
use std::time::Duration;

/// Longest time to live: after an hour without renewal nobody waits for a lease.
pub const LEASE_TTL_S_MAX: u64 = 3600;

/// The name of a lease in etcd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeaseId(u64);

/// A lease that was granted or renewed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Its name.
    pub id: LeaseId,
    /// How long it lasts without renewal. Not shorter than asked for; etcd grants none below one
    /// and a half elections.
    pub ttl: Duration,
}

/// A leased key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// What its owner wrote.
    pub value: Vec<u8>,
    /// The owner's lease; `None` if somebody wrote the key without one, and it never vanishes.
    pub lease: Option<LeaseId>,
}

/// How the attempt to hold a leased key ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Holding {
    /// It is held, as long as the lease lasts.
    Won,
    /// Somebody holds it, perhaps by the same lease.
    Taken(Held),
}

fn held(kv: KeyValue) -> Held {
    Held {
        value: kv.value,
        lease: Some(LeaseId(kv.lease)).filter(|lease| lease.0 != 0),
    }
}

impl EtcdRegistry {
    /// A new lease of at least `ttl`, in whole seconds upwards.
    ///
    /// # Errors
    /// [`RegistryError`]. If it is unknown whether the lease was granted, nobody knows its name,
    /// and it ends by itself.
    pub fn grant_lease(&mut self, ttl: Duration) -> Result<Lease, RegistryError> {
        let what = format!("grant of a lease of {ttl:?}");
        let ttl_s = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
        if !(1..=LEASE_TTL_S_MAX).contains(&ttl_s) {
            let why = format!("a lease lasts 1 to {LEASE_TTL_S_MAX} s");
            return Err(self.not_done(&what, why));
        }
        let ask = wire::grant(ttl_s);
        let answer: LeaseAnswer = self
            .ask(Repeat::Never, wire::LEASE_GRANT, &ask, |a: &LeaseAnswer| {
                a.header
            })
            .map_err(|f| self.error(&what, f))?;
        if answer.id == 0 || answer.ttl_s < ttl_s {
            return Err(self.not_done(&what, "it granted none, or a shorter one"));
        }
        Ok(Lease {
            id: LeaseId(answer.id),
            ttl: Duration::from_secs(answer.ttl_s),
        })
    }

    /// Renew a lease: it lasts its whole time again. `None`: it has ended, and so have its keys.
    ///
    /// # Errors
    /// [`RegistryError::NotDone`] without an answer; the lease may have been renewed or not, and
    /// its owner must go on counting from before.
    pub fn keep_lease(&mut self, id: LeaseId) -> Result<Option<Lease>, RegistryError> {
        let what = format!("renewal of lease {:x}", id.0);
        let line: Line<LeaseAnswer> = self
            .client
            .call(Repeat::Harmless, wire::LEASE_KEEP_ALIVE, &wire::lease(id.0))
            .map_err(|f| self.error(&what, f))
            .and_then(|answer| {
                serde_json::from_slice(&answer).map_err(|e| self.not_done(&what, e))
            })?;
        let answer = match (line.result, line.error) {
            (Some(answer), None) => answer,
            (_, error) => {
                let why = error.map_or("it said nothing".to_owned(), |e| e.to_string());
                return Err(self.not_done(&what, why));
            }
        };
        // The revision in it is the member's own, which may be behind.
        if self.cluster.is_some_and(|c| c != answer.header.cluster_id) || answer.id != id.0 {
            return Err(self.not_done(&what, "another cluster answered, or about another lease"));
        }
        Ok((answer.ttl_s > 0).then_some(Lease {
            id,
            ttl: Duration::from_secs(answer.ttl_s),
        }))
    }

    /// End a lease, and with it its keys. `false`: it had ended before.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub fn revoke_lease(&mut self, id: LeaseId) -> Result<bool, RegistryError> {
        let what = format!("revocation of lease {:x}", id.0);
        let ask = wire::lease(id.0);
        let answer = self.ask(
            Repeat::Never,
            wire::LEASE_REVOKE,
            &ask,
            |a: &RevokeAnswer| a.header,
        );
        match answer {
            Ok(RevokeAnswer { .. }) => Ok(true),
            Err(f) if !f.sent && f.why.contains("requested lease not found") => Ok(false),
            Err(f) => Err(self.error(&what, f)),
        }
    }

    /// Write the leased key `key` if nobody holds it.
    ///
    /// # Errors
    /// [`RegistryError`]; also if the lease has ended.
    pub fn hold(
        &mut self,
        key: &str,
        value: &[u8],
        lease: LeaseId,
    ) -> Result<Holding, RegistryError> {
        let what = format!("holding of {key} by lease {:x}", lease.0);
        refuse_limits(key, value).map_err(|why| self.not_done(&what, why))?;
        let full = self.full(Space::Leased, key);
        match self.write_if(&what, &full, 0, value, lease.0)? {
            Ok(()) => Ok(Holding::Won),
            Err(Some(kv)) => Ok(Holding::Taken(held(kv))),
            Err(None) => Err(self.not_done(&what, "it lost to nobody")),
        }
    }

    /// All leased keys that begin with `prefix`, in byte order.
    ///
    /// # Errors
    /// [`RegistryError::NotDone`].
    pub fn list_held(&mut self, prefix: &str) -> Result<Vec<(String, Held)>, RegistryError> {
        let what = format!("list of leased {prefix}");
        let (_, listed) = self.list_in(Space::Leased, prefix, &what)?;
        Ok(listed
            .into_iter()
            .map(|(key, kv)| (key, held(kv)))
            .collect())
    }

    /// What a leased key holds; `None` if nobody holds it.
    ///
    /// # Errors
    /// [`RegistryError::NotDone`].
    pub fn read_held(&mut self, key: &str) -> Result<Option<Held>, RegistryError> {
        let found = self.read_in(Space::Leased, key, &format!("read of leased {key}"))?;
        Ok(found.map(held))
    }
}
