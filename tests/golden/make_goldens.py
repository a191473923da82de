"""Make the tiny Hugging Face checkpoints of this folder, and the numbers that transformers computes from them.

    python tests/golden/make_goldens.py [case ...]     Python 3.11 with CPU torch 2.13, transformers 5.23, accelerate,
                                                       safetensors, numpy

An oracle that nobody here wrote: weights are drawn with numpy, stored under the names and in the layout of the released
checkpoints, read by transformers' own loader, and run by its `DeepseekV3ForCausalLM`, `DeepseekV2ForCausalLM` and
`MtpModel`. Nothing is restated. The model runs in float64 (`double_precision`), so what a golden stores is the correct
value rounded once to float32, and the tolerance of a test is the error of our own float32 arithmetic. `versions.json`
records the versions, how far transformers' own float32 run is from the float64 one, and the smallest distance between a
chosen and a rejected expert or group: routes that nearly tie could flip by rounding, so a seed with a margin below
`MIN_MARGIN` is refused. Run again, the script makes the same bytes; the float32 errors in `versions.json` differ from
one CPU to the next.

Each case is a folder with config.json and model.safetensors, as released, and golden.npz:
    tokens_BS, targets_BS int32           targets are the next tokens
    logits_BSV, hidden_BSD                hidden: after the final norm
    router_input_LTD, experts_LTK, weights_LTK   per MoE layer, main model first, then MTP; expert ids ascending
    mtp_logits_KBSV                       depth k - 1 of K; only positions i < S - k are defined, the others are 0
    loss, mtp_loss_K                      mean cross entropy; MTP sums over the S - k positions, divided by B * S (arXiv
                                          2412.19437, eq. 24)
and, for the base case, gradients.safetensors: d(loss + MTP_WEIGHT * mean(mtp_loss)) / d(weight) under the checkpoint's
names.

The case fp8 is a checkpoint in the released FP8 form. Its golden.npz has logits, routes and gates three times: those of
the dequantised weights in float64 as above, and with "training_" and "inference_" in front those of FP8 arithmetic
(restated in `fp8_arithmetic`; all else is transformers' model). Its weights are dequantised here: transformers 5.23
takes rows / (number of rows of scales) for the block, so it reads the 136 rows of kv_a, scaled as 128 and 8, as 68 and
68, and refuses the 576 rows of V3's. All other weights of the main model are checked against its loader.

The masking value of the router (0.0 in transformers before pull request 45441) is -inf in the version used, so the case
with only negative biases needs no restatement. `MtpModel` chains depth k + 1 on the state after depth k's own final
norm.
"""

import argparse
import contextlib
import json
import pathlib
import platform
import tempfile
from unittest import mock

import numpy as np
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from cases import CASES, FP8, V3, Case, draw_weights
from fp8_arithmetic import GROUP, INFERENCE, TRAINING, bf16, replace, store
from transformers.modeling_layers import MtpModel

FOLDER = pathlib.Path(__file__).parent
BATCH = 2
MTP_WEIGHT = 0.3
MIN_MARGIN = 2e-5  # of a routing decision, in units of a score: hundreds of roundings of one
MIN_FP8_MARGIN = 2e-3  # of a decision in BF16 and FP8


def load(folder: pathlib.Path, config: dict) -> tuple[torch.nn.Module, MtpModel | None]:
    """Read a checkpoint with transformers' own loaders: the main model, and the MTP layers where it has any."""
    options = {"dtype": torch.float32, "attn_implementation": "eager", "experts_implementation": "eager"}
    cls = getattr(transformers, config["architectures"][0])
    model, report = cls.from_pretrained(folder, output_loading_info=True, **options)
    depth = config["num_hidden_layers"]
    unknown = {key for key in report["unexpected_keys"] if int(key.split(".")[2]) < depth}
    if report["missing_keys"] or unknown:
        raise RuntimeError(f"transformers misses {report['missing_keys']} and does not know {unknown}")
    if not config["num_nextn_predict_layers"]:
        return model, None
    # The class names its own MTP layer, 61; ours follow the last layer of this checkpoint.
    extra = range(depth, depth + config["num_nextn_predict_layers"])
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{index}\." for index in extra]
    return model, MtpModel.from_pretrained(model)


@contextlib.contextmanager
def double_precision():
    """Let code that names float32 (norms, softmax, router, angles) compute in float64, so that the whole model does."""
    wide = {"float32": torch.float64, "float": torch.float64}
    with mock.patch.multiple(torch, **wide), mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield


def widen(model: torch.nn.Module, mtp: MtpModel | None) -> None:
    """Cast weights to float64 and recompute the rotary frequencies there; call inside `double_precision`."""
    model.double()
    if mtp is not None:
        mtp.double()
    rotary = model.model.rotary_emb
    rotary.inv_freq = type(rotary)(model.config).inv_freq
    assert rotary.inv_freq.dtype == torch.float64


def run(
    model: torch.nn.Module, mtp: MtpModel | None, tokens: torch.Tensor, targets: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Forward everything, teacher-forced; keys and shapes are those of golden.npz."""
    routed = []

    def record(module, inputs, output) -> None:
        _, weights, experts = output
        experts, order = experts.sort(dim=-1)
        routed.append((inputs[0].reshape(-1, inputs[0].shape[-1]), experts, weights.gather(-1, order)))

    layers = [*model.model.layers, *([] if mtp is None else [layer.mtp_block for layer in mtp.layers])]
    hooks = [layer.mlp.gate.register_forward_hook(record) for layer in layers if hasattr(layer.mlp, "gate")]
    out = {"tokens_BS": tokens, "targets_BS": targets}
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden)
    out |= {"hidden_BSD": hidden, "logits_BSV": logits, "loss": cross_entropy(logits, targets) / targets.numel()}
    if mtp is not None:
        out |= run_mtp(model, mtp, hidden, targets)
    for hook in hooks:
        hook.remove()
    names = ("router_input_LTD", "experts_LTK", "weights_LTK")
    out |= {name: torch.stack(part) for name, part in zip(names, zip(*routed, strict=True), strict=True)}
    return out


def run_mtp(model, mtp: MtpModel, hidden: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run the MTP layers: depth k merges the state of position i of depth k - 1 with the embedding of token i + k.

    It predicts token i + k + 1. Token i + 1 is target i. Past the end, where nothing is predicted, token 0 is embedded:
    it reaches the router's record only.
    """
    length = targets.shape[1]
    position_ids = torch.arange(length)[None]
    logits, losses = [], []
    for depth in range(1, len(mtp.layers) + 1):
        ahead = torch.nn.functional.pad(targets[:, depth - 1 :], (0, depth - 1))
        hidden = mtp.forward_layer(depth - 1, hidden, position_ids, None, input_ids=ahead)
        defined = model.lm_head(hidden)[:, : length - depth]
        logits.append(torch.nn.functional.pad(defined, (0, 0, 0, depth)))
        losses.append(cross_entropy(defined, targets[:, depth:]) / targets.numel())
    return {"mtp_logits_KBSV": torch.stack(logits), "mtp_loss_K": torch.stack(losses)}


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum over all positions, nats."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def gradients(model: torch.nn.Module, mtp: MtpModel, out: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Differentiate the training loss; the result has the checkpoint's names and layouts, embedding and head once."""
    (out["loss"] + MTP_WEIGHT * out["mtp_loss_K"].mean()).backward()
    depth = model.config.num_hidden_layers
    named = {name: p.grad for name, p in model.named_parameters()}
    for name, p in mtp.layers.named_parameters():
        index, rest = name.split(".", 1)
        rest = rest.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
        named[f"model.layers.{depth + int(index)}.{rest}"] = p.grad
    split = {}
    for name, grad in named.items():
        if name.endswith("experts.gate_up_proj"):
            for part, pieces in zip(("gate_proj", "up_proj"), grad.chunk(2, dim=1), strict=True):
                split |= {
                    name.replace("gate_up_proj", f"{expert}.{part}.weight"): piece
                    for expert, piece in enumerate(pieces)
                }
        elif name.endswith("experts.down_proj"):
            split |= {
                name.replace("down_proj", f"{expert}.down_proj.weight"): piece for expert, piece in enumerate(grad)
            }
        else:
            split[name] = grad
    return {name: np.ascontiguousarray(grad.numpy().astype(np.float32)) for name, grad in split.items()}


def routing_margin(config: dict, tensors: dict[str, np.ndarray], out: dict[str, torch.Tensor]) -> float:
    """Return the smallest gap between the last kept and the first rejected group, and expert.

    It is taken over all tokens and layers.
    """

    def gap(values: np.ndarray, kept: int) -> float:
        ranked = -np.sort(-values, axis=-1)
        return float((ranked[:, kept - 1] - ranked[:, kept]).min())

    margins = []
    names = [name for name in tensors if name.endswith("mlp.gate.weight")]
    for name, x_TD in zip(names, out["router_input_LTD"].detach().numpy(), strict=True):
        logits_TE = x_TD @ tensors[name].T.astype(np.float64)
        if config["scoring_func"] == "softmax":
            scores_TE = np.exp(logits_TE) / np.exp(logits_TE).sum(-1, keepdims=True)
        else:
            scores_TE = 1 / (1 + np.exp(-logits_TE)) + tensors[name.replace("weight", "e_score_correction_bias")]
        ascending_TGE = np.sort(scores_TE.reshape(len(x_TD), config["n_group"], -1), axis=-1)
        group_TG = ascending_TGE[..., -1] if config["scoring_func"] == "softmax" else ascending_TGE[..., -2:].sum(-1)
        margins.append(gap(group_TG, config["topk_group"]))
        kept_TG = group_TG >= np.sort(group_TG, axis=-1)[:, [-config["topk_group"]]]
        kept_TE = np.repeat(kept_TG, config["n_routed_experts"] // config["n_group"], axis=1)
        margins.append(gap(np.where(kept_TE, scores_TE, -np.inf), config["num_experts_per_tok"]))
    return min(margins)


def make(case: Case) -> dict[str, float]:
    """Write one case's folder; return the float32 noise and the routing margin for versions.json."""
    config, folder = V3 | case.changes, FOLDER / case.name
    rng = np.random.default_rng(case.seed)
    tensors = draw_weights(config, case.bias_range, rng)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ids = torch.from_numpy(rng.integers(0, config["vocab_size"], (BATCH, case.length + 1)))
    tokens, targets = ids[:, :-1], ids[:, 1:]
    model, mtp = load(folder, config)
    with torch.no_grad():
        single = run(model, mtp, tokens, targets)
    with double_precision():
        widen(model, mtp)
        out = run(model, mtp, tokens, targets)
    assert out["logits_BSV"].dtype == torch.float64 and torch.equal(single["experts_LTK"], out["experts_LTK"])
    margin = routing_margin(config, tensors, out)
    if margin < MIN_MARGIN:
        raise ValueError(
            f"case {case.name}: a routing decision is closer than {MIN_MARGIN} ({margin:.1e}); change its seed"
        )
    if mtp is not None:
        safetensors.numpy.save_file(gradients(model, mtp, out), folder / "gradients.safetensors")
    narrow = {torch.float64: np.float32, torch.int64: np.int32}
    np.savez_compressed(
        folder / "golden.npz", **{name: x.detach().numpy().astype(narrow[x.dtype]) for name, x in out.items()}
    )
    noise = {name: (single[name] - out[name]).detach().abs().max().item() for name in ("logits_BSV", "weights_LTK")}
    return {
        "float32_error_logits": noise["logits_BSV"],
        "float32_error_weights": noise["weights_LTK"],
        "routing_margin": margin,
    }


def make_fp8(case: Case) -> dict[str, float]:
    """Write the folder of a case in FP8; return what versions.json records, distances as shares of the logits."""
    config, folder = V3 | case.changes, FOLDER / case.name
    rng = np.random.default_rng(case.seed)
    drawn = {name: torch.from_numpy(weight) for name, weight in draw_weights(config, case.bias_range, rng).items()}
    stored, weights = store(drawn, rng)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_torch(stored, folder / "model.safetensors")
    ids = torch.from_numpy(rng.integers(0, config["vocab_size"], (BATCH, case.length + 1)))
    tokens, targets = ids[:, :-1], ids[:, 1:]
    outputs = {}
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        dequantized = pathlib.Path(name)
        wide = config | {"torch_dtype": "float32"}
        del wide["quantization_config"]
        (dequantized / "config.json").write_text(json.dumps(wide))
        write_torch(weights, dequantized / "model.safetensors")
        model, mtp = load(dequantized, wide)
        check_reader(folder, model)
        single = run(model, mtp, tokens, targets)
        with double_precision():
            widen(model, mtp)
            outputs[""] = run(model, mtp, tokens, targets)
        for prefix, arithmetic in (("training_", TRAINING), ("inference_", INFERENCE)):
            model, mtp = load(dequantized, wide)
            replace(model, mtp, stored, arithmetic)
            with bf16(arithmetic):
                outputs[prefix] = run(model, mtp, tokens, targets)
    right = outputs[""]
    numbers = {name: weight.numpy() for name, weight in weights.items()}
    margins = [
        routing_margin(config, numbers, out | {"router_input_LTD": out["router_input_LTD"].double()})
        for out in outputs.values()
    ]
    equal = all(torch.equal(out["experts_LTK"], right["experts_LTK"]) for out in (single, *outputs.values()))
    if not equal or min(margins) < MIN_FP8_MARGIN:
        raise ValueError(
            f"case {case.name}: routes equal: {equal}, closest decisions {margins}, not {MIN_FP8_MARGIN}; change its"
            " seed"
        )
    names = ("logits_BSV", "mtp_logits_KBSV", "experts_LTK", "weights_LTK")
    arrays = {"tokens_BS": tokens, "targets_BS": targets} | {
        p + name: out[name] for p, out in outputs.items() for name in names
    }
    np.savez_compressed(
        folder / "golden.npz",
        **{name: x.numpy().astype(np.float32 if x.is_floating_point() else np.int32) for name, x in arrays.items()},
    )
    noise = {name: (single[name] - right[name]).abs().max().item() for name in ("logits_BSV", "weights_LTK")}
    record = {
        "float32_error_logits": noise["logits_BSV"],
        "float32_error_weights": noise["weights_LTK"],
        "routing_margin": min(margins),
    }
    for prefix in ("training", "inference"):
        error = outputs[f"{prefix}_"]["logits_BSV"] - right["logits_BSV"]
        record[f"{prefix}_distance_logits"] = (error.norm() / right["logits_BSV"].norm()).item()
    return record


def write_torch(tensors: dict[str, torch.Tensor], path: pathlib.Path) -> None:
    """Write a checkpoint; MTP layers' copies of the embedding and the head are tensors of their own."""
    safetensors.torch.save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, path, metadata={"format": "pt"}
    )


def check_reader(folder: pathlib.Path, model: torch.nn.Module) -> None:
    """Check our dequantised weights against those that transformers makes of the FP8 folder, where it can read them."""
    options = {"dtype": torch.float32, "quantization_config": transformers.FineGrainedFP8Config(dequantize=True)}
    theirs = dict(type(model).from_pretrained(folder, **options).named_parameters())
    for name, weight in model.named_parameters():
        partly_filled = ".self_attn.kv_" in name and weight.ndim == 2 and weight.shape[0] % GROUP
        if not partly_filled and not torch.equal(weight, theirs[name]):
            raise RuntimeError(f"transformers dequantises {name} to other numbers")


def main() -> None:
    """Make the cases named, or every one, and record what made them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="cases; all of them by default")
    names = parser.parse_args().names
    transformers.logging.set_verbosity_error()  # its notes about the MTP tensors, which `load` checks itself
    transformers.logging.disable_progress_bar()
    versions = {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__}
    versions |= {"transformers": transformers.__version__, "safetensors": safetensors.__version__}
    made = {
        case.name: (make_fp8 if case is FP8 else make)(case)
        for case in (*CASES, FP8)
        if not names or case.name in names
    }
    path = FOLDER / "versions.json"
    kept = json.loads(path.read_text()) if names else {"versions": versions, "cases": {}}
    if kept["versions"] != versions:
        raise ValueError(f"the other cases were made with {kept['versions']}, not with {versions}; make all of them")
    record = {"versions": versions, "mtp_weight": MTP_WEIGHT, "cases": kept["cases"] | made}
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
