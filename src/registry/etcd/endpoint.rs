//! Where etcd is and how it is spoken to: addresses and TLS.

use rustls::ClientConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use std::fs::File;
use std::io::Read;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio_rustls::TlsConnector;

/// Most endpoints. etcd clusters have three or five members, seldom seven.
pub const ENDPOINTS_MAX: usize = 16;
/// Longest PEM file: a bundle of every public authority has a quarter of this.
pub const PEM_BYTES_MAX: u64 = 1024 * 1024;

/// How this host and etcd prove who they are. Both sides use TLS 1.3.
#[derive(Clone, Debug)]
pub struct EtcdTls {
    /// The authority that signed etcd's certificates, as PEM. No other is trusted.
    pub ca: PathBuf,
    /// This host's certificate, where etcd asks for one (`--client-cert-auth`).
    pub client: Option<EtcdClientCertificate>,
}

/// A certificate for this host and its key, as PEM.
#[derive(Clone, Debug)]
pub struct EtcdClientCertificate {
    /// The certificate, followed by intermediate ones if there are any.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// What is wrong with the settings.
#[derive(Debug, thiserror::Error)]
pub enum EtcdConfigError {
    /// None, or too many.
    #[error("etcd has {0} endpoints in the settings; name 1 to {ENDPOINTS_MAX}")]
    Endpoints(usize),
    /// Not a URL of the kind that is needed.
    #[error("{0:?} is no etcd endpoint: {1}; write it as https://host:2379")]
    Endpoint(String, String),
    /// Everybody on the way could read and change what decides who runs a VM.
    #[error(
        "{0} is neither encrypted nor on this machine; use https, or allow plain http if nobody else can reach that network"
    )]
    Plain(String),
    /// https without an authority to judge by.
    #[error("{0} needs the authority that signed etcd's certificate; name its PEM file")]
    NoAuthority(String),
    /// Not a name that can be part of a key.
    #[error("{0:?} cannot be the name of a pool in etcd: use 1 to {1} of a-z, 0-9 and -")]
    Pool(String, usize),
    /// A file of certificates or its contents.
    #[error("cannot use {path}: {why}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

/// One member of the cluster.
#[derive(Clone, Debug)]
pub(super) struct Endpoint {
    /// As in the settings, for messages.
    pub url: String,
    pub host: String,
    pub port: u16,
    /// The name its certificate must bear; none: no TLS.
    pub tls_name: Option<ServerName<'static>>,
}

impl Endpoint {
    pub(super) fn parse(url: &str, allow_plain: bool) -> Result<Self, EtcdConfigError> {
        let bad = |why: &str| EtcdConfigError::Endpoint(url.to_owned(), why.to_owned());
        let uri: hyper::Uri = url.parse().map_err(|_| bad("it is not a URL"))?;
        let authority = uri.authority().ok_or_else(|| bad("it has no host"))?;
        if authority.as_str().contains('@') || !matches!(uri.path(), "" | "/") {
            return Err(bad("it has more than a host and a port"));
        }
        if uri.query().is_some() {
            return Err(bad("it has more than a host and a port"));
        }
        let host = authority.host().trim_matches(['[', ']']).to_owned();
        let port = authority.port_u16().ok_or_else(|| bad("it has no port"))?;
        let tls_name = match uri.scheme_str() {
            Some("https") => Some(
                ServerName::try_from(host.clone()).map_err(|_| bad("its host is not a name"))?,
            ),
            Some("http") => None,
            _ => return Err(bad("it begins with neither https:// nor http://")),
        };
        if tls_name.is_none() && !is_loopback(&host) {
            if !allow_plain {
                return Err(EtcdConfigError::Plain(url.to_owned()));
            }
            tracing::warn!(
                "etcd at {url} is spoken to without encryption: whoever reaches that network can decide who runs a VM"
            );
        }
        Ok(Self {
            url: url.to_owned(),
            host,
            port,
            tls_name,
        })
    }
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn pem(path: &Path) -> Result<Vec<u8>, EtcdConfigError> {
    let bad = |why: String| EtcdConfigError::File {
        path: path.to_owned(),
        why,
    };
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(PEM_BYTES_MAX + 1).read_to_end(&mut bytes))
        .map_err(|e| bad(e.to_string()))?;
    if u64::try_from(bytes.len()).is_ok_and(|n| n <= PEM_BYTES_MAX) {
        return Ok(bytes);
    }
    Err(bad(format!("it is longer than {PEM_BYTES_MAX} bytes")))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, EtcdConfigError> {
    let bad = |why: String| EtcdConfigError::File {
        path: path.to_owned(),
        why,
    };
    let found: Vec<_> = CertificateDer::pem_slice_iter(&pem(path)?)
        .collect::<Result<_, _>>()
        .map_err(|e| bad(format!("it is not PEM: {e}")))?;
    if found.is_empty() {
        return Err(bad("there is no certificate in it".into()));
    }
    Ok(found)
}

/// TLS 1.3 with exactly the given authority.
pub(super) fn connector(tls: &EtcdTls) -> Result<TlsConnector, EtcdConfigError> {
    let bad = |path: &Path, why: String| EtcdConfigError::File {
        path: path.to_owned(),
        why,
    };
    let mut roots = rustls::RootCertStore::empty();
    for certificate in certificates(&tls.ca)? {
        roots
            .add(certificate)
            .map_err(|e| bad(&tls.ca, format!("its certificate is of no use: {e}")))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| bad(&tls.ca, e.to_string()))?
        .with_root_certificates(roots);
    let mut config = match &tls.client {
        None => builder.with_no_client_auth(),
        Some(client) => {
            let key = PrivateKeyDer::from_pem_slice(&pem(&client.key)?)
                .map_err(|e| bad(&client.key, format!("there is no private key in it: {e}")))?;
            builder
                .with_client_auth_cert(certificates(&client.certificate)?, key)
                .map_err(|e| bad(&client.certificate, format!("it and its key: {e}")))?
        }
    };
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_http_is_for_this_machine_unless_it_is_allowed() {
        for url in [
            "http://127.0.0.1:2379",
            "http://localhost:2379",
            "http://[::1]:1",
        ] {
            assert!(Endpoint::parse(url, false).is_ok(), "{url}");
        }
        let error = Endpoint::parse("http://10.0.0.1:2379", false).unwrap_err();
        assert!(matches!(error, EtcdConfigError::Plain(_)), "{error}");
        assert!(Endpoint::parse("http://10.0.0.1:2379", true).is_ok());
        // A name is not this machine because it begins like it.
        assert!(Endpoint::parse("http://127.0.0.1.example:2379", false).is_err());
        assert!(Endpoint::parse("http://localhost.example:2379", false).is_err());
    }

    #[test]
    fn what_is_no_endpoint_is_named() {
        for url in [
            "",
            "10.0.0.1:2379",
            "https://10.0.0.1",
            "ftp://h:1",
            "https://u@h:1",
            "https://h:1/v3",
            "https://h:1/?a",
        ] {
            let error = Endpoint::parse(url, true).unwrap_err().to_string();
            assert!(error.contains("https://host:2379"), "{url}: {error}");
        }
        let six = Endpoint::parse("https://[fd00::1]:2379", false).unwrap();
        assert_eq!((six.host.as_str(), six.port), ("fd00::1", 2379));
    }

    #[test]
    fn a_file_without_a_certificate_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let ca = dir.path().join("ca.pem");
        let tls = EtcdTls {
            ca: ca.clone(),
            client: None,
        };
        let why = |tls| connector(tls).err().unwrap().to_string();
        assert!(why(&tls).contains("ca.pem: No such file"), "{}", why(&tls));
        std::fs::write(&ca, "hello").unwrap();
        assert!(why(&tls).contains("no certificate"), "{}", why(&tls));
        std::fs::write(&ca, vec![b'-'; 1024 * 1024 + 1]).unwrap();
        assert!(why(&tls).contains("longer than"), "{}", why(&tls));
    }
}
