#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pollux::fuzzing::run("host_config", data));
