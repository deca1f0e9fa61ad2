"""One frozen settings object, validated once. An explicit argument beats a `VISPA_*` variable, which beats the default.

No other module reads the environment.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from vispa_graph.engine.contract import Contrast, Method, Positions, Reading, Solver
from vispa_graph.errors import SettingsError

EMBEDDED = "embedded"
_PREFIX = "VISPA_"
# Variables of ours that are no settings.
_OTHERS = ("mcp_token",)
Distribution = Literal["comments", "direct", "decoding"]


_BLOCKS = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")
_FRACTIONS = re.compile(r"([01]?\.\d+|[01])(?:-([01]?\.\d+|[01]))?")


def parse_layers(text: str) -> tuple[int, ...] | tuple[float, ...]:
    """Block numbers and ascending ranges joined by commas (2,3,4 or 10-25), or one range of fractions of the depth (0.3-0.8).

    Raises:
        ValueError: It is neither.
    """
    if "." in text and (found := _FRACTIONS.fullmatch(text.strip())):
        return float(found[1]), float(found[2] or found[1])
    numbers: list[int] = []
    for part in text.split(","):
        found = _BLOCKS.fullmatch(part.strip())
        if not found or (found[2] and int(found[2]) < int(found[1])):
            raise ValueError("layers are numbers from 0 and ascending ranges joined by commas, such as 10-25 or 3,4,5, or fractions such as 0.3-0.8")
        numbers += range(int(found[1]), int(found[2] or found[1]) + 1)
    return tuple(numbers)


def origin(name: str, value: Any) -> str:
    """In brackets, the variable of the environment that holds a setting's value, as text; nothing where none does: then it was given."""
    variable = f"{_PREFIX}{name.upper()}"
    return f" (from {variable})" if value is not None and value == os.environ.get(variable) else ""


def cache_origin(cache: Path) -> str:
    """In brackets, what made a cache folder the one to use; nothing where it was given."""
    variable = f"{_PREFIX}CACHE"
    if (named := os.environ.get(variable)) and Path(named) == cache:
        return f" (from {variable})"
    if cache == _default_cache():
        return " (from XDG_CACHE_HOME)" if os.environ.get("XDG_CACHE_HOME") else " (the default)"
    return ""


def misspelt_variables() -> dict[str, str]:
    """Variables of the environment whose names are nearly those of ours, with the nearest. Others are left alone: programs share prefixes."""
    known = [name.upper() for name in (*Settings.model_fields, *_OTHERS)]
    found = {}
    for variable, value in sorted(os.environ.items()):
        name = variable.upper().removeprefix(_PREFIX)
        if value and variable.upper().startswith(_PREFIX) and name not in known and (near := difflib.get_close_matches(name, known, n=1)):
            found[variable] = f"{_PREFIX}{near[0]}"
    return found


def _in_words(problem: str) -> str:
    """A message of pydantic without its own vocabulary."""
    return problem.removeprefix("Value error, ").replace("Input should", "it should").partition(", unable to parse")[0]


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vispa_graph"


def end_tracing_with_the_process() -> None:
    """Have LangSmith's client send from daemon threads, so that this process does not wait for an endpoint that does not answer."""
    os.environ.setdefault("LANGSMITH_USE_DAEMON", "true")


class Settings(BaseSettings):
    """Everything that can be chosen about a run.

    Settings that are None take the model's own default: the embedded model comes with a profile of what measured best for it;
    for every other model the defaults are the paper's.

    Raises:
        SettingsError: A setting is unknown, malformed or out of range.
    """

    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True, extra="forbid", env_ignore_empty=True)

    model: str = Field(EMBEDDED, min_length=1, description='The model to steer: "embedded", a folder, or a name on the Hugging Face hub.')
    revision: str | None = Field(None, description="Branch, tag or commit of a model from the hub.")
    device: str = Field("cpu", description='Where the model runs, such as "cpu", "cuda" or "mps".')
    device_map: str | None = Field(None, description='Spread the model over devices, such as "auto"; overrides device. Needs accelerate.')
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Precision of the model. Magnitudes are always solved in float32."
    )
    trust_remote_code: bool = Field(False, description="Whether a model from the hub may run code of its own on this machine.")

    method: Method | None = Field(None, description="How directions are found: probe, mean_difference, pca or sae.")
    contrast: Contrast | None = Field(None, description="What positive twins are set against when fitting.")
    reading: Reading | None = Field(None, description="How contrastive sentences are read when fitting.")
    regularisation: float | None = Field(None, gt=0, description="C of the logistic regression; 1 in the paper.")
    solver: Solver = Field("exact", description="How probes are solved: to convergence, or by saga on 70% of the pairs, as in the paper.")
    dictionary: Path | None = Field(None, description="Folder of a sparse dictionary for the method sae; without one it is learned.")
    layers: Annotated[tuple[int, ...] | tuple[float, ...] | None, NoDecode] = Field(
        None,
        description="Zero-based decoder blocks to steer, such as 2,3,4 or 10-25; or the first and last as fractions of the depth, such as 0.3-0.8. "
        "In the paper 10 to 25 of 32, the same fractions elsewhere.",
    )
    strength: float = Field(
        1.0, ge=-100, le=100, description="Multiple of the method's own magnitude; 0 does not steer, below 0 values are suppressed."
    )
    positions: Positions = Field(
        "all", description="Which positions are steered: all, as in the paper, or generated ones only, over one shared reading of the prompt."
    )
    target_probability: float | None = Field(None, gt=0, lt=1, description="P0 of the probe calibration; 0.9 in the paper.")
    fit_attributes: bool | None = Field(
        None, description="Whether an attribute outside the taxonomy gets a direction of its own, fitted on the spot; in the paper it does not."
    )

    reranker: str = Field(
        "default",
        pattern=r"^(default|llm|nli:.*\S|cross-encoder:.*\S)$",
        description='What judges the values at stake: "default", "nli:<model>", "cross-encoder:<model>", or "llm", the main language model.',
    )
    top_k: int = Field(6, ge=1, description="How many values are heard at most.")
    min_score: float = Field(
        0.1, ge=0, le=1, description="Values that score lower are not heard; with the default reranker a probability. 0 hears top_k in any case."
    )
    diversity: float = Field(
        0.0, ge=0, le=1, description="How much likeness to values chosen before counts against the score (MMR), in the Overton mode; 0 not at all."
    )
    max_new_tokens: int | None = Field(None, ge=1, le=32768, description="Longest comment in tokens; 200 in the paper.")
    temperature: float = Field(0.0, ge=0, le=10, description="0 for greedy decoding.")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Seed of the sampling, where temperature is above 0.")
    distribution: Distribution = Field(
        "comments", description="What a distribution is read after: comments, as in the paper, or the steered prompt itself, direct or decoding."
    )
    option_orders: int = Field(1, ge=1, le=26, description="In how many orders the options are shown and averaged over, against position bias.")
    aggregation: Literal["auto", "compose", "generate"] = Field(
        "auto", description="Whether answers are composed of the comments' own sentences or generated by the main language model."
    )

    trace_content: bool = Field(False, description="Whether traces and error reports may hold questions, comments and answers.")
    values: Annotated[tuple[Path, ...], NoDecode] = Field((), description="Folders of your own value files.")
    shipped_values: bool = Field(True, description="Whether the 31 values of vispa_graph are part of the taxonomy.")
    bioethics: bool = Field(False, description="Whether the ten values of the bioethics family are part of the taxonomy, for health care.")
    encoder: str = Field(EMBEDDED, min_length=1, description='The sentence encoder: "embedded" (all-MiniLM-L6-v2), a folder, or a name on the hub.')
    cache: Path = Field(default_factory=_default_cache, description="Folder for indexes and directions.")
    linger_ms: float = Field(
        15.0,
        ge=0,
        le=1000,
        description="How long a request waits for others to share its batch, in ms; up to four times as long while more of its kind keep coming.",
    )
    batch_tokens: int = Field(32768, ge=64, description="Largest batch, rows x width in tokens.")
    packed_gigabytes: float = Field(
        2.0,
        ge=0,
        allow_inf_nan=False,
        description="Most memory for packed copies of the model's weights, which make small batches faster on a processor; 0 for none.",
    )
    queue_size: int = Field(1024, ge=1, description="Most requests that wait for the engine; more are refused as busy.")
    timeout: float | None = Field(None, gt=0, description="Seconds after which a request to the engine fails; none unless given.")

    @field_validator("model", mode="before")
    @classmethod
    def _model(cls, value: Any) -> Any:
        """A folder may be given as a path."""
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @field_validator("values", mode="before")
    @classmethod
    def _folders(cls, value: Any) -> Any:
        """The text of a variable is a JSON list, or folders joined as in PATH."""
        if not isinstance(value, str):
            return value
        return json.loads(value) if value.startswith("[") else [folder for folder in value.split(os.pathsep) if folder]

    @field_validator("layers", mode="before")
    @classmethod
    def _layers(cls, value: Any) -> Any:
        """The text of a variable is a JSON list, or numbers and ranges."""
        if not isinstance(value, str):
            return value
        return json.loads(value) if value.startswith("[") else parse_layers(value)

    @model_validator(mode="wrap")
    @classmethod
    def _readable_errors(cls, data: Any, handler: Callable[[Any], Settings]) -> Settings:
        try:
            return handler(data)
        except ValidationError as error:
            problems = []
            for problem in error.errors():
                name = ".".join(str(part) for part in problem["loc"][:1]) or "settings"
                field = cls.model_fields.get(name)
                meaning = f" ({field.description})" if field else f" Known settings: {', '.join(cls.model_fields)}."
                problems.append(f"{name}{origin(name, data.get(name))}: {_in_words(problem['msg'])}.{meaning}")
            raise SettingsError("The settings cannot be used. " + " ".join(problems)) from None
