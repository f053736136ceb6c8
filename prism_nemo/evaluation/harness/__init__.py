"""EleutherAI's lm-evaluation-harness: our models in it, and the retention suite through it."""
