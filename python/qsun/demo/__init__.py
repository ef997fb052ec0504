"""`python -m qsun.demo`: a batch of chat prompts through one shared 4-bit decoder, with real weights."""
