"""Benchmarks of the kernels, on a GPU or a CPU."""
