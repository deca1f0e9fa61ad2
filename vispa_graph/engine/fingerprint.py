"""What tells a model from all others, so that nothing fitted on one is used on another."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vispa_graph.engine.strides import stride

# Case, accents, digits, blanks, line breaks and punctuation: what tokenizers treat differently.
_PROBE = "My father, 84, said: “No\u00a0— Café Zürich, ÅNGSTRÖM!”\n\n  I'd\tpay 1,234.50 € (don’t)…  ﬁne 東京 🙂 "
# Entries of a configuration that change no state; nor do those that its library writes about itself.
_INDECISIVE = frozenset(
    {"architectures", "auto_map", "id2label", "label2id", "initializer_range", "output_attentions", "output_hidden_states"}
    | {"output_router_logits", "return_dict", "use_cache"}
)


def fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256, 64 hex digits, over all that decides a state read from a text.

    That is the configuration as far as it differs from its class's defaults; names, shapes and a strided sample of about 1024 numbers of
    every parameter and saved buffer; what other buffers hold (the frequencies of rotary positions); the dtype; the tokenizer's
    vocabulary, how it cuts a text, and its chat template. The same for a model in memory and reloaded, and for any version of its library
    that keeps these.
    """
    digest = hashlib.sha256()
    saved = model.state_dict(keep_vars=True).keys()
    derived = set()
    for name, buffer in model.named_buffers():
        if name in saved:
            digest.update(f"{name}{tuple(buffer.shape)}".encode() + _sample(buffer.float()))
        elif buffer.is_floating_point():
            # Computed when the model is made: the last bits differ between devices, names and copies between versions of the library.
            derived.add(_sample(buffer.bfloat16().float()))
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + _sample(parameter.detach()))
    for values in sorted(derived):
        digest.update(values)
    # How it cuts a text and not how it is written down, which differs between versions of its library.
    cut = tokenizer(_PROBE, verbose=False)["input_ids"]
    config = model.config
    defaults = {} if getattr(config, "has_no_defaults_at_construction", False) else type(config)().to_dict()
    identity = [config.model_type, _decisive(config.to_dict(), defaults), str(model.dtype), tokenizer.get_vocab(), cut, tokenizer.chat_template]
    digest.update(json.dumps(identity, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _sample(values: torch.Tensor) -> bytes:
    """About 1024 of the numbers."""
    return values.reshape(-1)[:: stride(values.shape, 1024)].float().cpu().numpy().tobytes()


def _decisive(configuration: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A configuration without its defaults, to which versions of its library add, and without what decides no state."""
    kept = {
        name: value
        for name, value in configuration.items()
        if value != defaults.get(name)
        and name not in _INDECISIVE
        and not name.startswith("_")
        and not name.endswith(("_token_id", "dtype", "version"))
    }
    return {name: _decisive(value, defaults.get(name) or {}) if isinstance(value, dict) else value for name, value in kept.items()}
