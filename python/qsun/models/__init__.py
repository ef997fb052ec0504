"""Architectures: one configuration and one decoder stack for Llama, Qwen2, Qwen3 and Mistral."""
