//! The change that `pollux plan whatif` is asked about, read from its options.

use crate::plan::model::{Bytes, Host, HostState, Pool, Protection, Vm};
use crate::plan::whatif::Change;
use crate::pool::HostName;
use anyhow::{Context, bail};
use clap::Args;

#[derive(Args)]
pub(super) struct ChangeArgs {
    #[command(flatten)]
    what: What,
    /// Memory of what is started or added, like '8 GiB'.
    #[arg(long, value_name = "SIZE")]
    memory: Option<Bytes>,
    /// The host of what is started or protected; default: it is chosen.
    #[arg(long, value_name = "HOST")]
    on: Option<HostName>,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct What {
    /// Start a VM: one of the file that does not run, or a new one with --memory.
    #[arg(long, value_name = "VM")]
    start: Option<String>,
    /// Stop a VM.
    #[arg(long, value_name = "VM")]
    stop: Option<String>,
    /// Give a VM another size.
    #[arg(long, value_name = "VM=SIZE")]
    resize: Option<String>,
    /// Protect a VM by none, restart, reserved or mirrored.
    #[arg(long, value_name = "VM=PROTECTION")]
    protect: Option<String>,
    /// Move a VM while it runs.
    #[arg(long = "move", value_name = "VM=HOST")]
    moved: Option<String>,
    /// Empty a host and take it into maintenance.
    #[arg(long, value_name = "HOST")]
    maintenance: Option<HostName>,
    /// A host joins (with --memory), or one of the file comes back as live.
    #[arg(long, value_name = "HOST")]
    add_host: Option<HostName>,
}

/// `a=b`
fn pair<'a>(text: &'a str, form: &str) -> anyhow::Result<(&'a str, &'a str)> {
    text.split_once('=')
        .with_context(|| format!("`{text}` is not of the form {form}"))
}

impl ChangeArgs {
    pub(super) fn read(&self, pool: &Pool) -> anyhow::Result<Change> {
        let what = &self.what;
        Ok(if let Some(name) = &what.start {
            Change::Start(Box::new(self.vm(pool, name)?))
        } else if let Some(name) = &what.stop {
            Change::Stop(name.clone())
        } else if let Some(text) = &what.resize {
            let (name, size) = pair(text, "VM=SIZE")?;
            Change::Resize(name.into(), size.parse().map_err(anyhow::Error::msg)?)
        } else if let Some(text) = &what.protect {
            let (name, word) = pair(text, "VM=PROTECTION")?;
            let all = [
                Protection::None,
                Protection::Restart,
                Protection::Reserved,
                Protection::Mirrored,
            ];
            let found = all.into_iter().find(|p| p.word() == word);
            let protection = found.with_context(|| {
                format!("protection `{word}` is not known; use none, restart, reserved or mirrored")
            })?;
            Change::Protect(name.into(), protection, self.on.clone())
        } else if let Some(text) = &what.moved {
            let (name, host) = pair(text, "VM=HOST")?;
            Change::Move(name.into(), host.parse()?)
        } else if let Some(host) = &what.maintenance {
            Change::Maintenance(host.clone())
        } else if let Some(name) = &what.add_host {
            Change::Add(Box::new(self.host(pool, name)?))
        } else {
            bail!("say what is to change; `pollux plan whatif --help` shows examples");
        })
    }

    fn vm(&self, pool: &Pool, name: &str) -> anyhow::Result<Vm> {
        let known = pool.vm(name).cloned();
        let mut vm = match (known, self.memory) {
            (Some(known), None) => known,
            (None, Some(memory)) => Vm {
                name: name.into(),
                memory,
                ..Vm::default()
            },
            (Some(_), Some(_)) => {
                bail!("`{name}` is in the pool file, with its memory; leave --memory out")
            }
            (None, None) => bail!("the pool has no VM `{name}`; for a new one give --memory"),
        };
        if vm.host.is_none() {
            vm.host = self.on.clone();
        }
        Ok(vm)
    }

    fn host(&self, pool: &Pool, name: &HostName) -> anyhow::Result<Host> {
        let known = pool.host(name.as_str()).cloned();
        let mut host = match (known, self.memory) {
            (Some(known), _) => known,
            (None, Some(memory)) => Host {
                name: name.clone(),
                memory,
                overhead: Bytes(0),
                hugepages: Bytes(0),
                vcpus: None,
                state: HostState::Live,
                domain: None,
                devices: std::collections::BTreeMap::new(),
            },
            (None, None) => bail!("the pool has no host `{name}`; for a new one give --memory"),
        };
        host.memory = self.memory.unwrap_or(host.memory);
        host.state = HostState::Live;
        Ok(host)
    }
}
