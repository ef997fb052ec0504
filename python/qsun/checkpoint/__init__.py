"""Checkpoints in and out: safetensors and GGUF, read tensor by tensor, and quantised checkpoints written."""
