"""Inputs, exact results and tolerances that tests and benchmarks share; nothing else imports it."""
