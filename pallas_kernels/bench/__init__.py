"""The benchmark of the kernels, `python -m pallas_kernels.bench`: shapes, operands, yardsticks and records."""
