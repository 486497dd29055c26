//! etcd's v3 API as JSON: what is asked and what is answered.
//!
//! This module owns the layout. It is that of etcd's gRPC gateway (etcd documentation,
//! "Why gRPC gateway"; messages in etcd's `api/etcdserverpb/rpc.proto`): bytes are base64,
//! 64-bit numbers are decimal text, fields at their default are left out.
//!
//! Must never take an answer it does not wholly understand for one that says something.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

pub(super) const RANGE: &str = "/v3/kv/range";
pub(super) const TXN: &str = "/v3/kv/txn";
pub(super) const WATCH: &str = "/v3/watch";
pub(super) const LEASE_GRANT: &str = "/v3/lease/grant";
pub(super) const LEASE_KEEP_ALIVE: &str = "/v3/lease/keepalive";
pub(super) const LEASE_REVOKE: &str = "/v3/lease/revoke";

fn bytes<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
    let text = std::borrow::Cow::<'de, str>::deserialize(from)?;
    STANDARD
        .decode(text.as_bytes())
        .map_err(serde::de::Error::custom)
}

/// Decimal text, as etcd writes it, or a number.
fn number<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Number(u64),
        Text(String),
    }
    match Either::deserialize(from)? {
        Either::Number(n) => Ok(n),
        Either::Text(text) => text.parse().map_err(serde::de::Error::custom),
    }
}

/// A number that etcd keeps as a signed one and that is never below zero: one more can always be
/// reckoned with.
fn signed<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    let found = number(from)?;
    if i64::try_from(found).is_err() {
        return Err(serde::de::Error::custom(format!(
            "{found} is more than etcd counts to"
        )));
    }
    Ok(found)
}

/// Whose answer it is and how far its history had come.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(super) struct Header {
    #[serde(deserialize_with = "number", alias = "clusterId")]
    pub cluster_id: u64,
    /// 0 where etcd leaves it out: on the cancellation of a watch.
    #[serde(default, deserialize_with = "signed")]
    pub revision: u64,
}

#[derive(Debug, Deserialize)]
pub(super) struct KeyValue {
    #[serde(deserialize_with = "bytes")]
    pub key: Vec<u8>,
    #[serde(default, deserialize_with = "bytes")]
    pub value: Vec<u8>,
    /// 0 for a deleted key.
    #[serde(default, deserialize_with = "signed")]
    pub version: u64,
    #[serde(deserialize_with = "signed", alias = "modRevision")]
    pub mod_revision: u64,
    /// 0: attached to none.
    #[serde(default, deserialize_with = "signed")]
    pub lease: u64,
}

#[derive(Debug, Deserialize)]
pub(super) struct RangeAnswer {
    pub header: Header,
    #[serde(default)]
    pub kvs: Vec<KeyValue>,
    #[serde(default)]
    pub more: bool,
}

#[derive(Debug, Deserialize)]
pub(super) struct TxnAnswer {
    pub header: Header,
    #[serde(default)]
    pub succeeded: bool,
    #[serde(default)]
    pub responses: Vec<TxnResponse>,
}

/// The answer to the one operation of the branch that was taken.
#[derive(Debug, Deserialize)]
pub(super) struct TxnResponse {
    #[serde(alias = "responsePut")]
    pub response_put: Option<serde::de::IgnoredAny>,
    #[serde(alias = "responseRange")]
    pub response_range: Option<TxnRange>,
}

#[derive(Debug, Deserialize)]
pub(super) struct TxnRange {
    #[serde(default)]
    pub kvs: Vec<KeyValue>,
}

#[derive(Debug, Deserialize)]
pub(super) struct LeaseAnswer {
    pub header: Header,
    #[serde(default, rename = "ID", deserialize_with = "signed")]
    pub id: u64,
    /// Seconds; 0 or left out when the lease is gone.
    #[serde(default, rename = "TTL", deserialize_with = "signed")]
    pub ttl_s: u64,
}

#[derive(Debug, Deserialize)]
pub(super) struct RevokeAnswer {
    pub header: Header,
}

/// One line of an answer that is a stream.
#[derive(Debug, Deserialize)]
pub(super) struct Line<T> {
    pub result: Option<T>,
    pub error: Option<Value>,
}

#[derive(Debug, Deserialize)]
pub(super) struct WatchAnswer {
    pub header: Header,
    #[serde(default)]
    pub canceled: bool,
    #[serde(default, deserialize_with = "signed", alias = "compactRevision")]
    pub compact_revision: u64,
    #[serde(default, alias = "cancelReason")]
    pub cancel_reason: String,
    /// More events of the same revisions follow.
    #[serde(default)]
    pub fragment: bool,
    #[serde(default)]
    pub events: Vec<WatchEvent>,
}

#[derive(Debug, Deserialize)]
pub(super) struct WatchEvent {
    #[serde(default, rename = "type")]
    pub kind: EventKind,
    pub kv: KeyValue,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "UPPERCASE")]
pub(super) enum EventKind {
    #[default]
    Put,
    Delete,
}

/// The message of a refusal. Its text is what tells refusals apart; the code of many is the same.
pub(super) fn refusal(body: &[u8]) -> Option<String> {
    let value: Value = serde_json::from_slice(body).ok()?;
    let text = |name| value.get(name).and_then(Value::as_str).map(str::to_owned);
    text("message").or_else(|| text("error"))
}

pub(super) fn base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// The first key after all that begin with `prefix`; etcd's `"\0"`, the end of everything, if
/// there is none.
fn prefix_end(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}

/// One key. `serializable` is left out and so is false: the answer is linearizable.
pub(super) fn read_one(key: &[u8]) -> Value {
    json!({ "key": base64(key) })
}

/// At most `limit` keys that begin with `prefix`, after `after` if that is given, as they were
/// at `revision` (0: now). etcd answers in byte order.
pub(super) fn read_page(prefix: &[u8], after: Option<&[u8]>, limit: usize, revision: u64) -> Value {
    let from = after.map_or_else(
        || prefix.to_vec(),
        |last| {
            let mut next = last.to_vec();
            next.push(0);
            next
        },
    );
    json!({
        "key": base64(&from),
        "range_end": base64(&prefix_end(prefix)),
        "limit": limit.to_string(),
        "revision": revision.to_string(),
    })
}

/// Write `key` if it is at `version` (0: absent), else say what is there. `lease` 0: none.
pub(super) fn write_if(key: &[u8], version: u64, value: &[u8], lease: u64) -> Value {
    let key = base64(key);
    json!({
        "compare": [{
            "key": key, "target": "VERSION", "result": "EQUAL", "version": version.to_string(),
        }],
        "success": [{ "request_put": {
            "key": key, "value": base64(value), "lease": lease.to_string(),
        }}],
        "failure": [{ "request_range": { "key": key } }],
    })
}

/// All changes of keys that begin with `prefix`, from revision `from` on. Large batches come in
/// fragments of about a request's size.
pub(super) fn watch_from(prefix: &[u8], from: u64) -> Value {
    json!({ "create_request": {
        "key": base64(prefix),
        "range_end": base64(&prefix_end(prefix)),
        "start_revision": from.to_string(),
        "fragment": true,
    }})
}

pub(super) fn grant(ttl_s: u64) -> Value {
    json!({ "TTL": ttl_s.to_string() })
}

pub(super) fn lease(id: u64) -> Value {
    json!({ "ID": id.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_answer_of_etcd_is_read_and_so_is_one_in_the_other_spelling() {
        let answers = [
            r#"{"header":{"cluster_id":"13513763929059197825","revision":"2"},"kvs":[{"key":"L2E=",
                "create_revision":"2","mod_revision":"2","version":"1","value":"dmFs"}],"count":"1"}"#,
            r#"{"header":{"clusterId":13513763929059197825,"revision":2},"kvs":[{"key":"L2E=",
                "createRevision":2,"modRevision":"2","version":1,"value":"dmFs"}],"more":false}"#,
        ];
        for answer in answers {
            let answer: RangeAnswer = serde_json::from_str(answer).unwrap();
            assert_eq!(answer.header.cluster_id, 13_513_763_929_059_197_825);
            let kv = &answer.kvs[0];
            assert_eq!((&kv.key[..], &kv.value[..]), (&b"/a"[..], &b"val"[..]));
            assert_eq!((kv.version, kv.mod_revision, kv.lease), (1, 2, 0));
        }
    }

    #[test]
    fn an_answer_without_a_header_says_nothing() {
        assert!(serde_json::from_str::<RangeAnswer>("{}").is_err());
        assert!(serde_json::from_str::<TxnAnswer>(r#"{"succeeded":true}"#).is_err());
        assert!(serde_json::from_str::<RangeAnswer>(r#"{"header":{"cluster_id":"-1"}}"#).is_err());
    }

    #[test]
    fn a_number_beyond_what_etcd_counts_to_is_refused() {
        let answer = |revision: u64| {
            let text = format!(r#"{{"header":{{"cluster_id":"1","revision":"{revision}"}}}}"#);
            serde_json::from_str::<RangeAnswer>(&text)
        };
        let most = u64::MAX / 2;
        assert_eq!(answer(most).unwrap().header.revision, most);
        let told = answer(most + 1).unwrap_err().to_string();
        assert!(told.contains("more than etcd counts to"), "{told}");
    }

    #[test]
    fn the_end_of_a_prefix_is_the_first_key_behind_it() {
        assert_eq!(prefix_end(b"/p/"), b"/p0");
        assert_eq!(prefix_end(b"a\xff"), b"b");
        assert_eq!(prefix_end(b"\xff"), b"\0");
    }

    #[test]
    fn a_refusal_is_read_under_either_name() {
        let both =
            br#"{"error":"etcdserver: no leader","message":"etcdserver: no leader","code":14}"#;
        assert_eq!(refusal(both).as_deref(), Some("etcdserver: no leader"));
        assert_eq!(refusal(br#"{"error":"x"}"#).as_deref(), Some("x"));
        assert_eq!(refusal(b"<html>"), None);
    }

    proptest! {
        #[test]
        fn every_key_with_the_prefix_lies_before_its_end(prefix: Vec<u8>, rest: Vec<u8>) {
            let end = prefix_end(&prefix);
            let key = [prefix, rest].concat();
            prop_assert!(end == [0] || key < end);
        }

        #[test]
        fn any_bytes_are_an_error_or_an_answer(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = serde_json::from_slice::<RangeAnswer>(&bytes);
            let _ = serde_json::from_slice::<TxnAnswer>(&bytes);
            let _ = serde_json::from_slice::<Line<WatchAnswer>>(&bytes);
            let _ = refusal(&bytes);
        }
    }
}
