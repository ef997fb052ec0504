"""Checkpoint formats of other projects: AWQ, GPTQ, compressed-tensors, GGUF."""
