//! What the fuzzers run of a watch: a whole stream of answers, line by line.

use super::super::{EtcdOptions, EtcdRegistry, Space};
use super::{EtcdWatch, Revision, State};
use crate::registry::etcd::wire::{Line, WatchAnswer};
use std::sync::{Arc, LazyLock};
use tokio::runtime::{Builder, Runtime};

/// Never run: a watch needs one to be made.
static RUNTIME: LazyLock<Runtime> =
    LazyLock::new(|| Builder::new_current_thread().build().expect("a runtime"));

/// Where the watch stands at first.
const SINCE: Revision = Revision(5);

fn state() -> State {
    let options = EtcdOptions::new("p", vec!["http://127.0.0.1:1".into()]);
    let registry = EtcdRegistry::new(&options, RUNTIME.handle().clone()).expect("options");
    let EtcdWatch { state, .. } = registry.watch_from(Space::Keys, "", SINCE);
    Arc::into_inner(state).expect("one owner").into_inner()
}

/// Lines of a stream; the first that is refused ends it.
pub(crate) fn watch(data: &[u8]) {
    let (mut state, mut newest) = (state(), SINCE);
    // Changes that came in pieces are told with a later answer than the one that spoke of them.
    let mut told_until = 0;
    for line in data.split(|byte| *byte == b'\n') {
        let Ok(Line {
            result: Some(answer),
            error: None,
        }) = serde_json::from_slice::<Line<WatchAnswer>>(line)
        else {
            return;
        };
        told_until = answer.header.revision.max(told_until);
        let Ok(events) = state.take_in(answer) else {
            return;
        };
        for event in &events {
            assert!(event.revision >= newest && event.revision.0 <= told_until);
            newest = event.revision;
        }
        // Where the next watch begins, nothing was told that it tells again.
        assert!(state.next >= SINCE && (events.is_empty() || state.next > newest));
        assert!(state.held.iter().all(|event| event.revision == state.next));
    }
}
