"""From a kernel to the caller's program: mesh axes, files of lowered kernels, JAX's layout inference."""
