"""Evaluations beside each other: what was kept, what was lost, which checkpoint to choose."""
