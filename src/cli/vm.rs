//! `pollux vm …`

use super::{print_json, show};
use crate::api::client::{Client, block};
use crate::api::types::{CreateVm, Done, Protect, Role, Start, VmStatus};
use crate::pool::HostName;
use anyhow::{Context, bail};
use clap::Subcommand;
use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

const CREATE_HELP: &str = "\
Take in a VM from its spec; it does not start yet. A spec is TOML:

  name = \"orders\"
  uuid = \"6f1c0a52-3f0e-4b0c-9a39-3d6a2c1f6f11\"
  memory = \"512 MiB\"
  vcpus = 2
  boot = \"disk\"
  protection = \"mirrored\"
  [[disk]]
  name = \"root\"
  path = \"orders.raw\"
  size = \"8 GiB\"
  [[nic]]
  name = \"lan\"
  bridge = \"br0\"

A relative path of a disk starts at the host's image folder, STATE_DIR/images.";

#[derive(Subcommand)]
pub(super) enum VmCommand {
    /// Take in a VM from its spec; it does not start yet.
    #[command(long_about = CREATE_HELP)]
    Create {
        /// The spec's file; - for standard input.
        spec: PathBuf,
    },
    /// Forget a stopped VM; its disk images stay.
    Delete {
        /// Name or uuid.
        name: String,
    },
    /// Start a VM on this host.
    Start {
        /// Name or uuid.
        name: String,
        /// Start from this host's disks although another host held a standby or ran it
        /// last, and may have newer writes: they are given up. For the loss of both hosts.
        #[arg(long)]
        force: bool,
    },
    /// Power a VM off, as pulling its plug would; shut it down inside first.
    Stop {
        /// Name or uuid.
        name: String,
    },
    /// List the VMs this host knows.
    List,
    /// Show one VM: its protection, epochs, pauses, replication lag, events.
    Show {
        /// Name or uuid.
        name: String,
    },
    /// Print a VM's spec with every default written out.
    Spec {
        /// Name or uuid.
        name: String,
    },
    /// Mirror a running VM to a partner host, and keep it mirrored.
    Protect {
        /// Name or uuid.
        name: String,
        /// The partner; may be left out if the spec names it or there is only one.
        #[arg(long)]
        partner: Option<HostName>,
        /// Wait until it is mirrored, at most this many seconds.
        #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "120")]
        wait: Option<u64>,
    },
    /// Mirror a VM no longer.
    Unprotect {
        /// Name or uuid.
        name: String,
    },
    /// Swap the roles: the VM goes on at the partner, connections stay open.
    Switchover {
        /// Name or uuid.
        name: String,
    },
    /// Attach to a VM's serial console; Ctrl-] detaches.
    Console {
        /// Name or uuid.
        name: String,
    },
}

pub(super) fn run(command: VmCommand, client: &Client, json: bool) -> anyhow::Result<()> {
    match command {
        VmCommand::Create { spec } => {
            let (text, origin) = if spec.as_os_str() == "-" {
                let mut text = String::new();
                std::io::stdin()
                    .read_to_string(&mut text)
                    .context("cannot read the spec")?;
                (text, "standard input".to_owned())
            } else {
                let text = std::fs::read_to_string(&spec)
                    .with_context(|| format!("cannot read the spec {}", spec.display()))?;
                (text, spec.display().to_string())
            };
            let done: Done = block(client.post("/v1/vms", &CreateVm { spec: text, origin }))?;
            report(&done, json)
        }
        VmCommand::Delete { name } => {
            let done: Done = block(client.delete(&format!("/v1/vms/{name}")))?;
            report(&done, json)
        }
        VmCommand::Start { name, force } => {
            let done: Done =
                block(client.post(&format!("/v1/vms/{name}/start"), &Start { force }))?;
            report(&done, json)
        }
        VmCommand::Stop { name } => simple(client, &name, "stop", json),
        VmCommand::Unprotect { name } => simple(client, &name, "unprotect", json),
        VmCommand::Switchover { name } => simple(client, &name, "switchover", json),
        VmCommand::List => {
            let vms: Vec<VmStatus> = block(client.get("/v1/vms"))?;
            if json {
                print_json(&vms)
            } else {
                out(&show::vm_table(&vms))
            }
        }
        VmCommand::Show { name } => {
            let vm: VmStatus = block(client.get(&format!("/v1/vms/{name}")))?;
            if json {
                print_json(&vm)
            } else {
                out(&show::vm_details(&vm))
            }
        }
        VmCommand::Spec { name } => {
            let spec: String = block(client.get(&format!("/v1/vms/{name}/spec")))?;
            if json { print_json(&spec) } else { out(&spec) }
        }
        VmCommand::Protect {
            name,
            partner,
            wait,
        } => {
            let done: Done =
                block(client.post(&format!("/v1/vms/{name}/protect"), &Protect { partner }))?;
            if let Some(seconds) = wait {
                wait_mirrored(client, &name, Duration::from_secs(seconds), json)?;
            }
            report(&done, json)
        }
        VmCommand::Console { name } => console(client, &name),
    }
}

fn out(text: &str) -> anyhow::Result<()> {
    print!("{text}");
    Ok(())
}

fn report(done: &Done, json: bool) -> anyhow::Result<()> {
    if json {
        return print_json(done);
    }
    for note in &done.notes {
        println!("note: {note}");
    }
    Ok(())
}

fn simple(client: &Client, name: &str, command: &str, json: bool) -> anyhow::Result<()> {
    let done: Done = block(client.post(&format!("/v1/vms/{name}/{command}"), &()))?;
    report(&done, json)
}

/// How often progress is asked for.
const POLL: Duration = Duration::from_millis(100);

/// Wait until a VM is mirrored, showing the seeding.
fn wait_mirrored(client: &Client, name: &str, limit: Duration, json: bool) -> anyhow::Result<()> {
    let begun = Instant::now();
    let progress = !json && std::io::stderr().is_terminal();
    loop {
        let vm: VmStatus = block(client.get(&format!("/v1/vms/{name}")))?;
        if vm.mirrored {
            if progress {
                eprintln!(
                    "\rmirrored after {:.1} s                    ",
                    begun.elapsed().as_secs_f64()
                );
            }
            return Ok(());
        }
        if vm.role != Role::Primary {
            bail!("VM `{name}` does not run here any more; see `pollux vm show {name}`");
        }
        if begun.elapsed() > limit {
            let why = vm
                .warnings
                .first()
                .map_or(vm.state.as_str(), String::as_str);
            bail!(
                "VM `{name}` is not mirrored after {} s: {why}",
                limit.as_secs()
            );
        }
        if progress {
            match &vm.seeding {
                Some(s) => eprint!(
                    "\rseeding {} of {} MiB, round {}   ",
                    s.done_bytes >> 20,
                    s.total_bytes >> 20,
                    s.round
                ),
                None => eprint!("\r{}                    ", vm.state),
            }
        }
        std::thread::sleep(POLL);
    }
}

/// Ctrl-].
const DETACH: u8 = 0x1d;

fn console(client: &Client, name: &str) -> anyhow::Result<()> {
    let vm: VmStatus = block(client.get(&format!("/v1/vms/{name}")))?;
    let Some(path) = vm.console else {
        bail!("VM `{name}` does not run here; ask the host that runs it");
    };
    let mut socket = std::os::unix::net::UnixStream::connect(&path)
        .with_context(|| format!("cannot open the console {path}"))?;
    let mut to_guest = socket.try_clone()?;
    let _raw = RawTerminal::enter();
    eprintln!("attached to {name}; Ctrl-] detaches\r");
    let input = std::thread::spawn(move || -> std::io::Result<()> {
        let mut byte = [0];
        while std::io::stdin().read(&mut byte)? == 1 && byte[0] != DETACH {
            to_guest.write_all(&byte)?;
        }
        to_guest.shutdown(std::net::Shutdown::Both)
    });
    let mut stdout = std::io::stdout();
    let mut buffer = [0; 4096];
    while let Ok(n @ 1..) = socket.read(&mut buffer) {
        stdout.write_all(&buffer[..n])?;
        stdout.flush()?;
    }
    if input.is_finished() {
        let _ = input.join();
    }
    Ok(())
}

/// A terminal that hands every key on; back to what it was when dropped.
struct RawTerminal(Option<libc::termios>);

impl RawTerminal {
    fn enter() -> Self {
        let mut now = std::mem::MaybeUninit::<libc::termios>::uninit();
        // SAFETY: tcgetattr fills the struct or fails; it is read only if it succeeded.
        let before = unsafe {
            if libc::tcgetattr(0, now.as_mut_ptr()) != 0 {
                return Self(None);
            }
            now.assume_init()
        };
        let mut raw = before;
        // SAFETY: both calls take a valid termios of this process's own terminal.
        unsafe {
            libc::cfmakeraw(&raw mut raw);
            libc::tcsetattr(0, libc::TCSANOW, &raw const raw);
        }
        Self(Some(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // SAFETY: a termios that tcgetattr gave.
            unsafe {
                libc::tcsetattr(0, libc::TCSANOW, before);
            }
        }
    }
}
