"""The table of tensors: counted against the released checkpoint, the parameter tree and the goldens. Their values:
test_load_save.
"""

import dataclasses
import functools
import importlib
import json
import math

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from deepseek_jax.config import Config, from_config_dict
from deepseek_jax.huggingface import names
from deepseek_jax.model import transformer
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parameters import matrix_shape, num_lead_dims
from tests.golden import hf_checkpoint

BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
CONFIGS = ("tiny", "deepseek_v3", "deepseek_v2_lite", "deepseek_v2")
VARIANTS = {
    "no_dense_layers": {"num_dense_layers": 0},
    "only_dense_layers": {"num_dense_layers": 4, "num_mtp_layers": 0},
    "no_shared_experts": {"num_shared_experts": 0},
    "three_mtp_layers": {"num_mtp_layers": 3},
    "softmax_with_mtp": {"gate": "softmax", "query_latent": 0},
}


def published(name: str) -> Config:
    return from_config_dict(importlib.import_module(f"configs.{name}").get_config())


def config_of(case: str) -> Config:
    if case in CONFIGS:
        return published(case)
    if case in VARIANTS:
        tiny = published("tiny")
        return dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, **VARIANTS[case]))
    hf = json.loads((hf_checkpoint.FOLDER / case / "config.json").read_text())
    return hf_checkpoint.run_config(case, hf_checkpoint.read_model(hf), (1, 64))


def leaves_of(tree, path=()):
    if not isinstance(tree, dict):
        return {path: tree}
    return {leaf: value for key, branch in tree.items() for leaf, value in leaves_of(branch, (*path, key)).items()}


def shapes_of_init(config: Config) -> dict[tuple[str, ...], tuple[int, ...]]:
    config = config.with_(mesh={"pipe": 1, "data": 1, "node": 1, "expert": 1, "tensor": 1})
    with jax.set_mesh(make_mesh(config.mesh, jax.devices()[:1])):
        params, bias = jax.eval_shape(
            functools.partial(transformer.init, config.model), jax.eval_shape(lambda: jax.random.key(0))
        )
    return {path: leaf.shape for path, leaf in leaves_of({"params": params, "router_bias": bias}).items()}


@pytest.mark.parametrize("case", [*CONFIGS[:1], *CONFIGS[2:], *VARIANTS, *hf_checkpoint.CASES])
def test_they_are_counted_without_a_list(case):
    model = config_of(case).model
    assert names.num_tensors(model) == len(names.tensors(model))


def test_released_checkpoint_to_the_byte():
    """Counted from the headers of deepseek-ai/DeepSeek-V3."""
    listed = names.tensors(published("deepseek_v3").model)
    scales = [tensor for tensor in listed if tensor.quantized]
    assert len(listed) + len(scales) == 91_991
    stored = sum(BYTES[tensor.dtype] * math.prod(tensor.shape) for tensor in listed)
    assert stored + 4 * sum(math.prod(tensor.scale_shape) for tensor in scales) == 688_574_839_360
    every_name = [tensor.name for tensor in listed] + [tensor.scale_name for tensor in scales]
    assert len(set(every_name)) == 91_991
    assert all(tensor.quantized == (tensor.dtype == "F8_E4M3") for tensor in listed)


def test_tensors_come_in_the_order_of_the_released_files():
    listed = names.tensors(published("deepseek_v3").model)
    order = [tensor.name.split(".")[2] if ".layers." in tensor.name else tensor.name for tensor in listed]
    main = ["model.embed_tokens.weight", *map(str, range(61)), "model.norm.weight", "lm_head.weight"]
    assert list(dict.fromkeys(order)) == [*main, "61"]


@pytest.mark.parametrize("case", [*CONFIGS, *VARIANTS, *hf_checkpoint.CASES])
def test_every_element_of_every_leaf_is_filled_once(case):
    config = config_of(case)
    model, shapes = config.model, shapes_of_init(config)
    if model.gate == "softmax":  # no selection bias is stored
        shapes = {leaf: shape for leaf, shape in shapes.items() if leaf[-1] != "bias_E"}
    filled_parts = {leaf: [] for leaf in shapes}
    for tensor in names.tensors(model):
        shape = shapes[tensor.leaf]
        lead = num_lead_dims(tensor.leaf[-1], len(shape))
        assert lead == len(tensor.index)
        rows, columns = matrix_shape(shape, lead, tensor.row_dims)[lead:]
        assert tensor.matrix_shape == (rows, columns if tensor.half is None else columns // 2), tensor
        assert math.prod(tensor.matrix_shape) == math.prod(tensor.shape)
        if not tensor.copied:
            filled_parts[tensor.leaf].append((*tensor.index, tensor.half or 0))
    for leaf, filled in filled_parts.items():
        stacked = (len(leaf) > 2) + (leaf[-1] in ("gate_up_ED2F", "down_EFD"))  # dims of layers and experts
        indices = np.ndindex(*shapes[leaf][:stacked], 2 if "2F" in leaf[-1] else 1)
        assert sorted(filled) == list(indices), leaf


@pytest.mark.parametrize("case", hf_checkpoint.CASES)
def test_names_and_shapes_are_those_of_the_goldens(case):
    stored = load_file(hf_checkpoint.FOLDER / case / "model.safetensors")
    listed = names.tensors(config_of(case).model)
    assert {tensor.name: tensor.shape for tensor in listed} == {name: array.shape for name, array in stored.items()}
