use super::*;
use proptest::prelude::*;

const GOOD: &str = r#"name = "orders"
uuid = "6f1c0a52-3f0e-4b0c-9a39-3d6a2c1f6f11"
memory = "512 MiB"
vcpus = 2
kernel = "/boot/vmlinuz"
cmdline = "console=ttyS0 tsc_early_khz=2600000"
protection = "mirrored"

[[disk]]
name = "root"
path = "/var/lib/pollux/orders.raw"
size = "4 GiB"

[[nic]]
name = "lan"
mac = "52:54:00:12:34:56"
bridge = "br0"

[mirror]
partner = "host-b"
"#;

fn errors(text: &str) -> String {
    VmSpec::parse(text, "vm.toml").unwrap_err().to_string()
}

/// The good spec with one line replaced.
fn with(line: &str, other: &str) -> String {
    assert!(GOOD.contains(line), "{line}");
    GOOD.replacen(line, other, 1)
}

#[test]
fn a_good_spec_is_read_and_resolved() {
    let (spec, notes) = VmSpec::parse_with_notes(GOOD, "vm.toml").unwrap();
    assert_eq!(spec.name.as_str(), "orders");
    assert_eq!(
        spec.uuid.to_string(),
        "6f1c0a52-3f0e-4b0c-9a39-3d6a2c1f6f11"
    );
    assert_eq!(spec.memory.get(), 512 << 20);
    assert_eq!(spec.disks[0].size, SizeBytes(4 << 30));
    assert_eq!(spec.nics[0].mac.to_string(), "52:54:00:12:34:56");
    assert_eq!(spec.machine_family(), MachineFamily::Microvm);
    assert_eq!(spec.transport(), Transport::Mmio);
    assert_eq!(spec.mirror.partner.as_ref().unwrap().as_str(), "host-b");
    assert_eq!(
        notes[0].to_string(),
        "disk `root` has no `durability`: it gets \"memory\"; the VM survives the loss of either host, \
         but loss of power on both hosts at once can lose flushed writes"
    );
    assert_eq!(notes.len(), 1);
}

#[test]
fn the_partner_may_be_left_to_the_operator() {
    let text = with("partner = \"host-b\"", "");
    let spec = VmSpec::parse(&text, "vm.toml").unwrap();
    assert_eq!(spec.mirror.partner, None);
    assert_eq!(VmSpec::parse(&spec.to_toml(), "-").unwrap(), spec);
}

#[test]
fn a_microvm_without_a_clock_is_noted() {
    let text = with(" tsc_early_khz=2600000", "");
    let (_, notes) = VmSpec::parse_with_notes(&text, "-").unwrap();
    assert_eq!(
        notes[1].to_string(),
        "under TCG a Linux kernel hangs at its start on a microvm unless it is told the host's TSC \
         frequency: add tsc_early_khz=<kHz> to `cmdline`, or use machine = \"pc\""
    );
}

#[test]
fn a_vm_that_boots_from_disk_is_a_q35() {
    let text = with(
        "kernel = \"/boot/vmlinuz\"\ncmdline = \"console=ttyS0 tsc_early_khz=2600000\"",
        "boot = \"disk\"",
    );
    let spec = VmSpec::parse(&text, "-").unwrap();
    assert_eq!(spec.machine_family(), MachineFamily::Q35);
    assert_eq!(spec.transport(), Transport::PciLegacy);
}

#[test]
fn a_nic_without_mac_gets_the_same_one_everywhere() {
    let text = with("mac = \"52:54:00:12:34:56\"\n", "");
    let mac = VmSpec::parse(&text, "-").unwrap().nics[0].mac;
    assert_eq!(VmSpec::parse(&text, "-").unwrap().nics[0].mac, mac);
    assert!(MacAddr::new(mac.bytes()).is_ok());
    let other = text.replace("6f1c", "7f1c");
    assert_ne!(VmSpec::parse(&other, "-").unwrap().nics[0].mac, mac);
}

#[test]
fn an_unprotected_vm_may_have_any_device_and_hears_of_it() {
    let text = GOOD
        .replacen("protection = \"mirrored\"", "machine = \"q35\"", 1)
        .replacen("vcpus = 2", "devices = [\"nvme,serial=x\"]", 1);
    let (spec, notes) = VmSpec::parse_with_notes(&text, "-").unwrap();
    assert_eq!(spec.devices, ["nvme,serial=x"]);
    assert_eq!(
        notes[1].to_string(),
        "device `nvme` cannot be mirrored: it kills QEMU when its state is saved; use a [[disk]], which \
         is a virtio disk"
    );
}

#[test]
fn each_mistake_has_its_exact_words() {
    let cases: &[(&str, &str, &str)] = &[
        (
            "memory =",
            "memry =",
            "vm.toml:1:1: `memory` is missing: write the guest's memory, like memory = \"512 MiB\"\n\
             vm.toml:3:1: unknown key `memry`, did you mean `memory`?; a VM spec has name, uuid, memory, \
             vcpus, machine, transport, cpu, accel, firmware, boot, kernel, initrd, cmdline, devices, \
             protection, disk, nic, mirror, restart",
        ),
        (
            "size = \"4 GiB\"",
            "size = \"4 GiB\"\ndurabilty = \"memory\"",
            "vm.toml:13:1: unknown key `disk[0].durabilty`, did you mean `durability`?; a disk has name, \
             path, size, format, kind, durability, bus",
        ),
        (
            "bridge = \"br0\"",
            "bridge = \"br0\"\nzzz = 1",
            "vm.toml:18:1: unknown key `nic[0].zzz`; a NIC has name, mac, bridge",
        ),
        (
            "memory = \"512 MiB\"",
            "memory = \"512 MB\"",
            "vm.toml:3:1: `memory = \"512 MB\"` is not valid: write a whole number and a unit of B, KiB, \
             MiB, GiB or TiB, like \"512 MiB\", or an integer number of bytes",
        ),
        (
            "memory = \"512 MiB\"",
            "memory = 536870913",
            "vm.toml:3:1: `memory = 536870913` is not valid: guest memory is a multiple of 2 MiB, from \
             32 MiB to 512 GiB",
        ),
        (
            "memory = \"512 MiB\"",
            "memory = 1.5",
            "vm.toml:3:1: `memory` is a number with a fraction; it must be a size like \"512 MiB\" or a \
             number of bytes",
        ),
        (
            "memory = \"512 MiB\"",
            "memory = -1",
            "vm.toml:3:1: `memory = -1` is not valid: a size is not negative and fits into 64 bits",
        ),
        (
            "vcpus = 2",
            "vcpus = 0",
            "vm.toml:4:1: `vcpus = 0` is not valid: use an integer from 1 to 255",
        ),
        (
            "vcpus = 2",
            "vcpus = 99999999999999999999999999999999999999999999999999",
            "vm.toml:4:1: `vcpus = 170141183460469231731687303715884105727` is not valid: use an integer \
             from 1 to 255",
        ),
        (
            "vcpus = 2",
            "vcpus = \"two\"",
            "vm.toml:4:1: `vcpus` is a string; it must be an integer",
        ),
        (
            "name = \"orders\"",
            "name = \"Orders\"",
            "vm.toml:1:1: `name = \"Orders\"` is not valid: use 1 to 63 of a-z, 0-9 and '-', not starting \
             or ending with '-'",
        ),
        (
            "3d6a2c1f6f11",
            "3d6a2c1f6f1",
            "vm.toml:2:1: `uuid = \"6f1c0a52-3f0e-4b0c-9a39-3d6a2c1f6f1\"` is not valid: write a uuid as \
             uuidgen prints it",
        ),
        (
            "vcpus = 2",
            "machine = \"pc-q35-x\"",
            "vm.toml:4:1: `machine = \"pc-q35-x\"` is not valid: use \"auto\", \"microvm\", \"q35\", \
             \"pc\", or a versioned type like \"pc-q35-7.2\" or \"pc-i440fx-7.2\"",
        ),
        (
            "vcpus = 2",
            "transport = \"virtio-pci\"",
            "vm.toml:4:1: a microvm has no PCI: use `transport = \"virtio-mmio\"` or leave it out",
        ),
        (
            "vcpus = 2",
            "accel = \"hvf\"",
            "vm.toml:4:1: `accel = \"hvf\"` is not valid: use \"auto\" or \"kvm\" or \"tcg\"",
        ),
        (
            "vcpus = 2",
            "cpu = \"max;rm\"",
            "vm.toml:4:1: `cpu = \"max;rm\"` is not valid: write a model and flags as QEMU's -cpu takes \
             them, like \"max\" or \"qemu64,+ssse3\"",
        ),
        (
            "vcpus = 2",
            "firmware = \"ovmf\"",
            "vm.toml:4:1: `firmware = \"ovmf\"` is not valid: use \"seabios\" or the absolute path of a \
             firmware image",
        ),
        (
            "vcpus = 2",
            "boot = \"disk\"",
            "vm.toml:4:1: `boot = \"disk\"` and `kernel` exclude each other: remove one",
        ),
        (
            "kernel = \"/boot/vmlinuz\"",
            "machine = \"q35\"",
            "vm.toml:1:1: `kernel` is missing: name a kernel to start, or write boot = \"disk\" to start \
             from the first disk\n\
             vm.toml:6:1: `cmdline` needs a `kernel`: add one or remove `cmdline`",
        ),
        (
            "kernel = \"/boot/vmlinuz\"",
            "kernel = \"vmlinuz\"",
            "vm.toml:5:1: `kernel = \"vmlinuz\"` is not valid: write an absolute path of at most 4095 \
             bytes",
        ),
        (
            "protection = \"mirrored\"",
            "protection = \"restart\"",
            "vm.toml:9:1: `protection = \"restart\"` needs disks that every host reaches: write \
             disk[0].kind = \"shared\" if this one is on such storage, or use \"mirrored\" or \"none\"",
        ),
        (
            "protection = \"mirrored\"",
            "protection = \"reserved\"",
            "vm.toml:7:1: `protection = \"reserved\"` is not built yet: use \"mirrored\", which includes \
             it, or \"restart\"",
        ),
        (
            "size = \"4 GiB\"",
            "size = \"4 GiB\"\ndurability = \"disk\"",
            "vm.toml:13:1: `disk[0].durability = \"disk\"` is not built yet: use \"memory\": the VM \
             survives the loss of either host, but loss of power on both hosts at once can lose flushed \
             writes",
        ),
        (
            "size = \"4 GiB\"",
            "size = \"4 GiB\"\nkind = \"shared\"",
            "vm.toml:13:1: a mirrored VM's disks are kept on both hosts: write disk[0].kind = \
             \"replicated\", or use protection = \"restart\" (mirroring over shared disks is not built yet)",
        ),
        (
            "size = \"4 GiB\"",
            "size = \"4 GiB\"\nformat = \"qcow2\"",
            "vm.toml:13:1: `disk[0].format = \"qcow2\"` is not valid: use \"raw\"; qemu-img convert -O \
             raw makes one of other formats",
        ),
        (
            "size = \"4 GiB\"",
            "size = \"4 GiB\"\nbus = \"scsi\"",
            "vm.toml:13:1: `disk[0].bus = \"scsi\"` is not valid: use \"virtio\"",
        ),
        (
            "size = \"4 GiB\"",
            "size = 1000",
            "vm.toml:12:1: `disk[0].size = 1000` is not valid: a disk's size is a multiple of 4 KiB, from \
             4 KiB to 16 TiB",
        ),
        (
            "size = \"4 GiB\"",
            "",
            "vm.toml:9:1: `disk[0].size` is missing: write the size the guest sees, like size = \"4 GiB\"",
        ),
        (
            "mac = \"52:54:00:12:34:56\"",
            "mac = \"53:54:00:12:34:56\"",
            "vm.toml:16:1: `nic[0].mac = \"53:54:00:12:34:56\"` is not valid: its first byte is odd, which \
             makes it a multicast address; a NIC needs a unicast one, like \"52:54:00:12:34:56\"",
        ),
        (
            "mac = \"52:54:00:12:34:56\"",
            "mac = \"52:54:00:12:34\"",
            "vm.toml:16:1: `nic[0].mac = \"52:54:00:12:34\"` is not valid: write six bytes in hex with ':' \
             between, like \"52:54:00:12:34:56\"",
        ),
        (
            "bridge = \"br0\"",
            "bridge = \"a-bridge-name-too-long\"",
            "vm.toml:17:1: `nic[0].bridge = \"a-bridge-name-too-long\"` is not valid: write the name of a \
             bridge of the host: 1 to 15 of letters, digits, '-', '_' and '.'",
        ),
        (
            "[mirror]",
            "[[nic]]\nname = \"lan\"\nmac = \"52:54:00:12:34:56\"\nbridge = \"br1\"\n[mirror]",
            "vm.toml:20:1: `nic[1].name = \"lan\"` is not valid: `nic[0].name` has it already\n\
             vm.toml:21:1: `nic[1].mac = \"52:54:00:12:34:56\"` is not valid: `nic[0].mac` has it already",
        ),
        (
            "[[nic]]",
            "[[disk]]\nname = \"root\"\npath = \"/var/lib/pollux/orders.raw\"\nsize = 4096\n[[nic]]",
            "vm.toml:15:1: `disk[1].name = \"root\"` is not valid: `disk[0].name` has it already\n\
             vm.toml:16:1: `disk[1].path = \"/var/lib/pollux/orders.raw\"` is not valid: `disk[0].path` \
             has it already",
        ),
        (
            "partner = \"host-b\"",
            "partner = \"host-b\"\nepoch_gap_min_ms = 50\nepoch_interval_max_ms = 20",
            "vm.toml:21:1: `mirror.epoch_gap_min_ms` is 50, `mirror.epoch_interval_max_ms` is 20: the gap \
             must be the smaller one",
        ),
        (
            "vcpus = 2",
            "devices = [\"virtio-rng-pci\"]",
            "vm.toml:4:12: `devices[0] = \"virtio-rng-pci\"` is not valid: a microvm has virtio-mmio \
             devices only: use \"virtio-rng-device\", or use machine = \"q35\"",
        ),
        (
            "vcpus = 2",
            "machine = \"q35\"\ndevices = [\"virtio-rng-pci\", \"nvme,drive=d0\", \"nvme\"]",
            "vm.toml:5:30: `devices[1] = \"nvme,drive=d0\"` is not valid: `drive` names something outside \
             the device; write a [[disk]]\n\
             vm.toml:5:47: `devices[2] = \"nvme\"` is not valid: device `nvme` cannot be mirrored: it kills \
             QEMU when its state is saved; use a [[disk]], which is a virtio disk",
        ),
        (
            "vcpus = 2",
            "devices = \"virtio-rng-device\"",
            "vm.toml:4:1: `devices` is a string; it must be a list of strings",
        ),
        (
            "[[disk]]",
            "[disk]",
            "vm.toml:9:2: `disk` is a table; it must be a list of tables, each begun with [[…]]",
        ),
        (
            "vcpus = 2",
            "vcpus = ",
            "vm.toml:4:9: not valid TOML: string values must be quoted, expected literal string",
        ),
        (
            "vcpus = 2",
            "name = \"again\"",
            "vm.toml:4:1: not valid TOML: duplicate key",
        ),
    ];
    let mut wrong = String::new();
    for (line, other, expected) in cases {
        let got = errors(&with(line, other));
        if got != *expected {
            wrong.push_str(&format!("--- {other}\n{got}\n"));
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn a_text_that_is_no_spec_is_refused_whole() {
    assert_eq!(
        errors(&"#".repeat(SPEC_TEXT_BYTES_MAX + 1)),
        "vm.toml: the text has 65537 bytes; a VM spec has at most 65536"
    );
    // As deep as the cap on length allows.
    for open in ["[", "{a="] {
        let deep = format!("a={}", open.repeat(SPEC_TEXT_BYTES_MAX / open.len() - 2));
        assert!(errors(&deep).contains("not valid TOML"));
    }
}

#[test]
fn json_has_the_same_shape_and_the_same_checks() {
    let spec = VmSpec::parse(GOOD, "-").unwrap();
    let json = serde_json::to_string(&spec).unwrap();
    assert_eq!(serde_json::from_str::<VmSpec>(&json).unwrap(), spec);
    let bad = json.replace("\"vcpus\":2", "\"vcpu\":2");
    let error = serde_json::from_str::<VmSpec>(&bad)
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("spec: unknown key `vcpu`, did you mean `vcpus`?"),
        "{error}"
    );
}

fn label() -> impl Strategy<Value = String> {
    "[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?"
}

fn path() -> impl Strategy<Value = PathBuf> {
    // Everything but control characters, quotes and commas included.
    "/[^\\p{Cc}]{0,40}".prop_map(PathBuf::from)
}

fn boot() -> impl Strategy<Value = Boot> {
    let kernel = (path(), proptest::option::of(path()), "[^\\p{Cc}]{0,60}");
    prop_oneof![
        Just(Boot::Disk),
        kernel.prop_map(|(kernel, initrd, cmdline)| Boot::Kernel {
            kernel,
            initrd,
            cmdline
        })
    ]
}

#[test]
fn the_key_of_an_earlier_version_says_what_to_write() {
    let with = |line: &str| GOOD.replacen("[mirror]", &format!("[mirror]\n{line}"), 1);
    let refused = |line: &str| {
        VmSpec::parse(&with(line), "vm.toml")
            .unwrap_err()
            .to_string()
    };
    for (line, instead) in [
        ("compress = true", "write codec = \"auto\""),
        ("compress = false", "write codec = \"raw\""),
        (
            "compress = \"zstd\"",
            "write codec = \"auto\", \"raw\", \"lz4\" or \"zstd\"",
        ),
    ] {
        let text = refused(line);
        let begin = format!("`mirror.{line}` is a key of an earlier version: {instead}");
        assert!(text.contains(&begin) && !text.contains("unknown"), "{text}");
        assert!(text.starts_with("vm.toml:20:1:"), "{text}");
    }
    assert!(refused("codec = \"gzip\"").contains(
        "`mirror.codec = \"gzip\"` is not valid: use \"auto\" or \"raw\" or \"lz4\" or \"zstd\""
    ));
    assert!(
        refused("overload = \"stop\"")
            .contains("`mirror.overload = \"stop\"` is not valid: use \"throttle\" or \"solo\"")
    );
    // A near miss is pointed to what there is, not to what there was.
    let near = refused("compres = true");
    assert!(
        near.contains("unknown key") && !near.contains("compress,"),
        "{near}"
    );
    let spec = VmSpec::parse(&with("codec = \"zstd\"\ndelta = false"), "vm.toml").unwrap();
    assert_eq!(
        (spec.mirror.codec, spec.mirror.delta),
        (interconnect::codec::CodecChoice::Zstd, false)
    );
    let spec = VmSpec::parse(GOOD, "vm.toml").unwrap();
    assert_eq!(
        (spec.mirror.codec, spec.mirror.delta),
        (interconnect::codec::CodecChoice::Auto, true)
    );
}

prop_compose! {
    fn policy()(
        partner in label(),
        gap in 0..1_000_u32,
        more in 5..9_000_u32,
        overhead in 1..=90_u8,
        codec in proptest::sample::select(&interconnect::codec::CodecChoice::ALL[..]),
        delta: bool,
        overload in proptest::sample::select(&Overload::ALL[..]),
        audit: bool,
        packets in 16..=1_u32 << 20,
        overlay in 1_u64 << 20..=64 << 30,
    ) -> MirrorPolicy {
        MirrorPolicy {
            partner: Some(crate::pool::HostName::new(partner).unwrap()),
            epoch_gap_min_ms: gap,
            epoch_interval_max_ms: gap + more,
            overhead_max_percent: overhead,
            codec,
            delta,
            overload,
            audit,
            held_packets_max: packets,
            overlay_max: SizeBytes(overlay),
        }
    }
}

prop_compose! {
    fn restart()(
        best_effort in any::<bool>(),
        order in 0..=1_000_u32,
        delay_s in 0..=3_600_u32,
        shutdown in any::<bool>(),
        weight in 0..=1_000_000_u32,
    ) -> RestartPolicy {
        RestartPolicy {
            priority: RestartPriority::ALL[usize::from(best_effort)],
            order,
            delay_s,
            isolation: IsolationResponse::ALL[usize::from(shutdown)],
            weight,
        }
    }
}

prop_compose! {
    fn any_spec()(
        name in label(),
        uuid in any::<[u8; 16]>(),
        memory in 16..=262_144_u64,
        vcpus in 1..=255_u8,
        boot in boot(),
        pc in any::<bool>(),
        modern in any::<bool>(),
        cpu in proptest::option::of("[a-zA-Z0-9]{1,8}(,\\+[a-z0-9]{1,5}){0,3}"),
        accel in prop_oneof![Just(AccelChoice::Auto), Just(AccelChoice::Kvm), Just(AccelChoice::Tcg)],
        firmware in proptest::option::of(path()),
        disks in proptest::collection::btree_map(label(), (path(), 1..=1_u64 << 32), 1..4),
        nics in proptest::collection::btree_map(label(), (any::<[u8; 5]>(), "[a-z][a-z0-9_.-]{0,14}"), 0..4),
        rng in any::<bool>(),
        protection in prop_oneof![
            Just(Protection::None),
            Just(Protection::Restart),
            Just(Protection::Mirrored)
        ],
        mirror in policy(),
        restart in restart(),
    ) -> VmSpec {
        let machine = match (pc, &boot) {
            (false, _) => Machine::Auto,
            (true, Boot::Disk) => "pc-i440fx-7.2".parse().unwrap(),
            (true, _) => "q35".parse().unwrap(),
        };
        let mut spec = VmSpec {
            name: VmName::new(&name).unwrap(),
            uuid: VmId(uuid),
            memory: MemoryBytes::new(memory * (2 << 20)).unwrap(),
            vcpus,
            machine,
            transport_choice: None,
            cpu: cpu.map(|cpu| CpuModel::new(&cpu).unwrap()),
            accel,
            firmware,
            boot,
            disks: disks.into_iter().enumerate().map(|(i, (name, (path, blocks)))| Disk {
                name,
                path: format!("{}{i}", path.display()).into(),
                size: SizeBytes(blocks * 4096),
                kind: match protection {
                    Protection::Restart => DiskKind::Shared,
                    _ => DiskKind::Replicated,
                },
                durability: Durability::Memory,
            }).collect(),
            nics: nics.into_iter().enumerate().map(|(i, (name, (b, bridge)))| Nic {
                name,
                mac: MacAddr::new([2 + 4 * u8::try_from(i).unwrap(), b[0], b[1], b[2], b[3], b[4]]).unwrap(),
                bridge,
            }).collect(),
            devices: vec![],
            protection,
            mirror,
            restart,
        };
        let mmio = spec.machine_family() == MachineFamily::Microvm;
        if modern {
            spec.transport_choice = Some(if mmio { Transport::Mmio } else { Transport::PciModern });
        }
        if rng {
            let bus = if mmio { "device" } else { "pci,max-bytes=1024" };
            spec.devices.push(format!("virtio-rng-{bus}"));
        }
        spec
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(spec in any_spec()) {
        prop_assume!(spec.uuid.0 != [0; 16]);
        let toml = spec.to_toml();
        let (read, notes) = VmSpec::parse_with_notes(&toml, "-").map_err(|e| {
            TestCaseError::fail(format!("{e}\n{toml}"))
        })?;
        prop_assert_eq!(&read, &spec);
        prop_assert!(notes.iter().all(|note| note.to_string().contains("tsc_early_khz")), "{notes:?}");
        let json = serde_json::to_value(&spec).unwrap();
        prop_assert_eq!(serde_json::from_value::<VmSpec>(json).unwrap(), spec);
    }

    #[test]
    fn no_text_makes_the_reader_panic(text in ".{0,200}", cut in 0..400_usize) {
        let _ = VmSpec::parse(&text, "-");
        let mut mixed = GOOD.to_owned();
        let at = (0..=cut.min(GOOD.len())).rev().find(|at| GOOD.is_char_boundary(*at)).unwrap();
        mixed.insert_str(at, &text);
        let _ = VmSpec::parse(&mixed, "-");
    }

    #[test]
    fn sizes_show_themselves_readably(bytes: u64) {
        prop_assert_eq!(SizeBytes(bytes).to_string().parse::<SizeBytes>().unwrap(), SizeBytes(bytes));
    }
}
