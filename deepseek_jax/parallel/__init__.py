"""Where arrays live and how they move: the mesh with its layout table, and the expert exchange."""
