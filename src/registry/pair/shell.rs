//! The thread that owns one host's [`Core`]: hands it what comes, carries out what it says, in its
//! order. If the copy cannot be written the life of the machine ends as with a crash, and the
//! next one begins with what the file says.

use super::copy::{Owner, Standing};
use super::core::{Answer, CallId, Core, Fault, Input, OrderId, Output, Select, SessionId, Why};
use super::judge::{Judge, Patience};
use super::message::Message;
use super::store::{Store, StoreError};
use crate::ha::time::Millis;
use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Between two looks at the partner, the gateway and the fence agent.
const TICK: Duration = Duration::from_millis(100);
/// Between two tries to read the copy again after it could not be written.
const AGAIN_AFTER: Duration = Duration::from_secs(1);
/// Events taken in before the next tick, so that a flood of them holds up no judgement.
const EVENTS_PER_TICK_MAX: usize = 1024;

/// A connection to the partner that was authenticated.
pub struct Connection {
    /// Its number, higher than those of all before.
    pub id: SessionId,
    /// Messages on their way out; when this is dropped, those in it are sent and then it closes.
    pub out: SyncSender<Message>,
    /// Sends what is in `out`.
    pub writer: JoinHandle<()>,
    /// Ends it at once.
    pub cut: Box<dyn Fn() + Send>,
}

/// What a client wants.
pub(super) enum Op {
    Read(Select),
    Change {
        key: String,
        expected: Option<u64>,
        value: Vec<u8>,
    },
}

/// What reaches the thread.
pub(super) enum Event {
    Up(Connection),
    Down(SessionId),
    /// The partner is there; `None`: and says nothing.
    Heard(SessionId, Option<Message>),
    Call {
        op: Op,
        until: Instant,
        reply: SyncSender<Answer>,
    },
    /// Say farewell, and tell when it is sent.
    Leave(SyncSender<()>),
    #[cfg(test)]
    FailStore(bool),
    /// All handles are gone.
    End,
}

/// What the pair asks of its host.
pub trait Surroundings: Send {
    /// How long ago the partner was last heard by any other way than the pair's connection;
    /// `None`: never.
    fn heard_age(&self) -> Option<Duration>;
    /// Age of the gateway's newest answer, from when it was asked; `None`: never.
    fn gateway_age(&self) -> Option<Duration>;
    /// Whether the partner can be switched off at all.
    fn can_fence(&self) -> bool;
    /// Begin to switch the partner off. Ends one that is under way.
    ///
    /// # Errors
    /// Why it cannot begin.
    fn fence(&mut self) -> Result<(), String>;
    /// Give up the one that is under way, if it has done nothing yet.
    fn call_off(&mut self);
    /// What became of it: whether the power is off, as the agent, asked anew, said. Told once.
    fn fenced(&mut self) -> Option<bool>;
}

/// Told whenever keys may have changed.
#[derive(Default)]
pub(super) struct Changed {
    count: Mutex<u64>,
    signal: Condvar,
}

impl Changed {
    pub(super) fn now(&self) -> u64 {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self) {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.signal.notify_all();
    }

    /// Wait until it is told that `seen` is old, at most so long.
    pub(super) fn wait(&self, seen: u64, most: Duration) {
        let count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = self
            .signal
            .wait_timeout_while(count, most, |count| *count == seen);
    }
}

struct Call {
    reply: SyncSender<Answer>,
    until: Instant,
    writes: bool,
}

/// The thread's.
pub(super) struct Shell {
    pub(super) owner: Owner,
    pub(super) partner: String,
    pub(super) store: Store,
    pub(super) core: Core,
    /// The copy cannot be written; since when, and why.
    broken: Option<(Instant, StoreError)>,
    connection: Option<Connection>,
    surroundings: Box<dyn Surroundings>,
    judge: Judge,
    begun: Instant,
    calls: BTreeMap<CallId, Call>,
    calls_given: u64,
    order: Option<OrderId>,
    changed: Arc<Changed>,
    shown: Option<Shown>,
    held_still: bool,
    /// Why the newest session could not be.
    fault: Option<Fault>,
    left: bool,
}

/// What is told to people when it changes.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Shown {
    live: bool,
    linked: bool,
    standing: Standing,
}

fn millis(time: Duration) -> Millis {
    Millis(u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
}

fn new_life() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().0
}

impl Shell {
    pub(super) fn new(
        owner: Owner,
        partner: String,
        store: Store,
        patience: Patience,
        surroundings: Box<dyn Surroundings>,
        changed: Arc<Changed>,
    ) -> Result<Self, StoreError> {
        let core = Core::new(owner.side, new_life(), store.load()?);
        Ok(Self {
            owner,
            partner,
            core,
            store,
            broken: None,
            connection: None,
            surroundings,
            judge: Judge::new(patience, owner.side, Millis(0)),
            begun: Instant::now(),
            calls: BTreeMap::new(),
            calls_given: 0,
            order: None,
            changed,
            shown: None,
            held_still: false,
            fault: None,
            left: false,
        })
    }

    fn now(&self) -> Millis {
        millis(self.begun.elapsed())
    }

    pub(super) fn run(mut self, inbox: &Receiver<Event>) {
        let mut next = Instant::now();
        loop {
            self.show();
            // Everything that has come is heard before anybody is called silent.
            for _ in 0..EVENTS_PER_TICK_MAX {
                let wait = next.saturating_duration_since(Instant::now());
                match inbox.recv_timeout(wait) {
                    Ok(Event::End) | Err(RecvTimeoutError::Disconnected) => return self.hang(),
                    Ok(event) => self.take(event),
                    Err(RecvTimeoutError::Timeout) => break,
                }
                self.show();
            }
            if Instant::now() >= next {
                next = Instant::now() + TICK;
                self.tick();
            }
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Up(connection) => {
                let id = connection.id;
                self.judge.heard(self.now());
                self.hang();
                self.connection = Some(connection);
                if self.broken.is_some() {
                    self.hang();
                } else {
                    self.input(Input::Up(id));
                }
            }
            Event::Down(id) => {
                if self.connection.as_ref().is_some_and(|c| c.id == id) {
                    self.hang();
                }
                self.input(Input::Down(id));
            }
            Event::Heard(id, message) => {
                self.judge.heard(self.now());
                if let Some(message) = message {
                    self.input(Input::Heard(id, message));
                }
            }
            Event::Call { op, until, reply } => self.call(op, until, reply),
            Event::Leave(done) => {
                self.left = true;
                self.input(Input::Leave);
                if let Some(connection) = self.connection.take() {
                    drop(connection.out);
                    let _ = connection.writer.join();
                }
                let _ = done.send(());
            }
            #[cfg(test)]
            Event::FailStore(after) => self.store.fails = Some(after),
            Event::End => {}
        }
    }

    fn call(&mut self, op: Op, until: Instant, reply: SyncSender<Answer>) {
        if let Some((_, why)) = &self.broken {
            tracing::debug!("refused: {why}");
            let _ = reply.try_send(Answer::NotDone(Why::NotInSync));
            return;
        }
        self.calls_given += 1;
        let call = CallId(self.calls_given);
        let writes = matches!(op, Op::Change { .. });
        self.calls.insert(
            call,
            Call {
                reply,
                until,
                writes,
            },
        );
        self.input(match op {
            Op::Read(select) => Input::Read(call, select),
            Op::Change {
                key,
                expected,
                value,
            } => Input::Change {
                call,
                key,
                expected,
                value,
            },
        });
    }

    fn tick(&mut self) {
        let now = self.now();
        self.judge.tick(now);
        if let Some(age) = self.surroundings.heard_age() {
            self.judge.heard(now.since(millis(age)));
        }
        let instant = Instant::now();
        let late: Vec<CallId> = self
            .calls
            .iter()
            .filter(|(_, call)| call.until <= instant)
            .map(|(id, _)| *id)
            .collect();
        for call in late {
            self.input(Input::GiveUp(call));
        }
        if let Some(confirmed) = self.surroundings.fenced() {
            self.judge.ordered(now);
            if let Some(order) = self.order.take() {
                self.input(Input::Fenced { order, confirmed });
            }
        }
        if self
            .broken
            .as_ref()
            .is_some_and(|(since, _)| since.elapsed() >= AGAIN_AFTER)
        {
            self.mend();
        }
        self.look_for_silence(now);
    }

    fn look_for_silence(&mut self, now: Millis) {
        let may = self.core.is_live() && self.core.copy().standing == Standing::Paired;
        if !may || !self.judge.is_silent(now) || self.left {
            self.held_still = false;
            return;
        }
        let age = self.surroundings.gateway_age();
        let age = age.map(millis);
        let fences = self.surroundings.can_fence();
        if fences && self.judge.says_off(now, age) {
            self.input(Input::Silent);
        } else if !std::mem::replace(&mut self.held_still, true) {
            let partner = &self.partner;
            let why = if fences {
                "it is switched off as soon as this host reaches the gateway and has let a better one be first"
            } else {
                "no fence agent can say whether it is dead, so this host holds still: what runs goes on, nothing is started or taken over"
            };
            tracing::error!("{partner} is silent: {why}");
        }
    }

    fn input(&mut self, input: Input) {
        if self.broken.is_some() {
            return;
        }
        for output in self.core.handle(input) {
            if let Err(e) = self.carry_out(output) {
                self.give_up_life(e);
                return;
            }
        }
        // An order that does not count any more; what it does to the partner is seen anew.
        if self.core.order().is_none() && self.order.take().is_some() {
            self.surroundings.call_off();
        }
    }

    fn carry_out(&mut self, output: Output) -> Result<(), StoreError> {
        match output {
            Output::Store(copy) => {
                self.store.store(&copy)?;
                self.changed.tell();
            }
            Output::Send(id, message) => self.send(id, message),
            Output::Answer(id, answer) => {
                if let Some(call) = self.calls.remove(&id) {
                    let _ = call.reply.try_send(answer);
                }
            }
            Output::Fence(order) => {
                let partner = self.partner.clone();
                tracing::error!("{partner} is silent and is switched off");
                self.judge.ordered(self.now());
                match self.surroundings.fence() {
                    Ok(()) => self.order = Some(order),
                    Err(reason) => {
                        tracing::error!("{partner} cannot be switched off: {reason}");
                        let failed = Input::Fenced {
                            order,
                            confirmed: false,
                        };
                        // Nothing follows from it but that it may be tried again.
                        let _ = self.core.handle(failed);
                    }
                }
            }
            Output::Hang(_, fault) => {
                // They try again and again; it is told once.
                if self.fault.replace(fault) != Some(fault) {
                    tracing::error!("no registry with {}: {fault}", self.partner);
                }
                self.hang();
            }
            Output::HangAll => self.hang(),
        }
        Ok(())
    }

    fn send(&mut self, id: SessionId, message: Message) {
        let Some(connection) = self.connection.as_ref().filter(|c| c.id == id) else {
            return;
        };
        // One that is full is stuck; its end is told like any other.
        if let Err(TrySendError::Full(_)) = connection.out.try_send(message) {
            tracing::warn!(
                "{} takes no messages; the connection is ended",
                self.partner
            );
            (connection.cut)();
        }
    }

    fn hang(&mut self) {
        if let Some(connection) = self.connection.take() {
            (connection.cut)();
        }
    }

    /// As if this host had crashed, but for its clients, who are told.
    fn give_up_life(&mut self, why: StoreError) {
        tracing::error!(
            "the registry's copy: {why}; this host answers no more until it can be written and the partner is there"
        );
        self.hang();
        for (_, call) in std::mem::take(&mut self.calls) {
            let _ = call.reply.try_send(if call.writes {
                Answer::Unknown(Why::Late)
            } else {
                Answer::NotDone(Why::NotInSync)
            });
        }
        self.order = None;
        self.broken = Some((Instant::now(), why));
    }

    fn mend(&mut self) {
        match self.store.load() {
            Ok(copy) => {
                tracing::info!("the registry's copy can be read again");
                self.broken = None;
                self.core = Core::new(self.owner.side, new_life(), copy);
                if self.left {
                    self.input(Input::Leave);
                }
                self.changed.tell();
            }
            Err(why) => self.broken = Some((Instant::now(), why)),
        }
    }

    fn show(&mut self) {
        let shown = Shown {
            live: self.core.is_live() && self.broken.is_none(),
            linked: self.core.is_linked(),
            standing: self.core.copy().standing,
        };
        if self.shown.replace(shown) == Some(shown) || self.left {
            return;
        }
        let partner = &self.partner;
        match shown {
            Shown { live: false, .. } => {
                tracing::warn!("the registry answers once {partner} is there");
            }
            Shown {
                standing: Standing::Alone,
                ..
            } => {
                tracing::warn!(
                    "this host goes on without {partner}, whose life has ended for certain"
                );
            }
            Shown { linked: true, .. } => {
                self.fault = None;
                tracing::info!("in sync with {partner}: each change goes through both hosts");
            }
            _ => {
                tracing::warn!("{partner} is not there: the registry is read, and not changed");
            }
        }
        self.changed.tell();
    }
}
