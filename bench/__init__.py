"""Benchmarks: what irqrouter costs, as ratios to the bare system calls in C. Run with ``python -m bench``."""
