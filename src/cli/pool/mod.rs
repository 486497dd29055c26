//! `pollux pool …` and `pollux why`.

mod alone;
mod key;
mod off;
mod show;

use super::print_json;
use crate::api::client::{Client, block};
use crate::api::pool::PoolStatus;
use clap::{Args, Subcommand};
use std::process::ExitCode;

#[derive(Subcommand)]
pub(super) enum PoolCommand {
    /// Show the pool as this host knows it: hosts, paths, leases, with the age of each.
    ///
    /// Exit status 0 if this host is a member.
    Status,
    /// The pool's key: what a host needs to be heard by the others.
    #[command(subcommand)]
    Key(key::KeyCommand),
    Off(off::Off),
    Alone(alone::Alone),
}

pub(super) fn run(command: PoolCommand, client: &Client, json: bool) -> anyhow::Result<ExitCode> {
    match command {
        PoolCommand::Status => {
            let status: PoolStatus = block(client.get("/v1/pool"))?;
            if json {
                print_json(&status)?;
            } else {
                print!("{}", show::status(&status));
            }
            Ok(if status.phase == "member" {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
        PoolCommand::Key(command) => key::run(command, json),
        PoolCommand::Off(off) => off.run(client, json),
        PoolCommand::Alone(alone) => alone.run(),
    }
}

/// Who saw what, and which rule followed from it.
#[derive(Args)]
pub(super) struct Why {
    /// A host, a VM (name or uuid), or the number of a decision; all decisions without it.
    about: Option<String>,
}

impl Why {
    pub(super) fn run(&self, client: &Client, json: bool) -> anyhow::Result<ExitCode> {
        let status: PoolStatus = block(client.get("/v1/pool"))?;
        let found = show::about(&status, self.about.as_deref());
        if json {
            print_json(&found)?;
        } else {
            print!("{}", show::why(&status, self.about.as_deref(), &found));
        }
        Ok(if found.is_empty() {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        })
    }
}
