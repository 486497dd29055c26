//! Changes as etcd tells them, from any place in its history.
//!
//! ```text
//!            next: connect to a member                etcd: created
//!   apart ------------------------------> asked ------------------------> told of changes
//!     ^   the stream broke, or its member lost its leader: another member,     |
//!     +-------------- from where the last one ended <--------------------------+
//!
//!   any --- etcd: that part of history is compacted ---> ended (WatchEnd::Compacted)
//! ```
//!
//! Invariant: changes come in order, none twice, and none is left out between the revision the
//! watch began at and [`EtcdWatch::resume`]. A stream may be silent because nothing changes or
//! because its member is cut off in a way nobody notices; so a watch of the registry's keys looks
//! for itself after [`WATCH_SURE`] of silence.

pub(super) mod fuzz;

use super::client::{BODY_BYTES_MAX, Client, Driver, RETRY_PAUSE, block};
use super::wire::{self, EventKind, Header, Line, WatchAnswer};
use super::{EtcdRegistry, LIST_KEYS_MAX, Revision, Space, check, versioned};
use crate::registry::watch::by_polling;
use crate::registry::{Listing, RegistryError, Seen, Versioned, WATCH_POLL};
use bytes::{Buf, BytesMut};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout_at};

/// How long a silent stream is believed to be silent because nothing changes.
pub const WATCH_SURE: Duration = Duration::from_secs(10);

/// What happened to a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EtcdChange {
    /// It was written.
    Put(Versioned<Vec<u8>>),
    /// It vanished: its lease ended. Never happens to the registry's own keys.
    Deleted,
}

/// One change of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdEvent {
    /// The key, without what pollux puts in front of it.
    pub key: String,
    /// What happened to it.
    pub change: EtcdChange,
    /// When.
    pub revision: Revision,
}

/// Why a watch told nothing more.
#[derive(Debug, thiserror::Error)]
pub enum WatchEnd {
    /// For good: etcd has forgotten the changes from where the watch stands. List the keys, and
    /// watch from after the revision of the listing.
    #[error(
        "etcd has compacted its history up to revision {oldest}, the watch stood at {asked}; list the keys and watch from there", oldest = oldest.0, asked = asked.0
    )]
    Compacted {
        /// Where the watch stood.
        asked: Revision,
        /// The oldest revision etcd still has.
        oldest: Revision,
    },
    /// For now: no member could be watched in time. The watch goes on where it was when asked
    /// again.
    #[error(transparent)]
    NotNow(#[from] RegistryError),
}

/// What breaks one stream but not the watch.
struct Broken(String);

/// A stream of answers from one member.
struct Stream {
    body: Incoming,
    _driver: Driver,
    /// What came of the next line.
    line: BytesMut,
    /// Up to here there is no end of line in it.
    searched: usize,
}

impl Stream {
    /// The next line. Nothing is lost if the wait for it is given up.
    async fn line(&mut self) -> Result<BytesMut, Broken> {
        loop {
            let new = &self.line[self.searched..];
            if let Some(end) = new.iter().position(|b| *b == b'\n') {
                let line = self.line.split_to(self.searched + end);
                self.line.advance(1);
                self.searched = 0;
                return Ok(line);
            }
            self.searched = self.line.len();
            match self.body.frame().await {
                None => return Err(Broken("the stream ended".into())),
                Some(Err(e)) => return Err(Broken(format!("the stream broke: {e}"))),
                Some(Ok(frame)) => {
                    let data = frame.data_ref().map_or(&[][..], |data| data);
                    if self.line.len() + data.len() > BODY_BYTES_MAX {
                        return Err(Broken(format!("a line exceeds {BODY_BYTES_MAX} bytes")));
                    }
                    self.line.extend_from_slice(data);
                }
            }
        }
    }
}

/// The watch's own side; lives on the runtime while it is waited for.
struct State {
    client: Arc<Client>,
    prefix: Vec<u8>,
    /// Bytes of `prefix` that are not part of the keys told.
    base: usize,
    cluster: Option<u64>,
    next: Revision,
    /// Member to ask next.
    turn: usize,
    stream: Option<Stream>,
    /// Whether the stream's member has said that it watches.
    created: bool,
    /// Changes of a revision that may have more of them.
    held: Vec<EtcdEvent>,
    /// Why there is no stream.
    trouble: String,
    /// Set once history is gone.
    compacted: Option<Revision>,
}

impl State {
    /// The next changes; waits for ever.
    async fn events(&mut self) -> Result<Vec<EtcdEvent>, Revision> {
        loop {
            if let Some(oldest) = self.compacted {
                return Err(oldest);
            }
            match self.step().await {
                Ok(events) if events.is_empty() => {}
                Ok(events) => return Ok(events),
                Err(Broken(why)) => {
                    self.stream = None;
                    self.created = false;
                    self.held.clear();
                    self.turn += 1;
                    self.trouble = why;
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
            }
        }
    }

    /// Connect, or take in one line.
    async fn step(&mut self) -> Result<Vec<EtcdEvent>, Broken> {
        let Some(stream) = &mut self.stream else {
            let ask = wire::watch_from(&self.prefix, self.next.0);
            let opened = self.client.stream(self.turn, wire::WATCH, &ask);
            let (body, driver) = opened.await.map_err(Broken)?;
            self.stream = Some(Stream {
                body,
                _driver: driver,
                line: BytesMut::new(),
                searched: 0,
            });
            return Ok(Vec::new());
        };
        let line = stream.line().await?;
        let line: Line<WatchAnswer> = serde_json::from_slice(&line)
            .map_err(|e| Broken(format!("its answer is not etcd's: {e}")))?;
        match line {
            Line {
                result: Some(answer),
                error: None,
            } => self.take_in(answer),
            Line { error, .. } => Err(Broken(
                error.map_or("it said nothing".into(), |e| e.to_string()),
            )),
        }
    }

    fn take_in(&mut self, answer: WatchAnswer) -> Result<Vec<EtcdEvent>, Broken> {
        let Header {
            cluster_id,
            revision,
        } = answer.header;
        if *self.cluster.get_or_insert(cluster_id) != cluster_id {
            return Err(Broken("another cluster answered".into()));
        }
        if answer.canceled {
            if answer.compact_revision > 0 {
                self.compacted = Some(Revision(answer.compact_revision));
                return Ok(Vec::new());
            }
            return Err(Broken(format!("it gave up: {}", answer.cancel_reason)));
        }
        self.created = true;
        let mut events = std::mem::take(&mut self.held);
        for event in answer.events {
            let kv = event.kv;
            let at = Revision(kv.mod_revision);
            if !kv.key.starts_with(&self.prefix) || at > Revision(revision) {
                return Err(Broken("it told of what was not asked for".into()));
            }
            if at < self.next || events.last().is_some_and(|last| last.revision > at) {
                return Err(Broken("it told of changes out of order".into()));
            }
            let key = std::str::from_utf8(&kv.key[self.base..])
                .map_err(|_| Broken("a key is not text".into()))?
                .to_owned();
            let change = match event.kind {
                EventKind::Delete => EtcdChange::Deleted,
                EventKind::Put => {
                    check(&kv).map_err(Broken)?;
                    EtcdChange::Put(versioned(kv))
                }
            };
            events.push(EtcdEvent {
                key,
                change,
                revision: at,
            });
        }
        if let Some(last) = events.last().map(|last| last.revision) {
            self.next = Revision(last.0 + 1);
            if answer.fragment {
                // A lease takes all its keys with it at one revision; they are told together,
                // as a stream that breaks here is taken up at the beginning of a revision.
                let whole = events.partition_point(|event| event.revision < last);
                self.held = events.split_off(whole);
                self.next = last;
                if self.held.len() > LIST_KEYS_MAX {
                    return Err(Broken(format!("{LIST_KEYS_MAX} keys changed at once")));
                }
            }
        }
        Ok(events)
    }
}

/// A watch of a prefix; see the module.
pub struct EtcdWatch {
    state: Arc<Mutex<State>>,
    client: Arc<Client>,
    what: String,
    resume: Revision,
}

impl EtcdWatch {
    /// Where another watch would have to begin to tell what this one has not.
    #[must_use]
    pub fn resume(&self) -> Revision {
        self.resume
    }

    /// The next changes, in order; waits for them at most `wait`. None: nothing was told, and a
    /// member stands by to tell. A member that fails is replaced by another one. With a `wait`
    /// shorter than it takes to connect, a watch gets nowhere: give it 100 ms or more.
    ///
    /// # Errors
    /// [`WatchEnd`].
    pub fn next(&mut self, wait: Duration) -> Result<Vec<EtcdEvent>, WatchEnd> {
        let state = self.state.clone();
        let until = Instant::now() + wait;
        let outcome = block(self.client.handle(), wait, async move {
            let mut state = state.lock().await;
            let events = timeout_at(until, state.events()).await;
            let trouble = match state.created {
                true => None,
                false => Some(state.trouble.clone()),
            };
            (events, state.next, trouble)
        });
        let not_now = |why: String| RegistryError::NotDone {
            place: self.client.place(),
            what: self.what.clone(),
            why,
        };
        let Some((events, next, trouble)) = outcome else {
            let why = "the runtime did not run the watch; it is overloaded or has ended";
            return Err(not_now(why.into()).into());
        };
        match (events, trouble) {
            (Ok(Ok(events)), _) => {
                self.resume = next;
                Ok(events)
            }
            (Ok(Err(oldest)), _) => Err(WatchEnd::Compacted {
                asked: next,
                oldest,
            }),
            (Err(_), None) => Ok(Vec::new()),
            (Err(_), Some(trouble)) => {
                Err(not_now(format!("no member could be watched in {wait:?}: {trouble}")).into())
            }
        }
    }
}

impl EtcdRegistry {
    /// Watch the keys of `space` that begin with `prefix`, from the change at `since` on.
    /// Nothing is sent before the first [`EtcdWatch::next`].
    #[must_use]
    pub fn watch_from(&self, space: Space, prefix: &str, since: Revision) -> EtcdWatch {
        let state = State {
            client: self.client.clone(),
            prefix: self.full(space, prefix),
            base: self.full(space, "").len(),
            cluster: self.cluster,
            next: since,
            turn: 0,
            stream: None,
            created: false,
            held: Vec::new(),
            trouble: "none answered".into(),
            compacted: None,
        };
        EtcdWatch {
            state: Arc::new(Mutex::new(state)),
            client: self.client.clone(),
            what: format!("watch of {prefix}"),
            resume: since,
        }
    }

    /// The latest place in etcd's history that an answer spoke of; a watch from the next one
    /// tells what was not known by then.
    #[must_use]
    pub fn newest(&self) -> Revision {
        self.newest
    }

    fn look(&mut self, prefix: &str, seen: &mut Seen) -> Result<Listing, RegistryError> {
        let (moment, listing) = self.list_keys(prefix)?;
        seen.revision = Some(moment.0);
        seen.listed = Some(std::time::Instant::now());
        Ok(seen.news(listing))
    }

    pub(super) fn watch_keys(
        &mut self,
        prefix: &str,
        seen: &mut Seen,
        wait: Duration,
    ) -> Result<Listing, RegistryError> {
        let until = Instant::now() + wait;
        if wait < WATCH_POLL {
            return by_polling(self, prefix, seen, wait);
        }
        let mut told = match seen.revision {
            None => {
                let news = self.look(prefix, seen)?;
                if !news.is_empty() {
                    return Ok(news);
                }
                seen.revision.unwrap_or(0)
            }
            Some(revision) => revision,
        };
        let mut watch = match self.watching.take() {
            Some((of, watch)) if of == prefix && watch.resume().0 == told + 1 => watch,
            _ => self.watch_from(Space::Keys, prefix, Revision(told + 1)),
        };
        let mut news = BTreeMap::new();
        while news.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            let events = match watch.next(left) {
                Ok(events) => events,
                // The listing tells all that was forgotten, if not in how many steps.
                Err(WatchEnd::Compacted { .. }) => return self.look(prefix, seen),
                Err(WatchEnd::NotNow(e)) => return Err(e),
            };
            let silent = events.is_empty();
            told = watch.resume().0 - 1;
            seen.revision = Some(told);
            for event in events {
                if let EtcdChange::Put(entry) = event.change
                    && seen.is_news(&event.key, entry.version)
                {
                    news.insert(event.key, entry);
                }
            }
            if silent {
                break;
            }
        }
        if !news.is_empty() {
            seen.listed = Some(std::time::Instant::now());
        } else if seen.listed.is_none_or(|at| at.elapsed() >= WATCH_SURE) {
            let news = self.look(prefix, seen)?;
            if !news.is_empty() {
                return Ok(news); // The stream did not tell: leave it.
            }
            // It stands before `seen.revision` and is right all the same.
            seen.revision = Some(told);
        }
        self.watching = Some((prefix.to_owned(), watch));
        Ok(news.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> (tokio::runtime::Runtime, State) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let handle = runtime.handle().clone();
        let options = super::super::EtcdOptions::new("p", vec!["http://127.0.0.1:1".into()]);
        let registry = EtcdRegistry::new(&options, handle).unwrap();
        let watch = registry.watch_from(Space::Leased, "", Revision(5));
        let EtcdWatch { state, .. } = watch;
        (runtime, Arc::into_inner(state).unwrap().into_inner())
    }

    /// An answer that tells of keys deleted at these revisions.
    fn answer(fragment: bool, deleted: &[(&str, u64)]) -> WatchAnswer {
        let events: Vec<_> = deleted
            .iter()
            .map(|(key, at)| {
                let key = wire::base64(format!("/pollux/p/leased/{key}").as_bytes());
                let kv = serde_json::json!({ "key": key, "mod_revision": at.to_string() });
                serde_json::json!({ "type": "DELETE", "kv": kv })
            })
            .collect();
        let header = serde_json::json!({ "cluster_id": "1", "revision": "20" });
        let answer =
            serde_json::json!({ "header": header, "fragment": fragment, "events": events });
        serde_json::from_value(answer).unwrap()
    }

    fn told(state: &mut State, answer: WatchAnswer) -> Result<Vec<(String, u64)>, String> {
        let events = state.take_in(answer).map_err(|Broken(why)| why)?;
        let short = events.into_iter().map(|e| (e.key, e.revision.0));
        Ok(short.collect())
    }

    #[test]
    fn keys_that_vanish_at_one_revision_are_told_together_though_they_come_in_pieces() {
        let (_runtime, mut state) = state();
        let first = told(&mut state, answer(true, &[("a", 6), ("b", 7)])).unwrap();
        assert_eq!(first, [("a".into(), 6)]);
        // If the stream broke now, the next one would begin with all of revision 7.
        assert_eq!(state.next, Revision(7));
        let second = told(&mut state, answer(true, &[("c", 7)])).unwrap();
        assert_eq!(second, []);
        let third = told(&mut state, answer(false, &[("d", 7), ("e", 8)])).unwrap();
        assert_eq!(
            third,
            [("b", 7), ("c", 7), ("d", 7), ("e", 8)].map(|(key, at)| (key.into(), at))
        );
        assert_eq!(state.next, Revision(9));
    }

    #[test]
    fn changes_that_are_old_or_out_of_order_or_of_other_keys_break_the_stream() {
        let (_runtime, mut state) = state();
        assert!(told(&mut state, answer(false, &[("a", 4)])).is_err());
        assert!(told(&mut state, answer(false, &[("a", 8), ("b", 7)])).is_err());
        // Later than all that etcd says there is.
        assert!(told(&mut state, answer(false, &[("a", 21)])).is_err());
        let (_runtime, mut state) = self::state();
        state.prefix = b"/pollux/p/leased/x".to_vec();
        assert!(told(&mut state, answer(false, &[("a", 6)])).is_err());
    }
}
