//! Two ends of an interconnect over loopback in this process, and beside them a bare TCP
//! stream: what an epoch costs on either.

use anyhow::{Context, Result, bail};
use interconnect::codec::{PAGE_BYTES, Page, PageContent};
use interconnect::epoch::{EpochAssembler, EpochLimits};
use interconnect::frame::{Frame, FrameKind};
use interconnect::identity::Identity;
use interconnect::ids::{Epoch, Generation, VmId};
use interconnect::link::{EpochLane, Interconnect, LinkAddr, LinkEvent, LinkSettings, PairConfig};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

/// The VM whose epochs are sent.
pub const VM: VmId = VmId([1; 16]);
/// One epoch.
const ACK_MAX: Duration = Duration::from_secs(20);

/// What the standby does before it acknowledges.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AckAfter {
    /// Everything came and the digest holds: what the product does.
    Whole,
    /// And it is applied to the memory, patches checked.
    Applied,
}

/// Memory of the standby.
pub type Ram = Arc<Mutex<Vec<Page>>>;

/// Primary and standby.
pub struct Pair {
    a: Interconnect,
    _b: Interconnect,
    acks: mpsc::Receiver<(Epoch, Instant)>,
    lanes: mpsc::Receiver<Standby>,
    _runtimes: (Runtime, Runtime),
}

/// The standby of one lane.
struct Standby(JoinHandle<Result<()>>);

/// A lane and the standby at its end.
pub struct Lane {
    /// Epochs go here.
    pub lane: EpochLane,
    standby: Standby,
}

fn runtime() -> std::io::Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
}

fn free_addr() -> std::io::Result<SocketAddr> {
    UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()
}

impl Pair {
    /// Two ends that stand. Each lane's epochs are applied to `ram`.
    ///
    /// # Errors
    /// What could not be started.
    pub fn start(ram: &Ram, ack_after: AckAfter) -> Result<Self> {
        let (id_a, id_b) = (
            Arc::new(Identity::generate()?),
            Arc::new(Identity::generate()?),
        );
        let (at_a, at_b) = (free_addr()?, free_addr()?);
        let config =
            |me: &Arc<Identity>, peer: &Arc<Identity>, local, remote, names: (&str, &str)| {
                PairConfig {
                    identity: Arc::clone(me),
                    me: names.0.to_owned(),
                    peer: names.1.to_owned(),
                    peer_fingerprint: peer.fingerprint(),
                    links: vec![LinkAddr {
                        local,
                        peer: remote,
                    }],
                    settings: LinkSettings::default(),
                    on_ack: None,
                }
            };
        let (ack_tx, acks) = mpsc::channel();
        let mut config_a = config(&id_a, &id_b, at_a, at_b, ("a", "b"));
        config_a.on_ack = Some(Arc::new(move |frame: Frame| {
            let _ = ack_tx.send((frame.epoch, Instant::now()));
        }));
        let (runtime_a, runtime_b) = (runtime()?, runtime()?);
        let (a, mut events_a) = Interconnect::start(config_a, runtime_a.handle().clone())?;
        let (b, mut events_b) = Interconnect::start(
            config(&id_b, &id_a, at_b, at_a, ("b", "a")),
            runtime_b.handle().clone(),
        )?;
        for events in [&mut events_a, &mut events_b] {
            loop {
                match events.blocking_recv() {
                    Some(LinkEvent::Up { .. }) => break,
                    Some(_) => {}
                    None => bail!("the interconnect ended before it was up"),
                }
            }
        }
        let (lane_tx, lanes) = mpsc::channel();
        let (link, ram) = (b.clone(), Arc::clone(ram));
        std::thread::spawn(move || {
            while let Some(event) = events_b.blocking_recv() {
                if let LinkEvent::EpochLane { rx, generation, .. } = event {
                    let (link, ram) = (link.clone(), Arc::clone(&ram));
                    let stand = move || stand(rx, generation, &link, &ram, ack_after);
                    let _ = lane_tx.send(Standby(std::thread::spawn(stand)));
                }
            }
        });
        Ok(Self {
            a,
            _b: b,
            acks,
            lanes,
            _runtimes: (runtime_a, runtime_b),
        })
    }

    /// A fresh lane.
    ///
    /// # Errors
    /// If the session is gone.
    pub fn lane(&self, generation: Generation) -> Result<Lane> {
        let lane = self.a.open_epoch_lane(VM, generation)?;
        // The partner hears of it with its first frame.
        lane.send_blocking(Frame::empty(
            FrameKind::SeedBlocks,
            VM,
            generation,
            Epoch(0),
        ))?;
        let standby = self.lanes.recv_timeout(ACK_MAX)?;
        Ok(Lane { lane, standby })
    }

    /// Wait until `epoch` is acknowledged; when it was.
    ///
    /// # Errors
    /// If it is not in time.
    pub fn acknowledged(&self, epoch: Epoch) -> Result<Instant> {
        let (found, at) = self
            .acks
            .recv_timeout(ACK_MAX)
            .with_context(|| format!("epoch {epoch} is not acknowledged"))?;
        anyhow::ensure!(
            found == epoch,
            "epoch {found} and not {epoch} is acknowledged"
        );
        Ok(at)
    }
}

impl Lane {
    /// End it; everything was applied then.
    ///
    /// # Errors
    /// What the standby did not like.
    pub fn end(self) -> Result<()> {
        drop(self.lane);
        match self.standby.0.join() {
            Ok(result) => result,
            Err(_) => bail!("the standby panicked"),
        }
    }
}

fn stand(
    mut rx: tokio::sync::mpsc::Receiver<Frame>,
    generation: Generation,
    link: &Interconnect,
    ram: &Ram,
    ack_after: AckAfter,
) -> Result<()> {
    let mut ram = ram.lock().unwrap_or_else(PoisonError::into_inner);
    let guest_pages = ram.len() as u64;
    let mut assembler =
        EpochAssembler::new(guest_pages, EpochLimits::for_guest(guest_pages, vec![]));
    assembler.expect(VM, generation, Epoch(1));
    while let Some(frame) = rx.blocking_recv() {
        if frame.kind == FrameKind::SeedBlocks {
            continue;
        }
        let Some(whole) = assembler.push(frame)? else {
            continue;
        };
        let ack = Frame::empty(FrameKind::EpochAck, VM, generation, whole.epoch);
        if ack_after == AckAfter::Whole {
            link.control(ack.clone())?;
        }
        for (index, content) in whole.pages() {
            let page = &mut ram[usize::try_from(index)?];
            match content {
                PageContent::Zero => *page = [0; PAGE_BYTES],
                PageContent::Raw(new) => *page = *new,
                PageContent::Patch(patch) => patch.apply(page)?,
            }
        }
        if ack_after == AckAfter::Applied {
            link.control(ack)?;
        }
    }
    Ok(())
}

/// The bare thing: bytes over TCP on loopback, one byte back when all are there.
pub struct Echo {
    stream: TcpStream,
    staging: Vec<u8>,
}

impl Echo {
    /// A stream and the thread at its end.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn start() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let stream = TcpStream::connect(listener.local_addr()?)?;
        let (mut peer, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        peer.set_nodelay(true)?;
        std::thread::spawn(move || -> std::io::Result<()> {
            let mut buffer = Vec::new();
            loop {
                let mut length = [0; 8];
                peer.read_exact(&mut length)?;
                let length = usize::try_from(u64::from_le_bytes(length)).unwrap_or(0);
                if buffer.len() < length {
                    buffer.resize(length, 0);
                }
                peer.read_exact(&mut buffer[..length])?;
                peer.write_all(&[1])?;
            }
        });
        Ok(Self {
            stream,
            staging: Vec::new(),
        })
    }

    /// Copy the pages together, send them, wait for the byte.
    ///
    /// # Errors
    /// If the stream broke.
    pub fn send(&mut self, pages: &[(u64, Box<Page>)]) -> Result<Duration> {
        let begun = Instant::now();
        self.staging.clear();
        for (_, page) in pages {
            self.staging.extend_from_slice(&page[..]);
        }
        let length = self.staging.len() as u64;
        self.stream.write_all(&length.to_le_bytes())?;
        self.stream.write_all(&self.staging)?;
        self.stream.read_exact(&mut [0])?;
        Ok(begun.elapsed())
    }
}
