//! The registry in etcd, for pools that have outgrown one pair or have no shared storage.
//!
//! One key of the registry is one key of etcd, `/pollux/<pool>/keys/<key>`, and its version is
//! the one etcd counts for each key (1 = created). It is never deleted, so the version never
//! starts again. A compare-and-set is one transaction on that version. Every read is
//! linearizable: a member asks a majority before it answers.
//!
//! Keys that are to vanish with their owner live apart, under `/pollux/<pool>/leased/`, and hang
//! on a lease ([`EtcdRegistry::grant_lease`]). Changes of both are told by a watch
//! ([`EtcdRegistry::watch_from`]).
//!
//! Must never ask a member for an answer it knows by itself, never send a write twice, and
//! never believe an etcd that has lost its memory: answers of another cluster, or from before
//! the last answer, are refused.

mod client;
#[cfg(test)]
mod cluster_tests;
mod endpoint;
pub(crate) mod fuzz;
mod lease;
#[cfg(test)]
mod stream_tests;
#[cfg(test)]
mod testbed;
#[cfg(test)]
mod tests;
mod watch;
mod wire;

pub use endpoint::{ENDPOINTS_MAX, EtcdClientCertificate, EtcdConfigError, EtcdTls, PEM_BYTES_MAX};
pub use lease::{Held, Holding, LEASE_TTL_S_MAX, Lease, LeaseId};
pub(crate) use watch::fuzz::watch as fuzz_watch;
pub use watch::{EtcdChange, EtcdEvent, EtcdWatch, WATCH_SURE, WatchEnd};

use super::{
    CasOutcome, KEY_BYTES_MAX, Listing, Registry, RegistryError, Seen, VALUE_BYTES_MAX, Versioned,
};
use client::{BODY_BYTES_MAX, Client, Failure, Repeat};
use endpoint::Endpoint;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;
use wire::{Header, KeyValue, RangeAnswer, TxnAnswer};

/// How long a call may take by default: an election of etcd (one second unless set otherwise)
/// and then some, and shorter than an operator's patience.
pub const CALL_DEADLINE: Duration = Duration::from_secs(3);
/// Longest name of a pool: a DNS label.
pub const POOL_BYTES_MAX: usize = 63;
/// Keys asked for at once; with the longest keys and values they fit into one answer.
pub const PAGE_KEYS: usize = 64;
/// Most keys of a listing: four for each of 16,384 VMs.
pub const LIST_KEYS_MAX: usize = 65_536;
/// Most bytes of the keys and values of a listing. etcd itself keeps 2 GiB by default, old
/// versions included.
pub const LIST_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Room in an answer for one entry besides its key and value: field names and numbers.
const ENTRY_JSON_BYTES: usize = 512;
const PREFIX_BYTES_MAX: usize = "/pollux//leased/".len() + POOL_BYTES_MAX;
// Base64 makes four bytes of three.
const _: () = assert!(
    PAGE_KEYS * ((PREFIX_BYTES_MAX + KEY_BYTES_MAX + VALUE_BYTES_MAX) / 3 * 4 + ENTRY_JSON_BYTES)
        < BODY_BYTES_MAX
);

/// Which etcd, and how it is spoken to.
#[derive(Clone, Debug)]
pub struct EtcdOptions {
    /// The members' client URLs, `https://host:2379`, 1 to [`ENDPOINTS_MAX`]. All of one cluster.
    pub endpoints: Vec<String>,
    /// The pool: part of every key, so that pools can share an etcd.
    pub pool: String,
    /// Certificates; needed for `https`.
    pub tls: Option<EtcdTls>,
    /// Speak plain `http` to other machines too. On loopback it is always allowed.
    pub allow_plain_http: bool,
    /// How long a call may take.
    pub deadline: Duration,
}

impl EtcdOptions {
    /// The default behaviour, without TLS.
    #[must_use]
    pub fn new(pool: impl Into<String>, endpoints: Vec<String>) -> Self {
        Self {
            endpoints,
            pool: pool.into(),
            tls: None,
            allow_plain_http: false,
            deadline: CALL_DEADLINE,
        }
    }
}

/// The two kinds of keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// The registry's keys, which are never deleted.
    Keys,
    /// Keys that vanish with their lease.
    Leased,
}

/// A place in etcd's history: it rises by one with every change of any key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Revision(pub u64);

/// A registry in etcd; see the module. Calls block: not from a task of the runtime it uses.
pub struct EtcdRegistry {
    client: Arc<Client>,
    pool: String,
    /// Whose answers are believed: the cluster of the first one.
    cluster: Option<u64>,
    /// The latest place in history that an answer spoke of.
    newest: Revision,
    /// It has once answered from before that place, and is asked nothing more.
    forgetful: Option<String>,
    /// The stream of the last watch, with its prefix.
    watching: Option<(String, EtcdWatch)>,
}

impl std::fmt::Debug for EtcdRegistry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "EtcdRegistry({} {})", self.client.place(), self.pool)
    }
}

impl EtcdRegistry {
    /// The registry as `options` say; nothing is sent yet. Its connections run on `runtime`,
    /// which must have its I/O and time enabled and be driven by somebody else.
    ///
    /// # Errors
    /// [`EtcdConfigError`]: what is wrong with the settings.
    pub fn new(
        options: &EtcdOptions,
        runtime: tokio::runtime::Handle,
    ) -> Result<Self, EtcdConfigError> {
        let count = options.endpoints.len();
        if !(1..=ENDPOINTS_MAX).contains(&count) {
            return Err(EtcdConfigError::Endpoints(count));
        }
        let named = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        let pool = &options.pool;
        if pool.is_empty() || pool.len() > POOL_BYTES_MAX || !pool.bytes().all(named) {
            return Err(EtcdConfigError::Pool(pool.clone(), POOL_BYTES_MAX));
        }
        let endpoints = options
            .endpoints
            .iter()
            .map(|url| Endpoint::parse(url, options.allow_plain_http))
            .collect::<Result<Vec<_>, _>>()?;
        if let Some(https) = endpoints.iter().find(|e| e.tls_name.is_some())
            && options.tls.is_none()
        {
            return Err(EtcdConfigError::NoAuthority(https.url.clone()));
        }
        let tls = options.tls.as_ref().map(endpoint::connector).transpose()?;
        let client = Client::new(endpoints, tls, runtime, options.deadline);
        Ok(Self {
            client: Arc::new(client),
            pool: pool.clone(),
            cluster: None,
            newest: Revision(0),
            forgetful: None,
            watching: None,
        })
    }

    fn full(&self, space: Space, key: &str) -> Vec<u8> {
        let space = match space {
            Space::Keys => "keys",
            Space::Leased => "leased",
        };
        format!("/pollux/{}/{space}/{key}", self.pool).into_bytes()
    }

    fn error(&self, what: &str, failure: Failure) -> RegistryError {
        let (place, what, why) = (self.client.place(), what.to_owned(), failure.why);
        match failure.sent {
            false => RegistryError::NotDone { place, what, why },
            true => RegistryError::Unknown { place, what, why },
        }
    }

    fn not_done(&self, what: &str, why: impl ToString) -> RegistryError {
        let why = why.to_string();
        self.error(what, Failure { sent: false, why })
    }

    /// Ask, read the answer, and judge whose it is.
    fn ask<A: DeserializeOwned>(
        &mut self,
        repeat: Repeat,
        path: &'static str,
        ask: &Value,
        header: impl Fn(&A) -> Header,
    ) -> Result<A, Failure> {
        if let Some(why) = &self.forgetful {
            let why = why.clone();
            return Err(Failure { sent: false, why });
        }
        let answer = self.client.call(repeat, path, ask)?;
        // Somebody has acted on the request, as far as anybody can tell.
        let sent = repeat == Repeat::Never;
        serde_json::from_slice(&answer)
            .map_err(|e| format!("its answer is not etcd's: {e}"))
            .and_then(|answer| self.believe(header(&answer)).map(|()| answer))
            .map_err(|why| {
                self.client.distrust();
                Failure { sent, why }
            })
    }

    fn believe(&mut self, header: Header) -> Result<(), String> {
        let cluster = *self.cluster.get_or_insert(header.cluster_id);
        if cluster != header.cluster_id {
            return Err(format!(
                "cluster {:x} answered where {cluster:x} did before; name the members of one cluster only, and start this host's daemon again if etcd was made anew on purpose",
                header.cluster_id
            ));
        }
        let newest = self.newest.0;
        if header.revision < newest {
            let why = format!(
                "it answered as of revision {} where it had been at {newest}, so it has forgotten what was won; find out who set it back, make sure that no VM runs twice, and start this host's daemon again",
                header.revision
            );
            self.forgetful = Some(why.clone());
            return Err(why);
        }
        self.newest = Revision(header.revision);
        Ok(())
    }

    fn read_in(
        &mut self,
        space: Space,
        key: &str,
        what: &str,
    ) -> Result<Option<KeyValue>, RegistryError> {
        if key.is_empty() || key.len() > KEY_BYTES_MAX {
            return Ok(None); // Such a key cannot be written.
        }
        let full = self.full(space, key);
        let answer: RangeAnswer = self
            .ask(
                Repeat::Harmless,
                wire::RANGE,
                &wire::read_one(&full),
                |a: &RangeAnswer| a.header,
            )
            .map_err(|f| self.error(what, f))?;
        one(answer.kvs, &full).map_err(|why| self.not_done(what, why))
    }

    /// All keys with `prefix` as they were at one moment, and that moment.
    fn list_in(
        &mut self,
        space: Space,
        prefix: &str,
        what: &str,
    ) -> Result<(Revision, Vec<(String, KeyValue)>), RegistryError> {
        let base = self.full(space, "").len();
        let full = self.full(space, prefix);
        let mut listed: Vec<(String, KeyValue)> = Vec::new();
        let mut bytes = 0;
        let mut last: Option<Vec<u8>> = None;
        let mut moment = Revision(0);
        loop {
            let ask = wire::read_page(&full, last.as_deref(), PAGE_KEYS, moment.0);
            let page: RangeAnswer = self
                .ask(Repeat::Harmless, wire::RANGE, &ask, |a: &RangeAnswer| {
                    a.header
                })
                .map_err(|f| self.error(what, f))?;
            if moment == Revision(0) {
                moment = Revision(page.header.revision);
            }
            if page.kvs.len() > PAGE_KEYS || (page.kvs.is_empty() && page.more) {
                let why = format!("a page of {} keys was not asked for", page.kvs.len());
                return Err(self.not_done(what, why));
            }
            for kv in page.kvs {
                if !kv.key.starts_with(&full) || last.as_ref().is_some_and(|last| *last >= kv.key) {
                    return Err(self.not_done(what, "its keys are not those asked for"));
                }
                last = Some(kv.key.clone());
                check(&kv).map_err(|why| self.not_done(what, why))?;
                bytes += kv.key.len() + kv.value.len();
                let key = std::str::from_utf8(&kv.key[base..])
                    .map_err(|_| self.not_done(what, "a key is not text"))?
                    .to_owned();
                listed.push((key, kv));
            }
            if !page.more {
                return Ok((moment, listed));
            }
            if listed.len() >= LIST_KEYS_MAX || bytes >= LIST_BYTES_MAX {
                let why = format!(
                    "there are more than {LIST_KEYS_MAX} keys or {LIST_BYTES_MAX} bytes; ask for a longer prefix"
                );
                return Err(self.not_done(what, why));
            }
        }
    }

    fn list_keys(&mut self, prefix: &str) -> Result<(Revision, Listing), RegistryError> {
        let what = format!("list of {prefix}");
        let (moment, listed) = self.list_in(Space::Keys, prefix, &what)?;
        let listing = listed.into_iter().map(|(key, kv)| (key, versioned(kv)));
        Ok((moment, listing.collect()))
    }

    /// Write if the key is at `version`; what is there if it is not.
    fn write_if(
        &mut self,
        what: &str,
        full: &[u8],
        version: u64,
        value: &[u8],
        lease: u64,
    ) -> Result<Result<(), Option<KeyValue>>, RegistryError> {
        let ask = wire::write_if(full, version, value, lease);
        let mut answer: TxnAnswer = self
            .ask(Repeat::Never, wire::TXN, &ask, |a: &TxnAnswer| a.header)
            .map_err(|f| self.error(what, f))?;
        let unclear = |why: &str| Failure {
            sent: true,
            why: format!("its answer is not the one of such a transaction: {why}"),
        };
        let response = match answer.responses.len() {
            1 => answer.responses.remove(0),
            _ => return Err(self.error(what, unclear("not one response"))),
        };
        match (
            answer.succeeded,
            response.response_put,
            response.response_range,
        ) {
            (true, Some(_), None) => Ok(Ok(())),
            (false, None, Some(range)) => {
                let found = one(range.kvs, full).map_err(|why| self.error(what, unclear(&why)))?;
                if found.as_ref().map_or(0, |kv| kv.version) == version {
                    return Err(self.error(what, unclear("it lost at the expected version")));
                }
                Ok(Err(found))
            }
            _ => Err(self.error(what, unclear("another operation"))),
        }
    }
}

/// The one entry asked for, or none.
fn one(mut kvs: Vec<KeyValue>, full: &[u8]) -> Result<Option<KeyValue>, String> {
    if kvs.len() > 1 || kvs.iter().any(|kv| kv.key != full) {
        return Err("it answered with other keys than were asked for".into());
    }
    kvs.iter().try_for_each(check)?;
    Ok(kvs.pop())
}

/// Nobody but pollux should write here, and pollux writes nothing of the kind refused here.
fn check(kv: &KeyValue) -> Result<(), String> {
    let key = String::from_utf8_lossy(&kv.key);
    if kv.version == 0 {
        return Err(format!("{key} is at version 0"));
    }
    if kv.key.len() > PREFIX_BYTES_MAX + KEY_BYTES_MAX || kv.value.len() > VALUE_BYTES_MAX {
        return Err(format!(
            "{key} has {} bytes of key and {} of value and was not written by pollux; find out by whom",
            kv.key.len(),
            kv.value.len()
        ));
    }
    Ok(())
}

fn versioned(kv: KeyValue) -> Versioned<Vec<u8>> {
    Versioned {
        version: kv.version,
        value: kv.value,
    }
}

fn refuse_limits(key: &str, value: &[u8]) -> Result<(), String> {
    if key.is_empty() || key.len() > KEY_BYTES_MAX || value.len() > VALUE_BYTES_MAX {
        return Err(format!(
            "keys have 1 to {KEY_BYTES_MAX} bytes, values at most {VALUE_BYTES_MAX}"
        ));
    }
    Ok(())
}

impl Registry for EtcdRegistry {
    fn read(&mut self, key: &str) -> Result<Option<Versioned<Vec<u8>>>, RegistryError> {
        let found = self.read_in(Space::Keys, key, &format!("read of {key}"))?;
        Ok(found.map(versioned))
    }

    fn compare_and_set(
        &mut self,
        key: &str,
        expected: Option<u64>,
        value: &[u8],
    ) -> Result<CasOutcome, RegistryError> {
        let what = format!("compare-and-set of {key}");
        refuse_limits(key, value).map_err(|why| self.not_done(&what, why))?;
        // To etcd 0 means absent, and its numbers end at 2^63; no key is ever at either.
        if expected.is_some_and(|v| v == 0 || i64::try_from(v).is_err()) {
            return Ok(CasOutcome::Lost(self.read(key)?));
        }
        let version = expected.unwrap_or(0);
        let full = self.full(Space::Keys, key);
        Ok(match self.write_if(&what, &full, version, value, 0)? {
            Ok(()) => CasOutcome::Won {
                version: version + 1,
            },
            Err(found) => CasOutcome::Lost(found.map(versioned)),
        })
    }

    fn list(&mut self, prefix: &str) -> Result<Listing, RegistryError> {
        Ok(self.list_keys(prefix)?.1)
    }

    fn watch(
        &mut self,
        prefix: &str,
        seen: &mut Seen,
        wait: Duration,
    ) -> Result<Listing, RegistryError> {
        self.watch_keys(prefix, seen, wait)
    }
}

const _: () = {
    // The registry thread owns it.
    const fn is_send<T: Send>() {}
    is_send::<EtcdRegistry>();
};
