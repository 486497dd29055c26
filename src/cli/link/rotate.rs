//! `pollux link rotate`: a new key for this host.

use crate::api::client::{Client, block};
use crate::api::links::{RotationState, RotationStatus};
use crate::cli::print_json;
use clap::Args;
use std::fmt::Write;
use std::process::ExitCode;
use std::time::Duration;

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(100);

#[derive(Args)]
pub(in crate::cli) struct RotateArgs {
    /// Begin, and do not wait until all partners have it.
    #[arg(long)]
    no_wait: bool,
    /// Only show how a change stands.
    #[arg(long, conflicts_with_all = ["no_wait", "give_up"])]
    status: bool,
    /// Keep the present key after all, if not all partners have pinned the next one.
    #[arg(long, conflicts_with = "no_wait")]
    give_up: bool,
}

pub(super) fn run(args: &RotateArgs, client: &Client, json: bool) -> anyhow::Result<ExitCode> {
    let path = "/v1/rotation";
    let shown: RotationStatus = if args.status {
        block(client.get(path))?
    } else if args.give_up {
        block(client.delete(path))?
    } else if args.no_wait {
        block(client.post(path, &()))?
    } else {
        return block(wait(client, json));
    };
    if json {
        print_json(&shown)?;
    } else {
        print!("{}", text(&shown));
    }
    Ok(ExitCode::SUCCESS)
}

async fn wait(client: &Client, json: bool) -> anyhow::Result<ExitCode> {
    let mut now: RotationStatus = client.post("/v1/rotation", &()).await?;
    let mut told = String::new();
    while now.state != RotationState::Idle {
        let text = text(&now);
        if !json && text != told {
            eprint!("{text}");
            told = text;
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            _ = tokio::signal::ctrl_c() => {
                eprintln!(
                    "the change goes on without this command: `pollux link rotate --status` shows it, --give-up ends it"
                );
                return Ok(ExitCode::FAILURE);
            }
        }
        now = client.get("/v1/rotation").await?;
    }
    if json {
        print_json(&now)?;
    } else {
        println!("this host's key is {} now", now.present);
    }
    Ok(ExitCode::SUCCESS)
}

fn text(status: &RotationStatus) -> String {
    let mut out = format!("key in use   {}\n", status.present);
    match (status.state, &status.next) {
        (RotationState::Telling, Some(next)) => {
            let _ = writeln!(
                out,
                "key to come  {next}, as soon as all partners have pinned it"
            );
        }
        (RotationState::Switched, _) => {
            out.push_str("it is new: links are dialled anew with it\n");
        }
        _ => out.push_str("no change is under way\n"),
    }
    for partner in &status.partners {
        let _ = writeln!(out, "  {}: {}", partner.partner, partner.step);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::links::PartnerRotation;
    use crate::pool::HostName;

    #[test]
    fn what_is_waited_for_is_told() {
        let status = RotationStatus {
            state: RotationState::Telling,
            present: "sha256:11".into(),
            next: Some("sha256:22".into()),
            partners: vec![PartnerRotation {
                partner: HostName::new("b").unwrap(),
                done: false,
                step: "is not connected".into(),
            }],
        };
        let text = text(&status);
        for part in ["sha256:11", "sha256:22", "b: is not connected"] {
            assert!(text.contains(part), "{text}");
        }
    }
}
