//! What the fuzzers run of this room (`crate::fuzzing`): answers of etcd. The first byte says to
//! which question; the watch has a target of its own, which follows a whole stream.

use super::wire::{
    self, Header, KeyValue, LeaseAnswer, Line, RangeAnswer, RevokeAnswer, TxnAnswer, WatchAnswer,
};
use super::{check, versioned};

/// One answer.
pub(crate) fn answer(data: &[u8]) {
    let Some((which, body)) = data.split_first() else {
        return;
    };
    match which % 6 {
        0 => {
            if let Ok(answer) = serde_json::from_slice::<RangeAnswer>(body) {
                possible(answer.header);
                answer.kvs.into_iter().for_each(entry);
            }
        }
        1 => {
            if let Ok(answer) = serde_json::from_slice::<TxnAnswer>(body) {
                possible(answer.header);
                let ranges = answer
                    .responses
                    .into_iter()
                    .filter_map(|r| r.response_range);
                ranges.flat_map(|range| range.kvs).for_each(entry);
            }
        }
        2 => {
            if let Ok(answer) = serde_json::from_slice::<LeaseAnswer>(body) {
                possible(answer.header);
            }
        }
        3 => {
            if let Ok(answer) = serde_json::from_slice::<RevokeAnswer>(body) {
                possible(answer.header);
            }
        }
        4 => {
            if let Ok(Line {
                result: Some(answer),
                ..
            }) = serde_json::from_slice::<Line<WatchAnswer>>(body)
            {
                possible(answer.header);
                answer.events.into_iter().for_each(|event| entry(event.kv));
            }
        }
        _ => {
            let said = wire::refusal(body);
            assert!(said.is_none_or(|said| said.len() <= body.len()));
        }
    }
}

/// etcd counts in signed numbers; one more than any of them can be reckoned with.
fn possible(header: Header) {
    assert!(i64::try_from(header.revision).is_ok());
}

/// What passes for an entry is one that the registry can have.
fn entry(kv: KeyValue) {
    if check(&kv).is_ok() {
        let bytes = kv.value.len();
        let entry = versioned(kv);
        assert!(entry.version.checked_add(1).is_some() && entry.value.len() == bytes);
    }
}

/// Three changes, the last of which come in pieces.
pub(crate) const STREAM: &str = concat!(
    r#"{"result":{"header":{"cluster_id":"1","revision":"9"},"created":true}}"#,
    "\n",
    r#"{"result":{"header":{"cluster_id":"1","revision":"9"},"events":[{"kv":{"key":"L3BvbGx1eC9wL2tleXMvYQ==","mod_revision":"6","version":"1","value":"dmFs"}}]}}"#,
    "\n",
    r#"{"result":{"header":{"cluster_id":"1","revision":"9"},"fragment":true,"events":[{"type":"DELETE","kv":{"key":"L3BvbGx1eC9wL2tleXMvYQ==","mod_revision":"8"}}]}}"#,
    "\n",
    r#"{"result":{"header":{"cluster_id":"1","revision":"9"},"events":[{"kv":{"key":"L3BvbGx1eC9wL2tleXMvYg==","mod_revision":"8","version":"2"}}]}}"#,
    "\n",
    r#"{"result":{"header":{"cluster_id":"1"},"canceled":true,"compact_revision":"12","cancel_reason":"x"}}"#,
);

/// As etcd answers, each with the number of its question.
pub(crate) fn answer_seeds() -> Vec<(&'static str, Vec<u8>)> {
    let header = r#""header":{"cluster_id":"14","member_id":"3","revision":"2","raft_term":"2"}"#;
    let entry = r#"{"key":"L2E=","create_revision":"2","mod_revision":"2","version":"1","value":"dmFs","lease":"5"}"#;
    let stream = STREAM.lines().nth(1).unwrap_or_default();
    let answers = [
        (
            "range",
            format!(r#"{{{header},"kvs":[{entry}],"more":true,"count":"1"}}"#),
        ),
        (
            "txn",
            format!(
                r#"{{{header},"succeeded":true,"responses":[{{"response_put":{{}}}},{{"response_range":{{"kvs":[{entry}]}}}}]}}"#
            ),
        ),
        ("lease", format!(r#"{{{header},"ID":"7587","TTL":"5"}}"#)),
        ("revoke", format!("{{{header}}}")),
        ("watch", stream.to_owned()),
        (
            "refusal",
            r#"{"error":"etcdserver: no leader","message":"x","code":14}"#.into(),
        ),
    ];
    let numbered = answers.into_iter().zip(0_u8..);
    numbered
        .map(|((name, body), number)| (name, [&[number], body.as_bytes()].concat()))
        .collect()
}
