"""Hugging Face checkpoints: reading, writing and converting them."""
