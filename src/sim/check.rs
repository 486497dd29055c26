//! The invariants, checked against what really is.

use super::world::{Event, Role, World};
use super::{GuestState, OVER_ALARM_PERMILLE_MAX, SHARE_OF_LEAST, Violation};
use crate::mirror::standby::StandbyEnd;
use crate::mirror::{MAX_IN_FLIGHT, Micros, PrimaryState};
use crate::pool::{Epoch, Generation};

impl World {
    pub(super) fn violated(&mut self, invariant: &'static str, what: String) {
        let (at, seed) = (self.now, self.seed);
        self.violation.get_or_insert(Violation {
            invariant,
            what,
            at,
            seed,
        });
    }

    /// A packet leaves a host. **one-life**: only the instance that came to life last speaks.
    pub(super) fn leaves(&mut self, host: usize, answer: u64) {
        if self.alive_on != host {
            self.violated(
                "one-life",
                format!(
                    "answer {answer} leaves {} after the other side came to life",
                    self.hosts[host].name
                ),
            );
        }
        let story = self.client.story;
        let delay = Micros(self.rng.between(50, 500));
        self.after(
            delay,
            Event::Answer {
                number: answer,
                story,
            },
        );
    }

    /// A packet leaves a solo VM: nobody may be named who could take over without it.
    pub(super) fn leaves_direct(&mut self, host: usize, answer: u64) {
        self.check_solo(host);
        self.leaves(host, answer);
    }

    /// **one-life**: the registry says that this host alone may run the VM.
    pub(super) fn check_solo(&mut self, host: usize) {
        let record = &self.registry.record.value;
        if record.owner != self.hosts[host].name || record.standby.is_some() {
            let what = format!(
                "{} is solo while the registry says {record:?}",
                self.hosts[host].name
            );
            self.violated("one-life", what);
        }
    }

    /// **output-commit**: the standby holds the epoch, and the record has named it.
    pub(super) fn check_release(&mut self, host: usize, attempt: Generation, through: Epoch) {
        let whole = self.whole.get(&attempt).copied().unwrap_or_default();
        if through > whole {
            let what =
                format!("epoch {through} of {attempt:?} is released, the standby holds {whole}");
            self.violated("output-commit", what);
        }
        let named = |record: &crate::mirror::VmRecord| {
            record.generation == attempt && record.standby.is_some()
        };
        if !self.registry.named.iter().any(named) {
            let what = format!(
                "{} releases epoch {through} of {attempt:?}, but its standby was never named",
                self.hosts[host].name
            );
            self.violated("output-commit", what);
        }
    }

    /// **one-life**: promotion is asked for by the host that the registry names as owner.
    pub(super) fn check_promote(&mut self, host: usize, attempt: Generation, epoch: Epoch) {
        let record = &self.registry.record.value;
        if record.owner != self.hosts[host].name || record.generation <= attempt {
            let what = format!(
                "{} promotes epoch {epoch} while the registry says {record:?}",
                self.hosts[host].name
            );
            self.violated("one-life", what);
        }
    }

    /// **whole-epoch**: all parts are those of one checkpoint. **nothing-lost**: every answer
    /// the client saw is in it.
    pub(super) fn check_promoted(
        &mut self,
        host: usize,
        attempt: Generation,
        epoch: Epoch,
        state: GuestState,
    ) {
        if self.checkpoints.get(&(attempt, epoch)) != Some(&state) {
            let what = format!(
                "{} runs from {state:?}, which is not checkpoint {epoch} of {attempt:?}",
                self.hosts[host].name
            );
            self.violated("whole-epoch", what);
        }
        if state.served < self.client.acked {
            let what = format!(
                "the client saw answer {}, the promoted guest knows {}",
                self.client.acked, state.served
            );
            self.violated("nothing-lost", what);
        }
    }

    /// **nothing-lost**: nobody gives away what the registry counts on.
    pub(super) fn check_standby_end(&mut self, host: usize, attempt: Generation, why: &StandbyEnd) {
        // Without a whole epoch there is nothing to throw away.
        if matches!(why, StandbyEnd::Broken { .. }) || !self.whole.contains_key(&attempt) {
            return;
        }
        let record = &self.registry.record.value;
        let me = &self.hosts[host].name;
        let named = record.standby.as_ref() == Some(me) && record.generation == attempt;
        let owner = record.owner == *me && record.generation == attempt.next();
        if named || owner {
            let what =
                format!("{me} throws its copy away ({why:?}) while the registry says {record:?}");
            self.violated("nothing-lost", what);
        }
    }

    /// **nothing-lost**: the VM is gone from both hosts, so whoever the registry counts on
    /// must have come to harm since (or shortly before, its last write still on its way).
    pub(super) fn check_lost(&mut self) {
        let record = &self.registry.record.value;
        let holder = record.standby.as_ref().unwrap_or(&record.owner);
        let harmed = (0..2)
            .find(|host| self.hosts[*host].name == *holder)
            .map(|host| self.harmed[host]);
        let unharmed = harmed.is_some_and(|at| at + Micros::from_millis(1600) < self.named_at);
        if unharmed && record.running {
            let what = format!("nobody runs the VM although {holder} came to no harm: {record:?}");
            self.violated("nothing-lost", what);
        }
    }

    /// **nothing-lost**: a primary stands down only before another owner.
    pub(super) fn check_deposed(&mut self, host: usize) {
        let record = &self.registry.record.value;
        if record.owner == self.hosts[host].name {
            let what = format!(
                "{} stands down while the registry says {record:?}",
                self.hosts[host].name
            );
            self.violated("nothing-lost", what);
        }
    }

    /// Time passes: how much of it mirrored, how much with a lag over the alarm?
    pub(super) fn account_lag(&mut self, passed: Micros) {
        if self.faults_on {
            return;
        }
        for host in &self.hosts {
            if let Role::Primary { machine, .. } = &host.role {
                let status = machine.status(self.now);
                if status.state == PrimaryState::Mirrored {
                    self.mirrored_for = self.mirrored_for + passed;
                    if !status.mirrored {
                        self.over_alarm_for = self.over_alarm_for + passed;
                    }
                }
            }
        }
    }

    /// **bounded**: whatever the link carries, the guest does not outrun it for long.
    pub(super) fn check_bounded(&mut self) {
        let (over, all) = (self.over_alarm_for, self.mirrored_for);
        if all >= SHARE_OF_LEAST && over.0 * 1000 > all.0 * OVER_ALARM_PERMILLE_MAX {
            let what =
                format!("the lag was over its alarm for {over:?} of {all:?} without a fault");
            self.violated("bounded", what);
        }
    }

    /// **truthful**: a VM called mirrored has a standby that holds what is called committed.
    /// **bounded**: no more epochs are under way than allowed.
    pub(super) fn check_truthful(&mut self) {
        for host in 0..2 {
            let Role::Primary {
                machine,
                attempt,
                guest,
            } = &self.hosts[host].role
            else {
                continue;
            };
            let status = machine.status(self.now);
            let (attempt, running) = (*attempt, guest.epoch);
            if !status.mirrored {
                continue;
            }
            let whole = self.whole.get(&attempt).copied().unwrap_or_default();
            if whole < status.committed {
                let what = format!(
                    "status calls epoch {} committed, the standby holds {whole}",
                    status.committed
                );
                self.violated("truthful", what);
            }
            let under_way = running.saturating_sub(status.committed.0);
            if under_way > MAX_IN_FLIGHT as u64 + 1 {
                self.violated("bounded", format!("{under_way} epochs are under way"));
            }
        }
    }
}
