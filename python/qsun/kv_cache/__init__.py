"""The KV cache: its tensors, which blocks are free, who holds them, and what can be shared."""
