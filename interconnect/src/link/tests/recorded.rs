//! What version 1 said on the wire, byte for byte: `tests/recorded/v1`.

use super::*;
use crate::codec::tests::noise;
use crate::codec::{DiskOp, DiskWrite, Page, PageContent};
use crate::epoch::{AuditSums, EpochAssembler, EpochLimits, EpochMeta};
use crate::frame::FrameKind;
use crate::ids::Epoch;
use bytes::Bytes;

const VM: VmId = VmId([0x51; 16]);
const GENERATION: Generation = Generation(7);
const GUEST_PAGES: u64 = 64;
const DISK_BYTES: u64 = 1 << 20;

/// Zero, packed and raw pages.
fn pages(epoch: u64) -> Vec<(u64, Page)> {
    (0..9)
        .map(|n| {
            let mut page = [0; 4096];
            match n % 3 {
                0 => {}
                1 => page.fill(u8::try_from(n + epoch).unwrap()),
                _ => page.copy_from_slice(&noise(n + epoch, 4096)),
            }
            (n * 7 + epoch, page)
        })
        .collect()
}

fn writes(epoch: u64) -> Vec<DiskWrite> {
    vec![
        DiskWrite {
            disk: 0,
            offset: 512 * epoch,
            op: DiskOp::Data(noise(epoch, 1024).into()),
        },
        DiskWrite {
            disk: 0,
            offset: 8192,
            op: DiskOp::Data(vec![3; 4096].into()),
        },
        DiskWrite {
            disk: 0,
            offset: 65_536,
            op: DiskOp::Zero { length: 4096 },
        },
        DiskWrite {
            disk: 0,
            offset: 131_072,
            op: DiskOp::Trim { length: 8192 },
        },
    ]
}

fn state(epoch: u64) -> Bytes {
    let mut state = noise(99, 3000);
    state[1500] = epoch.to_le_bytes()[0];
    state.into()
}

fn meta(epoch: u64) -> EpochMeta {
    EpochMeta {
        flush: epoch == 2,
        clock_ns: 1_000_000 * epoch,
        guest_pages: GUEST_PAGES,
        audit: (epoch == 2).then(|| AuditSums {
            memory: 0x1122,
            disks: vec![0x3344],
        }),
    }
}

fn recorded(name: &str) -> Bytes {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/recorded/v1");
    let path = std::path::Path::new(dir).join(name);
    Bytes::from(std::fs::read(&path).unwrap_or_else(|error| panic!("{path:?}: {error}")))
}

/// The side that dials is `castor`, the other `pollux`, as in the recording.
fn recorded_sides() -> (Side, Side) {
    loop {
        let (a, b) = sides(1);
        if a.name == "castor" {
            return (a, b);
        }
    }
}

/// The frames of the recorded lane, after its start.
fn recorded_frames() -> Vec<Frame> {
    let mut lane = recorded("lane.bin").slice(hello::LANE_BYTES..);
    let mut frames = Vec::new();
    while !lane.is_empty() {
        frames.push(crate::frame::decode(&mut lane).unwrap());
    }
    frames
}

async fn read_hello(receive: &mut quinn::RecvStream) -> Vec<u8> {
    let mut hello = vec![0; 10];
    receive.read_exact(&mut hello).await.unwrap();
    let mut text = vec![0; usize::from(hello[8]) + usize::from(hello[9])];
    receive.read_exact(&mut text).await.unwrap();
    hello.extend(text);
    hello
}

/// As today's hello, but offering what version 1 did.
fn as_of_version_1(mut hello: Vec<u8>) -> Vec<u8> {
    assert_eq!(hello[6..8], hello::PROTOCOL_VERSION.to_le_bytes());
    hello[6..8].copy_from_slice(&1u16.to_le_bytes());
    hello
}

#[test]
fn a_dialler_of_version_1_is_understood_and_answered_as_then() {
    let runtime = runtime();
    let (a, b) = recorded_sides();
    let mut two = start(b.config(&a), &runtime);
    let raw = a.raw_endpoint(&b, &runtime);
    let (connection, mut receive, _send) = runtime.block_on(async {
        let connection = raw.connect(b.links[0]).await;
        let (mut send, mut receive) = connection.open_bi().await.unwrap();
        send.write_all(&recorded("hello-dialler.bin"))
            .await
            .unwrap();
        let answer = as_of_version_1(read_hello(&mut receive).await);
        assert_eq!(answer, recorded("hello-acceptor.bin"));
        let mut lane = connection.open_uni().await.unwrap();
        lane.write_all(&recorded("lane.bin")).await.unwrap();
        lane.finish().unwrap();
        (connection, receive, send)
    });
    assert_eq!(two.up().1.version, 1);
    assert_eq!(two.interconnect.stats().version, 1);
    let mut rx = two.lane_of(VM);
    let mut assembler = EpochAssembler::new(
        GUEST_PAGES,
        EpochLimits::for_guest(GUEST_PAGES, vec![DISK_BYTES]),
    );
    assembler.expect(VM, GENERATION, Epoch(1));
    for n in 1..=2 {
        let epoch = loop {
            let frame = rx.blocking_recv().unwrap();
            if let Some(epoch) = assembler.push(frame).unwrap() {
                break epoch;
            }
        };
        assert_eq!(epoch.epoch, Epoch(n));
        assert_eq!(
            (&epoch.disk, &epoch.device_state, &epoch.meta),
            (&writes(n), &state(n), &meta(n))
        );
        let got: Vec<(u64, Page)> = epoch
            .pages()
            .map(|(index, content)| match content {
                PageContent::Raw(page) => (index, *page),
                _ => (index, [0; 4096]),
            })
            .collect();
        assert!(got == pages(n));
        let ack = Frame::empty(FrameKind::EpochAck, VM, GENERATION, Epoch(n));
        two.interconnect.control(ack).unwrap();
    }
    assert_eq!(rx.blocking_recv(), None);
    let mut acks = vec![0; recorded("acks.bin").len()];
    runtime.block_on(receive.read_exact(&mut acks)).unwrap();
    assert_eq!(acks, recorded("acks.bin"));
    connection.close(0u32.into(), b"over");
    assert!(two.down().1.contains("over"));
}

#[test]
fn to_an_acceptor_of_version_1_all_is_said_as_then() {
    let runtime = runtime();
    let (a, b) = recorded_sides();
    let raw = b.raw_endpoint(&a, &runtime);
    let mut one = start(a.config(&b), &runtime);
    let (connection, mut send, _receive) = runtime.block_on(async {
        let connection = raw.endpoint.accept().await.unwrap().await.unwrap();
        let (mut send, mut receive) = connection.accept_bi().await.unwrap();
        let said = as_of_version_1(read_hello(&mut receive).await);
        assert_eq!(said, recorded("hello-dialler.bin"));
        send.write_all(&recorded("hello-acceptor.bin"))
            .await
            .unwrap();
        (connection, send, receive)
    });
    assert_eq!(one.up().1.version, 1);
    let lane = one.interconnect.open_epoch_lane(VM, GENERATION).unwrap();
    for frame in recorded_frames() {
        lane.send_blocking(frame).unwrap();
    }
    // What version 1 does not know is refused here, not there.
    let probe = Frame::empty(FrameKind::Probe, VM, GENERATION, Epoch(0));
    assert!(matches!(
        lane.try_send(probe),
        Err(SendError::Version {
            version: 1,
            needed: 2,
            ..
        })
    ));
    let answer = Frame::empty(FrameKind::ProbeAck, VM, GENERATION, Epoch(0));
    assert!(matches!(
        one.interconnect.control(answer),
        Err(SendError::Version { .. })
    ));
    assert!(matches!(
        one.interconnect.open_io_lane(VM, GENERATION),
        Err(SendError::Version { .. })
    ));
    drop(lane);
    let said = runtime.block_on(async {
        let mut stream = connection.accept_uni().await.unwrap();
        let said = stream.read_to_end(1 << 20).await.unwrap();
        send.write_all(&recorded("acks.bin")).await.unwrap();
        said
    });
    assert!(said == recorded("lane.bin"));
    for n in 1..=2 {
        let frame = one.control_frame();
        assert_eq!((frame.kind, frame.epoch), (FrameKind::EpochAck, Epoch(n)));
    }
}
