#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pollux::fuzzing::run("restart_plan", data));
