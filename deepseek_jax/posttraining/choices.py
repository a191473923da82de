"""The choices of which GRPO and its published variants consist, as data; `policy_objective` says what each does."""

import dataclasses
import math

RATIOS = "token", "sequence", "sequence_token", "output"
CLIPS = "ratio", "weight"
ESTIMATORS = "k1", "k2", "k3"
AGGREGATIONS = "sequence", "token", "constant"
SCALES = "std", "none"
OVERLONG = "keep", "mask", "punish"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """See `posttraining.policy_objective` for the loss, and `posttraining.advantages` for the advantages.

    Attributes:
        ratio: of what the ratio is: each "token", the "sequence" (geometric mean), "sequence_token" (the same value
            with each token's own gradient), or the whole "output" (product).
        clip: the "ratio" with PPO's minimum, or the "weight" of the log-probability (CISPO).
        clip_low: a ratio counts as at least 1 - clip_low; 1 is no bound.
        clip_high: and as at most 1 + clip_high.
        dual_clip: least multiple of a negative advantage; above 1, or 0: none.
        kl: estimator, "k1", "k2" or "k3".
        kl_weight: beta; 0 needs no reference.
        aggregation: over "sequence" means, all "token"s, or a "constant" length.
        constant_length: in tokens, of "constant"; else 0.
        tis_cap: most that a token weighs for its probability in trainer over sampler; 0: such weights are off.
        advantage_scale: divide by the group's "std", or "none".
        overlong: outputs that were cut off at the limit: "keep", "mask" their loss, or "punish" length before it.
        overlong_buffer: tokens before the limit over which punishment grows from 0 to 1; else 0.
        drop_flat_groups: groups of which no output or every one is right carry no loss and do not count.
    """

    ratio: str
    clip: str
    clip_low: float
    clip_high: float
    dual_clip: float
    kl: str
    kl_weight: float
    aggregation: str
    constant_length: int
    tis_cap: float
    advantage_scale: str
    overlong: str
    overlong_buffer: int
    drop_flat_groups: bool


def check(choices: Choices, where: str = "choices") -> None:
    """Refuse choices that mean nothing.

    Raises:
        ValueError: with value and remedy.
    """
    named = {"ratio": RATIOS, "clip": CLIPS, "kl": ESTIMATORS, "aggregation": AGGREGATIONS}
    for key, known in (named | {"advantage_scale": SCALES, "overlong": OVERLONG}).items():
        if getattr(choices, key) not in known:
            raise ValueError(f"{where}.{key} = {getattr(choices, key)!r} is unknown; use one of {', '.join(known)}")

    def refuse(key: str, remedy: str):
        raise ValueError(f"{where}.{key} = {getattr(choices, key)} {remedy}")

    if not 0.0 < choices.clip_low <= 1.0:
        refuse("clip_low", "must be above 0 and at most 1, which is no bound below")
    if not 0.0 < choices.clip_high < math.inf:
        refuse("clip_high", "must be positive and finite")
    if choices.dual_clip and not 1.0 < choices.dual_clip < math.inf:
        refuse("dual_clip", "must be above 1, for example 3; 0 turns it off")
    if choices.dual_clip and choices.clip == "weight":
        refuse("dual_clip", f"has no meaning for {where}.clip = 'weight', which bounds no gain; set it to 0")
    if not 0.0 <= choices.kl_weight < math.inf:
        refuse("kl_weight", "must be finite and at least 0, which needs no reference")
    if not 0.0 <= choices.tis_cap < math.inf or 0.0 < choices.tis_cap < 1.0:
        refuse("tis_cap", "must be at least 1, for example 2; 0 turns it off")
    if (choices.constant_length > 0) != (choices.aggregation == "constant"):
        refuse("constant_length", f"must be positive for {where}.aggregation = 'constant', and 0 for the others")
    if (choices.overlong_buffer > 0) != (choices.overlong == "punish"):
        refuse("overlong_buffer", f"must be positive for {where}.overlong = 'punish', and 0 for the others")


GRPO = Choices(
    ratio="token",
    clip="ratio",
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=0.0,
    kl="k3",
    kl_weight=0.04,  # DeepSeekMath, section 4.2; R1 has 0.001
    aggregation="sequence",
    constant_length=0,
    tis_cap=0.0,
    advantage_scale="std",
    overlong="keep",
    overlong_buffer=0,
    drop_flat_groups=False,
)
V3 = dataclasses.replace(GRPO, ratio="output")
DAPO = dataclasses.replace(
    GRPO,
    clip_high=0.28,
    kl_weight=0.0,
    aggregation="token",
    overlong="punish",
    overlong_buffer=4096,  # of 20,480 tokens
    drop_flat_groups=True,
)
DR_GRPO = dataclasses.replace(GRPO, kl_weight=0.0, aggregation="constant", constant_length=3000, advantage_scale="none")
GSPO = dataclasses.replace(GRPO, ratio="sequence", clip_low=3e-4, clip_high=4e-4, kl_weight=0.0)
GSPO_TOKEN = dataclasses.replace(GSPO, ratio="sequence_token")
# The paper gives no bound below and does not tell the one above; ScaleRL (arXiv 2510.13786) has 4 to 8.
CISPO = dataclasses.replace(GRPO, clip="weight", clip_low=1.0, clip_high=4.0, kl_weight=0.0, aggregation="token")

VARIANTS = {
    "grpo": GRPO,
    "v3": V3,
    "dapo": DAPO,
    "dr_grpo": DR_GRPO,
    "gspo": GSPO,
    "gspo_token": GSPO_TOKEN,
    "cispo": CISPO,
}
