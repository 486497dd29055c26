//! `pollux link …`

mod create;
mod file;
mod rotate;
mod show;
mod test;

use super::print_json;
use crate::api::client::{Client, block};
use crate::api::links::PairStatus;
use crate::api::types::{Done, HostInfo, HostStatus, LINK_PORT, LinkAddrs, LinkConfig};
use clap::Subcommand;
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::str::FromStr;

#[derive(Subcommand)]
pub(super) enum LinkCommand {
    /// Link two hosts: let each pin the other's identity, and tell both the links' addresses.
    #[command(after_long_help = CREATE_HELP)]
    Create(create::CreateArgs),
    /// Print what a partner needs to pin this host, for `pollux link create --file` there.
    #[command(after_long_help = EXPORT_HELP)]
    Export {
        /// A physical link as this host writes it, address with or without port; best first.
        #[arg(long = "link", value_name = "LOCAL=PEER")]
        links: Vec<LinkPair>,
    },
    /// List the partners, and how each link to them stands.
    List,
    /// Show one pair: its links, its lanes, what the encoder makes of the VMs, what happened.
    #[command(after_long_help = SHOW_HELP)]
    Show {
        /// The partner.
        partner: String,
    },
    /// Measure a pair end to end, and say what that means for mirroring.
    #[command(after_long_help = TEST_HELP)]
    Test(test::TestArgs),
    /// Give this host a new key while its partners stay connected.
    #[command(after_long_help = ROTATE_HELP)]
    Rotate(rotate::RotateArgs),
    /// Forget a partner.
    Remove {
        /// Its name.
        partner: String,
    },
}

const CREATE_HELP: &str = "\
Four ways, each ends with both hosts having pinned each other:

  Compare a code (nothing else needed): run the command on both hosts, each with its own
  address first. Both show the same eight digits, or somebody stands between them; only
  what a person confirms is pinned.
    on a:  pollux link create --link 10.78.0.1=10.78.0.2
    on b:  pollux link create --link 10.78.0.2=10.78.0.1
  In scripts, without a terminal, the first run prints the code and exits; read it on one
  host and confirm it on the other:
    on b:  pollux link create --link 10.78.0.2=10.78.0.1 --yes-code 12345678

  By file, over a way you trust (ssh, a stick):
    on a:  pollux link export --link 10.78.0.1=10.78.0.2 > a.link
    on b:  pollux link create --file a.link       and the same the other way round

  By fingerprint, as `pollux host show` prints it on the partner:
    on a:  pollux link create --partner b --fingerprint sha256:... --link 10.78.0.1=10.78.0.2

  With both API sockets in reach (hosts of a lab, a socket forwarded by ssh), in one go:
    pollux link create /run/a.sock /run/b.sock --link 10.78.0.1=10.78.0.2
    pollux link create a b          hosts of the lab `lab`, with the lab's own links

Several links: repeat --link, best first; all of them carry. Each uses UDP port 7443
unless told otherwise, and the port above it for heartbeats.";

const EXPORT_HELP: &str = "\
The file holds no secret, but whoever changes it on its way chooses whom the partner
trusts: carry it over a way you trust, or compare codes instead.

  pollux link export --link 10.78.0.1=10.78.0.2 > a.link";

const SHOW_HELP: &str = "\
State of a link: up (carries), suspect (stands, but what was sent on it is overdue; it gets
nothing new until it is well), down. Loss and repeats count since its connection stands.
OUT and IN are rates of the last second.";

const TEST_HELP: &str = "\
Real traffic over the real session: round trips, goodput, epochs of 16 and of 1,000 pages.
It goes behind what control and I/O lanes carry. While VMs are mirrored over the pair it
leaves three quarters of the time to them (bursts of 4 MiB with pauses); with --full it
takes all there is, and epochs of those VMs take longer while it runs. Ctrl-C ends it.

  pollux link test b
  pollux link test b --seconds 20 --full --json";

const ROTATE_HELP: &str = "\
The new key is made and kept beside the present one; every partner pins it too; when all
have, this host uses it, dials its links anew one after the other, and the partners forget
the old one. Sessions go on all the while. A crash at any moment leaves a pair that can
connect; the change goes on when the daemon is back.

A partner that is away is waited for: it would not let this host in afterwards. There is no
force. If it is gone for good, `pollux link remove` it; if not, --give-up keeps the present
key.

  pollux link rotate
  pollux link rotate --status
  pollux link rotate --give-up";

/// LOCAL=PEER.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LinkPair(LinkAddrs);

impl FromStr for LinkPair {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (local, peer) = text
            .split_once('=')
            .ok_or_else(|| format!("`{text}` is not LOCAL=PEER, like 10.78.0.1=10.78.0.2"))?;
        Ok(Self(LinkAddrs {
            local: address(local)?,
            peer: address(peer)?,
        }))
    }
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse::<SocketAddr>()
        .or_else(|_| {
            text.parse::<IpAddr>()
                .map(|ip| SocketAddr::new(ip, LINK_PORT))
        })
        .map_err(|_| format!("`{text}` is not an IP address, with or without a port"))
}

fn addrs(links: &[LinkPair]) -> Vec<LinkAddrs> {
    links.iter().map(|l| l.0).collect()
}

pub(super) fn run(command: LinkCommand, client: &Client, json: bool) -> anyhow::Result<ExitCode> {
    match command {
        LinkCommand::Create(args) => create::run(args, client, json)?,
        LinkCommand::Export { links } => {
            let info: HostInfo = block(client.get("/v1/host"))?;
            let file = file::LinkFile::of(&info, addrs(&links));
            if json {
                print_json(&file)?;
            } else {
                print!("{}", file.to_toml());
            }
        }
        LinkCommand::List => {
            let links: Vec<LinkConfig> = block(client.get("/v1/links"))?;
            let status: HostStatus = block(client.get("/v1/status"))?;
            let list = show::entries(links, &status.partners);
            if json {
                print_json(&list)?;
            } else {
                print!("{}", show::list(&list));
            }
        }
        LinkCommand::Show { partner } => {
            let pair: PairStatus = block(client.get(&format!("/v1/links/{partner}/status")))?;
            if json {
                print_json(&pair)?;
            } else {
                print!("{}", show::pair(&pair));
            }
        }
        LinkCommand::Test(args) => return test::run(&args, client, json),
        LinkCommand::Rotate(args) => return rotate::run(&args, client, json),
        LinkCommand::Remove { partner } => {
            let done: Done = block(client.delete(&format!("/v1/links/{partner}")))?;
            if json {
                print_json(&done)?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::LinkPair;

    #[test]
    fn links_are_read_with_and_without_port() {
        let pair: LinkPair = "10.0.0.1=10.0.0.2:9000".parse().unwrap();
        assert_eq!(pair.0.local.to_string(), "10.0.0.1:7443");
        assert_eq!(pair.0.peer.to_string(), "10.0.0.2:9000");
        assert!("10.0.0.1".parse::<LinkPair>().is_err());
        assert!("a=b".parse::<LinkPair>().is_err());
    }
}
