"""Benchmarks behind `scripts/bench`; each contestant runs in a process of its own."""
