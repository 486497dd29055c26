//! Every input the fuzzers kept, through the decoder it was found for: `scripts/fuzz`
//! finds and chooses them.

#![allow(clippy::unwrap_used)]

use interconnect::fuzzing;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Each target's corpus is small enough to read and to replay in every run.
const FILES_MAX: usize = 60;
const BYTES_MAX: usize = 256 << 10;

fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{folder:?}: {error}"));
    entries.map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn the_decoders_keep_their_promises_on_every_input_of_the_corpus() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let folders: BTreeSet<_> = entries(&corpus)
        .iter()
        .map(|folder| folder.file_name().unwrap().to_str().unwrap().to_owned())
        .collect();
    let targets = fuzzing::TARGETS.iter().map(|target| target.0.to_owned());
    assert_eq!(folders, targets.collect(), "one folder for each target");
    for (name, target) in fuzzing::TARGETS {
        let files = entries(&corpus.join(name));
        assert!((1..=FILES_MAX).contains(&files.len()), "{name}");
        let mut bytes = 0;
        for file in files {
            let input = std::fs::read(&file).unwrap();
            bytes += input.len();
            // A panic below is explained by the name of the input.
            println!("{}", file.display());
            target(&input);
            // Damaged and cut off, too.
            for at in [0, input.len() / 2, input.len().saturating_sub(1)] {
                target(&input[..at]);
                let mut damaged = input.clone();
                if let Some(byte) = damaged.get_mut(at) {
                    *byte ^= 1 << (at % 8);
                    target(&damaged);
                }
            }
        }
        assert!(bytes <= BYTES_MAX, "{name}: {bytes} bytes");
    }
}

#[test]
fn there_is_a_fuzzer_for_every_target() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz");
    let manifest = std::fs::read_to_string(fuzz.join("Cargo.toml")).unwrap();
    for (name, _) in fuzzing::TARGETS {
        assert!(
            manifest.contains(&format!("name = \"{name}\"")),
            "{name} has no fuzzer"
        );
        let source = std::fs::read_to_string(fuzz.join(format!("targets/{name}.rs"))).unwrap();
        assert!(
            source.contains(&format!("run(\"{name}\", data)")),
            "{name}'s fuzzer runs another target"
        );
    }
    // The others are the product's.
    let ours = entries(&fuzz.join("targets")).into_iter().filter(|file| {
        let source = std::fs::read_to_string(file).unwrap();
        source.contains("interconnect::fuzzing")
    });
    assert_eq!(ours.count(), fuzzing::TARGETS.len());
}
