"""Benchmarks of speed, memory and selection criteria. They run on demand, not with the tests."""
