"""How good a model is, from its workdir or checkpoint: held-out text, yardsticks, logits to compare."""
