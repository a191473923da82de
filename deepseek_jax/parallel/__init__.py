"""Where arrays live and how they move: the mesh, gathers of weights, the expert exchange, and programs on a mesh."""
