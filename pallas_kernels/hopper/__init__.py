"""What the kernels for Hopper GPUs have in common; the kernels are in the operations' folders."""
