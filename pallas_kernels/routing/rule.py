"""How a router chooses (`Rule`), and what it says of the tokens of a decoding step (`Routing`)."""

import dataclasses
from typing import NamedTuple

import jax
from jax import Array

from pallas_kernels.experts_decode.plan import Dense


@dataclasses.dataclass(frozen=True)
class Rule:
    """How experts are chosen and weighed (DeepSeek-V3, arXiv 2412.19437, section 2.1.2; V2, arXiv 2405.04434).

    Attributes:
        k: experts of a token.
        num_groups: groups of equally many neighbouring experts.
        num_kept_groups: of which a token takes experts.
        group_score: "top2", the sum of a group's two best, or "max".
        gate: "sigmoid" or "softmax".
        normalize: whether a token's gates are divided by their sum.
        scale: of the gates.
    """

    k: int
    num_groups: int = 1
    num_kept_groups: int = 1
    group_score: str = "top2"
    gate: str = "sigmoid"
    normalize: bool = True
    scale: float = 1.0

    @property
    def grouped(self) -> bool:
        """Whether some groups are left out."""
        return self.num_groups > self.num_kept_groups


class Routing(NamedTuple):
    """What a router says of T tokens.

    Attributes:
        experts: int32 [T, K]: each token's, best first, ties to the lowest index, then those that every token has.
        gates: FP32 [T, K].
        scores: FP32 [T, E], of the routed experts, without bias.
        dense: what `experts_decode` reads of these experts and gates, where the kernel has made it.
    """

    experts: Array
    gates: Array
    scores: Array
    dense: Dense | None


for kind in (Dense, Routing):  # results of lowered kernels that are kept in files
    jax.export.register_namedtuple_serialization(kind, serialized_name=f"pallas_kernels.{kind.__name__}")
