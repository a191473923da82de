"""What a run needs, before anyone rents a machine: its size, the meshes that it can run on, the memory of its step."""
