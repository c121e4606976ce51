"""Demonstrations and benchmarks; each file opens with the command that runs it."""
