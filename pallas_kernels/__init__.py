"""DeepSeek-V3's block-scaled FP8 arithmetic (arXiv 2412.19437, section 3.3) as Pallas kernels for Hopper GPUs and TPUs.

Every operation has three faces: a `reference` in plain jnp, which is the specification; a kernel for Hopper (Mosaic
GPU: TMA and wgmma); and a kernel for TPU. This package imports nothing but JAX. Derivatives are composed elsewhere, in
`deepseek_jax/model/linear.py`.

Dims are m, n, k as in D[m, n] = sum over k of A[m, k] B[n, k]; both operands have k last. E is experts, G groups.
"""

GROUP = 128  # elements along k that share a scale; here, so that configurations are checked without importing JAX
