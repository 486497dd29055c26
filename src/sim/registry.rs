//! A registry of one key that is linearizable and otherwise as bad as allowed: slow, not
//! there, or there with its answers lost, and with writes that land long after.

use super::rng::Rng;
use crate::mirror::{ClaimOutcome, Micros, Versioned, VmRecord};

/// How it behaves for now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mood {
    /// Answers in a few ms.
    #[default]
    Well,
    /// Answers late, sometimes too late to be waited for.
    Slow,
    /// Does nothing.
    Out,
    /// May do what it is told, early or late, and answers nobody.
    Mute,
}

/// One operation on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Read, or compare and set.
    pub write: Option<(u64, VmRecord)>,
}

/// When a request takes effect and when its answer comes, from now.
#[derive(Clone, Copy, Debug)]
pub struct Course {
    /// `None`: never takes effect.
    pub effect: Option<Micros>,
    /// When the caller learns something.
    pub answer: Micros,
    /// Whether what it learns is the outcome.
    pub known: bool,
}

/// The shell's patience with the registry.
const PATIENCE: u64 = 1_000_000;

/// The store and all it ever held.
#[derive(Clone, Debug)]
pub struct RegistryModel {
    /// The record now.
    pub record: Versioned<VmRecord>,
    /// Every generation and standby it ever named.
    pub named: Vec<VmRecord>,
    /// How it behaves.
    pub mood: Mood,
}

impl RegistryModel {
    /// One VM, solo.
    #[must_use]
    pub fn new(record: VmRecord) -> Self {
        let named = vec![record.clone()];
        Self {
            record: Versioned {
                version: 1,
                value: record,
            },
            named,
            mood: Mood::Well,
        }
    }

    /// What will become of a request sent now.
    pub fn course(&self, rng: &mut Rng) -> Course {
        match self.mood {
            Mood::Well => {
                let effect = rng.between(200, 4000);
                let answer = effect + rng.between(200, 4000);
                Course {
                    effect: Some(Micros(effect)),
                    answer: Micros(answer),
                    known: true,
                }
            }
            Mood::Slow => {
                let effect = rng.between(1000, 1_200_000);
                let answer = effect + rng.between(200, 300_000);
                let known = answer <= PATIENCE;
                Course {
                    effect: Some(Micros(effect)),
                    answer: Micros(answer.min(PATIENCE)),
                    known,
                }
            }
            Mood::Out => Course {
                effect: None,
                answer: Micros(rng.between(500, 50_000)),
                known: false,
            },
            Mood::Mute => {
                let effect = rng.permille(600).then(|| Micros(rng.between(500, 400_000)));
                Course {
                    effect,
                    answer: Micros(rng.between(500, 60_000)),
                    known: false,
                }
            }
        }
    }

    /// The request takes effect.
    pub fn execute(&mut self, request: &Request) -> ClaimOutcome {
        let Some((expected, value)) = &request.write else {
            return ClaimOutcome::Lost(Some(self.record.clone()));
        };
        if *expected != self.record.version {
            return ClaimOutcome::Lost(Some(self.record.clone()));
        }
        self.put(value.clone());
        ClaimOutcome::Won(self.record.clone())
    }

    /// Write, whatever is there.
    pub fn put(&mut self, value: VmRecord) {
        self.named.push(value.clone());
        self.record = Versioned {
            version: self.record.version + 1,
            value,
        };
    }
}
