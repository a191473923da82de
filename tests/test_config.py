"""Configuration: published numbers, strict conversion, schedules, the choices of `resolve`, and the command line."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from configs import deepseek_v3, tiny, v3_300m
from deepseek_jax import config as config_lib
from deepseek_jax import config_checks
from deepseek_jax.config import Source, from_config_dict, to_dict
from deepseek_jax.parallel.program import resolve, resolve_for
from deepseek_jax.schedule import schedule_value
from pallas_kernels import dispatch
from tests.support.configs import CONFIGS

ROOT = Path(__file__).parents[1]
PARTS = ["tiny", "v3_300m", "v3_5b", "deepseek_v3", "deepseek_v2_lite", "deepseek_v2", "moe_1b", "moonlight_16b"]


def changed(path, value, base=tiny):
    """The dict of a config file with the value at a dotted `path` replaced."""
    tree = base.get_config().to_dict()
    *sections, key = path.split(".")
    section = tree
    for name in sections:
        section = section[name]
    section[key] = value
    return tree


@pytest.mark.parametrize("name", CONFIGS)
def test_config_file_converts_and_survives_json(name):
    config = from_config_dict(importlib.import_module(f"configs.{name}").get_config())
    assert config.name == name
    assert from_config_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert isinstance(hash(config), int)  # a static argument of jit


def test_other_configs_keep_their_precision():
    """Each begins with V3's, which is the report's FP8."""
    precisions = {name: importlib.import_module(f"configs.{name}").get_config().execution.precision for name in PARTS}
    assert precisions == dict.fromkeys(PARTS, "bf16") | {
        "deepseek_v3": "fp8",
        "moonlight_16b": "fp8",
        "tiny": "fp32",
    }


def test_training_values_of_671b():
    """Those that no config.json has; the model's are read from one in tests/huggingface/test_config.py."""
    config = from_config_dict(deepseek_v3.get_config())
    assert config.model.init_std == 0.006 and not config.model.yarn.enabled
    assert config.execution.precision == "fp8"
    assert (config.loss.sequence_balance_weight, config.loss.balance_frequency) == (1e-4, "unbiased")
    found = config.optimizer
    assert (found.b1, found.b2, found.weight_decay, found.clip_norm) == (0.9, 0.95, 0.1, 1.0)
    assert (config.data.fim_rate, config.data.mask_documents, config.data.sequence_length) == (0.1, False, 4096)


# What the message must name: key, value and remedy.
LR, MTP, SIZE = "optimizer.learning_rate", "loss.mtp_weight", "training.batch_size"
REFUSED = {
    "typo": ("model.num_layer", 8, r"config\.model\.num_layer is unknown; did you mean 'num_layers'"),
    "typo in a nested section": ("model.yarn.beta_fats", 8.0, r"model\.yarn\.beta_fats is unknown; .* 'beta_fast'"),
    "nothing like it": ("mesh.zebra", 8, r"config\.mesh\.zebra is unknown; known keys: \['context', 'data', 'expert'"),
    "a float for a count": ("model.num_layers", 8.0, r"config\.model\.num_layers = 8\.0 is a float; it must be a int"),
    "text for a number": ("optimizer.b1", "0.9", r"config\.optimizer\.b1 = '0\.9' is a str; it must be a float"),
    "a bool for a number": ("model.num_layers", True, r"config\.model\.num_layers = True is a bool"),
    "a number for a bool": ("data.mask_documents", 1, r"config\.data\.mask_documents = 1 is a int; it must be a bool"),
    "nothing": ("model.width", None, r"config\.model\.width = None is a NoneType"),
    "a number for a section": ("model.yarn", 40.0, r"yarn = 40\.0 must be a section with the keys \['enabled'"),
    "a flat schedule": (LR, ("constant", 1.0, 1e-3), r"config\.optimizer\.learning_rate\[0\] = 'constant' must be"),
    "half a piece": (LR, (("constant", 1.0),), r"must have 3 entries: shape, end fraction, value"),
    "experts in groups": ("model.num_experts", 18, r"num_experts = 18 .* num_groups = 4; change either"),
    "top-k above the kept experts": ("model.experts_per_token", 9, r"= 9 exceeds the 8 experts of 2 kept .*; lower it"),
    "kept groups": ("model.num_kept_groups", 5, r"num_kept_groups = 5 exceeds num_groups = 4"),
    "odd rotary dim": ("model.rotary_dim", 15, r"rotary_dim = 15 must be even"),
    "dense layers": ("model.num_dense_layers", 5, r"num_dense_layers = 5 exceeds num_layers = 4"),
    "MTP without experts": ("model.num_dense_layers", 4, r"MTP layers are MoE layers; set num_mtp_layers = 0"),
    "YaRN that shortens": ("model.yarn.factor", 0.5, r"yarn.factor = 0\.5 must be at least 1"),
    "no width": ("model.width", 0, r"model\.width = 0 must be positive"),
    "negative count": ("model.num_mtp_layers", -1, r"model\.num_mtp_layers = -1 must be at least 0"),
    "too short for MTP": ("data.sequence_length", 2, r"sequence_length = 2 is too short: 1 MTP layers need at least 3"),
    "no sources": ("data.sources", (), r"data\.sources is empty; name at least one"),
    "unknown gate": ("model.gate", "tanh", r"model\.gate = 'tanh' is unknown; choose one of \('sigmoid', 'softmax'\)"),
    "unknown remat": ("execution.remat", "some", r"execution\.remat = 'some' is unknown"),
    "not finite": ("optimizer.eps", float("nan"), r"optimizer\.eps = nan must be finite"),
    "no tokens": ("training.num_tokens", 0.0, r"training\.num_tokens = 0\.0 must be positive"),
    "negative weight": ("loss.z_loss_weight", -1.0, r"loss\.z_loss_weight = -1\.0 must be at least 0"),
    "more than all": ("data.fim_rate", 1.5, r"data\.fim_rate = 1\.5 is a fraction; it must lie in \[0, 1\]"),
    "an average that never moves": ("optimizer.b1", 1.0, r"optimizer\.b1 = 1\.0 must be below 1"),
    "BF16 moments": ("optimizer.b2", 0.999, r"optimizer\.b2 = 0\.999: BF16 moments .* above 0\.99; lower it"),
    "slack": ("execution.exchange_slack", 0.5, r"exchange_slack = 0\.5 must be at least 1"),
    "empty schedule": (LR, (), r"config\.optimizer\.learning_rate: the ends \[\]"),
    "empty batch schedule": (SIZE, (), r"config\.training\.batch_size: the ends \[\]"),
    "ends early": (MTP, (("constant", 0.5, 0.3),), r"mtp_weight: the ends \[0\.5\].*to exactly 1\.0"),
    "falls back": (MTP, (("constant", 0.7, 0.3), ("linear", 0.7, 0.1), ("linear", 1.0, 0.1)), r"\[0\.7, 0\.7, 1\.0\]"),
    "starts at 0": (MTP, (("constant", 0.0, 0.3), ("constant", 1.0, 0.1)), r"must rise from above 0"),
    "schedule shape": (LR, (("cubic", 1.0, 1e-3),), r"shape 'cubic' is unknown; choose 'constant'"),
    "negative rate": (LR, (("constant", 1.0, -1e-3),), r"value -0\.001 must be finite and not negative"),
    "infinite rate": (LR, (("constant", 1.0, float("inf")),), r"value inf must be finite"),
    "between micro-batches": (SIZE, (("constant", 1.0, 12),), r"12\.0\) must be .* multiple .* is 8 or 16$"),
    "no batch": (SIZE, (("constant", 1.0, 0),), r"0\.0\) must be a constant whole multiple"),
    "fractional batch": (SIZE, (("constant", 1.0, 8.5),), r"8\.5\) must be a constant whole multiple.*is 8 or 16$"),
    "batch that glides": (SIZE, (("constant", 0.5, 8), ("linear", 1.0, 16)), r"'linear', .* must be a constant"),
}


@pytest.mark.parametrize(("path", "value", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_value_is_refused_by_name(path, value, message):
    with pytest.raises(ValueError, match=message):
        from_config_dict(changed(path, value))


@pytest.mark.parametrize("name", ["width", "query_latent", "kv_latent", "value_dim", "dense_hidden", "expert_hidden"])
def test_fp8_sums_over_groups_of_128(name):
    tree = changed("execution.precision", "fp8")
    tree["model"] |= {"kv_latent": 128}
    from_config_dict(tree)
    tree["model"][name] = 48
    said = "num_heads \\* value_dim = 192" if name == "value_dim" else f"{name} = 48"
    with pytest.raises(ValueError, match=f"{said} must be a multiple of 128 for execution.precision = 'fp8'"):
        from_config_dict(tree)


def test_two_best_scores_of_a_group_need_two_experts():
    tree = changed("model.num_groups", 16)
    tree["model"]["num_kept_groups"] = 8
    with pytest.raises(ValueError, match="'top2' needs groups of 2 experts or more, got 1; use 'max' or fewer groups"):
        from_config_dict(tree)
    tree["model"]["group_score"] = "max"
    assert from_config_dict(tree).model.num_groups == 16


@pytest.mark.parametrize(
    ("model", "choice"),
    [
        ({"num_experts": 8, "num_groups": 4, "num_kept_groups": 2}, "chooses groups and no experts within them"),
        ({"num_experts": 4, "num_groups": 1, "num_kept_groups": 1}, "every token goes to every expert"),
    ],
)
def test_a_router_that_cannot_choose_is_warned_about_once(model, choice, caplog):
    config_checks._warn_once.cache_clear()
    tree = tiny.get_config().to_dict()
    tree["model"] |= model
    for _ in range(2):
        from_config_dict(tree)
    (record,) = caplog.records
    assert choice in record.getMessage() and "experts_per_token = 4" in record.getMessage()


def test_paths_of_the_home_folder_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    tree = tiny.get_config().to_dict()
    tree["data"] |= {"sources": [{"path": "~/text", "weight": 1.0}, {"path": "./a/", "weight": 1.0}]}
    tree["data"] |= {"tokenizer": "~/t.json"}
    tree["training"] |= {"initial_weights": "~/weights"}
    config = from_config_dict(tree)
    assert [source.path for source in config.data.sources] == ["/somewhere/text", "./a/"]
    assert (config.data.tokenizer, config.training.initial_weights) == ("/somewhere/t.json", "/somewhere/weights")


def test_missing_keys_are_named():
    tree = tiny.get_config().to_dict()
    del tree["model"]["width"], tree["model"]["gate"]
    with pytest.raises(ValueError, match=r"config\.model lacks \['width', 'gate'\]; start from configs/deep"):
        from_config_dict(tree)
    del tree["model"]
    with pytest.raises(ValueError, match=r"config lacks \['model'\]"):
        from_config_dict(tree)


def test_whole_numbers_stand_for_floats():
    assert from_config_dict(changed("training.num_tokens", 1_000_000)).training.num_tokens == 1e6
    config = from_config_dict(changed("data.sources", [{"path": "a", "weight": 2}]))
    assert config.data.sources == (config_lib.Source(path="a", weight=2.0),)


def test_schedule_shapes_meet_at_their_ends():
    pieces = (("linear", 0.25, 4.0), ("cosine", 0.75, 2.0), ("linear", 0.875, 0.0), ("constant", 1.0, 1.0))
    values = {0.0: 4.0, 0.2: 4.0, 0.25: 4.0, 0.375: 3.0 + 0.5**0.5, 0.5: 3.0, 0.75: 2.0, 0.8125: 1.0}
    values |= dict.fromkeys((0.875, 0.99, 1.0, 7.0), 1.0)
    assert {fraction: schedule_value(pieces, fraction) for fraction in values} == pytest.approx(values, abs=1e-12)


def test_a_piece_contains_its_start_and_not_its_end():
    pieces = (("constant", 0.5, 3.0), ("constant", 1.0, 1.0))
    assert (schedule_value(pieces, 0.5 - 1e-12), schedule_value(pieces, 0.5)) == (3.0, 1.0)


RESOLVED = {
    ("cpu", "bf16", False): "xla",
    ("gpu", "bf16", False): "cudnn",
    ("gpu", "fp8", False): "cudnn",  # the attention core stays in BF16
    ("gpu", "fp32", False): "xla",  # cuDNN has no FP32
    ("gpu", "bf16", True): "xla",  # nor several segments per row
    ("tpu", "bf16", True): "splash",
    ("tpu", "fp32", False): "splash",
}


@pytest.mark.parametrize(("platform", "precision", "mask"), RESOLVED)
def test_resolve_chooses_attention(platform, precision, mask):
    tree = changed("execution.precision", precision)
    tree["data"]["mask_documents"] = mask
    tree["model"]["kv_latent"] = 128
    resolved = resolve(from_config_dict(tree), platform, 1)
    assert resolved.execution.attention == RESOLVED[platform, precision, mask]
    assert resolve(resolved, platform, 1) == resolved


@pytest.mark.parametrize(("attention", "platform"), [("cudnn", "cpu"), ("cudnn", "tpu"), ("splash", "gpu")])
def test_resolve_refuses_attention_that_the_platform_lacks(attention, platform):
    tree = changed("execution.attention", attention)
    tree["execution"]["precision"] = "bf16"
    with pytest.raises(NotImplementedError, match=rf"'{attention}' needs a .PU, and this is a {platform.upper()}; use"):
        resolve(from_config_dict(tree), platform, 1)


def test_splash_attention_takes_whole_blocks():
    tree = changed("data.sequence_length", 192)
    assert resolve(from_config_dict(tree), "tpu", 1).execution.attention == "xla"
    tree["execution"]["attention"] = "splash"
    with pytest.raises(ValueError, match="sequence_length = 192 must be a multiple of 128"):
        resolve(from_config_dict(tree), "tpu", 1)


def test_fp8_is_refused_on_a_gpu_without_kernels():
    config = from_config_dict(v3_300m.get_config()).with_(execution={"precision": "fp8"})
    for capability in ("8.0", "10.0"):
        device = SimpleNamespace(platform="gpu", compute_capability=capability, device_kind="another GPU")
        mesh = SimpleNamespace(devices=np.array([device]), shape=dict.fromkeys(("context", "node", "expert"), 1))
        with pytest.raises(NotImplementedError, match=rf"{capability}; use --config.execution.precision=bf16"):
            resolve_for(config, mesh)
    device.compute_capability = "9.0"
    assert resolve_for(config, mesh).execution.experts == "grouped"


def test_resolve_keeps_what_was_asked_for_and_changes_nothing_else():
    config = from_config_dict(changed("execution.attention", "xla"))
    resolved = resolve(config, "tpu", 8)
    assert resolved == config.with_(execution={"exchange": "dense", "experts": "blocks"})


def test_resolve_chooses_exchange():
    config = from_config_dict(tiny.get_config())
    assert [resolve(config, "cpu", devices).execution.exchange for devices in (1, 8)] == ["local", "dense"]
    assert [resolve(config, "cpu", 8, nodes).execution.exchange for nodes in (1, 2, 8)] == ["dense", "two_hop", "dense"]
    with pytest.raises(ValueError, match="'local' needs every expert on every device, but 8 .*; use 'auto'"):
        resolve(from_config_dict(changed("execution.exchange", "local")), "cpu", 8)


def train_command(*overrides):
    """Run `experiments.train --print_config` with overrides."""
    command = [sys.executable, "-m", "experiments.train", "--config=configs/tiny.py", "--print_config", *overrides]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=600
    )


def test_command_line_overrides():
    done = train_command(
        "--config.model.num_layers=8",
        "--config.loss.mtp_weight=(('linear', 1.0, 0.5),)",
        "--config.execution.precision=bf16",
    )
    printed = from_config_dict(json.loads(done.stdout))
    want = tiny.get_config()
    want.model.num_layers, want.loss.mtp_weight, want.execution.precision = 8, (("linear", 1.0, 0.5),), "bf16"
    assert printed == from_config_dict(want)


@pytest.mark.parametrize(
    ("precision", "hardware", "width", "experts"),
    [
        ("bf16", ("gpu", "9.0"), 256, "grouped"),
        ("bf16", ("gpu", "9.0"), 192, "blocks"),
        ("bf16", ("gpu", "8.0"), 256, "blocks"),
        ("fp32", ("gpu", "9.0"), 256, "blocks"),
        ("fp8", ("gpu", "8.0"), 256, "grouped"),
    ],
)
def test_resolve_chooses_the_experts_arithmetic(precision, hardware, width, experts, monkeypatch):
    monkeypatch.setattr(dispatch, "_hardware", lambda: hardware)
    tree = changed("execution.precision", precision)
    tree["model"] |= {"width": width, "kv_latent": 128, "expert_hidden": 128}
    assert resolve(from_config_dict(tree), "gpu", 1).execution.experts == experts


@pytest.mark.parametrize(("precision", "experts"), [("fp8", "blocks"), ("fp32", "grouped")])
def test_experts_of_another_precision_are_refused(precision, experts):
    tree = changed("execution.precision", precision)
    tree["execution"]["experts"] = experts
    tree["model"]["kv_latent"] = 128
    with pytest.raises(ValueError, match=f"experts = '{experts}' does not exist .* '{precision}'.*use 'auto'"):
        from_config_dict(tree)


def test_weights_are_not_kept_where_nothing_is_recomputed():
    tree = changed("execution.gather", "kept")
    tree["execution"]["remat"] = "none"
    with pytest.raises(ValueError, match="'kept' says nothing with execution.remat = 'none'.*use gather = 'layer'"):
        from_config_dict(tree)


def test_a_number_is_a_constant_schedule():
    config = from_config_dict(changed("optimizer.learning_rate", 1e-3))
    assert config.optimizer.learning_rate == (("constant", 1.0, 1e-3),)
    assert from_config_dict(changed("optimizer.learning_rate", (1e-3,))) == config  # what a flag makes of a number
    assert from_config_dict(changed("training.batch_size", 16)).training.batch_size == (("constant", 1.0, 16.0),)
    with pytest.raises(ValueError, match="must be a sequence"):
        from_config_dict(changed("optimizer.learning_rate", True))


def test_a_source_may_have_a_text_field_of_its_own():
    config = from_config_dict(changed("data.sources", ({"path": "a", "weight": 1.0, "text_field": "content"},)))
    assert config.data.sources[0].text_field == "content"
    tree = json.loads(json.dumps(to_dict(config)))
    assert from_config_dict(tree) == config
    del tree["data"]["sources"][0]["text_field"]  # as runs of older versions stored it
    assert from_config_dict(tree).data.sources == (Source(path="a", weight=1.0),)
    with pytest.raises(ValueError, match=r"config.data.sources\[0\].text_fild is unknown; did you mean 'text_field'"):
        from_config_dict(changed("data.sources", ({"path": "a", "weight": 1.0, "text_fild": "content"},)))


def test_a_path_alone_is_a_source_of_weight_one():
    """What `--config.data.sources=my/texts` makes."""
    (source,) = from_config_dict(changed("data.sources", ("my/texts",))).data.sources
    assert (source.path, source.weight, source.text_field) == ("my/texts", 1.0, "")


def test_a_word_for_a_schedule_is_refused_by_name():
    with pytest.raises(ValueError, match="config.optimizer.learning_rate = 1e-3x is not a number"):
        from_config_dict(changed("optimizer.learning_rate", ("1e-3x",)))


# fmt: skip
@pytest.mark.parametrize(
    ("name", "before", "length", "batch", "steps", "factor", "original"),
    [
        ("deepseek_v3_32k", "deepseek_v3", 32768, 1920, 1000, 40.0, 4096),
        ("deepseek_v3_128k", "deepseek_v3_32k", 131072, 480, 1000, 40.0, 4096),
        ("tiny_1k", "tiny", 1024, 2, 100, 10.0, 256),
        ("tiny_2k", "tiny_1k", 2048, 1, 100, 10.0, 256),
    ],
)
def test_phases_of_context_extension_continue_each_other(name, before, length, batch, steps, factor, original):
    """Section 4.3: YaRN of one factor in both phases, as many tokens in each, the last learning rate throughout."""
    config, base = (from_config_dict(importlib.import_module(f"configs.{n}").get_config()) for n in (name, before))
    assert config.training.initial_weights == f"runs/{before}"
    assert config.data.sequence_length == length
    assert [size for _, _, size in config.training.batch_size] == [batch]
    assert config.training.num_tokens == length * batch * steps
    yarn = config.model.yarn
    assert (yarn.enabled, yarn.factor, yarn.original_length) == (True, factor, original)
    assert dataclasses.replace(config.model, yarn=base.model.yarn) == base.model
    assert [rate for _, _, rate in config.optimizer.learning_rate] == [base.optimizer.learning_rate[-1][2]]
    assert config.optimizer.warmup_steps == 0 and config.optimizer.bias_update_rate[-1][2] == 0.0
