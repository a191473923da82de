"""Every test runs on a simulated mesh of eight CPU devices, with a compilation cache that outlives the run."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling is what these tests spend their time on: level 1 halves it and keeps the arithmetic in FP32.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=1"

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".cache" / "jax-tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
