"""Meshes over the first devices."""

import jax

from deepseek_jax.config import Mesh
from deepseek_jax.parallel.mesh import make_mesh


def mesh_of(data=1, node=1, expert=1):
    return make_mesh(Mesh(pipe=1, data=data, node=node, expert=expert, tensor=1), jax.devices()[: data * node * expert])
