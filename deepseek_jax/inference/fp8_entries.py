"""Entries of the latent cache in FP8: FlashMLA's layout, 656 bytes a token and layer at V3's widths, not 1,152.

    bytes   0 .. 511    the latent, 512 values in E4M3
          512 .. 527    its scales, 4 in FP32, little-endian: one for each 128 values, largest magnitude / 448
          528 .. 655    the rotary key, 64 values in BF16, little-endian: positions survive no coarser rounding

A value comes back as E4M3 number times scale. The rules for zeros and for what is not a number are those of
`pallas_kernels.quantized`. No kernel reads this layout yet: what attends unpacks first. Products of the packed latent
themselves would need more care, because Hopper adds FP8 products in few bits.
"""

import jax.numpy as jnp
from jax import Array, lax

from deepseek_jax.model.attention import Entry
from pallas_kernels import GROUP
from pallas_kernels.quantized import E4M3, decode, encode, largest_magnitude, scale_of


def packed_bytes(latent: int, rotary: int) -> int:
    """Return the bytes of one entry of so many latent and rotary values.

    Raises:
        ValueError: the latent does not divide into groups of 128.
    """
    if latent % GROUP:
        raise ValueError(f"a latent of {latent} values has no FP8 entry: it must be a multiple of {GROUP}; use BF16")
    return latent + 4 * (latent // GROUP) + 2 * rotary


def pack(entry: Entry) -> Array:
    """Return entries as uint8 [B, S, packed_bytes]."""
    *lead, latent = entry.latent_BSC.shape
    packed_bytes(latent, entry.rotary_BSR.shape[-1])
    groups = entry.latent_BSC.astype(jnp.float32).reshape(*lead, latent // GROUP, GROUP)
    scales = scale_of(largest_magnitude(groups, axis=-1), "fp32")
    values = encode(groups, scales[..., None])
    parts = values, scales, entry.rotary_BSR.astype(jnp.bfloat16)
    return jnp.concatenate([lax.bitcast_convert_type(part, jnp.uint8).reshape(*lead, -1) for part in parts], axis=-1)


def unpack(packed: Array, latent: int, dtype: jnp.dtype = jnp.bfloat16) -> Entry:
    """Return the entries that `pack` has written, in `dtype`; `latent` tells where the scales begin."""
    *lead, num_bytes = packed.shape
    num_groups = latent // GROUP
    if num_bytes <= packed_bytes(latent, 0) or (num_bytes - packed_bytes(latent, 0)) % 2:
        raise ValueError(f"{num_bytes} bytes are no packed entry with a latent of {latent} values")
    values, scales, rotary = jnp.split(packed, (latent, latent + 4 * num_groups), axis=-1)
    values = decode(lax.bitcast_convert_type(values.reshape(*lead, num_groups, GROUP), E4M3))
    scales = lax.bitcast_convert_type(scales.reshape(*lead, num_groups, 4), jnp.float32)
    rotary = lax.bitcast_convert_type(rotary.reshape(*lead, -1, 2), jnp.bfloat16)
    return Entry((values * scales[..., None]).reshape(*lead, latent).astype(dtype), rotary.astype(dtype))
