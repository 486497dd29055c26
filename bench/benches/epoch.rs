//! An epoch of real pages, end to end.
use pollux_bench::pages::Capture;
fn main() -> anyhow::Result<()> {
    let c = Capture::kept(16, 1000)?;
    for e in &c.epochs {
        println!("{} pages", e.pages.len());
    }
    println!("before {} epoch_ms {}", c.before.len(), c.epoch_ms);
    Ok(())
}
