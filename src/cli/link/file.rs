//! A link file: what one host tells a partner that is to pin it.

use crate::api::types::{HostInfo, LinkAddrs, LinkConfig};
use crate::pool::HostName;
use anyhow::{Context, bail};
use interconnect::identity::Fingerprint;
use serde::{Deserialize, Serialize};
use std::io::Read;
use std::path::Path;

/// Version of the layout.
const VERSION: u32 = 1;
/// Longest file read, bytes: a handful of lines is a few hundred.
const FILE_BYTES_MAX: u64 = 64 << 10;
/// Most links in a file: more ports than a host has for this.
const LINKS_MAX: usize = 16;

/// Identity and addresses of a host, as that host writes them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LinkFile {
    /// Version of the layout.
    version: u32,
    /// The host.
    host: HostName,
    /// Of its identity.
    fingerprint: Fingerprint,
    /// Its links, its own address first.
    #[serde(default, rename = "link", skip_serializing_if = "Vec::is_empty")]
    links: Vec<LinkAddrs>,
}

impl LinkFile {
    /// Of this host.
    pub(super) fn of(info: &HostInfo, links: Vec<LinkAddrs>) -> Self {
        Self {
            version: VERSION,
            host: info.name.clone(),
            fingerprint: info.fingerprint.parse().unwrap_or(Fingerprint([0; 32])),
            links,
        }
    }

    /// As written.
    pub(super) fn to_toml(&self) -> String {
        let body = toml::to_string(self).unwrap_or_default();
        format!(
            "# Host {}, for `pollux link create --file` on its partner. No secret, but to be\n# carried over a way you trust.\n{body}",
            self.host
        )
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let file: Self = toml::from_str(text).map_err(|e| {
            let line = e.span().map_or(1, |s| {
                1 + text.get(..s.start).map_or(0, |t| t.matches('\n').count())
            });
            anyhow::anyhow!("line {line}: {}", e.message())
        })?;
        if file.version != VERSION {
            bail!(
                "it has version {}, this build reads {VERSION}: run the same pollux version on both hosts",
                file.version
            );
        }
        if file.links.len() > LINKS_MAX {
            bail!(
                "it names {} links, at most {LINKS_MAX} make sense",
                file.links.len()
            );
        }
        Ok(file)
    }

    /// Read a file, `-` for standard input.
    pub(super) fn read(path: &Path) -> anyhow::Result<Self> {
        let shown = path.display();
        let mut text = String::new();
        let read = if path == Path::new("-") {
            std::io::stdin()
                .lock()
                .take(FILE_BYTES_MAX)
                .read_to_string(&mut text)
        } else {
            std::fs::File::open(path).and_then(|f| f.take(FILE_BYTES_MAX).read_to_string(&mut text))
        };
        read.with_context(|| {
            format!("cannot read {shown}: make it on the partner with `pollux link export`")
        })?;
        Self::parse(&text)
            .with_context(|| format!("{shown} is not a link file as `pollux link export` makes it"))
    }

    /// What its partner pins: over `links`, or over those of the file seen from there.
    pub(super) fn config(&self, links: Vec<LinkAddrs>) -> anyhow::Result<LinkConfig> {
        let links = if links.is_empty() {
            self.links.iter().map(|l| l.mirrored()).collect()
        } else {
            links
        };
        if links.is_empty() {
            bail!(
                "the file of {} names no link: add --link LOCAL=PEER, as this host writes it",
                self.host
            );
        }
        Ok(LinkConfig {
            partner: self.host.clone(),
            fingerprint: self.fingerprint.to_string(),
            next_fingerprint: None,
            links,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> LinkFile {
        LinkFile {
            version: VERSION,
            host: HostName::new("a").unwrap(),
            fingerprint: Fingerprint([7; 32]),
            links: vec![LinkAddrs {
                local: "10.0.0.1:7443".parse().unwrap(),
                peer: "10.0.0.2:7443".parse().unwrap(),
            }],
        }
    }

    #[test]
    fn a_file_comes_back_and_is_seen_from_the_other_side() {
        let file = sample();
        assert_eq!(LinkFile::parse(&file.to_toml()).unwrap(), file);
        let config = file.config(Vec::new()).unwrap();
        assert_eq!(config.links[0].local.to_string(), "10.0.0.2:7443");
        assert_eq!(config.partner.as_str(), "a");
        let mut bare = file;
        bare.links.clear();
        let error = bare.config(Vec::new()).unwrap_err().to_string();
        assert!(error.contains("--link"), "{error}");
    }

    #[test]
    fn what_is_wrong_with_a_file_is_told() {
        let text = sample().to_toml();
        for (bad, said) in [
            (text.replace("version = 1", "version = 2"), "version 2"),
            (text.replace("sha256:0707", "sha256:zz07"), "fingerprint"),
            (text.replace("host =", "hots ="), "hots"),
            (text.replace("\"a\"", "\"A!\""), "host name"),
            (text.replace("10.0.0.1:7443", "nowhere"), "line"),
            ("-----BEGIN PRIVATE KEY-----".into(), "line 1"),
            (
                text.clone() + &"[[link]]\nlocal = '10.0.0.1:1'\npeer = '10.0.0.2:1'\n".repeat(20),
                "21 links",
            ),
        ] {
            let error = LinkFile::parse(&bad).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }
}
