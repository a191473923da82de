"""From a base model to a reasoning model: fine-tuning, reinforcement learning with rewards, distillation."""
