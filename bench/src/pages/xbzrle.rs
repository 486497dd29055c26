//! QEMU's own delta coding beside ours: what `migrate` with XBZRLE puts on the wire for the
//! same guest under the same load (QEMU: docs/xbzrle.txt, `query-migrate`).

use super::guest::Guest;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// The first pass sends all of RAM; what counts comes after.
const FIRST_PASS_MAX: Duration = Duration::from_secs(120);
/// What the migration may send.
const BYTES_PER_S: u64 = 12 << 20;
/// Passes that warm the cache.
const WARM_PASSES: u64 = 15;
/// Passes that are counted.
const PASSES: u64 = 40;

/// What QEMU reports, over the passes that were counted.
#[derive(Clone, Copy, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Xbzrle {
    /// Size of its cache, bytes.
    pub cache_bytes: u64,
    /// Passes over dirty memory.
    pub passes: u64,
    /// Pages it went through: encoded, whole, zero.
    pub pages: u64,
    /// Of them encoded against the cache.
    pub encoded: u64,
    /// Of them not in the cache.
    pub misses: u64,
    /// Of them whose encoding was too long.
    pub overflows: u64,
    /// Bytes on the wire.
    pub bytes: u64,
}

impl Xbzrle {
    /// Bytes on the wire for a dirty page.
    #[must_use]
    pub fn bytes_per_page(&self) -> f64 {
        self.bytes as f64 / self.pages.max(1) as f64
    }
}

fn number(value: &Value, path: &str) -> u64 {
    value.pointer(path).and_then(Value::as_u64).unwrap_or(0)
}

/// Migrate a loaded guest to nowhere, with XBZRLE and a cache of `cache_bytes` (a power of
/// two), and count; ended before it would complete.
///
/// # Errors
/// What QEMU refused.
pub fn measure(guest: &mut Guest, cache_bytes: u64) -> Result<Xbzrle> {
    guest.qmp(
        "migrate-set-capabilities",
        json!({"capabilities": [{"capability": "xbzrle", "state": true}]}),
    )?;
    // It must not complete: what is dirty at the end of a pass has to be more than this
    // bandwidth carries in the downtime. It also makes a pass about as long as our epochs.
    guest.qmp(
        "migrate-set-parameters",
        json!({"xbzrle-cache-size": cache_bytes, "max-bandwidth": BYTES_PER_S, "downtime-limit": 1}),
    )?;
    guest.qmp("migrate", json!({"uri": "exec:cat >/dev/null"}))?;
    let at = |guest: &mut Guest, pass: u64| -> Result<Value> {
        let end = Instant::now() + FIRST_PASS_MAX;
        loop {
            let info = guest.qmp("query-migrate", json!({}))?;
            let status = info.pointer("/status").and_then(Value::as_str);
            ensure!(
                matches!(status, Some("setup" | "active")),
                "the migration ended by itself: {info}"
            );
            if number(&info, "/ram/dirty-sync-count") >= pass {
                return Ok(info);
            }
            ensure!(Instant::now() < end, "pass {pass} is not reached: {info}");
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    let counted = at(guest, 1 + WARM_PASSES).and_then(|from| {
        let pass = number(&from, "/ram/dirty-sync-count") + PASSES;
        Ok((from, at(guest, pass)?))
    });
    let _ = guest.qmp("migrate_cancel", json!({}));
    let (from, to) = counted.context("migrating with XBZRLE")?;
    let over = |path| number(&to, path).saturating_sub(number(&from, path));
    let overflows = over("/xbzrle-cache/overflow");
    let encoded = over("/xbzrle-cache/pages");
    Ok(Xbzrle {
        cache_bytes,
        passes: over("/ram/dirty-sync-count"),
        // A page that overflows is counted as encoded and as normal.
        pages: over("/ram/normal") + over("/ram/duplicate") + encoded - overflows.min(encoded),
        encoded,
        misses: over("/xbzrle-cache/cache-miss"),
        overflows,
        bytes: over("/ram/transferred"),
    })
}
