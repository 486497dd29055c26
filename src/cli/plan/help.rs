//! What the long help of each command teaches.

pub(super) const CHECK: &str = "\
A pool file lists hosts, VMs and what runs where (docs/planner.md has every key):

  tolerate = 1                  # failures to survive
  [[host]]
  name = \"a\"
  memory = \"64 GiB\"
  [[vm]]
  name = \"db\"
  memory = \"16 GiB\"
  host = \"a\"                    # where it runs now
  protection = \"restart\"        # none, restart, reserved, mirrored

The answer is exact: `survives` only if every VM of priority `always` can restart on the survivors
of every set of failures without moving a running VM. The proof is checked by a verifier of its
own before it is shown. Otherwise one set that is not survived is named, with what stays down and why.

Examples:
  pollux plan check --pool tests/pools/*.toml
  pollux plan check --pool pool.toml --failures 2 --certificate proof.json

Exit status 0 only if every pool survives.";

pub(super) const MAX: &str = "\
Answers for the VMs that must restart (priority `always`), and for all VMs including `best-effort`.

Example:
  pollux plan max --pool pool.toml";

pub(super) const RESTART: &str = "\
VMs that must restart go where the proof of `plan check` says, if it covers this failure; else the
most important ones that fit are chosen. Within a host, VMs start in batches; a batch starts when the
one before is up. Best-effort VMs follow, then new standbys. With `policy.shrink` or
`policy.stop_best_effort`, running VMs give way if there is no other way, and are named.

Example:
  pollux plan restart --pool pool.toml --dead a,b

Exit status 0 only if nothing is left down.";

pub(super) const WHATIF: &str = "\
The change is tried on a copy of the pool; nothing is done. A change that makes a safe pool
overcommitted is refused with the reason, or, with `policy.allow_overcommit`, warned of.

Examples:
  pollux plan whatif --pool pool.toml --start web --memory '8 GiB'
  pollux plan whatif --pool pool.toml --start web --on b      # a VM of the file that does not run
  pollux plan whatif --pool pool.toml --resize db='32 GiB'
  pollux plan whatif --pool pool.toml --protect db=mirrored
  pollux plan whatif --pool pool.toml --move db=c
  pollux plan whatif --pool pool.toml --maintenance a
  pollux plan whatif --pool pool.toml --add-host d --memory '64 GiB'";

pub(super) const EXPLAIN: &str = "\
Shows what each host holds, reserves and has free, the failure that leaves least, and, if the pool
is overcommitted, the fewest live moves or changes of protection that make it safe again.

Example:
  pollux plan explain --pool pool.toml";

pub(super) const RANDOM: &str = "\
VM sizes are drawn from 1, 2, 3, 3, 4, 5, 6, 6, 7, 9, 10, 12, 14, 20, 24 and 28 GiB; each VM is placed
on the host with the most memory free.

Examples:
  pollux plan random --hosts 8 --used 65 --seed 7 > pool.toml
  pollux plan random --hosts 64 --vms 2000 --used 90 -r 3 | pollux plan check --pool -";
