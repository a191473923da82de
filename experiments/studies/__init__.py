"""What FP8 costs: each study compares two arithmetics, draws the difference and writes it down."""
