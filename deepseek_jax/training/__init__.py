"""From a configuration to a trained model: `pretrain` builds the parts of a run, `loop` runs them, `step` computes."""
