"""The mathematics of DeepSeek-V3, per device: no files, no flags, no logging."""
