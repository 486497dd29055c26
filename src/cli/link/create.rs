//! `pollux link create`: four ways for two hosts to pin each other.

use super::file::LinkFile;
use super::{LinkPair, addrs};
use crate::api::client::{Client, block, pin_both};
use crate::api::links::{ConfirmMeeting, MeetRequest, MeetingState, MeetingStatus};
use crate::api::types::{Done, HostInfo, LinkAddrs, LinkConfig};
use crate::cli::print_json;
use crate::lab::Lab;
use crate::lab::daemons::link_addrs;
use crate::pool::HostName;
use anyhow::{Context, bail};
use clap::Args;
use interconnect::identity::code::Code;
use std::io::{BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Between two looks at a meeting.
const LOOK_EVERY: Duration = Duration::from_millis(100);

#[derive(Args)]
pub(in crate::cli) struct CreateArgs {
    /// Two hosts to be linked in one go: API sockets, or hosts of a lab by name.
    #[arg(num_args = 2, value_names = ["A", "B"], conflicts_with_all = ["partner_api", "partner", "file", "yes_code"])]
    hosts: Vec<String>,
    /// The lab that A and B are hosts of.
    #[arg(long, value_name = "NAME", default_value = "lab", requires = "hosts")]
    lab: String,
    /// A physical link, address with or without port, this host's (or A's) own first; best
    /// link first.
    #[arg(long = "link", value_name = "LOCAL=PEER")]
    links: Vec<LinkPair>,
    /// The partner daemon's API socket: both are told in one go.
    #[arg(long, value_name = "SOCKET", conflicts_with_all = ["partner", "file", "yes_code"])]
    partner_api: Option<PathBuf>,
    /// The partner's name, with --fingerprint.
    #[arg(long, requires = "fingerprint", conflicts_with_all = ["file", "yes_code"])]
    partner: Option<HostName>,
    /// The partner's fingerprint, as `pollux host show` prints it there.
    #[arg(long, requires = "partner")]
    fingerprint: Option<String>,
    /// The partner's link file, `-` for standard input.
    #[arg(long, conflicts_with = "yes_code")]
    file: Option<PathBuf>,
    /// Pin if this is the code here too: the one that the partner shows.
    #[arg(long, value_name = "CODE")]
    yes_code: Option<Code>,
    /// End a meeting that waits on this host; nothing is pinned.
    #[arg(long, exclusive = true)]
    cancel: bool,
}

pub(super) fn run(args: CreateArgs, client: &Client, json: bool) -> anyhow::Result<()> {
    let links = addrs(&args.links);
    if args.cancel {
        let done: Done = block(client.delete("/v1/meeting"))?;
        return if json { print_json(&done) } else { Ok(()) };
    }
    if let [a, b] = args.hosts.as_slice() {
        let (a, b, links) = two_hosts(a, b, &args.lab, links)?;
        return both(&a, &b, &links, json);
    }
    if let Some(socket) = &args.partner_api {
        return both(client, &Client::new(socket), &needed(links)?, json);
    }
    if let Some(path) = &args.file {
        return pin(client, LinkFile::read(path)?.config(links)?, json);
    }
    if let (Some(partner), Some(fingerprint)) = (args.partner, args.fingerprint) {
        let link = LinkConfig {
            partner,
            fingerprint,
            next_fingerprint: None,
            links: needed(links)?,
        };
        return pin(client, link, json);
    }
    meet(client, needed(links)?, args.yes_code, json)
}

fn needed(links: Vec<LinkAddrs>) -> anyhow::Result<Vec<LinkAddrs>> {
    if links.is_empty() {
        bail!(
            "no link given: add --link LOCAL=PEER, like --link 10.78.0.1=10.78.0.2; `pollux link create --help` shows the ways to link two hosts"
        );
    }
    Ok(links)
}

/// Clients of the two hosts named, and the links between them as A writes them.
fn two_hosts(
    a: &str,
    b: &str,
    lab: &str,
    links: Vec<LinkAddrs>,
) -> anyhow::Result<(Client, Client, Vec<LinkAddrs>)> {
    if a.contains('/') && b.contains('/') {
        return Ok((
            Client::new(Path::new(a)),
            Client::new(Path::new(b)),
            needed(links)?,
        ));
    }
    let names = [a, b].map(|name| {
        HostName::new(name).with_context(|| {
            format!("`{name}` is neither an API socket (a path with `/`) nor a host of a lab")
        })
    });
    let [a, b] = names;
    let (a, b) = (a?, b?);
    let lab = Lab::open(lab).with_context(|| {
        format!("{a} and {b} are no API sockets, and hosts of the lab `{lab}` only if it is up")
    })?;
    let (at_a, at_b) = (lab.host(&a)?, lab.host(&b)?);
    let links = if links.is_empty() {
        link_addrs(at_a, &b)
    } else {
        links
    };
    Ok((
        Client::new(&at_a.api_socket),
        Client::new(&at_b.api_socket),
        links,
    ))
}

/// Tell two daemons in one go.
fn both(here: &Client, there: &Client, links: &[LinkAddrs], json: bool) -> anyhow::Result<()> {
    let (a, b) = block(pin_both(here, there, links))?;
    if json {
        return print_json(&[a, b]);
    }
    println!("{} {}\n{} {}", a.name, a.fingerprint, b.name, b.fingerprint);
    Ok(())
}

/// Tell this side alone.
fn pin(client: &Client, link: LinkConfig, json: bool) -> anyhow::Result<()> {
    let _: Done = block(client.post("/v1/links", &link))?;
    let info: HostInfo = block(client.get("/v1/host"))?;
    if json {
        return print_json(&info);
    }
    let mut links = String::new();
    for link in &link.links {
        links.push_str(&format!(" --link {}={}", link.peer, link.local));
    }
    println!(
        "{} is pinned here. If this host is not pinned there yet, on {}:\n  pollux link create --partner {} --fingerprint {}{links}",
        link.partner, link.partner, info.name, info.fingerprint
    );
    Ok(())
}

/// Meet the partner, show the code, pin it when it is confirmed.
fn meet(
    client: &Client,
    links: Vec<LinkAddrs>,
    yes_code: Option<Code>,
    json: bool,
) -> anyhow::Result<()> {
    let asks = yes_code.is_none() && !json && std::io::stdin().is_terminal();
    let met = block(wait(client, links, asks))?;
    let (Some(partner), Some(code)) = (&met.partner, &met.code) else {
        bail!(
            "{}",
            met.reason
                .as_deref()
                .unwrap_or("the meeting ended without a code")
        );
    };
    let confirmed = match yes_code {
        Some(code) => code.to_string(),
        None if asks => {
            println!("\n  {code}\n");
            print!(
                "Does host {partner} show the same code? Type `yes` to pin it, anything else to end this: "
            );
            std::io::stdout().flush()?;
            let mut answer = String::new();
            std::io::stdin().lock().read_line(&mut answer)?;
            if answer.trim() != "yes" {
                let _: Done = block(client.delete("/v1/meeting"))?;
                bail!(
                    "{partner} is not pinned. If the codes differed, somebody may stand between the hosts: check the cable, then begin again on both"
                );
            }
            code.clone()
        }
        None => {
            if json {
                return print_json(&met);
            }
            println!(
                "code {code}: nothing is pinned yet. If {partner} shows the same, repeat this command with --yes-code and the code shown there"
            );
            return Ok(());
        }
    };
    let pinned: MeetingStatus =
        block(client.post("/v1/meeting/confirm", &ConfirmMeeting { code: confirmed }))?;
    if json {
        return print_json(&pinned);
    }
    println!(
        "{partner} is pinned here: {}",
        pinned.fingerprint.unwrap_or_default()
    );
    Ok(())
}

/// Wait until there is a code, telling a person what is waited for.
async fn wait(
    client: &Client,
    links: Vec<LinkAddrs>,
    tells: bool,
) -> anyhow::Result<MeetingStatus> {
    let mut met: MeetingStatus = client.post("/v1/meeting", &MeetRequest { links }).await?;
    let mut told = None;
    loop {
        match met.state {
            MeetingState::Code => return Ok(met),
            MeetingState::Pinned | MeetingState::Failed => {
                bail!(
                    "{}",
                    met.reason
                        .as_deref()
                        .unwrap_or("the partner is pinned already")
                )
            }
            MeetingState::Waiting => {}
        }
        if tells && told != met.reason {
            if told.is_none()
                && let Some(link) = met.links.first()
            {
                eprintln!(
                    "waiting for the partner; run there: pollux link create --link {}={}",
                    link.peer, link.local
                );
            }
            if let Some(reason) = &met.reason {
                eprintln!("  {reason}");
            }
            told.clone_from(&met.reason);
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            _ = tokio::signal::ctrl_c() => {
                let _: Done = client.delete("/v1/meeting").await?;
                bail!("nobody was met and nothing is pinned");
            }
        }
        met = client.get("/v1/meeting").await?;
    }
}
