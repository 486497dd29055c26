//! Hosts on one machine: network and pid namespaces.
