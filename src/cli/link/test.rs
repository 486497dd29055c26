//! `pollux link test`: starts a test at the daemon, shows how far it is, prints the report.

use super::show::rate;
use crate::api::client::{Client, block};
use crate::api::links::{TestReport, TestRequest, TestState, TestStatus};
use crate::api::types::Percentiles;
use crate::cli::print_json;
use crate::cli::show::micros;
use anyhow::bail;
use clap::Args;
use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::process::ExitCode;
use std::time::Duration;

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Columns of the bar.
const BAR: u64 = 40;
/// Exit status after Ctrl-C, as shells count it (128 and SIGINT).
const INTERRUPTED: u8 = 130;

#[derive(Args)]
pub(in crate::cli) struct TestArgs {
    /// The partner.
    partner: String,
    /// How long to measure, 1 to 120 seconds.
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u64).range(1..=120))]
    seconds: u64,
    /// Take all the links carry, also while VMs are mirrored over them.
    #[arg(long)]
    full: bool,
    /// End the test that is under way instead.
    #[arg(long, conflicts_with_all = ["full", "seconds"])]
    cancel: bool,
}

pub(super) fn run(args: &TestArgs, client: &Client, json: bool) -> anyhow::Result<ExitCode> {
    let path = format!("/v1/links/{}/test", args.partner);
    if args.cancel {
        let status: TestStatus = block(client.delete(&path))?;
        if json {
            print_json(&status)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let request = TestRequest {
        seconds: args.seconds,
        full: args.full,
    };
    let bar = !json && std::io::stderr().is_terminal();
    let status = block(follow(client, &path, &request, bar))?;
    match (status.state, &status.report) {
        (TestState::Done, Some(report)) => {
            if json {
                print_json(report)?;
            } else {
                print!("{}", text(report));
            }
            Ok(ExitCode::SUCCESS)
        }
        (TestState::Cancelled, _) => {
            eprintln!("the test was ended");
            Ok(ExitCode::from(INTERRUPTED))
        }
        _ => bail!(
            "the link test with {} failed: {}",
            args.partner,
            status.reason.as_deref().unwrap_or("see the daemon's log")
        ),
    }
}

/// Start a test and wait for its end; Ctrl-C ends it.
async fn follow(
    client: &Client,
    path: &str,
    request: &TestRequest,
    bar: bool,
) -> anyhow::Result<TestStatus> {
    let mut status: TestStatus = client.post(path, request).await?;
    let test = status.test;
    while status.state == TestState::Running {
        if bar {
            draw(&status);
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => status = client.get(path).await?,
            _ = tokio::signal::ctrl_c() => {
                let _: TestStatus = client.delete(path).await?;
            }
        }
        if status.test != test {
            bail!("another test was begun meanwhile; its figures are not this one's");
        }
    }
    if bar {
        // Back to an empty line.
        eprint!("\r\x1b[K");
    }
    Ok(status)
}

fn draw(status: &TestStatus) {
    let done = status.done_permille.min(1000);
    let filled = usize::try_from(done * BAR / 1000).unwrap_or_default();
    let empty = usize::try_from(BAR).unwrap_or_default() - filled;
    eprint!(
        "\r[{}{}] {:>3} %  {}\x1b[K",
        "=".repeat(filled),
        " ".repeat(empty),
        done / 10,
        status.step
    );
    let _ = std::io::stderr().flush();
}

fn row(out: &mut String, name: &str, p: Percentiles) {
    let _ = writeln!(
        out,
        "  {name:<26} {:>10} {:>10} {:>10}",
        micros(p.p50),
        micros(p.p99),
        micros(p.max)
    );
}

fn text(report: &TestReport) -> String {
    let how = if report.full {
        "all the links carry"
    } else {
        "bursts beside mirrored VMs; --full takes all"
    };
    let mut out = format!(
        "link test with {}, {}.{} s, {how}\n",
        report.partner,
        report.took_ms / 1000,
        report.took_ms / 100 % 10
    );
    let path = &report.together;
    let _ = writeln!(
        out,
        "\n  {:<26} {:>10} {:>10} {:>10}",
        "", "p50", "p99", "max"
    );
    row(&mut out, "round trip, control lane", path.rtt_us);
    row(&mut out, "epoch of 16 pages", path.small_epoch_us);
    row(&mut out, "epoch of 1,000 pages", path.large_epoch_us);
    let _ = writeln!(
        out,
        "  {:<26} {:>10}",
        "goodput, all links",
        rate(path.goodput_bytes_per_s)
    );
    let _ = writeln!(
        out,
        "  {:<26} {:>10}",
        "longest heartbeat gap",
        micros(report.heartbeat_gap_us_max)
    );
    let _ = writeln!(
        out,
        "\n{:<4} {:>10} {:>9} {:>9} {:>12} {:>8} {:>6}  ADDRESSES",
        "LINK", "SENT", "RTT p50", "RTT p99", "PACKETS", "LOST", "MTU"
    );
    for l in &report.links {
        let _ = writeln!(
            out,
            "{:<4} {:>10} {:>9} {:>9} {:>12} {:>8} {:>6}  {} - {}",
            l.link,
            rate(l.sent_bytes_per_s),
            micros(l.rtt_us.p50),
            micros(l.rtt_us.p99),
            l.sent_packets,
            l.lost_packets,
            l.mtu_bytes,
            l.local,
            l.peer
        );
    }
    out.push_str("\nfor mirroring\n");
    for words in &report.meaning.words {
        let _ = writeln!(out, "  {words}");
    }
    if !report.warnings.is_empty() {
        out.push('\n');
    }
    for warning in &report.warnings {
        let _ = writeln!(out, "WARNING {warning}");
    }
    out
}
