//! What is asked of a gateway and what counts as its answer. Pure.
//!
//! ICMP echo (RFC 792) and ICMPv6 echo (RFC 4443): type, code, checksum, identifier, sequence
//! number, and data that comes back as it was. The data holds a random token, so that nobody
//! who cannot read the requests can answer them.

use std::net::IpAddr;
use std::time::Duration;

/// Requests whose answers still count: a minute at the default period. An answer that is later
/// says nothing about now.
const OUTSTANDING: usize = 64;
/// Type, code, checksum, identifier, sequence number.
const HEADER_BYTES: usize = 8;
const MAGIC: [u8; 4] = *b"PLXG";
const TOKEN_BYTES: usize = 16;
/// Size of a request and of its answer, in bytes.
pub(super) const MESSAGE_BYTES: usize = HEADER_BYTES + MAGIC.len() + TOKEN_BYTES;

/// One's complement of the one's complement sum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(u16::MAX)
}

/// What was asked and answered.
#[derive(Debug)]
pub(super) struct Echo {
    gateway: IpAddr,
    token: [u8; TOKEN_BYTES],
    sequence: u16,
    /// When each of the last requests was sent; `None`: not, or answered.
    sent: [Option<(u16, Duration)>; OUTSTANDING],
    /// When the newest request that was answered was sent.
    answered: Option<Duration>,
    round_trip: Option<Duration>,
}

impl Echo {
    pub(super) const fn new(gateway: IpAddr, token: [u8; TOKEN_BYTES]) -> Self {
        Self {
            gateway,
            token,
            sequence: 0,
            sent: [None; OUTSTANDING],
            answered: None,
            round_trip: None,
        }
    }

    /// The next request, to be sent now.
    pub(super) fn request(&mut self, now: Duration) -> [u8; MESSAGE_BYTES] {
        self.sequence = self.sequence.wrapping_add(1);
        self.sent[usize::from(self.sequence) % OUTSTANDING] = Some((self.sequence, now));
        let mut message = [0; MESSAGE_BYTES];
        message[0] = if self.gateway.is_ipv4() { 8 } else { 128 };
        // A ping socket puts its own identifier in place (icmp(7)).
        message[4..6].copy_from_slice(&self.token[..2]);
        message[6..8].copy_from_slice(&self.sequence.to_be_bytes());
        message[8..12].copy_from_slice(&MAGIC);
        message[12..].copy_from_slice(&self.token);
        // The kernel fills in the checksum of ICMPv6, and of ping sockets.
        if self.gateway.is_ipv4() {
            let sum = checksum(&message);
            message[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        message
    }

    /// Judge an ICMP message of any content; whether it was an answer to an open request.
    pub(super) fn handle(&mut self, now: Duration, from: IpAddr, message: &[u8]) -> bool {
        let kind = if self.gateway.is_ipv4() { 0 } else { 129 };
        if from != self.gateway
            || message.len() != MESSAGE_BYTES
            || message[..2] != [kind, 0]
            || message[8..12] != MAGIC
            || message[12..] != self.token
        {
            return false;
        }
        let sequence = u16::from_be_bytes([message[6], message[7]]);
        let slot = &mut self.sent[usize::from(sequence) % OUTSTANDING];
        let Some((_, sent)) = slot.take_if(|(number, _)| *number == sequence) else {
            return false;
        };
        self.round_trip = Some(now.saturating_sub(sent));
        self.answered = self.answered.max(Some(sent));
        true
    }

    /// When the newest answered request was sent: the gateway was there after it.
    pub(super) const fn answered(&self) -> Option<Duration> {
        self.answered
    }

    /// Time the newest answer took.
    pub(super) const fn round_trip(&self) -> Option<Duration> {
        self.round_trip
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GATEWAY: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 254));

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn answer(request: &[u8]) -> Vec<u8> {
        let mut answer = request.to_vec();
        answer[0] = 0;
        answer
    }

    #[test]
    fn the_checksum_is_that_of_the_rfc() {
        // RFC 1071, section 3: the sum of these is ddf2.
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(checksum(&bytes), !0xddf2);
        let request = Echo::new(GATEWAY, [7; 16]).request(ms(1));
        assert_eq!(checksum(&request), 0, "over a message with its checksum");
    }

    #[test]
    fn an_answer_counts_once_from_when_its_request_was_sent() {
        let mut echo = Echo::new(GATEWAY, [7; 16]);
        let (first, second) = (echo.request(ms(100)), echo.request(ms(600)));
        assert_eq!(echo.answered(), None);
        assert!(echo.handle(ms(650), GATEWAY, &answer(&second)));
        assert_eq!(
            (echo.answered(), echo.round_trip()),
            (Some(ms(600)), Some(ms(50)))
        );
        assert!(
            !echo.handle(ms(9_000), GATEWAY, &answer(&second)),
            "repeated"
        );
        // A late answer to an older request makes nothing younger or older.
        assert!(echo.handle(ms(700), GATEWAY, &answer(&first)));
        assert_eq!(echo.answered(), Some(ms(600)));
    }

    #[test]
    fn what_is_no_answer_of_the_gateway_does_not_count() {
        let mut echo = Echo::new(GATEWAY, [7; 16]);
        let request = echo.request(ms(1));
        let other = IpAddr::from([10, 0, 0, 253]);
        assert!(!echo.handle(ms(2), other, &answer(&request)), "another's");
        assert!(!echo.handle(ms(2), GATEWAY, &request), "the request itself");
        let mut unreachable = answer(&request);
        unreachable[0] = 3;
        assert!(!echo.handle(ms(2), GATEWAY, &unreachable));
        let mut guessed = answer(&request);
        guessed[20] ^= 1;
        assert!(!echo.handle(ms(2), GATEWAY, &guessed), "without the token");
        let mut never = answer(&request);
        never[7] += 1;
        assert!(!echo.handle(ms(2), GATEWAY, &never), "never asked");
        for _ in 0..OUTSTANDING {
            echo.request(ms(3));
        }
        assert!(!echo.handle(ms(4), GATEWAY, &answer(&request)), "long ago");
        assert_eq!(echo.answered(), None);
    }

    proptest! {
        #[test]
        fn messages_of_any_content_are_no_answer(
            bytes in proptest::collection::vec(any::<u8>(), 0..100),
        ) {
            let mut echo = Echo::new(GATEWAY, [7; 16]);
            echo.request(ms(1));
            prop_assert!(!echo.handle(ms(2), GATEWAY, &bytes));
        }
    }
}
