//! Egress gate, tap, RARP, ingress log.
