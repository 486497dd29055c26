//! Calls to the registry: to a model of etcd, or to the very Disk Paxos; and what is committed.

use super::{ETCD_CALL_MS, Item, Registry, World};
use crate::ha::machine::{Input, WriteOutcome};
use crate::ha::state::{PoolState, Standing};
use crate::sim::pool::host::name;
use crate::sim::pool::{paxos, register};

impl World {
    pub(super) fn etcd(&mut self, n: usize, life: u64, call: register::Call) {
        let works = self.hosts[n].etcd;
        let Registry::Etcd(register) = &mut self.registry else {
            return;
        };
        if !works || self.now < register.paused_until {
            // Nothing was sent to a member that leads: nothing happened.
            let input = match call {
                register::Call::Read => Input::Read(Err("no answer".into())),
                register::Call::Write { .. } => Input::Written(WriteOutcome::Lost),
            };
            let at = self.now + ETCD_CALL_MS;
            return self.push(at, Item::Input(n, life, input));
        }
        let writes = matches!(call, register::Call::Write { .. });
        if writes && self.lost_answers && self.rng.permille(80) {
            let unknown = Item::Input(n, life, Input::Written(WriteOutcome::Unknown));
            self.push(self.now + ETCD_CALL_MS, unknown);
            // And it may take effect yet.
            if self.rng.permille(500) {
                let late = self.now + self.rng.between(0, 4000);
                self.push(late, Item::Late(n, life, call));
            }
            return;
        }
        let Some(answer) = self.apply(n, life, call) else {
            return;
        };
        let lost = writes && self.lost_answers && self.rng.permille(50);
        let answer = if lost && matches!(answer, Input::Written(WriteOutcome::Won { .. })) {
            Input::Written(WriteOutcome::Unknown)
        } else {
            answer
        };
        let at = self.after((1, 30));
        self.push(at, Item::Input(n, life, answer));
    }

    /// A call takes effect at etcd; its answer.
    pub(super) fn apply(&mut self, n: usize, life: u64, call: register::Call) -> Option<Input> {
        let Registry::Etcd(register) = &mut self.registry else {
            return None;
        };
        let answer = register.apply(call);
        if let Input::Written(WriteOutcome::Won { version }) = answer
            && let Some(value) = register.value.clone()
        {
            self.commit((n, life), version, value.value);
        }
        Some(answer)
    }

    pub(super) fn disk(&mut self, n: usize, life: u64, started: &paxos::Started) {
        let host = &mut self.hosts[n];
        let Registry::Statefile(disks) = &mut self.registry else {
            return;
        };
        if host.life != life {
            return;
        }
        // A host that stands still does it when it goes on, however late that is.
        let until = host.frozen_until;
        if self.now < until {
            return self.push(until, Item::Disk(n, life, *started));
        }
        if let Some(client) = &mut host.client {
            let reach = host.disks[started.disk];
            client.end(disks, started.disk, started.action, reach);
        }
        self.client(n);
    }

    /// Go on with a host's call to the statefile.
    pub(super) fn client(&mut self, n: usize) {
        let now = self.now;
        let host = &mut self.hosts[n];
        let Registry::Statefile(disks) = &mut self.registry else {
            return;
        };
        let Some(client) = &mut host.client else {
            return;
        };
        let life = host.life;
        let answer = client.go_on(disks, now, &mut self.rng);
        let started = client.start(&host.disks, &mut self.rng);
        let wakes = client.wakes_at();
        if let Some(answer) = answer {
            self.push(now, Item::Input(n, life, answer));
        }
        for started in started {
            // One that hangs ends when its disk is looked at again.
            let at = now + started.after_ms.unwrap_or(2 * paxos::CALL_MS);
            self.push(at, Item::Disk(n, life, started));
        }
        if let Some(at) = wakes {
            self.push(at.max(now + 1), Item::Client(n, life));
        }
        self.look_at_disks();
    }

    /// What is chosen on the disks is what is committed.
    pub(super) fn look_at_disks(&mut self) {
        let Registry::Statefile(disks) = &self.registry else {
            return;
        };
        if let Some((by, version, state)) = disks.newly_chosen(self.committed_version) {
            self.commit(by, version, state);
        }
    }

    /// A state is committed by `by`.
    pub(super) fn commit(&mut self, writer: (usize, u64), version: u64, state: PoolState) {
        let before = self.committed.take().unwrap_or_default();
        self.committed_version = version;
        self.judge_commit(writer, &before, &state);
        self.committed = Some(state);
    }

    pub(super) fn judge_commit(
        &mut self,
        writer: (usize, u64),
        before: &PoolState,
        state: &PoolState,
    ) {
        let named = before.coordinator;
        let by = writer.0;
        let is_writer =
            |c: crate::ha::state::Coordinator| (usize::from(c.host.0), c.incarnation.0) == writer;
        let leads = named.is_some_and(is_writer);
        // Whoever takes over decides about nobody in the same write.
        let takes_over = state.term > before.term;
        if takes_over && !state.coordinator.is_some_and(is_writer) {
            let what = format!("{} made another the coordinator", name(by));
            self.violate("one-coordinator", what);
        }
        if takes_over && let Some(c) = state.coordinator {
            let host = usize::from(c.host.0);
            self.log.coordinators.push((self.now, host));
            self.trace(|_| format!("{} coordinates", name(host)));
        }
        for (host, member) in &state.members {
            let was = before
                .members
                .get(host)
                .filter(|was| was.incarnation == member.incarnation)
                .map(|was| was.standing);
            if was == Some(member.standing) {
                continue;
            }
            let index = usize::from(host.0);
            let life = member.incarnation.0;
            let standing = member.standing;
            self.trace(|_| {
                format!(
                    "{}: {} in life {life} is {standing:?} now",
                    name(by),
                    name(index)
                )
            });
            if index != by && !leads {
                let what = format!(
                    "{} decided about {} ({standing:?}), and the coordinator was {named:?}",
                    name(by),
                    name(index)
                );
                self.violate("one-coordinator", what);
            }
            match standing {
                Standing::Ousted => {
                    self.log.given_up.push((self.now, index, life));
                    if self.formed_at > 0 && !self.hosts[index].touched {
                        let what =
                            format!("{} was given up, and no fault was about it", name(index));
                        self.violate("innocent", what);
                    }
                }
                Standing::Dead(proof) => self.log.proved.push((self.now, index, proof)),
                Standing::In | Standing::Away => {}
            }
        }
    }

    pub(super) fn call(&mut self, n: usize, write: Option<(Option<u64>, PoolState)>) {
        let now = self.now;
        let host = &mut self.hosts[n];
        let life = host.life;
        match (&mut host.client, write) {
            (Some(client), None) => client.read(now),
            (Some(client), Some((expected, state))) => client.write(now, expected, state),
            (None, write) => {
                let input = match write {
                    None => Input::Read(Err("no statefile".into())),
                    Some(_) => Input::Written(WriteOutcome::Lost),
                };
                let at = now + paxos::CALL_MS;
                return self.push(at, Item::Input(n, life, input));
            }
        }
        self.client(n);
    }
}
