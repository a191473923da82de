"""Count what travels between devices: `python -m experiments.benchmarks.traffic --config=configs/deepseek_v3.py`.

Prints, for each axis of the mesh, the bytes that leave a device for each of its tokens. Of one MoE layer: what the
routing asks for ("useful"), what the program sends ("shipped"), what the most scattered token needs ("limit"), and what
one copy per expert would be. Then of all layers together, with the weights that are gathered. Routes are those of a
fresh router on random tokens, or those of --experts.

The gradient of one micro-batch is traced with shapes alone: no weight is made, and no device is needed. With --compiled
it is compiled for the devices of this machine (or --cpu_devices), and counted in what XLA made of it.
"""

import io

import jax
import numpy as np
from absl import flags

from deepseek_jax.config import Config, from_config_dict
from deepseek_jax.inputs import local_path, read_bytes, shown
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.plan import traffic
from deepseek_jax.plan.meshes import Fit, require_fit
from experiments import command, recipe, session

CONFIG = recipe.Recipe(
    None, "Configuration, such as configs/deepseek_v3.py; --config.mesh.node=8 overrides.", required=True
)
DEVICES = flags.DEFINE_integer(
    "devices",
    None,
    "Number of devices; by default --cpu_devices, or what the axes of the mesh multiply to.",
    lower_bound=1,
    upper_bound=2**20,
)
EXPERTS = flags.DEFINE_string("experts", None, "A .npy file of chosen experts, integers [tokens, K], instead.")
COMPILED = flags.DEFINE_bool("compiled", False, "Count in the compiled program; needs the devices of the mesh.")

NUM_TOKENS = 1024  # that a fresh router routes
MEGA = 1e6


def main(_) -> None:
    """Parse, count, print."""
    config = from_config_dict(CONFIG.value)
    given = None if EXPERTS.value is None else _given(EXPERTS.value, config)
    if COMPILED.value:
        if DEVICES.value is not None:
            raise ValueError(f"--devices = {DEVICES.value} is for traced programs; with --compiled use --cpu_devices")
        session.start()
        fit = require_fit(config, jax.device_count())
        collectives = traffic.compile_for(fit.config, make_mesh(fit.config.mesh))
    else:
        jax.config.update("jax_platforms", "cpu")  # shapes alone: a card or TPU of this machine stays free
        fit = require_fit(config, DEVICES.value or session.CPU_DEVICES.value or _size(config))
        collectives = traffic.trace(fit.config, fit.mesh)
    has_experts = fit.config.model.num_moe_layers > 0
    routes = given if given is not None or not has_experts else traffic.fresh_routes(fit.config.model, NUM_TOKENS)
    print(head(fit, "compiled" if COMPILED.value else "traced"))
    if routes is not None:
        print(layer_table(traffic.layer_lines(fit.config, fit.mesh, collectives, routes)))
    print(step_table(traffic.step_lines(fit.config, fit.mesh, collectives)))


def _size(config: Config) -> int:
    """Return the devices of a mesh whose open axis has one."""
    sizes = config.mesh.data, config.mesh.node, config.mesh.expert
    return int(np.prod([max(size, 1) for size in sizes]))


def _given(text: str, config: Config) -> np.ndarray:
    """Return the chosen experts of a file.

    Raises:
        ValueError: it is no array [tokens, K] of ids in [0, E), or holds no token.
    """
    path = local_path(text, "--experts")
    try:
        experts_TK = np.load(io.BytesIO(read_bytes(path)), allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"--experts = {shown(text)} is no .npy file ({shown(str(error))}); save one") from error
    model = config.model
    right = isinstance(experts_TK, np.ndarray) and experts_TK.dtype.kind in "iu"
    if not right or experts_TK.ndim != 2 or experts_TK.shape[1] != model.experts_per_token or not experts_TK.size:
        what = f"{experts_TK.dtype} {list(experts_TK.shape)}" if isinstance(experts_TK, np.ndarray) else "an archive"
        raise ValueError(f"--experts = {shown(text)} holds {what}; save integers [tokens, {model.experts_per_token}]")
    if experts_TK.min() < 0 or experts_TK.max() >= model.num_experts:
        raise ValueError(
            f"--experts = {shown(text)} has ids from {experts_TK.min()} to {experts_TK.max()}; those of"
            f" {config.name} are 0 to {model.num_experts - 1}"
        )
    return experts_TK.astype(np.int64)


def head(fit: Fit, how: str) -> str:
    """Return the line that says what was counted, and how."""
    config = fit.config
    tokens = config.training.micro_batch_size * config.data.sequence_length // fit.num_devices
    mesh = " x ".join(f"{axis} {size}" for axis, size in fit.mesh.shape.items() if size > 1) or "one device"
    return (
        f"{config.name}, {config.execution.precision}, {mesh}, {tokens:,} tokens a device and micro-batch, slack"
        f" {config.execution.exchange_slack:g}, gather {config.execution.gather}, {how}\n"
        "Bytes that leave a device for each of its tokens; rounds that balanced routing does not need are left out."
    )


def layer_table(lines: list[traffic.Line]) -> str:
    """Return the table of one MoE layer."""
    if not lines:
        return "\nOne MoE layer: every expert is on every device, nothing is exchanged."
    titles = f"{'useful':>12}{'shipped':>12}{'limit':>12}{'per expert':>12}"
    rows = [f"\n{'one MoE layer':<32}{titles}"]
    for line in lines:
        figures = line.useful, line.shipped, line.limit, line.per_expert
        rows.append(_name(line) + "".join(f"{'' if n is None else format(n, ',.0f'):>12}" for n in figures))
    return "\n".join(rows)


def step_table(lines: list[traffic.Line]) -> str:
    """Return the table of all layers together."""
    if not lines:
        return "\nAll layers: nothing travels."
    rows = [f"\n{'all layers, MB a token':<32}{'shipped':>12}"]
    return "\n".join([*rows, *(f"{_name(line)}{line.shipped / MEGA:>12,.3f}" for line in lines)])


def _name(line: traffic.Line) -> str:
    return f"{line.axis:<8}{line.direction:<10}{line.kind:<14}"


if __name__ == "__main__":
    command.run(main)
