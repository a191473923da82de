"""`/tokenize`, `/detokenize` and `/tokenizer_info`, as vLLM has them: evaluations count tokens with these."""

from typing import Any

from deepseek_jax.serving.chat import prepare
from deepseek_jax.serving.errors import ApiError
from deepseek_jax.serving.fields import Fields, checked_ids, wrong
from deepseek_jax.serving.model import Model


def tokenize(model: Model, body: dict[str, Any]) -> dict[str, Any]:
    """Return the ids of a prompt, or of a conversation.

    Raises:
        ApiError: the body has neither, or cannot be used.
    """
    fields = Fields(body)
    if fields.get("messages") is not None:
        ids = list(prepare(model, fields).prompt)
    else:
        prompt = fields.text("prompt")
        if prompt is None:
            raise wrong("prompt", None, "write a text, or messages")
        try:
            ids = model.encode(prompt, fields.boolean("add_special_tokens", True))
        except ValueError as error:
            raise ApiError(400, str(error), param="prompt", code="invalid_value") from error
    found = {"count": len(ids), "max_model_len": model.num_positions, "tokens": ids}
    if fields.boolean("return_token_strs"):
        found["token_strs"] = [model.spell(token) for token in ids]
    return found


def detokenize(model: Model, body: dict[str, Any]) -> dict[str, Any]:
    """Return the text of ids, special tokens included.

    Raises:
        ApiError: the body has no ids, or some that no token has.
    """
    ids = checked_ids("tokens", body.get("tokens"), model.vocab_size)
    pieces, plain = [], []
    for token in ids:
        if token in model.special_texts:
            pieces += [model.tokenizer.decode(plain), model.special_texts[token]]
            plain = []
        else:
            plain.append(token)
    return {"prompt": "".join([*pieces, model.tokenizer.decode(plain)])}


def tokenizer_info(model: Model) -> dict[str, Any]:
    """Return what a client may want to know of the tokenizer."""
    tokenizer, special = model.tokenizer, model.special_texts
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special[tokenizer.bos],
        "eos_token": special[tokenizer.eos],
        "pad_token": special[tokenizer.pad],
        "vocab_size": model.vocab_size,
        "model_max_length": model.num_positions,
        "chat_template": None if model.chat is None else model.chat.template_text,
    }
