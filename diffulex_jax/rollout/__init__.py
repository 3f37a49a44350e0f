"""The engine as the rollout worker of reinforcement learning libraries."""
