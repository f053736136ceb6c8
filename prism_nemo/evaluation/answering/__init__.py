"""Putting questions to a model, keeping its answers, and judging them."""
