"""DeepSeek-V3 in JAX.

Arrays carry their shape in their name. Sharding does not change the letters; inside the training step's `shard_map`
they are local sizes.

    B batch (sequences)       N attention heads                 E routed experts
    S sequence                A query latent                    K experts per token
    M memory (key positions)  C key-value latent                G expert groups
    T tokens = B * S          P content head dim                F hidden width of an FFN
    L layers                  R rotary head dim                 W rows after dispatch
    V vocabulary              Q query and key head dim = P + R  Z slots of rows sorted by expert
    D model width             H value head dim
                              X key-content and value dims = P + H

`kv_a_DC` is the one suffix that stretches its letter: its columns are the latent and the shared rotary key, C + R.
Einsum letters are the same in lower case. `axis` always means a mesh axis, `dim` a dimension of a tensor.
"""

__version__ = "0.1.0"
