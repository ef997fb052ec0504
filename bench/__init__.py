"""The benchmark of the kernels: is it right, how fast is it, how far from the memory limit, against whom."""
