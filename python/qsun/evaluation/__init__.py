"""Measuring models by the engine that serves them: tasks with answers, metrics, perplexity of responses."""
