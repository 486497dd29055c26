//! Values of the registry that say what a VM is and who runs it.

use crate::mirror::VmRecord;
use crate::pool::HostName;
use crate::pool::spec::VmSpec;

/// A VM's record.
pub(super) fn vm_record(data: &[u8]) {
    let Ok(record) = VmRecord::from_bytes(data) else {
        return;
    };
    let back = VmRecord::from_bytes(&record.to_bytes()).expect("what was read can be read again");
    assert_eq!(back, record);
    let me = HostName::new("me").expect("a name");
    for force in [false, true] {
        if let Ok(mine) = VmRecord::start(&me, Some(&record), force) {
            assert!(mine.generation > record.generation && mine.running);
            assert!(force || record.owner == me || !record.running);
        }
    }
}

/// A VM's spec.
pub(super) fn vm_spec(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if let Ok(spec) = VmSpec::parse(&text, "fuzzed") {
        let again = spec.to_toml();
        let back = VmSpec::parse(&again, "fuzzed");
        assert_eq!(back.as_ref(), Ok(&spec), "{again}");
    }
}
