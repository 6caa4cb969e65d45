"""Benchmarks of speed, memory, selection criteria and faults. They run on demand, not with the tests."""
