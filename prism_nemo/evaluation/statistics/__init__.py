"""Intervals, differences, resampling and power, in plain Python and numpy."""
