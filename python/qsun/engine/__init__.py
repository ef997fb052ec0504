"""The engine: scheduling, batching, sampling, and the public `DecodeEngine`."""
