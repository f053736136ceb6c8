"""Long-context tasks in the manner of RULER, made here: the answers are known, and the length is what was asked for."""
