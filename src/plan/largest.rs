//! Question 2: how many failures are survived at most, and what would be lost with one more?
//!
//! Survival is monotone: what is survived with r failures is survived with fewer ([`super::sets`]
//! says why), so the largest r is found by halving.

use super::answer::{Answer, Word};
use super::layout::Scope;
use super::model::Pool;
use super::tolerance::{Budget, Checker, Runner};
use serde::Serialize;

/// The answer for one class.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Largest {
    /// VMs that restart: `always`, or all of them.
    pub class: &'static str,
    /// So many failures are survived; none if not even the pool as it is holds.
    pub survives: Option<u32>,
    /// Hosts or domains there are.
    pub of: u32,
    /// What happens with one more.
    pub next: Option<Answer>,
}

/// Find it.
#[must_use]
pub fn largest(runner: &dyn Runner, pool: &Pool, scope: Scope, budget: Budget) -> Largest {
    let ask = |r: u32| Answer::of(&Checker::new_on(runner, pool, r, scope, budget));
    let of = super::layout::Layout::new(pool, scope).units.len();
    let of = u32::try_from(of).unwrap_or(u32::MAX);
    let mut out = Largest {
        class: match scope {
            Scope::Always => "always",
            Scope::All => "always and best-effort",
        },
        survives: None,
        of,
        next: None,
    };
    // Survived below `yes`, not known to be at `no` and above. Small numbers are cheap and
    // likely: double first, halve then.
    let (mut yes, mut no) = (0, of + 1);
    let mut probe = 0;
    while yes < no {
        let answer = ask(probe);
        if answer.answer == Word::Survives {
            out.survives = Some(probe);
            yes = probe + 1;
        } else {
            no = probe;
            out.next = Some(answer);
        }
        probe = if out.next.is_none() {
            (probe * 2).max(1).min(of)
        } else {
            yes.midpoint(no)
        };
    }
    out
}
