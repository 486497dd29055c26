#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| interconnect::fuzzing::run("texts", data));
