"""Runs the CUDA kernels on the CPU: one fiber a thread, no toolkit, no GPU."""
