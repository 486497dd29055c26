//! A host, two partners and the messages between them, crashed at every step.

use super::*;

fn host(name: &str) -> HostName {
    HostName::new(name).unwrap()
}

const fn key(byte: u8) -> Fingerprint {
    Fingerprint([byte; 32])
}

/// What is on the host's disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Disk {
    present: Fingerprint,
    next: Option<Fingerprint>,
}

/// What happens next in a run.
#[derive(Clone, Debug)]
enum Happening {
    /// The host does what it decided.
    Act(KeyAction),
    /// A partner hears a word and changes its disk.
    Hears(HostName, KeyWord),
    /// A partner says it has pinned a key.
    Says(HostName, Fingerprint),
    /// The host hears that.
    Answered(HostName, Fingerprint),
    /// A session comes up.
    Up(HostName),
}

struct World {
    disk: Disk,
    change: KeyChange,
    pins: BTreeMap<HostName, Pins>,
    todo: Vec<Happening>,
    happened: usize,
}

impl World {
    fn new(partners: &[&str]) -> Self {
        let disk = Disk {
            present: key(1),
            next: None,
        };
        let pins = Pins {
            present: key(1),
            next: None,
        };
        let mut world = Self {
            disk,
            change: KeyChange::new(key(1), None),
            pins: partners.iter().map(|n| (host(n), pins)).collect(),
            todo: Vec::new(),
            happened: 0,
        };
        world.start();
        world
    }

    /// The host's daemon starts from its disk; sessions come up.
    fn start(&mut self) {
        self.change = KeyChange::new(self.disk.present, self.disk.next);
        self.todo.clear();
        let names: Vec<_> = self.pins.keys().cloned().collect();
        for name in names {
            self.change.partner_added(name.clone());
            self.todo.push(Happening::Up(name));
        }
    }

    /// The operator's wish.
    fn rotate(&mut self, next: Fingerprint) {
        self.disk.next = Some(next);
        let connected: Vec<_> = self.pins.keys().cloned().collect();
        let actions = self.change.begin(next, &connected);
        self.act(actions);
    }

    fn act(&mut self, actions: Vec<KeyAction>) {
        self.todo.extend(actions.into_iter().map(Happening::Act));
    }

    /// One thing happens; false if nothing is left to happen.
    fn step(&mut self) -> bool {
        if self.todo.is_empty() {
            return false;
        }
        self.happened += 1;
        match self.todo.remove(0) {
            Happening::Up(name) => {
                let actions = self.change.session_up(&name);
                self.act(actions);
            }
            Happening::Act(KeyAction::Say(name, word)) => {
                self.todo.push(Happening::Hears(name, word));
            }
            Happening::Act(KeyAction::Switch) => {
                self.disk = Disk {
                    present: self.disk.next.unwrap(),
                    next: None,
                };
                let actions = self.change.switched();
                self.act(actions);
            }
            Happening::Act(KeyAction::Redial(name)) => {
                assert!(self.pins[&name].accept(self.disk.present));
                let actions = self.change.redialled(&name);
                self.act(actions);
            }
            Happening::Hears(name, word) => {
                let after = self.pins[&name]
                    .after(word)
                    .expect("it speaks of a pinned key");
                self.pins.insert(name.clone(), after);
                if let KeyWord::New { next, .. } = word {
                    self.todo.push(Happening::Says(name, next));
                }
            }
            Happening::Says(name, next) => self.todo.push(Happening::Answered(name, next)),
            Happening::Answered(name, next) => {
                let actions = self.change.pinned(&name, next);
                self.act(actions);
            }
        }
        self.check();
        true
    }

    /// Invariant pinned.
    fn check(&self) {
        for (name, pins) in &self.pins {
            assert!(
                pins.accept(self.disk.present),
                "after {} steps {name} lets in {pins:?}, the host has {:?}",
                self.happened,
                self.disk
            );
        }
    }

    /// The session with one partner ends and comes up again: what was on its way is lost.
    fn session_breaks(&mut self, name: &HostName) {
        self.todo.retain(|h| match h {
            Happening::Hears(n, _) | Happening::Says(n, _) | Happening::Answered(n, _) => n != name,
            _ => true,
        });
        self.todo.push(Happening::Up(name.clone()));
    }
}

/// Steps of a whole rotation with nothing going wrong.
fn steps_of(partners: &[&str]) -> usize {
    let mut world = World::new(partners);
    world.rotate(key(2));
    while world.step() {}
    world.happened
}

fn finished(world: &World, with: Fingerprint) {
    assert_eq!(
        (world.disk.present, world.disk.next),
        (with, None),
        "{:?}",
        world.change
    );
    for pins in world.pins.values() {
        assert_eq!(pins.all(), [with]);
    }
    assert!(
        world
            .change
            .partners()
            .all(|(_, state)| state == PartnerKey::Settled)
    );
}

#[test]
fn a_rotation_ends_with_the_new_key_alone() {
    for partners in [&[][..], &["b"], &["b", "c"]] {
        let mut world = World::new(partners);
        while world.step() {}
        world.rotate(key(2));
        while world.step() {}
        finished(&world, key(2));
    }
}

#[test]
fn the_host_may_crash_at_any_two_steps() {
    let steps = steps_of(&["b", "c"]) + 4;
    for first in 0..steps {
        for second in 0..steps {
            let mut world = World::new(&["b", "c"]);
            world.rotate(key(2));
            for crash_after in [first, second] {
                for _ in 0..crash_after {
                    world.step();
                }
                world.start();
                world.check();
            }
            while world.step() {}
            finished(&world, key(2));
        }
    }
}

#[test]
fn a_partner_or_its_session_may_break_at_any_step() {
    let steps = steps_of(&["b", "c"]) + 4;
    for first in 0..steps {
        for second in 0..steps {
            let mut world = World::new(&["b", "c"]);
            world.rotate(key(2));
            for (breaks_after, name) in [(first, "b"), (second, "c")] {
                for _ in 0..breaks_after {
                    world.step();
                }
                world.session_breaks(&host(name));
            }
            while world.step() {}
            finished(&world, key(2));
        }
    }
}

#[test]
fn a_rotation_begun_before_the_last_one_was_forgotten_locks_nobody_out() {
    let steps = steps_of(&["b"]) + 2;
    for begun_after in 0..steps {
        let mut world = World::new(&["b"]);
        world.rotate(key(2));
        for _ in 0..begun_after {
            world.step();
        }
        // Only once the last one has switched; before it counts as the same one.
        if world.disk.next.is_none() {
            world.rotate(key(3));
            while world.step() {}
            finished(&world, key(3));
        }
    }
}

#[test]
fn giving_up_leaves_the_present_key_alone() {
    let steps = steps_of(&["b", "c"]);
    for given_up_after in 0..steps {
        let mut world = World::new(&["b", "c"]);
        world.rotate(key(2));
        for _ in 0..given_up_after {
            world.step();
        }
        if world.disk.next.is_none() {
            break;
        }
        world.disk.next = None;
        // What was decided and not done yet is not done any more.
        world
            .todo
            .retain(|h| !matches!(h, Happening::Act(KeyAction::Switch)));
        let actions = world.change.given_up(&[host("b"), host("c")]);
        world.act(actions);
        while world.step() {}
        finished(&world, key(1));
    }
}

#[test]
fn a_partner_that_is_away_is_waited_for_until_it_is_removed() {
    let mut change = KeyChange::new(key(1), None);
    change.partner_added(host("b"));
    change.partner_added(host("away"));
    let told = change.begin(key(2), &[host("b")]);
    assert_eq!(told.len(), 1, "only who is there is told: {told:?}");
    assert_eq!(change.pinned(&host("b"), key(2)), []);
    assert_eq!(change.partner_removed(&host("away")), [KeyAction::Switch]);
}

#[test]
fn answers_about_another_key_count_for_nothing() {
    let mut change = KeyChange::new(key(1), None);
    change.partner_added(host("b"));
    assert_eq!(change.pinned(&host("b"), key(2)), []);
    let _ = change.begin(key(2), &[]);
    assert_eq!(change.pinned(&host("b"), key(3)), []);
    assert_eq!(change.pinned(&host("stranger"), key(2)), []);
    assert_eq!(change.pinned(&host("b"), key(2)), [KeyAction::Switch]);
}

#[test]
fn a_partner_cannot_be_talked_into_dropping_the_key_it_knows() {
    let pins = Pins {
        present: key(1),
        next: None,
    };
    assert_eq!(
        pins.after(KeyWord::Only { present: key(9) }),
        None,
        "a key that was never pinned"
    );
    let new = KeyWord::New {
        present: key(9),
        next: key(1),
    };
    assert_eq!(pins.after(new), None);
}
