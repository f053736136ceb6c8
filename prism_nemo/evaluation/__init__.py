"""Evaluation: benchmarks, scoring and the statistics of both."""
