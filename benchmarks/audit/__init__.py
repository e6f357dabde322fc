"""What the shipped Triton kernels cost, read off their machine code. Needs no GPU; `python -m benchmarks.audit`."""
