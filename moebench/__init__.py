"""Benchmark and profile MoE expert kernels with MXFP4 weights."""

__version__ = "0.1.0"
