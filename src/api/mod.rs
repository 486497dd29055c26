//! HTTP+JSON on a unix socket: the one way to ask a daemon anything.
