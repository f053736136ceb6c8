"""The mid-training loop and what it shares with reinforcement learning: trainer, schedule, guards, progress."""
