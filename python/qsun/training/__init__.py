"""Prefill-only fine-tuning: the prompt through a trained module, the answer through the frozen decoder."""
