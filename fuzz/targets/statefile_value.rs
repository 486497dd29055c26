#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pollux::fuzzing::run("statefile_value", data));
