//! `pollux pool key …`
//!
//! Works on the host's state folder, whether its daemon runs or not.

use crate::beat::{KeyStep, LINE_BYTES_MAX, PoolKeys, load_keys, save_first_keys, save_keys};
use crate::cli::print_json;
use anyhow::Context;
use clap::{Args, Subcommand};
use serde::Serialize;
use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(Subcommand)]
pub(in crate::cli) enum KeyCommand {
    /// Make a new pool with this host as its first.
    Create(Folder),
    /// Show the pool, the keys this host holds, and how far a change of them is; no secrets.
    Show(Folder),
    /// Print the keys as one line, for `pollux pool key import` on the other hosts.
    ///
    /// Whoever has the line can speak for every host of the pool: carry it over a way nobody
    /// else reads (ssh).
    #[command(after_long_help = "  pollux pool key export | ssh b pollux pool key import")]
    Export(Folder),
    /// Take up the line that export prints, from a file or from standard input.
    Import {
        /// The file; its line is not an argument, since others can see those.
        file: Option<PathBuf>,
        #[command(flatten)]
        folder: Folder,
    },
    /// Change the key, in three steps while all hosts stay in contact.
    #[command(after_long_help = ROTATE_HELP)]
    Rotate {
        #[command(flatten)]
        step: StepArgs,
        #[command(flatten)]
        folder: Folder,
    },
}

const ROTATE_HELP: &str = "\
Each step is done on every host before the next begins; hosts one step apart hear each other,
hosts two steps apart do not:

  1. on one host:  pollux pool key rotate
     then            pollux pool key export | ssh HOST pollux pool key import
     for each other: all accept the next key, and send with the present one
  2. on each host: pollux pool key rotate --switch
  3. on each host: pollux pool key rotate --finish

Between 1 and 2, --give-up forgets the next key again. A host that was away imports the line of
any host that was not.";

#[derive(Args)]
pub(in crate::cli) struct Folder {
    /// The host's state folder, as `state_dir` of its configuration has it.
    #[arg(long, default_value = "/var/lib/pollux")]
    state_dir: PathBuf,
}

impl Folder {
    pub(super) fn path(&self) -> &Path {
        &self.state_dir
    }
}

#[derive(Args)]
#[group(multiple = false)]
pub(in crate::cli) struct StepArgs {
    /// Second step: send with the next key.
    #[arg(long)]
    switch: bool,
    /// Third step: forget the key before.
    #[arg(long)]
    finish: bool,
    /// Instead of the second: forget the next key.
    #[arg(long)]
    give_up: bool,
}

/// What is shown of a pool's keys.
#[derive(Serialize)]
struct Shown {
    pool: String,
    /// The key this host sends with.
    present: u32,
    /// `settled`, `next` or `before`.
    step: &'static str,
    /// All it accepts.
    keys: Vec<ShownKey>,
}

#[derive(Serialize)]
struct ShownKey {
    number: u32,
    digest: String,
}

impl Shown {
    fn of(keys: &PoolKeys) -> Self {
        Self {
            pool: keys.pool().to_string(),
            present: keys.present().0,
            step: match keys.step() {
                KeyStep::Settled => "settled",
                KeyStep::Next(_) => "next",
                KeyStep::Before(_) => "before",
            },
            keys: keys
                .digests()
                .into_iter()
                .map(|(number, digest)| ShownKey {
                    number: number.0,
                    digest,
                })
                .collect(),
        }
    }

    fn to_text(&self) -> String {
        let mut text = format!("pool {}\n", self.pool);
        for key in &self.keys {
            let role = if key.number == self.present {
                "sent with"
            } else if key.number > self.present {
                "next: once every host has it, `pollux pool key rotate --switch` on each"
            } else {
                "before: once every host sends with the new one, `pollux pool key rotate --finish` on each"
            };
            text += &format!("key {} {}  {role}\n", key.number, key.digest);
        }
        text
    }
}

fn load(dir: &Path) -> anyhow::Result<PoolKeys> {
    load_keys(dir)?.with_context(|| {
        format!(
            "{}: this host has no pool key: import one (`pollux pool key import`), or make a new pool (`pollux pool key create`)",
            dir.display()
        )
    })
}

fn show(keys: &PoolKeys, json: bool) -> anyhow::Result<()> {
    let shown = Shown::of(keys);
    if json {
        print_json(&shown)
    } else {
        print!("{}", shown.to_text());
        Ok(())
    }
}

/// At most one byte more than a line can have, so that too much is noticed and not read.
fn read_line(from: impl Read) -> std::io::Result<String> {
    let mut text = String::new();
    let most = u64::try_from(LINE_BYTES_MAX + 2).unwrap_or(u64::MAX);
    from.take(most).read_to_string(&mut text)?;
    Ok(text)
}

fn import(dir: &Path, line: &str) -> anyhow::Result<PoolKeys> {
    let line: PoolKeys = line.parse()?;
    match load_keys(dir)? {
        None => {
            save_first_keys(dir, &line)?;
            Ok(line)
        }
        Some(mut keys) => {
            keys.import(&line)?;
            save_keys(dir, &keys)?;
            Ok(keys)
        }
    }
}

fn rotate(dir: &Path, step: &StepArgs) -> anyhow::Result<PoolKeys> {
    let mut keys = load(dir)?;
    match (step.switch, step.finish, step.give_up) {
        (true, ..) => keys.switch()?,
        (_, true, _) => keys.finish()?,
        (.., true) => keys.give_up()?,
        _ => {
            keys.begin()?;
        }
    }
    save_keys(dir, &keys)?;
    Ok(keys)
}

pub(super) fn run(command: KeyCommand, json: bool) -> anyhow::Result<ExitCode> {
    let keys = match command {
        KeyCommand::Create(folder) => {
            let keys = PoolKeys::create()?;
            save_first_keys(&folder.state_dir, &keys)?;
            keys
        }
        KeyCommand::Show(folder) => load(&folder.state_dir)?,
        KeyCommand::Export(folder) => {
            let line = load(&folder.state_dir)?.to_line();
            if json {
                print_json(&line)?;
            } else {
                println!("{line}");
            }
            return Ok(ExitCode::SUCCESS);
        }
        KeyCommand::Import { file, folder } => {
            let line = match &file {
                Some(path) => std::fs::File::open(path)
                    .and_then(read_line)
                    .with_context(|| format!("cannot read {}", path.display()))?,
                None => {
                    if std::io::stdin().is_terminal() {
                        eprintln!("paste the line of `pollux pool key export`, then Ctrl-D");
                    }
                    read_line(std::io::stdin().lock()).context("cannot read standard input")?
                }
            };
            import(&folder.state_dir, &line)?
        }
        KeyCommand::Rotate { step, folder } => rotate(&folder.state_dir, &step)?,
    };
    show(&keys, json)?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEPS: [StepArgs; 3] = [
        StepArgs {
            switch: false,
            finish: false,
            give_up: false,
        },
        StepArgs {
            switch: true,
            finish: false,
            give_up: false,
        },
        StepArgs {
            switch: false,
            finish: true,
            give_up: false,
        },
    ];

    #[test]
    fn two_hosts_change_their_key_by_the_commands_of_the_help() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (a, b) = (a.path(), b.path());
        assert!(load(a).unwrap_err().to_string().contains("pool key import"));
        save_first_keys(a, &PoolKeys::create().unwrap()).unwrap();
        import(b, &load(a).unwrap().to_line()).unwrap();
        rotate(a, &STEPS[0]).unwrap();
        assert!(rotate(b, &STEPS[1]).is_err(), "b has no next key yet");
        import(b, &load(a).unwrap().to_line()).unwrap();
        for step in &STEPS[1..] {
            for host in [a, b] {
                rotate(host, step).unwrap();
            }
        }
        let (of_a, of_b) = (load(a).unwrap(), load(b).unwrap());
        assert_eq!(of_a, of_b);
        let shown = Shown::of(&of_a);
        assert_eq!(
            (shown.present, shown.step, shown.keys.len()),
            (2, "settled", 1)
        );
        // A refused line leaves the folder as it was.
        let foreign = PoolKeys::create().unwrap().to_line();
        assert!(import(a, &foreign).is_err() && import(a, "nonsense").is_err());
        assert_eq!(load(a).unwrap(), of_a);
    }

    #[test]
    fn what_is_shown_holds_no_secret_and_too_much_is_not_read() {
        let mut keys = PoolKeys::create().unwrap();
        keys.begin().unwrap();
        let line = keys.to_line();
        let text = Shown::of(&keys).to_text();
        for secret in line.split('.').filter_map(|field| field.split_once('-')) {
            assert!(secret.1.len() < 64 || !text.contains(secret.1));
        }
        assert!(text.contains("--switch"), "{text}");
        let read = read_line(std::io::repeat(b'x')).unwrap();
        assert!(read.len() < 2 * LINE_BYTES_MAX && read.parse::<PoolKeys>().is_err());
    }
}
