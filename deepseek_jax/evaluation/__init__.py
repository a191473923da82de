"""How good a model is, from its workdir or its checkpoint: held-out text, yardsticks, logits for comparisons."""
