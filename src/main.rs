//! The one binary: commands, the daemon, and the first processes of a lab.

use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    // A lab's processes enter namespaces, which only a program without threads may do.
    let rest = args.get(1..).unwrap_or_default();
    if let Some(code) = pollux::lab::hidden_main(rest).or_else(|| pollux::drill::hidden_main(rest))
    {
        return u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from);
    }
    pollux::cli::main(args)
}
