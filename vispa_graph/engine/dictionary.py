"""Sparse dictionaries of a model's states, one a block: top-k sparse autoencoders (Gao et al. 2024), small ones learned here or any loaded.

On disk a dictionary is a folder as EleutherAI's sparsify writes it, so that those published in that form can be used: for every block
`layers.N/sae.safetensors` with `encoder.weight` [m, d], `encoder.bias` [m], `W_dec` [m, d] and `b_dec` [d], beside a `cfg.json` that
holds `k`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vispa_graph.engine.contract import Floats
from vispa_graph.engine.strides import stride
from vispa_graph.errors import StoreError
from vispa_graph.storage import atomic_folder

Array = npt.NDArray[Any]

FEATURES, ACTIVE = 256, 16
_STEPS, _BATCH, _RATE = 400, 256, 3e-3
# What learning depends on, beside the states: part of the key of whatever rests on a learned dictionary.
RECIPE = {"features": FEATURES, "active": ACTIVE, "steps": _STEPS, "batch": _BATCH, "rate": _RATE}
_TENSORS, _CONFIG = "sae.safetensors", "cfg.json"


@dataclass(frozen=True, eq=False)
class Features:
    """The dictionary of one block. m features, d the model's width.

    Attributes:
        encoder: [m, d].
        encoder_bias: [m].
        decoder: [m, d], one direction a feature.
        centre: [d], subtracted before encoding.
        active: How many features a state may have.
    """

    encoder: Floats
    encoder_bias: Floats
    decoder: Floats
    centre: Floats
    active: int

    def encode(self, states: Array) -> Array:
        """States [n, d] to features [n, m]: the `active` largest, where above 0."""
        found: Array = np.maximum((states - self.centre) @ self.encoder.T + self.encoder_bias, 0)
        if self.active < found.shape[1]:
            least = np.partition(found, -self.active, axis=1)[:, -self.active, None]
            found[found < least] = 0
        return found

    def unexplained(self, states: Array) -> float:
        """The share of the variance of states [n, d] that the dictionary does not reconstruct."""
        rest = states - self.centre - self.encode(states) @ self.decoder
        return float((rest**2).sum() / ((states - states.mean(0)) ** 2).sum())


class SparseDictionary:
    """The dictionaries of some blocks."""

    def __init__(self, layers: Mapping[int, Features]) -> None:
        self.layers = dict(layers)

    def encode(self, layer: int, states: Array) -> Array:
        """States [n, d] of a block to features [n, m].

        Raises:
            StoreError: The dictionary is for states of another width.
        """
        width = self.layers[layer].centre.shape[0]
        if states.shape[1] != width:
            raise StoreError(
                f"The dictionary of block {layer} is for states of width {width}, but this model's have {states.shape[1]}. "
                "Give one made for this model."
            )
        return self.layers[layer].encode(states)

    def decode(self, layer: int, features: Array) -> Array:
        """A difference of features [m] to one of states [d]."""
        decoded: Array = features @ self.layers[layer].decoder
        return decoded

    @property
    def fingerprint(self) -> str:
        """SHA-256 over a strided sample of about 4096 numbers of every matrix."""
        digest = hashlib.sha256()
        for layer, found in sorted(self.layers.items()):
            digest.update(f"{layer} {found.active} {found.encoder.shape}".encode())
            for matrix in (found.encoder, found.encoder_bias, found.decoder, found.centre):
                digest.update(np.ascontiguousarray(matrix.reshape(-1)[:: stride(matrix.shape, 4096)]).tobytes())
        return digest.hexdigest()


def learn_features(states: Floats, *, features: int = FEATURES, active: int = ACTIVE, seed: int = 0) -> Features:
    """Learn a dictionary for the states of one block; the same states and seed give the same dictionary.

    Args:
        states: [n, d]; no more features than states are learned.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    data = torch.from_numpy(np.ascontiguousarray(states, dtype=np.float32))
    centre = data.mean(0)
    data = data - centre
    scale = data.square().mean().sqrt().clamp(min=1e-12)
    data = data / scale
    features, active = min(features, len(data)), min(active, features, len(data))
    # Begun at states of their own, features are seldom dead.
    begin = torch.nn.functional.normalize(data[torch.randperm(len(data), generator=generator)[:features]] + 1e-6, dim=1)
    with torch.enable_grad():
        encoder, decoder = begin.clone().requires_grad_(), begin.clone().requires_grad_()
        bias = torch.zeros(features, requires_grad=True)
        optimiser = torch.optim.Adam([encoder, decoder, bias], lr=_RATE)
        schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, total_iters=_STEPS)
        for _ in range(_STEPS):
            batch = data[torch.randint(len(data), (min(_BATCH, len(data)),), generator=generator)]
            top = torch.relu(batch @ encoder.T + bias).topk(active, dim=1)
            sparse = torch.zeros(len(batch), features).scatter(1, top.indices, top.values)
            loss = (batch - sparse @ decoder).square().sum(1).mean()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            with torch.no_grad():  # otherwise features shrink while directions grow
                decoder.copy_(torch.nn.functional.normalize(decoder, dim=1))
    return Features(
        encoder.detach().numpy(),
        (bias.detach() * scale).numpy(),
        decoder.detach().numpy(),
        centre.numpy(),
        active,
    )


def open_dictionary(folder: Path, layers: Sequence[int]) -> SparseDictionary:
    """Read the dictionaries of some blocks, memory-mapped.

    Raises:
        StoreError: One is missing, cannot be read, or is of another kind than top-k.
    """
    return SparseDictionary({layer: _read(folder / f"layers.{layer}") for layer in layers})


def learn_dictionary(
    folder: Path, layers: Sequence[int], read: Callable[[Sequence[int]], Floats], progress: Callable[[int, int], None] | None = None
) -> SparseDictionary:
    """The dictionaries of some blocks from a folder; those that are not there are learned and kept, each as soon as it is learned.

    Args:
        read: Gives the states [n, L, d] at some blocks; called for those that are missing, if any are.
        progress: Called with (done, total) blocks.
    """
    missing = [layer for layer in layers if not (folder / f"layers.{layer}").is_dir()]
    if missing:  # a folder that cannot be written to is found out before anything is read for it
        folder.mkdir(parents=True, exist_ok=True)
    states = read(missing) if missing else None
    for place, layer in enumerate(missing):
        if states is not None:
            _write(folder / f"layers.{layer}", learn_features(states[:, place], seed=layer))
        if progress:
            progress(place + 1, len(missing))
    return open_dictionary(folder, layers)


def _read(folder: Path) -> Features:
    from safetensors import SafetensorError, safe_open

    remedy = "Give a folder with a top-k dictionary for every steered block, or remove it if it lies in the cache."
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        unusual = [name for name in ("transcode", "skip_connection") if config.get(name)]
        if config.get("activation", "topk") != "topk" or unusual:
            raise StoreError(f"The dictionary in {folder} is not a plain top-k autoencoder. {remedy}")
        with safe_open(folder / _TENSORS, framework="pt") as file:
            encoder, bias, decoder, centre = (file.get_tensor(name).float().numpy() for name in ("encoder.weight", "encoder.bias", "W_dec", "b_dec"))
        found = Features(encoder, bias, decoder, centre, int(config["k"]))
    except (OSError, KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
        raise StoreError(f"The dictionary in {folder} cannot be read ({type(error).__name__}). {remedy}") from error
    size, wide = found.encoder.shape if found.encoder.ndim == 2 else (0, 0)
    shapes = (found.decoder.shape, found.encoder_bias.shape, found.centre.shape)
    if shapes != ((size, wide), (size,), (wide,)) or not 1 <= found.active <= size:
        raise StoreError(f"The dictionary in {folder} has shapes that do not fit together. {remedy}")
    if not all(np.isfinite(matrix).all() for matrix in (found.encoder, found.encoder_bias, found.decoder, found.centre)):
        raise StoreError(f"The dictionary in {folder} holds numbers that are not finite. {remedy}")
    return found


def _write(folder: Path, features: Features) -> None:
    from safetensors.numpy import save

    tensors = {
        "encoder.weight": features.encoder,
        "encoder.bias": features.encoder_bias,
        "W_dec": features.decoder,
        "b_dec": features.centre,
    }
    size, width = features.encoder.shape
    with atomic_folder(folder) as temporary:
        (temporary / _TENSORS).write_bytes(save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}))
        config = {"activation": "topk", "k": features.active, "num_latents": size, "d_in": width}
        (temporary / _CONFIG).write_text(json.dumps(config), encoding="utf-8")
