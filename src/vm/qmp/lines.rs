//! Cuts a byte stream into lines, with a cap. Pure: bytes in, lines out.

/// Bytes asked for in one read. Replies of a checkpoint are below 100 bytes.
pub(super) const READ_BYTES: usize = 16 * 1024;

/// Bytes received and not yet handed out as lines.
///
/// Invariant: `scanned` bytes of `bytes[start..]` hold no newline.
#[derive(Debug, Default)]
pub(super) struct LineBuffer {
    bytes: Vec<u8>,
    start: usize,
    scanned: usize,
}

impl LineBuffer {
    /// Takes in what was read.
    pub(super) fn push(&mut self, more: &[u8]) {
        if self.start > 0 {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        self.bytes.extend_from_slice(more);
    }

    /// The next whole line without its end (`\n`, `\r\n`), if there is one.
    pub(super) fn next_line(&mut self) -> Option<&[u8]> {
        let pending = &self.bytes[self.start..];
        let Some(at) = pending[self.scanned..].iter().position(|&b| b == b'\n') else {
            self.scanned = pending.len();
            return None;
        };
        let (from, to) = (self.start, self.start + self.scanned + at);
        self.start = to + 1;
        self.scanned = 0;
        Some(self.bytes[from..to].trim_ascii())
    }

    /// Bytes held that do not form a line yet.
    pub(super) fn partial_len(&self) -> usize {
        self.bytes.len() - self.start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_survive_any_split() {
        let stream = b"one\r\n\ntwo\nthr";
        for cut in 0..stream.len() {
            let mut buffer = LineBuffer::default();
            let mut lines = Vec::new();
            for part in [&stream[..cut], &stream[cut..]] {
                buffer.push(part);
                while let Some(line) = buffer.next_line() {
                    lines.push(line.to_vec());
                }
            }
            assert_eq!(lines, [&b"one"[..], b"", b"two"], "cut at {cut}");
            assert_eq!(buffer.partial_len(), 3);
        }
    }
}
