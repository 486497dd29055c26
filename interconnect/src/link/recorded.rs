//! What version 1 said on the wire, byte for byte: `tests/recorded/v1`.

use super::tests::{free_runtime, sides};
use super::*;
use crate::codec::tests::noise;
use crate::codec::{CompressMode, DiskOp, DiskWrite, Page};
use crate::epoch::{AuditSums, EpochMeta, EpochWriter};
use crate::frame::FrameKind;
use crate::ids::Epoch;
use bytes::Bytes;

pub(super) const VM: VmId = VmId([0x51; 16]);
pub(super) const GENERATION: Generation = Generation(7);
pub(super) const GUEST_PAGES: u64 = 64;
pub(super) const DISK_BYTES: u64 = 1 << 20;

/// Zero, packed and raw pages.
pub(super) fn pages(epoch: u64) -> Vec<(u64, Page)> {
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

pub(super) fn writes(epoch: u64) -> Vec<DiskWrite> {
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

pub(super) fn state(epoch: u64) -> Bytes {
    let mut state = noise(99, 3000);
    state[1500] = epoch.to_le_bytes()[0];
    state.into()
}

pub(super) fn meta(epoch: u64) -> EpochMeta {
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

#[test]
fn record() {
    let runtime = free_runtime();
    let (a, b) = sides(1);
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/recorded/v1");
    let write = |name: &str, bytes: &[u8]| std::fs::write(dir.join(name), bytes).unwrap();
    // The real dialler, against an endpoint that keeps what it says.
    let (one, _events) = Interconnect::start(a.config(&b), runtime.handle().clone()).unwrap();
    let (endpoint, _) = {
        let _entered = runtime.enter();
        transport::endpoint(&b.config(&a), 0).unwrap()
    };
    runtime.block_on(async {
        let connection = endpoint.accept().await.unwrap().await.unwrap();
        let (mut send, mut receive) = connection.accept_bi().await.unwrap();
        let mut hello = vec![0; 10];
        receive.read_exact(&mut hello).await.unwrap();
        let mut text = vec![0; usize::from(hello[8]) + usize::from(hello[9])];
        receive.read_exact(&mut text).await.unwrap();
        hello.extend(text);
        write("hello-dialler.bin", &hello);
        let _ = hello::send(&mut send, b.name, "pollux 0.1.0").await;
        while one.session().is_none() {
            tokio::task::yield_now().await;
        }
        let lane = one.open_epoch_lane(VM, GENERATION).unwrap();
        let mut writer = EpochWriter::new(VM, GENERATION, CompressMode::Adaptive);
        let mut send = |frame| lane.try_send(frame);
        for epoch in 1..=2 {
            writer.begin(Epoch(epoch));
            writer
                .pages(pages(epoch).iter().map(|(i, p)| (*i, p)), &mut send)
                .unwrap();
            writer.disk(&writes(epoch), &mut send).unwrap();
            writer.device_state(state(epoch), &mut send).unwrap();
            writer.finish(&meta(epoch), &mut send).unwrap();
        }
        drop(lane);
        let mut stream = connection.accept_uni().await.unwrap();
        write("lane.bin", &stream.read_to_end(1 << 20).await.unwrap());
        connection.close(0u32.into(), b"");
        endpoint.close(0u32.into(), b"");
        endpoint.wait_idle().await;
    });
    drop(endpoint);
    drop(one);
    // The real acceptor.
    let (a, b) = sides(1);
    let (two, _events) = Interconnect::start(b.config(&a), runtime.handle().clone()).unwrap();
    let (endpoint, client) = {
        let _entered = runtime.enter();
        transport::endpoint(&a.config(&b), 0).unwrap()
    };
    runtime.block_on(async {
        let connection = endpoint
            .connect_with(client, b.links[0], "pollux")
            .unwrap()
            .await
            .unwrap();
        let (mut send, mut receive) = connection.open_bi().await.unwrap();
        let _ = hello::send(&mut send, a.name, "pollux 0.1.0").await;
        let mut hello = vec![0; 10];
        receive.read_exact(&mut hello).await.unwrap();
        let mut text = vec![0; usize::from(hello[8]) + usize::from(hello[9])];
        receive.read_exact(&mut text).await.unwrap();
        hello.extend(text);
        write("hello-acceptor.bin", &hello);
        while two.session().is_none() {
            tokio::task::yield_now().await;
        }
        let mut acks = Vec::new();
        for epoch in 1..=2 {
            two.control(Frame::empty(
                FrameKind::EpochAck,
                VM,
                GENERATION,
                Epoch(epoch),
            ))
            .unwrap();
            let mut ack = vec![0; crate::frame::HEADER_BYTES];
            receive.read_exact(&mut ack).await.unwrap();
            acks.extend(ack);
        }
        write("acks.bin", &acks);
        connection.close(0u32.into(), b"");
    });
}
