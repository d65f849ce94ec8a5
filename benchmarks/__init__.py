"""What the benchmark is made of; `bench_fused.py` is the program to run."""
