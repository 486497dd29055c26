//! The one binary.

fn main() {
    let args: Vec<std::ffi::OsString> = std::env::args_os().skip(1).collect();
    if let Some(status) =
        pollux::lab::hidden_main(&args).or_else(|| pollux::drill::hidden_main(&args))
    {
        std::process::exit(status);
    }
}
