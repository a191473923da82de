"""DeepSeek-V3, 671B: every constant of the report (arXiv 2412.19437), and the base of every other config here.

A config is data. Other files call this `get_config()` and change what differs, so an ablation reads as a diff.
Schedules are pieces `(shape, until, value)`: `until` is a fraction of `training.num_tokens`, `shape` is "constant" (the
value holds over the piece), "linear" or "cosine" (from the previous piece's value to this one).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the published 671B configuration and its pre-training recipe."""
    return ConfigDict(
        {
            "name": "deepseek_v3",
            "seed": 0,
            "model": {
                "vocab_size": 129280,
                "width": 7168,
                "num_layers": 61,
                "num_dense_layers": 3,
                "num_heads": 128,
                "query_latent": 1536,  # 0: queries come straight from the residual stream (V2-Lite)
                "kv_latent": 512,
                "content_dim": 128,
                "rotary_dim": 64,
                "value_dim": 128,
                "dense_hidden": 18432,
                "num_experts": 256,
                "num_shared_experts": 1,
                "experts_per_token": 8,
                "expert_hidden": 2048,
                "num_groups": 8,
                "num_kept_groups": 4,
                "gate": "sigmoid",  # or "softmax" (V2)
                "group_score": "top2",  # sum of the two best biased scores, or "max" (V2)
                "normalize_gates": True,
                "routed_scale": 2.5,
                "num_mtp_layers": 1,
                "rope_base": 10000.0,
                "yarn": {
                    "enabled": False,  # off in the 4K pre-training, on for context extension and the released weights
                    "factor": 40.0,
                    "original_length": 4096,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "mscale": 1.0,
                    "mscale_all_dim": 1.0,
                },
                "norm_eps": 1e-6,
                # of every matrix; norm gains start at 1 and router biases at 0 (unstated in the report)
                "init_std": 0.006,
                # times init_std: of the matrices that write into the residual stream (o, down)
                "residual_init_scale": 1.0,
            },
            "loss": {
                "mtp_weight": (("constant", 10.0 / 14.8, 0.3), ("constant", 1.0, 0.1)),
                # Of each layer's loss. They are summed over layers, MTP's router included (unstated in the report),
                # and averaged over sequences.
                "sequence_balance_weight": 1e-4,
                # The alternative of section 4.5.3, off in the main run: summed over layers alike, over the tokens of
                # the whole batch. Of several micro-batches it takes a forward pass more.
                "batch_balance_weight": 0.0,
                "balance_frequency": "unbiased",  # eq. 18 as printed: top-k of the unbiased scores; or "selected"
                "z_loss_weight": 0.0,  # not part of the report
            },
            "optimizer": {
                "learning_rate": (
                    ("constant", 10.0 / 14.8, 2.2e-4),
                    ("cosine", 14.3 / 14.8, 2.2e-5),
                    ("constant", 14.633 / 14.8, 2.2e-5),
                    ("constant", 1.0, 7.3e-6),
                ),
                "learning_rate_factor": 1.0,  # of the whole schedule, for sweeps
                "warmup_steps": 2000,
                "b1": 0.9,
                "b2": 0.95,
                "eps": 1e-8,  # unstated in the report; Adam's usual value
                "weight_decay": 0.1,  # matrices only: norm gains are excluded (unstated in the report)
                "clip_norm": 1.0,
                "bias_update_rate": (("constant", 14.3 / 14.8, 1e-3), ("constant", 1.0, 0.0)),
                "ema_memory": "device",  # "host": in pinned CPU memory, where the report keeps it (section 3.2.2)
                "ema_decay": 0.0,  # 0: no average is kept. The report keeps one, its decay is unstated
            },
            "data": {
                # "stdlib" is the source text of the running Python's standard library: real text that is already on the
                # machine. docs/data.md lists what else a path may be; a source may have a "text_field" of its own.
                "sources": ({"path": "stdlib", "weight": 1.0},),
                "text_field": "text",
                "on_error": "refuse",  # or "skip": what to do with an unreadable file, line or record
                "tokenizer": "bpe",  # "bpe": trained on the corpus; "byte"; or the path of a tokenizer.json
                "sequence_length": 4096,
                "heldout_fraction": 0.02,
                "fim_rate": 0.1,
                # of tokens joining punctuation and line breaks; the report says "a certain proportion"
                "split_rate": 0.1,
                "mask_documents": False,
                "reset_positions": False,
                "prefetch": 4,
            },
            "training": {
                "num_tokens": 14.8e12,
                # Sequences per optimizer step. The report ramps 3072 -> 15360 over the first 469B tokens and does not
                # give the shape: four steps.
                "batch_size": (
                    ("constant", 0.117 / 14.8, 3072),
                    ("constant", 0.234 / 14.8, 6144),
                    ("constant", 0.352 / 14.8, 9216),
                    ("constant", 0.469 / 14.8, 12288),
                    ("constant", 1.0, 15360),
                ),
                "micro_batch_size": 128,  # sequences over all devices: one per data-parallel rank of the report's 128
                "log_every": 1,
                "eval_every": 1000,
                "eval_batches": 64,
                "checkpoint_every": 500,
                "keep_checkpoints": 3,
                "max_skipped_steps": 20,  # consecutive non-finite steps after which the run stops
                # Random; or a released checkpoint's folder (experiments.convert_hf import), or a run's workdir or
                # workdir@step, also with its whole state: docs/workdir.md.
                "initial_weights": "",
            },
            # -1: whatever the other axes leave. Over `context` each sequence is split: docs/long_context.md.
            "mesh": {"pipe": 1, "data": -1, "context": 1, "node": 8, "expert": 8, "tensor": 1},
            "execution": {
                # The report's (section 3.3), for Hopper GPUs and TPUs; or "bf16", for any hardware, or "fp32".
                "precision": "fp8",
                "remat": "selective",  # "none", "selective" (spec of section 3.2.3: norms and up-projections), "full"
                "scan_unroll": 1,
                # Sharded weights are gathered per "layer", in both passes (ZeRO-3); "kept": per layer, and kept from
                # forward to backward (half the gathers); or once per "step", with whole gradients (ZeRO-1).
                "gather": "layer",
                "attention": "auto",  # or "cudnn", "splash", "xla"
                "attention_chunk": 512,  # queries at a time of the XLA path
                "exchange": "auto",  # or "local", "dense" (one hop), "two_hop" (over node, then over expert)
                "exchange_slack": 1.25,  # room for rows and for experts' slots, in multiples of the balanced number
                # of a pipeline, mesh.pipe above 1: the least memory, and any number of micro-batches; docs/pipeline.md
                # compares it with "gpipe", "interleaved", "zb1p", "dualpipe" and "dualpipev"
                "schedule": "1f1b",
                "interleave": 1,  # 2: two halves of a micro-batch side by side; one attends while the other exchanges
                "experts": "auto",  # or "blocks" (a loop over XLA's matmuls), "grouped" (one kernel for all experts)
                "expert_block": 256,  # rows of one block: all of one expert
                "expert_wave": 16,  # blocks multiplied at once
                "loss_chunk": 2048,  # tokens whose logits exist at once, per device
            },
        }
    )
