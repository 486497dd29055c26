use super::*;

fn party(byte: u8, name: &str) -> Party {
    Party {
        fingerprint: Fingerprint([byte; 32]),
        name: name.to_owned(),
    }
}

fn exchange(dials: bool, me: &Party, sees: &Party, nonce: u8) -> Exchange {
    Exchange::new(dials, me.clone(), sees.fingerprint, Nonce([nonce; 32])).unwrap()
}

/// Over the wire and back.
fn sent(message: &Message) -> Message {
    let bytes = message.to_bytes();
    let (fixed, name) = bytes.split_first_chunk().unwrap();
    Message::parse(fixed, name).unwrap()
}

/// What both sides end with.
fn run(dialler: &mut Exchange, acceptor: &mut Exchange) -> ((Party, Code), (Party, Code)) {
    let commit = dialler.begin().unwrap();
    let answer = acceptor.handle(sent(&commit)).unwrap();
    let reveal = dialler.handle(sent(&answer.send.unwrap())).unwrap();
    let end = acceptor.handle(sent(&reveal.send.unwrap())).unwrap();
    assert!(answer.code.is_none() && end.send.is_none());
    (reveal.code.unwrap(), end.code.unwrap())
}

#[test]
fn both_sides_get_the_same_code_and_each_others_names() {
    let (a, b) = (party(1, "castor"), party(2, "pollux"));
    let mut dialler = exchange(true, &a, &b, 3);
    let mut acceptor = exchange(false, &b, &a, 4);
    assert!(acceptor.begin().is_none());
    let ((seen_b, code_a), (seen_a, code_b)) = run(&mut dialler, &mut acceptor);
    assert_eq!((seen_a, seen_b), (a.clone(), b.clone()));
    assert_eq!(code_a, code_b);
    // Everything that goes in changes it.
    for (other_a, other_b, nonce_a, nonce_b) in [
        (party(9, "castor"), b.clone(), 3, 4),
        (a.clone(), party(9, "pollux"), 3, 4),
        (party(1, "leda"), b.clone(), 3, 4),
        (a.clone(), party(2, "leda"), 3, 4),
        (a.clone(), b.clone(), 9, 4),
        (a.clone(), b.clone(), 3, 9),
    ] {
        let ((_, code), (_, same)) = run(
            &mut exchange(true, &other_a, &other_b, nonce_a),
            &mut exchange(false, &other_b, &other_a, nonce_b),
        );
        assert_eq!(code, same);
        assert_ne!(code, code_a, "{other_a:?} {other_b:?} {nonce_a} {nonce_b}");
    }
}

#[test]
fn a_man_in_the_middle_shows_two_codes() {
    let (a, b, m) = (party(1, "castor"), party(2, "pollux"), party(7, "pollux"));
    let m_as_a = party(7, "castor");
    let ((_, at_a), _) = run(
        &mut exchange(true, &a, &m, 3),
        &mut exchange(false, &m, &a, 5),
    );
    let (_, (_, at_b)) = run(
        &mut exchange(true, &m_as_a, &b, 6),
        &mut exchange(false, &b, &m_as_a, 4),
    );
    assert_ne!(at_a, at_b);
    // One that only passes messages on is found out by what the sides see of him.
    let mut dialler = exchange(true, &a, &m, 3);
    let mut acceptor = exchange(false, &b, &m, 4);
    let commit = dialler.begin().unwrap();
    let answer = acceptor.handle(sent(&commit)).unwrap();
    let reveal = dialler.handle(answer.send.unwrap()).unwrap();
    assert_eq!(
        acceptor.handle(reveal.send.unwrap()).err(),
        Some(MeetingError::Commitment)
    );
}

#[test]
fn who_is_bound_cannot_choose_again() {
    let (a, b) = (party(1, "castor"), party(2, "pollux"));
    let mut acceptor = exchange(false, &b, &a, 4);
    acceptor
        .handle(exchange(true, &a, &b, 3).begin().unwrap())
        .unwrap();
    let mut other = exchange(true, &a, &b, 9);
    other.begin();
    let answer = exchange(false, &b, &a, 4)
        .handle(exchange(true, &a, &b, 9).begin().unwrap())
        .unwrap();
    let reveal = other.handle(answer.send.unwrap()).unwrap().send.unwrap();
    assert_eq!(
        acceptor.handle(reveal).err(),
        Some(MeetingError::Commitment)
    );
}

#[test]
fn an_exchange_counts_once_the_own_nonce_is_out() {
    let (a, b) = (party(1, "castor"), party(2, "pollux"));
    let (mut dialler, mut acceptor) = (exchange(true, &a, &b, 3), exchange(false, &b, &a, 4));
    let commit = dialler.begin().unwrap();
    assert!(!dialler.counts() && !acceptor.counts());
    let answer = acceptor.handle(commit.clone()).unwrap().send.unwrap();
    assert!(!dialler.counts() && acceptor.counts());
    dialler.handle(answer.clone()).unwrap();
    assert!(dialler.counts());
    // Nothing is said twice.
    assert_eq!(acceptor.handle(commit).err(), Some(MeetingError::Order));
    assert_eq!(dialler.handle(answer).err(), Some(MeetingError::Order));
    assert!(dialler.begin().is_none());
}

#[test]
fn its_own_identity_is_no_partner() {
    let a = party(1, "castor");
    let own = Exchange::new(true, a.clone(), a.fingerprint, Nonce([0; 32]));
    assert_eq!(own.err(), Some(MeetingError::Own));
}

#[test]
fn codes_are_text_and_back() {
    let code = Code(42);
    assert_eq!(code.to_string(), "0000 0042");
    for text in ["0000 0042", "00000042", " 0000-0042 ", "0 0 0 0 0 0 4 2"] {
        assert_eq!(text.parse(), Ok(code), "{text}");
    }
    for bad in [
        "",
        "42",
        "000000042",
        "0000 004x",
        "+0000042",
        "１２３４５６７８",
    ] {
        assert!(bad.parse::<Code>().is_err(), "{bad}");
    }
}

#[test]
fn a_message_is_refused_for_every_wrong_byte_of_its_head() {
    let mut dialler = exchange(true, &party(1, "castor"), &party(2, "b"), 3);
    let bytes = dialler.begin().unwrap().to_bytes();
    let (fixed, name): (&[u8; MESSAGE_FIXED_BYTES], _) = bytes.split_first_chunk().unwrap();
    assert!(Message::parse(fixed, name).is_ok());
    for at in 0..8 {
        let mut bad = *fixed;
        bad[at] ^= 0x80;
        assert!(Message::parse(&bad, name).is_err(), "byte {at}");
    }
    assert!(Message::parse(fixed, b"casto").is_err());
    assert!(Message::parse(fixed, &[0xff; 6]).is_err());
    let long = party(1, &"ä".repeat(NAME_BYTES_MAX));
    let message = exchange(true, &long, &party(2, "b"), 3).begin().unwrap();
    assert_eq!(sent(&message).name.len(), NAME_BYTES_MAX);
}
