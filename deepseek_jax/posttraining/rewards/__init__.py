"""How good a completion is, by rules: mathematics, code that passes tests, format, language. None of it imports JAX."""
