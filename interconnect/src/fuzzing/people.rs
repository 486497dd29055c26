//! What two hosts say before they trust each other, what people type, and link tests.

use super::Script;
use crate::identity::Fingerprint;
use crate::identity::code::{Code, Exchange, MESSAGE_FIXED_BYTES, Message, Nonce, Party, Progress};
use crate::probe::wire::{Piece, Talk};

/// A message off the wire.
fn message(bytes: &[u8]) -> Option<Message> {
    let (fixed, name) = bytes.split_first_chunk::<MESSAGE_FIXED_BYTES>()?;
    assert!(Message::name_bytes(fixed).is_ok() || Message::parse(fixed, name).is_err());
    let message = Message::parse(fixed, name).ok()?;
    assert_eq!(message.to_bytes(), bytes);
    Some(message)
}

fn side(dials: bool) -> Exchange {
    let party = |number: u8| Party {
        fingerprint: Fingerprint([number; 32]),
        name: format!("host {number}"),
    };
    let (me, peer) = (party(u8::from(dials)), Fingerprint([u8::from(!dials); 32]));
    Exchange::new(dials, me, peer, Nonce([7 + u8::from(dials); 32])).expect("two identities")
}

/// Byte 0: 0 messages of any content to the acceptor, 1 to the dialler, else an exchange in
/// which each message is damaged as the script says.
pub(super) fn meeting(data: &[u8]) {
    let mut script = Script(data);
    match script.u8() {
        dials @ 0..=1 => {
            let mut side = side(dials == 1);
            side.begin();
            while !script.is_empty() {
                let bytes = MESSAGE_FIXED_BYTES + usize::from(script.u8());
                let Some(message) = message(script.take(bytes)) else {
                    continue;
                };
                let code = side.handle(message).is_ok_and(|step| step.code.is_some());
                assert!(!code || side.counts());
            }
        }
        _ => {
            let (mut dialler, mut acceptor) = (side(true), side(false));
            let mut damaged = false;
            let mut over_the_wire = |message: Message| {
                let mut bytes = message.to_bytes();
                let at = usize::from(script.u8()) % bytes.len();
                let flip = script.u8();
                bytes[at] ^= flip;
                damaged |= flip != 0;
                self::message(&bytes)
            };
            let told = |step: Progress| (step.send, step.code);
            let Some(commit) = dialler.begin().and_then(&mut over_the_wire) else {
                return;
            };
            let Ok((Some(answer), None)) = acceptor.handle(commit).map(told) else {
                return;
            };
            let Some(answer) = over_the_wire(answer) else {
                return;
            };
            let Ok((Some(reveal), Some((_, ours)))) = dialler.handle(answer).map(told) else {
                return;
            };
            let Some(reveal) = over_the_wire(reveal) else {
                return;
            };
            if let Ok((None, Some((_, theirs)))) = acceptor.handle(reveal).map(told) {
                assert!(damaged || ours == theirs);
                assert_eq!(theirs.to_string().parse(), Ok(theirs));
            }
        }
    }
}

/// What people type.
pub(super) fn texts(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if let Ok(code) = text.parse::<Code>() {
        assert_eq!(code.to_string().parse(), Ok(code));
    }
    if let Ok(fingerprint) = text.parse::<Fingerprint>() {
        assert_eq!(fingerprint.to_string().parse(), Ok(fingerprint));
    }
}

/// Payloads of `Probe` and `ProbeAck` frames.
pub(super) fn probe(data: &[u8]) {
    if let Ok(talk) = Talk::parse(data) {
        assert_eq!(Talk::parse(&talk.to_bytes()), Ok(talk));
    }
    if let Ok(piece) = Piece::parse(data) {
        assert_eq!(Piece::parse(&piece.to_bytes(data.len(), &[])), Ok(piece));
    }
}
