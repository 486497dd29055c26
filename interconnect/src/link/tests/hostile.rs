//! A partner that breaks the protocol, floods or stalls: the session ends with a reason, and
//! the next one is as good as the first.

use super::*;
use crate::lane::wire::{
    JOIN_BYTES, Join, JoinKind, LaneAck, LaneStart, SegmentHeader, control_segment_head,
};
use crate::lane::{LANE_WINDOW_BYTES, LaneClass, LaneId, LinkIndex};

/// A partner made by hand, as the side that dials.
struct Partner {
    connection: quinn::Connection,
    send: quinn::SendStream,
    receive: quinn::RecvStream,
}

struct Stage {
    two: Running,
    raw: Raw,
    to: SocketAddr,
    me: &'static str,
    runtime: Runtime,
    nonce: u8,
}

fn stage() -> Stage {
    let runtime = runtime();
    let (a, b) = sides(1);
    Stage {
        two: start(b.config(&a), &runtime),
        raw: a.raw_endpoint(&b, &runtime),
        to: b.links[0],
        me: a.name,
        runtime,
        nonce: 0,
    }
}

fn join_of(kind: JoinKind, nonce: u8) -> Join {
    Join {
        kind,
        link: LinkIndex(0),
        nonce: [nonce; 16],
        window_bytes: LANE_WINDOW_BYTES,
        features: 0,
    }
}

impl Stage {
    /// Dial and say hello, offering up to version 9.
    fn hello(&self) -> Partner {
        self.runtime.block_on(async {
            let connection = self.raw.connect(self.to).await;
            let (mut send, mut receive) = connection.open_bi().await.unwrap();
            let mut hello = b"PLXH\x02\0\x09\0".to_vec();
            hello.extend([u8::try_from(self.me.len()).unwrap(), 2]);
            hello.extend(self.me.as_bytes());
            hello.extend(b"b9");
            send.write_all(&hello).await.unwrap();
            let mut fixed = [0; 10];
            receive.read_exact(&mut fixed).await.unwrap();
            let mut text = vec![0; usize::from(fixed[8]) + usize::from(fixed[9])];
            receive.read_exact(&mut text).await.unwrap();
            Partner {
                connection,
                send,
                receive,
            }
        })
    }

    fn ask(&self, partner: &mut Partner, join: &Join) -> Option<Join> {
        self.runtime.block_on(async {
            partner.send.write_all(&join.encode()).await.unwrap();
            let mut answer = [0; JOIN_BYTES];
            partner.receive.read_exact(&mut answer).await.ok()?;
            Some(Join::parse(&answer).unwrap())
        })
    }

    /// A new session, up on the other side.
    fn joined(&mut self) -> Partner {
        let mut partner = self.hello();
        self.nonce += 1;
        let answer = self.ask(&mut partner, &join_of(JoinKind::New, self.nonce));
        assert_eq!(answer.unwrap().kind, JoinKind::Joined);
        assert_eq!(self.two.up().1.version, 2);
        partner
    }

    fn closed(&self, partner: &Partner) -> String {
        self.runtime
            .block_on(async { tokio::time::timeout(PATIENCE, partner.connection.closed()).await })
            .expect("closed in time")
            .to_string()
    }

    /// A lane's stream that says this.
    fn say_on_lane(&self, partner: &Partner, lane: u32, bytes: &[u8]) {
        self.runtime.block_on(async {
            let mut stream = partner.connection.open_uni().await.unwrap();
            let start = LaneStart {
                lane: LaneId(lane),
                class: LaneClass::Epoch,
                vm: VM,
                generation: Generation(1),
                answers: LaneId(0),
            };
            stream.write_all(&start.encode()).await.unwrap();
            let _ = stream.write_all(bytes).await;
            // As a lane goes on, its stream does.
            std::mem::forget(stream);
        });
    }
}

fn segment(offset: u64, content: &[u8]) -> Vec<u8> {
    let header = SegmentHeader {
        offset,
        bytes: u32::try_from(content.len()).unwrap(),
        fin: false,
        frame_end: false,
    };
    [&header.encode()[..], content].concat()
}

fn encoded(frame: &Frame) -> Vec<u8> {
    [&frame.header().unwrap()[..], &frame.payload].concat()
}

#[test]
fn what_breaks_the_protocol_ends_the_session_with_a_reason() {
    let mut stage = stage();
    let ack = encoded(&Frame::empty(
        FrameKind::EpochAck,
        VM,
        Generation(1),
        Epoch(1),
    ));
    let mut damaged = encoded(&frame(FrameKind::Pages, 1, vec![1; 100]));
    damaged[20] ^= 1;
    let mut huge = segment(0, b"x");
    huge[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    let beyond = segment(LANE_WINDOW_BYTES, b"x");
    let on_lane: [(&[u8], &str); 5] = [
        (&huge, "segment of 4294967295 bytes"),
        (&beyond, "as far as the window goes"),
        (&segment(0, &ack), "EpochAck frame on an epoch lane"),
        (&segment(0, &damaged), "damaged"),
        (&segment(0, &[0; 60]), "magic"),
    ];
    for (bytes, want) in on_lane {
        let partner = stage.joined();
        stage.say_on_lane(&partner, 1, bytes);
        let _rx = stage.two.lane();
        let reason = stage.two.down().1;
        assert!(reason.contains(want), "{reason}, not {want}");
        assert!(stage.closed(&partner).contains(want));
    }
    let unsent = LaneAck {
        lane: LaneId(0),
        delivered: 1000,
        received: 1000,
    };
    let pages = encoded(&frame(FrameKind::Pages, 1, vec![1; 100]));
    let header = SegmentHeader {
        offset: 0,
        bytes: u32::try_from(pages.len()).unwrap(),
        fin: false,
        frame_end: true,
    };
    let control = [&control_segment_head(&header)[..], &pages].concat();
    let on_control: [(&[u8], &str); 4] = [
        (&unsent.encode(), "of which 0 were sent"),
        (b"\x01\0\0\0\xff\xff\xff\xff", "record of type 1"),
        (b"\x09\0\0\0\x01\0\0\0", "unknown"),
        (&control, "Pages frame on the control lane"),
    ];
    for (bytes, want) in on_control {
        let mut partner = stage.joined();
        stage
            .runtime
            .block_on(partner.send.write_all(bytes))
            .unwrap();
        let reason = stage.two.down().1;
        assert!(reason.contains(want), "{reason}, not {want}");
        assert!(stage.closed(&partner).contains(want));
    }
}

#[test]
fn more_lanes_than_allowed_end_the_session() {
    let mut stage = stage();
    let partner = stage.joined();
    let mut lanes = Vec::new();
    for lane in 1..=140 {
        stage.say_on_lane(&partner, lane, b"");
        if lane <= 128 {
            lanes.push(stage.two.lane());
        }
        if partner.connection.close_reason().is_some() {
            break;
        }
    }
    let reason = stage.two.down().1;
    assert!(reason.contains("more than 128 lanes"), "{reason}");
}

#[test]
fn a_join_that_makes_no_sense_changes_nothing_for_the_session_that_stands() {
    let mut stage = stage();
    let standing = stage.joined();
    // One of a session that is not known: told so.
    let mut other = stage.hello();
    let answer = stage.ask(&mut other, &join_of(JoinKind::Resume, 77));
    assert_eq!(answer.unwrap().kind, JoinKind::Unknown);
    drop(other);
    // A replay of the one that started this session, and answers instead of questions.
    for join in [
        join_of(JoinKind::New, stage.nonce),
        join_of(JoinKind::Joined, stage.nonce),
        join_of(JoinKind::Unknown, stage.nonce),
    ] {
        let mut other = stage.hello();
        assert_eq!(stage.ask(&mut other, &join), None);
        stage.closed(&other);
    }
    // Not a Join, one of another layout, one with a window in which nothing fits.
    for at in [0, 4, 6, 31] {
        let mut bytes = join_of(JoinKind::Resume, stage.nonce).encode();
        bytes[at] ^= 0x7f;
        if at == 31 {
            bytes[24..32].fill(0);
        }
        let mut other = stage.hello();
        stage
            .runtime
            .block_on(other.send.write_all(&bytes))
            .unwrap();
        stage.closed(&other);
    }
    assert_eq!(standing.connection.close_reason(), None);
    assert_eq!(stage.two.interconnect.session(), Some(SessionId(1)));
    // And the right one adds its connection.
    let mut more = stage.hello();
    let answer = stage.ask(&mut more, &join_of(JoinKind::Resume, stage.nonce));
    assert_eq!(answer.unwrap().kind, JoinKind::Joined);
    assert_eq!(stage.two.interconnect.session(), Some(SessionId(1)));
    // An old session's nonce starts nothing, however new it says it is.
    let _newest = stage.joined();
    let mut old = stage.hello();
    assert_eq!(stage.ask(&mut old, &join_of(JoinKind::New, 1)), None);
    stage.closed(&old);
    assert_eq!(stage.two.interconnect.session(), Some(SessionId(2)));
}

#[test]
fn a_partner_that_reads_nothing_stops_this_side_at_its_bounds() {
    let mut stage = stage();
    let partner = stage.joined();
    let link = &stage.two.interconnect;
    let lane = link.open_epoch_lane(VM, Generation(1)).unwrap();
    let payload = bytes::Bytes::from(noise(1, 1 << 20));
    let (mut bulk, mut full) = (0, 0);
    while full < 1000 {
        let frame = Frame {
            payload: payload.clone(),
            ..frame(FrameKind::Pages, 0, vec![])
        };
        match lane.try_send(frame) {
            Ok(()) => (bulk, full) = (bulk + 1, 0),
            Err(SendError::Full { .. }) => {
                full += 1;
                std::thread::yield_now();
            }
            Err(other) => panic!("{other}"),
        }
    }
    assert!(bulk <= 20, "{bulk} MiB of a lane with a window of 16");
    let mut control = 0;
    let error = loop {
        match link.control(frame(FrameKind::Control, 0, vec![1; 100_000])) {
            Ok(()) => control += 1,
            Err(error) => break error,
        }
        assert!(control < 1000);
    };
    assert!(matches!(error, SendError::Full { .. }), "{error}");
    assert_eq!(partner.connection.close_reason(), None);
    let pressure = lane.pressure();
    assert!(pressure.unacked_bytes <= LANE_WINDOW_BYTES && pressure.queued_bytes > 0);
}
