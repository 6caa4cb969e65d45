"""Speed and memory, measured on demand against a bare forward pass in the same run; never part of the tests."""
