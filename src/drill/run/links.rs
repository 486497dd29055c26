//! A run in which single links fail and the VM is to stay mirrored.

use super::Drill;
use crate::drill::MonotonicNs;
use crate::drill::clients::Clients;
use crate::drill::env::{EnvError, VmView};
use crate::drill::links::{LinkFacts, LinkPlan};
use crate::drill::report::RunFacts;
use crate::drill::stats::micros;
use std::time::{Duration, Instant};

impl Drill<'_> {
    /// Harm the links one after the other, look on, and see them taken back.
    pub(super) fn link_run(
        &mut self,
        mut run: RunFacts,
        plans: &[LinkPlan],
        clients: &Clients,
    ) -> Result<(RunFacts, Option<VmView>), EnvError> {
        let mut newest = run.before.clone();
        for (number, plan) in plans.iter().enumerate() {
            self.look_on(&mut newest, plan.after, &mut |_, _| false)?;
            self.say(&format!(
                "link {}: {:?} for {:?}",
                plan.link, plan.harm, plan.length
            ));
            let from_ns = self.env.harm_link(plan.link, plan.harm)?;
            if number == 0 {
                run.injected_ns = from_ns;
                run.calm.to_ns = from_ns;
            }
            let mut facts = LinkFacts {
                plan: *plan,
                from_ns,
                healed_ns: from_ns,
                back_ns: None,
                told: false,
                lag_us: Vec::new(),
                commit: (newest.commit, newest.commit),
                strayed: Vec::new(),
            };
            let seen = self.harmed(&mut facts, &mut newest);
            run.links.push(facts);
            seen?;
        }
        clients.wait_answers(
            self.spec.load.clients,
            run.links.last().map_or(run.injected_ns, |l| l.healed_ns),
            self.pace.failover_max,
            self.pace.look_every,
        );
        run.watched_until_ns = MonotonicNs::now();
        let stayed = newest.mirrored && newest.generation == run.before.generation;
        run.after = Some(newest);
        if stayed {
            return Ok((run.clone(), run.after));
        }
        // The next run begins with a mirrored VM all the same.
        let begun = Instant::now();
        let again = match self.env.wait_mirrored(self.pace.mirror_max) {
            Ok(view) => {
                run.reprotected_us = Some(micros(begun.elapsed()));
                Some(view)
            }
            Err(e) => {
                run.trouble.push(e.to_string());
                None
            }
        };
        Ok((run, again))
    }

    /// From the harm to the link's return.
    fn harmed(&mut self, facts: &mut LinkFacts, newest: &mut VmView) -> Result<(), EnvError> {
        let length = facts.plan.length;
        self.look_on(newest, length, &mut |view, _| {
            note(facts, view);
            false
        })?;
        facts.healed_ns = self.env.heal_link(facts.plan.link)?;
        let (link, mut told, mut back_ns) = (facts.plan.link, false, None);
        self.look_on(newest, self.pace.failover_max, &mut |view, env| {
            note(facts, view);
            match env.link_carries(link) {
                Ok(Some(carries)) => {
                    told = true;
                    back_ns = carries.then(MonotonicNs::now);
                    carries
                }
                // Nothing to wait for.
                Ok(None) => true,
                Err(_) => false,
            }
        })?;
        facts.told |= told;
        facts.back_ns = back_ns;
        facts.commit.1 = newest.commit;
        Ok(())
    }

    /// Look at the VM for this long, or until `enough` says so.
    fn look_on(
        &mut self,
        newest: &mut VmView,
        length: Duration,
        enough: &mut dyn FnMut(&VmView, &mut dyn crate::drill::env::DrillEnv) -> bool,
    ) -> Result<(), EnvError> {
        let end = Instant::now() + length;
        while Instant::now() < end {
            let views = self.env.views()?;
            // Whoever runs it now; where nobody does, the old host's word on it.
            let runs = views.iter().find(|v| v.runs());
            let known = runs.or_else(|| views.iter().find(|v| v.host == newest.host));
            if let Some(view) = known {
                newest.clone_from(view);
                if enough(newest, self.env) {
                    return Ok(());
                }
            }
            std::thread::sleep(
                self.pace
                    .look_every
                    .min(end.saturating_duration_since(Instant::now())),
            );
        }
        Ok(())
    }
}

fn note(facts: &mut LinkFacts, view: &VmView) {
    facts.lag_us.push(view.lag_us);
    if !view.mirrored && !facts.strayed.contains(&view.state) {
        facts.strayed.push(view.state.clone());
    }
}
