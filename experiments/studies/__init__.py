"""Studies of what FP8 costs: each compares two arithmetics, draws the difference and writes records."""
