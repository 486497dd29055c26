//! Dirty sets of a running guest, epoch by epoch, as the daemon collects them.

use super::guest::{Guest, Load, RAM_MIB};
use super::xbzrle::{self, Xbzrle};
use anyhow::{Context, Result, ensure};
use interconnect::codec::{CodecChoice, CodecVersion, EncodePolicy, PAGE_BYTES, Page};
use pollux::interpose::memory::{Staging, Tracker};
use serde_json::json;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// First bytes of a file of captured pages.
const MAGIC: [u8; 8] = *b"PLXPGS02";
/// The guest runs a while before anything is captured: redis fills its data set.
const WARM_REQUESTS: u64 = 120_000;
/// And no longer than this.
const WARM_MAX: Duration = Duration::from_secs(40);

/// What a guest dirtied between two checkpoints.
#[derive(Clone, Default)]
pub struct Epoch {
    /// Page index and content, in the order the tracker gave them.
    pub pages: Vec<(u64, Box<Page>)>,
}

/// A stretch of a guest's life.
pub struct Capture {
    /// Pages of the guest.
    pub guest_pages: u64,
    /// What every page had before the first epoch that dirtied it.
    pub before: Vec<(u64, Box<Page>)>,
    /// The epochs, oldest first, each of about as many pages as was asked for.
    pub epochs: Vec<Epoch>,
    /// How long the guest ran in an epoch, on average.
    pub epoch_ms: f64,
}

/// Let redis fill its data set.
fn warm(load: &Load) {
    let began = Instant::now();
    while load.done() < WARM_REQUESTS && began.elapsed() < WARM_MAX {
        std::thread::sleep(Duration::from_millis(100));
    }
    eprintln!("{} requests in {:?}", load.done(), began.elapsed());
}

impl Capture {
    /// Boot a guest, load it, and capture `epochs` epochs of about `pages` dirty pages.
    ///
    /// # Errors
    /// What failed.
    pub fn take(epochs: usize, pages: u64) -> Result<Self> {
        let mut guest = Guest::boot()?;
        let load = guest.load()?;
        warm(&load);
        Self::of(&mut guest, epochs, pages)
    }

    /// The same of a guest that runs under load already.
    ///
    /// # Errors
    /// What failed.
    pub fn of(guest: &mut Guest, epochs: usize, pages: u64) -> Result<Self> {
        let pid = i32::try_from(guest.pid())?;
        let mut tracker = Tracker::attach(pid, &guest.ram_file(), RAM_MIB << 20)?;
        let all = tracker.pages();
        let mut staging = Staging::new(all, all)?;
        guest.qmp("stop", json!({}))?;
        tracker.collect(&mut staging)?;
        staging.clear();
        let mut ram = vec![0; usize::try_from(RAM_MIB << 20)?];
        File::open(guest.ram_file())?.read_exact(&mut ram)?;
        let mut known = vec![false; usize::try_from(all)?];
        let mut capture = Self {
            guest_pages: all,
            before: Vec::new(),
            epochs: Vec::new(),
            epoch_ms: 0.0,
        };
        // How long gives how many pages is found out on the way.
        let mut run = Duration::from_millis(20);
        let mut rounds = 0;
        while capture.epochs.len() < epochs {
            rounds += 1;
            ensure!(
                rounds < epochs * 10,
                "the guest dirties too few pages or too many"
            );
            guest.qmp("cont", json!({}))?;
            std::thread::sleep(run);
            guest.qmp("stop", json!({}))?;
            let found = tracker.collect(&mut staging)?.pages;
            let right = found >= pages * 3 / 4 && found <= pages * 3 / 2;
            let ratio = (pages as f64 / found.max(1) as f64).clamp(0.5, 2.0);
            let mut epoch = Epoch::default();
            for (index, page) in staging.iter() {
                let at = usize::try_from(index)?;
                if !known[at] {
                    known[at] = true;
                    let old = ram[at * PAGE_BYTES..]
                        .first_chunk()
                        .context("in the guest")?;
                    capture.before.push((index, Box::new(*old)));
                }
                epoch.pages.push((index, Box::new(*page)));
            }
            staging.clear();
            // Epochs found while the length was still sought are kept out; what they
            // changed is what the next begin with.
            if right {
                capture.epoch_ms += run.as_secs_f64() * 1e3 / epochs as f64;
                capture.epochs.push(epoch);
            } else if capture.epochs.is_empty() {
                for (index, page) in &epoch.pages {
                    let at = usize::try_from(*index)? * PAGE_BYTES;
                    ram[at..at + PAGE_BYTES].copy_from_slice(&page[..]);
                }
                capture.before.clear();
                known.fill(false);
                run = run.mul_f64(ratio);
            } else {
                capture.epochs.push(epoch);
            }
        }
        guest.qmp("cont", json!({}))?;
        tracker.detach()?;
        Ok(capture)
    }

    /// As [`Self::take`], but kept in `target/bench` and read from there the next time.
    ///
    /// # Errors
    /// What failed.
    pub fn kept(epochs: usize, pages: u64) -> Result<Self> {
        let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bench"))
            .join(format!("pages-{epochs}x{pages}.bin"));
        if let Ok(found) = Self::read(&path) {
            return Ok(found);
        }
        eprintln!("captures pages of the test guest under load");
        let taken = Self::take(epochs, pages)?;
        taken.write(&path)?;
        Ok(taken)
    }

    /// As [`Self::kept`], and what XBZRLE makes of the same guest under the same load, with a
    /// cache as large as the bases of patches. `fresh`: not what is kept.
    ///
    /// # Errors
    /// What failed.
    pub fn kept_with_xbzrle(epochs: usize, pages: u64, fresh: bool) -> Result<(Self, Xbzrle)> {
        let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bench"))
            .join(format!("pages-{epochs}x{pages}.bin"));
        let figures = path.with_extension("json");
        if !fresh {
            let theirs = std::fs::read(&figures).ok();
            let theirs = theirs.and_then(|text| serde_json::from_slice(&text).ok());
            if let (Ok(found), Some(theirs)) = (Self::read(&path), theirs) {
                return Ok((found, theirs));
            }
        }
        eprintln!("captures pages of the test guest under load, then lets QEMU migrate it");
        let mut guest = Guest::boot()?;
        let load = guest.load()?;
        warm(&load);
        let taken = Self::of(&mut guest, epochs, pages)?;
        taken.write(&path)?;
        let cache = EncodePolicy::for_guest(RAM_MIB << 20, CodecChoice::Auto, CodecVersion::V2);
        let theirs = xbzrle::measure(&mut guest, cache.base_bytes_max)?;
        std::fs::write(&figures, serde_json::to_vec(&theirs)?)?;
        load.stop()?;
        Ok((taken, theirs))
    }

    fn write(&self, path: &Path) -> Result<()> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let partial = path.with_extension("partial");
        let mut out = BufWriter::new(File::create(&partial)?);
        out.write_all(&MAGIC)?;
        out.write_all(&self.guest_pages.to_le_bytes())?;
        out.write_all(&self.epoch_ms.to_le_bytes())?;
        out.write_all(&(self.epochs.len() as u64).to_le_bytes())?;
        for pages in std::iter::once(&self.before).chain(self.epochs.iter().map(|e| &e.pages)) {
            out.write_all(&(pages.len() as u64).to_le_bytes())?;
            for (index, page) in pages {
                out.write_all(&index.to_le_bytes())?;
                out.write_all(&page[..])?;
            }
        }
        out.flush()?;
        std::fs::rename(partial, path)?;
        Ok(())
    }

    fn read(path: &Path) -> Result<Self> {
        let mut file = BufReader::new(File::open(path)?);
        let mut word = || -> Result<[u8; 8]> {
            let mut word = [0; 8];
            file.read_exact(&mut word)?;
            Ok(word)
        };
        ensure!(word()? == MAGIC, "not a file of captured pages");
        let guest_pages = u64::from_le_bytes(word()?);
        let epoch_ms = f64::from_le_bytes(word()?);
        let epochs = u64::from_le_bytes(word()?);
        let mut lists = Vec::new();
        for _ in 0..=epochs {
            let mut pages = Vec::new();
            let mut bytes = [0; 8];
            file.read_exact(&mut bytes)?;
            for _ in 0..u64::from_le_bytes(bytes) {
                file.read_exact(&mut bytes)?;
                let mut page = Box::new([0; PAGE_BYTES]);
                file.read_exact(&mut page[..])?;
                pages.push((u64::from_le_bytes(bytes), page));
            }
            lists.push(pages);
        }
        let before = lists.remove(0);
        Ok(Self {
            guest_pages,
            before,
            epochs: lists.into_iter().map(|pages| Epoch { pages }).collect(),
            epoch_ms,
        })
    }
}
