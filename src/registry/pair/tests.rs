//! Both hosts in one process: the promises of every registry, and what a host does when its
//! partner is gone, with the real threads and files and a network of channels.

use super::copy::Side;
use super::core::SessionId;
use super::message::Message;
use super::shell::Event;
use super::*;
use crate::beat::{GREETING_BYTES, PoolKeys, SessionStart, load_keys, save_first_keys};
use crate::ha::time::Millis;
use crate::pool::HostName;
use crate::registry::suite::Store as SuiteStore;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Barrier, Mutex};

/// Ordinary enough for a busy machine: no test waits for one to end.
const LONG: Duration = Duration::from_secs(60);

/// What stands around a host, as a test turns it.
#[derive(Default)]
struct World {
    gateway: Option<Duration>,
    heard: Option<Duration>,
    fences: bool,
    /// Orders given, and what comes of the newest.
    ordered: u64,
    outcome: Option<bool>,
}

#[derive(Clone, Default)]
struct Around(Arc<Mutex<World>>);

impl Surroundings for Around {
    fn heard_age(&self) -> Option<Duration> {
        self.0.lock().unwrap().heard
    }

    fn gateway_age(&self) -> Option<Duration> {
        self.0.lock().unwrap().gateway
    }

    fn can_fence(&self) -> bool {
        self.0.lock().unwrap().fences
    }

    fn fence(&mut self) -> Result<(), String> {
        self.0.lock().unwrap().ordered += 1;
        Ok(())
    }

    fn call_off(&mut self) {
        self.0.lock().unwrap().outcome = None;
    }

    fn fenced(&mut self) -> Option<bool> {
        self.0.lock().unwrap().outcome.take()
    }
}

struct HostOfPair {
    registry: PairRegistry,
    tell: Sender<Event>,
    around: Around,
}

struct Pair {
    dirs: [tempfile::TempDir; 2],
    hosts: Mutex<[Option<HostOfPair>; 2]>,
    sessions: AtomicU64,
    opened: AtomicUsize,
}

const SIDES: [Side; 2] = [Side::Lower, Side::Higher];

fn pump(begin: &Barrier, messages: &Receiver<Message>, tell: &Sender<Event>, id: SessionId) {
    begin.wait();
    for message in messages.iter() {
        // As bytes, as on a wire.
        let bytes = message.encode().unwrap();
        let message = Message::decode(&bytes).unwrap();
        if tell.send(Event::Heard(id, Some(message))).is_err() {
            return;
        }
    }
    let _ = tell.send(Event::Down(id));
}

impl Pair {
    fn new() -> Self {
        let pair = Self {
            dirs: [(); 2].map(|()| tempfile::tempdir().unwrap()),
            hosts: Mutex::new([None, None]),
            sessions: AtomicU64::new(0),
            opened: AtomicUsize::new(0),
        };
        for h in 0..2 {
            pair.start(h);
        }
        pair
    }

    fn in_sync() -> Self {
        let pair = Self::new();
        pair.connect();
        for h in 0..2 {
            pair.wait_until_it_answers(h);
        }
        pair
    }

    fn start(&self, h: usize) {
        let around = Around::default();
        let options = PairOptions {
            pool: [5; 16],
            side: SIDES[h],
            partner: ["higher", "lower"][h].to_owned(),
            dir: self.dirs[h].path().to_owned(),
            patience: Patience {
                silence: Millis(1),
                hesitation: Millis(0),
                stall: Millis(u64::MAX),
            },
            call_wait: LONG,
        };
        // The thread of the life before gives the copy back when it has ended.
        let (registry, tell) = loop {
            match PairRegistry::begin(options.clone(), Box::new(around.clone())) {
                Ok(begun) => break begun,
                Err(PairError::Store(StoreError::Locked(_))) => std::thread::yield_now(),
                Err(e) => panic!("{e}"),
            }
        };
        self.hosts.lock().unwrap()[h] = Some(HostOfPair {
            registry,
            tell,
            around,
        });
    }

    /// The host loses power: nothing of it is left but its file.
    fn kill(&self, h: usize) {
        let host = self.hosts.lock().unwrap()[h].take().unwrap();
        let _ = host.tell.send(Event::End);
    }

    fn connect(&self) {
        let id = SessionId(self.sessions.fetch_add(1, Ordering::SeqCst) + 1);
        let tells = [0, 1].map(|h| self.tell(h));
        // Nobody hears anything of a session before it knows of it.
        let begin = Arc::new(Barrier::new(3));
        for (h, tell) in tells.iter().enumerate() {
            let (out, messages) = sync_channel(1000);
            let to = tells[1 - h].clone();
            let cut = tells[1 - h].clone();
            let begin = Arc::clone(&begin);
            let connection = Connection {
                id,
                out,
                writer: std::thread::spawn(move || pump(&begin, &messages, &to, id)),
                cut: Box::new(move || {
                    let _ = cut.send(Event::Down(id));
                }),
            };
            tell.send(Event::Up(connection)).unwrap();
        }
        begin.wait();
    }

    fn tell(&self, h: usize) -> Sender<Event> {
        self.hosts.lock().unwrap()[h].as_ref().unwrap().tell.clone()
    }

    fn registry(&self, h: usize) -> PairRegistry {
        self.hosts.lock().unwrap()[h]
            .as_ref()
            .unwrap()
            .registry
            .clone()
    }

    fn around(&self, h: usize) -> Around {
        self.hosts.lock().unwrap()[h]
            .as_ref()
            .unwrap()
            .around
            .clone()
    }

    fn cut(&self) {
        let id = SessionId(self.sessions.load(Ordering::SeqCst));
        for h in 0..2 {
            let _ = self.tell(h).send(Event::Down(id));
        }
    }

    fn wait_until_it_answers(&self, h: usize) {
        let mut registry = self.registry(h);
        while registry.read("").is_err() {
            std::thread::yield_now();
        }
    }

    /// Change something, however long it takes until that is possible.
    fn change(&self, h: usize, key: &str) {
        let mut registry = self.registry(h);
        while registry.compare_and_set(key, None, b"v").is_err() {
            std::thread::yield_now();
        }
    }
}

impl SuiteStore for Pair {
    /// One and the other in turn.
    fn open(&self) -> Box<dyn Registry> {
        let n = self.opened.fetch_add(1, Ordering::SeqCst);
        Box::new(self.registry(n % 2))
    }
}

crate::registry::suite::registry_suite!(Pair::in_sync());

fn refused(result: Result<CasOutcome, RegistryError>) -> String {
    match result {
        Err(e @ RegistryError::NotDone { .. }) => e.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_host_that_starts_answers_nothing_before_it_is_in_sync() {
    let pair = Pair::new();
    let mut lower = pair.registry(0);
    assert!(lower.read("k").unwrap_err().to_string().contains("in sync"));
    assert!(refused(lower.compare_and_set("k", None, b"v")).contains("in sync"));
    pair.connect();
    pair.change(0, "k");
    pair.kill(0);
    pair.start(0);
    let told = pair.registry(0).read("k").unwrap_err().to_string();
    assert!(told.contains("in sync"), "{told}");
    pair.connect();
    pair.wait_until_it_answers(0);
    assert_eq!(pair.registry(0).read("k").unwrap().unwrap().version, 1);
}

#[test]
fn cut_off_both_read_on_and_change_nothing() {
    let pair = Pair::in_sync();
    pair.change(1, "k");
    pair.cut();
    for h in 0..2 {
        let mut registry = pair.registry(h);
        assert_eq!(registry.read("k").unwrap().unwrap().version, 1);
        let told = refused(registry.compare_and_set("k", Some(1), b"w"));
        assert!(told.contains("confirmed off"), "{told}");
    }
    pair.connect();
    pair.change(0, "l");
    assert_eq!(pair.registry(1).list("").unwrap().len(), 2);
}

#[test]
fn only_a_confirmed_power_off_and_a_gateway_let_a_host_go_on_alone() {
    for h in 0..2 {
        let pair = Pair::in_sync();
        pair.change(0, "before");
        let around = pair.around(h);
        pair.kill(1 - h);
        let mut registry = pair.registry(h);
        let alone =
            |registry: &mut PairRegistry| registry.compare_and_set("alone", None, b"v").is_ok();
        around.0.lock().unwrap().fences = true;
        assert!(!alone(&mut registry), "no gateway");
        assert_eq!(around.0.lock().unwrap().ordered, 0);
        {
            let mut world = around.0.lock().unwrap();
            world.gateway = Some(Duration::ZERO);
            world.heard = Some(Duration::ZERO);
        }
        assert!(!alone(&mut registry), "heard by a heartbeat");
        assert_eq!(around.0.lock().unwrap().ordered, 0);
        around.0.lock().unwrap().heard = None;
        while around.0.lock().unwrap().ordered == 0 {
            std::thread::yield_now();
        }
        assert!(!alone(&mut registry), "not confirmed yet");
        around.0.lock().unwrap().outcome = Some(true);
        pair.change(h, "alone");

        // Its copy stands alone, durably.
        pair.kill(h);
        pair.start(h);
        assert_eq!(pair.registry(h).read("alone").unwrap().unwrap().version, 1);

        // And the partner that comes back has a stale one, until it is copied.
        pair.start(1 - h);
        assert!(pair.registry(1 - h).read("before").is_err());
        pair.connect();
        pair.wait_until_it_answers(1 - h);
        assert_eq!(pair.registry(1 - h).list("").unwrap().len(), 2);
        pair.change(1 - h, "together");
        pair.cut();
        refused(pair.registry(h).compare_and_set("x", None, b"v"));
    }
}

#[test]
fn a_farewell_lets_the_partner_go_on_alone_without_a_fence_agent() {
    let pair = Pair::in_sync();
    let mut leaver = pair.registry(1);
    leaver.leave();
    assert!(leaver.read("k").unwrap_err().to_string().contains("ends"));
    pair.change(0, "alone");
}

#[test]
fn a_copy_that_cannot_be_written_is_as_a_crash_and_mends_itself() {
    for after in [false, true] {
        let pair = Pair::in_sync();
        pair.tell(0).send(Event::FailStore(after)).unwrap();
        // The lower side's commit fails: the higher one holds it, prepared, and it counts.
        let lost = pair.registry(0).compare_and_set("k", None, b"v");
        assert!(
            matches!(lost, Err(RegistryError::Unknown { .. })),
            "{lost:?}"
        );
        assert!(pair.registry(0).read("k").is_err());
        // Its next life begins in its own time, and takes no connection before.
        let mut pause = Duration::from_millis(50);
        while pair.registry(0).read("").is_err() {
            pair.connect();
            std::thread::sleep(pause);
            pause *= 2;
        }
        for h in 0..2 {
            assert_eq!(pair.registry(h).read("k").unwrap().unwrap().version, 1);
        }
    }
}

#[test]
fn a_copy_that_is_gone_is_copied_from_a_partner_that_lives_and_from_no_other() {
    let pair = Pair::in_sync();
    pair.change(0, "k");
    pair.kill(1);
    std::fs::remove_file(pair.dirs[1].path().join("registry.pair")).unwrap();
    pair.start(1);
    pair.connect();
    pair.wait_until_it_answers(1);
    assert_eq!(pair.registry(1).read("k").unwrap().unwrap().version, 1);

    for h in 0..2 {
        pair.kill(h);
    }
    std::fs::remove_file(pair.dirs[1].path().join("registry.pair")).unwrap();
    for h in 0..2 {
        pair.start(h);
    }
    pair.connect();
    // Whatever was said is through when these are answered twice.
    for h in [0, 1, 0, 1] {
        assert!(pair.registry(h).read("k").is_err());
    }

    // Unless somebody who knows says so.
    pair.kill(0);
    let changes = loop {
        match declare_alone(pair.dirs[0].path(), [5; 16]) {
            Ok(changes) => break changes,
            Err(StoreError::Locked(_)) => std::thread::yield_now(),
            Err(e) => panic!("{e}"),
        }
    };
    assert_eq!(changes, 1);
    pair.start(0);
    assert_eq!(pair.registry(0).read("k").unwrap().unwrap().version, 1);
    pair.connect();
    pair.wait_until_it_answers(1);
}

/// A host of a pair on this machine, with real sockets.
fn start_on(h: usize, port: u16, keys: &PoolKeys, dir: &std::path::Path) -> (PairRegistry, Around) {
    if load_keys(dir).unwrap().is_none() {
        save_first_keys(dir, keys).unwrap();
    }
    let name = |h: usize| HostName::new(["a", "b"][h]).unwrap();
    let address = |h: usize| SocketAddr::from(([127, 0, 0, [1, 2][h]], port));
    let around = Around::default();
    let options = PairOptions {
        pool: keys.pool().0,
        side: SIDES[h],
        partner: name(1 - h).to_string(),
        dir: dir.to_owned(),
        patience: Patience {
            silence: Millis(u64::MAX),
            hesitation: Millis(0),
            stall: Millis(u64::MAX),
        },
        call_wait: LONG,
    };
    let nowhere = SocketAddr::from(([127, 0, 0, 9], 1));
    let wires = WiresOptions {
        me: name(h),
        partner: name(1 - h),
        side: SIDES[h],
        // The first network is dead: nobody listens there.
        routes: [nowhere, address(1 - h)]
            .map(|peer| Route {
                local: if peer == nowhere { nowhere } else { address(h) },
                peer,
                device: None,
            })
            .to_vec(),
        state_dir: dir.to_owned(),
    };
    let registry = PairRegistry::start(options, wires, Box::new(around.clone())).unwrap();
    (registry, around)
}

fn eventually_reads(registry: &mut PairRegistry) {
    while registry.read("").is_err() {
        std::thread::yield_now();
    }
}

#[test]
fn over_sockets_two_hosts_find_each_other_and_no_stranger_gets_between_them() {
    let dirs = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let keys = PoolKeys::create().unwrap();
    let free = TcpListener::bind("127.0.0.2:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let (mut a, _) = start_on(0, port, &keys, dirs[0].path());
    let (mut b, _) = start_on(1, port, &keys, dirs[1].path());
    eventually_reads(&mut a);
    eventually_reads(&mut b);
    // As long as a message can be, and longer than any buffer on the way.
    let value = vec![7; VALUE_BYTES_MAX];
    assert_eq!(
        b.compare_and_set("k", None, &value).unwrap(),
        CasOutcome::Won { version: 1 }
    );
    assert_eq!(a.read("k").unwrap().unwrap().value, value);

    let mut stranger = TcpStream::connect(("127.0.0.2", port)).unwrap();
    let foreign = PoolKeys::create().unwrap();
    let start = SessionStart::new(&foreign, &HostName::new("a").unwrap()).unwrap();
    stranger.write_all(start.greeting()).unwrap();
    let mut told = Vec::new();
    // It is told a greeting, and nothing else.
    let _ = stranger.read_to_end(&mut told);
    assert_eq!(told.len(), GREETING_BYTES);
    assert_eq!(
        a.compare_and_set("k", Some(1), b"w").unwrap(),
        CasOutcome::Won { version: 2 }
    );

    // One that starts again is found again, with what it held.
    drop(b);
    let mut again = loop {
        let unlocked = store::Store::open(
            dirs[1].path(),
            Owner {
                pool: keys.pool().0,
                side: Side::Higher,
            },
        );
        if unlocked.is_ok() {
            drop(unlocked);
            break start_on(1, port, &keys, dirs[1].path()).0;
        }
        std::thread::yield_now();
    };
    eventually_reads(&mut again);
    assert_eq!(again.read("k").unwrap().unwrap().version, 2);
    // A farewell goes through before the connection does.
    again.leave();
    while a.compare_and_set("alone", None, b"v").is_err() {
        std::thread::yield_now();
    }
}
