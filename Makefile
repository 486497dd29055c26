# `make` alone explains. Every target does the set-up it needs; the second time it is free.

CARGO ?= cargo
# One profile for demo, test and soak (Cargo.toml says why), so nothing is built twice.
POLLUX = target/debug/pollux
SEEDS ?= 10000
# States that the model check of the statefile explores per case; about 2 KiB of memory each.
MODEL_STEPS ?= 1000000
FUZZ_SECONDS ?= 60

.PHONY: help setup setup-verify build demo test verify advisories fix bench soak fuzz

help:
	@echo 'pollux keeps a virtual machine running when its host dies.'
	@echo
	@echo '  make demo      see it: boots a VM on host A, mirrors it to host B, cuts power to A'
	@echo '  make test      all tests: pure code, real QEMU, hosts in namespaces (needs root)'
	@echo
	@echo '  make setup     what both do first: install missing packages, build the test guest'
	@echo '  make verify    read-only: format, lints, rooms, licences, docs'
	@echo '  make fix       writes: format, and the lints that can mend themselves'
	@echo '  make bench     measure; docs/promises.md holds the numbers'
	@echo '  make soak      both simulators over many seeds (SEEDS=$(SEEDS)), the model checks of statefile and claims'
	@echo '  make fuzz      every decoder of bytes from elsewhere (FUZZ_SECONDS=$(FUZZ_SECONDS) for each of 34)'
	@echo '  make advisories  known holes in dependencies (asks the network for the list)'
	@echo
	@echo 'One test:    cargo test NAME        One seed:  POLLUX_SEED=7 cargo test sim'
	@echo 'The guest:   guest/smoke            By hand:   cargo run -- help'

setup:
	@scripts/setup

setup-verify:
	@scripts/setup verify

build: setup
	@$(CARGO) build --locked

demo: build
	@$(POLLUX) demo

test: setup
	$(CARGO) test --locked --workspace

verify: setup-verify
	$(CARGO) fmt --all --check
	scripts/check-rooms
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings -A rustdoc::private-intra-doc-links' $(CARGO) doc --locked --workspace --no-deps --document-private-items --quiet
	PATH="$(CURDIR)/target/tools/bin:$$PATH" $(CARGO) deny --log-level warn check licenses bans sources

advisories: setup-verify
	PATH="$(CURDIR)/target/tools/bin:$$PATH" $(CARGO) deny check advisories

fix:
	$(CARGO) fmt --all
	$(CARGO) clippy --workspace --all-targets --fix --allow-dirty --allow-staged
	$(CARGO) fmt --all

bench: setup
	$(CARGO) bench --locked -p pollux-bench

soak: build
	$(POLLUX) sim run scenarios/ --seeds $(SEEDS)
	POLLUX_SEEDS=$(SEEDS) $(CARGO) test --locked -p pollux sim -- --nocapture --include-ignored
	POLLUX_MODEL_STEPS=$(MODEL_STEPS) $(CARGO) test --locked -p pollux --lib statefile::model -- --nocapture
	$(CARGO) test --locked -p pollux --lib mirror::model -- --nocapture --include-ignored

fuzz: setup
	FUZZ_SECONDS=$(FUZZ_SECONDS) scripts/fuzz
