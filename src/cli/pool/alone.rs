//! `pollux pool alone`: what only a person can know.

use super::key::Folder;
use crate::beat::load_keys;
use crate::registry::pair::declare_alone;
use anyhow::{Context, bail};
use clap::Args;
use std::process::ExitCode;

/// Declare this host's copy of a pair's registry the right one.
///
/// For a pool of two whose registry is `kind = "pair"`, when the other host will not come back,
/// or came back without its copy, while this one was off or its daemon restarted. Works on the
/// state folder of a daemon that does not run. Only if the other host is off, or its copy is
/// gone, and nothing that it ran since still runs: pollux cannot know, and both would run the
/// same VMs.
#[derive(Args)]
pub(in crate::cli) struct Alone {
    #[command(flatten)]
    folder: Folder,
    /// The other host is off, or has no copy any more.
    #[arg(long)]
    yes: bool,
}

impl Alone {
    pub(super) fn run(&self) -> anyhow::Result<ExitCode> {
        let dir = self.folder.path();
        if !self.yes {
            bail!(
                "make certain that the other host is off, or has no copy any more, and say so with --yes"
            );
        }
        let keys =
            load_keys(dir)?.with_context(|| format!("{} holds no key of a pool", dir.display()))?;
        let changes = declare_alone(dir, keys.pool().0)?;
        println!(
            "The copy of {} stands alone now, after {changes} changes; start the daemon.",
            dir.display()
        );
        Ok(ExitCode::SUCCESS)
    }
}
