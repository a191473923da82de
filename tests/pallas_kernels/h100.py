"""An H100 to compile for, on a machine that has none."""

# What XLA asks of a device, for an H100 SXM (`cudaGetDeviceProperties`).
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132  fpus_per_core: 128  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  clock_rate_ghz: 1.98  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  device_memory_size: 84978434048
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 19 }
runtime_version { major: 13 }
"""
