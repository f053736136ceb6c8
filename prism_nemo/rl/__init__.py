"""Reinforcement learning with verifiable rewards: prompts, rollout, reward, advantage, loss, update."""
