//! `pollux pool off`: a person's proof.

use super::super::print_json;
use crate::api::client::{Client, block};
use crate::api::types::Done;
use crate::pool::HostName;
use anyhow::bail;
use clap::Args;
use std::process::ExitCode;

/// Say that a host is off, after you have made certain of it.
///
/// For a host that the pool has given up, or that is silent, whose death nothing can prove: it has no
/// watchdog, or its fence agent does not confirm that its power is off. Its VMs are restarted
/// by your word. Pull its plugs, or see for yourself that it is dark, before you say so: if it
/// still runs, its VMs run twice and their disks are lost.
///
/// To be said on the host that coordinates (`pollux pool status`).
#[derive(Args)]
#[command(after_help = "Example:\n  pollux pool off b --yes")]
pub(in crate::cli) struct Off {
    /// The host that is off.
    host: HostName,
    /// You have made certain that it is.
    #[arg(long)]
    yes: bool,
}

impl Off {
    pub(super) fn run(&self, client: &Client, json: bool) -> anyhow::Result<ExitCode> {
        let host = &self.host;
        if !self.yes {
            bail!(
                "make certain that {host} is off, and say so with --yes: if it still runs, its VMs run twice"
            );
        }
        let done: Done = block(client.post(&format!("/v1/pool/hosts/{host}/off"), &()))?;
        if json {
            print_json(&done)?;
        } else {
            println!("The pool counts {host} as off; `pollux why {host}` shows what follows.");
        }
        Ok(ExitCode::SUCCESS)
    }
}
