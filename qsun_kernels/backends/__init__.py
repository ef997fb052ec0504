"""The backends behind the operators: cuda (compiled kernels), triton, and torch (the reference)."""
