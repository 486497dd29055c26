//! `pollux link …`

use super::print_json;
use crate::api::client::{Client, block, pin_both};
use crate::api::types::{Done, HostInfo, LINK_PORT, LinkAddrs, LinkConfig, PartnerStatus};
use anyhow::bail;
use clap::Subcommand;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

#[derive(Subcommand)]
pub(super) enum LinkCommand {
    /// Pin a partner: exchange fingerprints and tell both sides their addresses.
    ///
    /// With --partner-api both daemons are asked and told in one go, as on one machine or
    /// through a forwarded socket. Without it this side alone is told, and --partner and
    /// --fingerprint say what `pollux host show` prints on the partner; run the mirrored
    /// command there.
    Create {
        /// A physical link as LOCAL=PEER, addresses with or without port; best link first.
        #[arg(long = "link", value_name = "LOCAL=PEER", required = true)]
        links: Vec<LinkPair>,
        /// The partner daemon's API socket.
        #[arg(long, value_name = "SOCKET", conflicts_with_all = ["partner", "fingerprint"])]
        partner_api: Option<PathBuf>,
        /// The partner's name.
        #[arg(
            long,
            requires = "fingerprint",
            required_unless_present = "partner_api"
        )]
        partner: Option<crate::pool::HostName>,
        /// The partner's fingerprint.
        #[arg(long, requires = "partner")]
        fingerprint: Option<String>,
    },
    /// List the pinned links and how they stand.
    List,
    /// Forget a partner.
    Remove {
        /// Its name.
        partner: String,
    },
}

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

pub(super) fn run(command: LinkCommand, client: &Client, json: bool) -> anyhow::Result<()> {
    match command {
        LinkCommand::Create {
            links,
            partner_api,
            partner,
            fingerprint,
        } => {
            let links: Vec<LinkAddrs> = links.into_iter().map(|l| l.0).collect();
            match (partner_api, partner, fingerprint) {
                (Some(socket), _, _) => {
                    let (a, b) = block(pin_both(client, &Client::new(&socket), &links))?;
                    if json {
                        return print_json(&[a, b]);
                    }
                    println!("{} {}\n{} {}", a.name, a.fingerprint, b.name, b.fingerprint);
                }
                (None, Some(partner), Some(fingerprint)) => {
                    let link = LinkConfig {
                        partner,
                        fingerprint,
                        next_fingerprint: None,
                        links,
                    };
                    let _: Done = block(client.post("/v1/links", &link))?;
                    let info: HostInfo = block(client.get("/v1/host"))?;
                    if json {
                        return print_json(&info);
                    }
                    println!(
                        "{} is pinned here. On {}: pollux link create --partner {} --fingerprint {} --link PEER=LOCAL",
                        link.partner, link.partner, info.name, info.fingerprint
                    );
                }
                _ => bail!("give --partner-api, or --partner and --fingerprint"),
            }
            Ok(())
        }
        LinkCommand::List => {
            let links: Vec<LinkConfig> = block(client.get("/v1/links"))?;
            let status: crate::api::types::HostStatus = block(client.get("/v1/status"))?;
            if json {
                return print_json(&links);
            }
            for link in &links {
                let stands = status.partners.iter().find(|p| p.name == link.partner);
                println!("{}", line(link, stands));
            }
            Ok(())
        }
        LinkCommand::Remove { partner } => {
            let done: Done = block(client.delete(&format!("/v1/links/{partner}")))?;
            if json { print_json(&done) } else { Ok(()) }
        }
    }
}

fn line(link: &LinkConfig, status: Option<&PartnerStatus>) -> String {
    let addresses: Vec<String> = link
        .links
        .iter()
        .map(|l| format!("{} - {}", l.local, l.peer))
        .collect();
    let stands = status.map_or(
        "unknown",
        |s| if s.connected { "connected" } else { "down" },
    );
    format!(
        "{}  {stands}  {}  {}",
        link.partner,
        addresses.join(", "),
        link.fingerprint
    )
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
