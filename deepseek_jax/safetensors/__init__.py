"""Safetensors files: reading and writing them, whatever they hold."""
