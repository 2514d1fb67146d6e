"""Benchmarks: what a training step costs, ours and others', measured in one run."""
