//! What the client process writes: one JSON array a line, short, append-only.
//!
//! ```text
//! ["hello",1,CLIENTS]                          first line: version, number of clients
//! ["up",CLIENT,AT_NS]                          its connection stands
//! [CLIENT,SEQ,SENT_NS,ANSWERED_NS,NUMBER]      an answered request
//! ["broken",CLIENT,AT_NS,SEQ,"why"]            its connection broke while request SEQ was out
//! ["open",CLIENT,SENT_NS,SEQ]                  at the end: never answered
//! ["end",AT_NS]                                last line
//! ```
//!
//! Times are `CLOCK_MONOTONIC` nanoseconds.

use super::MonotonicNs;
use serde::Deserialize;
use std::fmt;

/// Version of the format.
pub const LOG_VERSION: u64 = 1;
/// Longest line taken from a client process, bytes; the longest it writes is far shorter.
pub const LINE_BYTES_MAX: usize = 4096;

/// An answered request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Answer {
    /// Which client.
    pub client: u16,
    /// Its how manyeth request, from 0.
    pub seq: u64,
    /// Just before the request was given to the kernel.
    pub sent_ns: MonotonicNs,
    /// Just after the answer was read.
    pub answered_ns: MonotonicNs,
    /// The number it was given (echo: the bytes echoed).
    pub number: u64,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// The first.
    Hello {
        /// Number of clients.
        clients: u16,
    },
    /// A connection stands.
    Up {
        /// Which client.
        client: u16,
        /// Since when.
        at_ns: MonotonicNs,
    },
    /// A request was answered.
    Answer(Answer),
    /// A connection broke.
    Broken {
        /// Which client.
        client: u16,
        /// When.
        at_ns: MonotonicNs,
        /// The request that was out.
        seq: u64,
        /// The socket's error or the wrong answer.
        why: String,
    },
    /// A request that was never answered.
    Open {
        /// Which client.
        client: u16,
        /// When it was sent.
        sent_ns: MonotonicNs,
        /// Which request.
        seq: u64,
    },
    /// The last.
    End {
        /// When.
        at_ns: MonotonicNs,
    },
}

/// A line that is none.
#[derive(Debug, thiserror::Error)]
#[error("the client wrote a line that is not one of its log: {0}")]
pub struct BadLine(String);

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hello { clients } => write!(f, "[\"hello\",{LOG_VERSION},{clients}]"),
            Self::Up { client, at_ns } => write!(f, "[\"up\",{client},{}]", at_ns.0),
            Self::Answer(a) => write!(
                f,
                "[{},{},{},{},{}]",
                a.client, a.seq, a.sent_ns.0, a.answered_ns.0, a.number
            ),
            Self::Broken {
                client,
                at_ns,
                seq,
                why,
            } => {
                let why = serde_json::Value::from(why.as_str());
                write!(f, "[\"broken\",{client},{},{seq},{why}]", at_ns.0)
            }
            Self::Open {
                client,
                sent_ns,
                seq,
            } => write!(f, "[\"open\",{client},{},{seq}]", sent_ns.0),
            Self::End { at_ns } => write!(f, "[\"end\",{}]", at_ns.0),
        }
    }
}

impl Line {
    /// Read one line.
    ///
    /// # Errors
    /// [`BadLine`] with its beginning.
    pub fn parse(text: &str) -> Result<Self, BadLine> {
        let bad = || BadLine(text.chars().take(80).collect());
        let json = |e: serde_json::Error| {
            BadLine(format!(
                "{} ({e})",
                text.chars().take(80).collect::<String>()
            ))
        };
        if !text.starts_with("[\"") {
            return serde_json::from_str(text).map(Self::Answer).map_err(json);
        }
        let fields: Vec<serde_json::Value> = serde_json::from_str(text).map_err(json)?;
        let number = |i: usize| {
            fields
                .get(i)
                .and_then(serde_json::Value::as_u64)
                .ok_or_else(bad)
        };
        let client = |i: usize| number(i).and_then(|n| u16::try_from(n).map_err(|_| bad()));
        let time = |i: usize| number(i).map(MonotonicNs);
        match fields.first().and_then(|v| v.as_str()) {
            Some("hello") if number(1)? == LOG_VERSION => Ok(Self::Hello {
                clients: client(2)?,
            }),
            Some("up") => Ok(Self::Up {
                client: client(1)?,
                at_ns: time(2)?,
            }),
            Some("broken") => Ok(Self::Broken {
                client: client(1)?,
                at_ns: time(2)?,
                seq: number(3)?,
                why: fields
                    .get(4)
                    .and_then(|v| v.as_str())
                    .ok_or_else(bad)?
                    .to_owned(),
            }),
            Some("open") => Ok(Self::Open {
                client: client(1)?,
                sent_ns: time(2)?,
                seq: number(3)?,
            }),
            Some("end") => Ok(Self::End { at_ns: time(1)? }),
            _ => Err(bad()),
        }
    }
}

/// Everything a client process has said so far.
#[derive(Clone, Debug, Default)]
pub struct ClientLog {
    /// Number of clients it announced.
    pub clients: u16,
    /// Answers in the order they were written.
    pub answers: Vec<Answer>,
    /// Broken connections: client, when, request, why.
    pub broken: Vec<(u16, MonotonicNs, u64, String)>,
    /// Requests never answered: client, when sent.
    pub open: Vec<(u16, MonotonicNs)>,
    /// Connections made.
    pub ups: u64,
    /// The process ended in good order.
    pub ended: bool,
}

impl ClientLog {
    /// Take one line.
    pub fn add(&mut self, line: Line) {
        match line {
            Line::Hello { clients } => self.clients = clients,
            Line::Up { .. } => self.ups += 1,
            Line::Answer(answer) => self.answers.push(answer),
            Line::Broken {
                client,
                at_ns,
                seq,
                why,
            } => self.broken.push((client, at_ns, seq, why)),
            Line::Open {
                client, sent_ns, ..
            } => self.open.push((client, sent_ns)),
            Line::End { .. } => self.ended = true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_survive_the_journey_and_garbage_does_not() {
        let at_ns = MonotonicNs(5);
        let answer = Answer {
            client: 3,
            seq: 9,
            sent_ns: MonotonicNs(1),
            answered_ns: MonotonicNs(2),
            number: 77,
        };
        for line in [
            Line::Hello { clients: 4 },
            Line::Up { client: 1, at_ns },
            Line::Answer(answer),
            Line::Broken {
                client: 1,
                at_ns,
                seq: 4,
                why: "a \"quoted\" reason".into(),
            },
            Line::Open {
                client: 1,
                sent_ns: at_ns,
                seq: 4,
            },
            Line::End { at_ns },
        ] {
            assert_eq!(Line::parse(&line.to_string()).unwrap(), line);
        }
        for bad in [
            "",
            "[]",
            "[1,2,3]",
            "[\"hello\",2,1]",
            "[\"up\",99999,1]",
            "[\"end\"]",
            "{}",
            "[\"what\"]",
        ] {
            assert!(Line::parse(bad).is_err(), "{bad}");
        }
    }
}
