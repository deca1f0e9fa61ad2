"""The steering engine on a Hugging Face causal language model. The only module that loads and runs one."""

from __future__ import annotations

import inspect
import logging
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList

from vispa_graph.engine.batching import Batcher, Job, as_ours
from vispa_graph.engine.cache import copies_itself, expect, roomy_cache
from vispa_graph.engine.checks import check_batching, check_device, check_steerable, difference, sharing_problem, tolerance
from vispa_graph.engine.contract import Direction, Floats, Generation, GenerationRequest, Message, ScoreRequest, Scores
from vispa_graph.engine.decoding import Always, GrowingRow, GrowingRows, Sampler, Work
from vispa_graph.engine.fingerprint import fingerprint
from vispa_graph.engine.folder import find_model
from vispa_graph.engine.hooks import BatchPlan, Hooks
from vispa_graph.engine.layers import check_layers, decoder_blocks, default_layers
from vispa_graph.engine.packing import PackedWeights
from vispa_graph.engine.rows import WIDEST, Row, apart, laid_out, shared_rows, single_rows
from vispa_graph.errors import (
    ContextLengthError,
    EngineMemoryError,
    InputError,
    ModelNotFoundError,
    NonFiniteError,
    NotCausalError,
    SettingsError,
    UnsteerableModelError,
    VispaError,
)
from vispa_graph.quiet import quiet

# Contrastive sentences longer than this are cut (the paper's setting).
_READ_TOKENS = 256
# Longest entry of a vocabulary that may be a letter, with what marks a blank before it: "\u2581", "\u0120", "\u010a".
_SPELLING = 4

# Most memory for packed weights unless told otherwise.
PACKED_BYTES = 2_000_000_000

_log = logging.getLogger(__name__)


class _Kind(NamedTuple):
    """What is to be done with requests, and whether their rows share one reading of each prompt.

    Texts too long to stand beside rows with two texts are read apart from them.
    """

    task: Literal["generate", "score", "read", "read long"]
    shared: bool = False


class HuggingFaceEngine:
    """Steers one causal language model.

    The model is put into evaluation mode and gets permanent hooks; it must not be used or changed by anyone else until `close`.

    Args:
        model: Any causal language model whose decoder blocks can be found.
        tokenizer: Its tokenizer; a chat template is used where it has one.
        name: What traces and manifests call it.
        linger: Seconds that a request waits for others to share its batch; up to four times as long while more of its kind keep coming.
        capacity: Largest rows x width of a batch, in tokens, prompt and completion together.
        queue_size: Most requests that wait; more fail with an `EngineBusyError`.
        timeout: Seconds that requests without a timeout of their own have; None for no end.
        packed_bytes: Most memory for a second, packed copy of the weights, which makes small batches faster on a processor; see `PackedWeights`.

    Raises:
        UnsteerableModelError: The blocks cannot be found, adding a vector at one does not change exactly its output, or a prompt is not
            answered the same alone and in a batch.
        NotCausalError: What the model makes of a token depends on the tokens after it.
        NonFiniteError: The model's activations are not finite.
        SettingsError: Some of the model's weights are not in memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        linger: float = 0.015,
        capacity: int = 32768,
        queue_size: int = 1024,
        timeout: float | None = None,
        packed_bytes: int = PACKED_BYTES,
    ) -> None:
        if not model.can_generate():
            raise NotCausalError(f"{type(model).__name__} does not generate text: it has no language-model head. Choose a causal language model.")
        if any(parameter.is_meta for parameter in model.parameters()):
            raise SettingsError(
                f"Some weights of {type(model).__name__} are not in memory (device_map has put them off to the processor or a disk), so it cannot be "
                "steered. Give it more or larger devices, a smaller dtype, or the device cpu."
            )
        self._model = model
        model.train(False)
        self._tokenizer = tokenizer
        self._name = name
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise UnsteerableModelError(
                    "The tokenizer has neither a padding nor an end token, so prompts cannot share a batch. Give it one of them."
                )
            tokenizer.pad_token = tokenizer.eos_token
        self._blocks = decoder_blocks(model)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._capacity, self._timeout = capacity, timeout
        self._lock = threading.Lock()
        self._stops = _end_tokens(model, tokenizer)
        self._packed = PackedWeights(model, packed_bytes)
        self._hooks = Hooks(self._blocks)
        self._roomy = False
        try:
            check_steerable(model, self._blocks)
            self._roomy = self._takes_roomy_cache()
            vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
            check_batching(type(model).__name__, self._two_steps, vocabulary)
            self._sharing_problem = sharing_problem(self._two_steps, vocabulary)
            self._shares_rows = self._takes_two_in_a_row()
            self._fingerprint = fingerprint(model, tokenizer)
        except BaseException as error:
            self._release()
            if not isinstance(error, Exception) or isinstance(error, VispaError):
                raise
            raise UnsteerableModelError(f"{type(model).__name__} cannot be steered: it fails on a few tokens ({_first_line(error)}).") from error
        self._letters: dict[str, list[int]] = {}
        self._batcher: Batcher[Work] = Batcher(self._run, linger=linger, capacity=capacity, queue_size=queue_size, finish=self._release)

    @classmethod
    def load(
        cls,
        model: str,
        *,
        name: str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        device_map: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        linger: float = 0.015,
        capacity: int = 32768,
        queue_size: int = 1024,
        timeout: float | None = None,
        packed_bytes: int = PACKED_BYTES,
    ) -> HuggingFaceEngine:
        """Load a model from a folder or a hub.

        Raises:
            ModelNotFoundError: The folder does not exist, or the hub does not have the model or cannot be reached.
            NotCausalError: What is there is not a causal language model.
            SettingsError: The device is not there, or too small, or a package that the model needs is not installed.
            UnsteerableModelError, NonFiniteError: See the class.
        """
        model = find_model(model)
        if device_map is not None and find_spec("accelerate") is None:
            raise SettingsError(
                "device_map needs the package accelerate, which is not installed. Install it (pip install accelerate), or give a device."
            )
        if device_map is None:
            check_device(device)
        common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        config = _read_config(model, **common)
        with quiet():
            try:
                tokenizer = AutoTokenizer.from_pretrained(model, **common)
                common |= {"dtype": getattr(torch, dtype), "device_map": device_map, "use_safetensors": True, "output_loading_info": True}
                loaded, found = cast(Any, AutoModelForCausalLM).from_pretrained(model, config=config, **common)
                if found["missing_keys"]:  # transformers would go on with random weights in their place
                    raise NotCausalError(
                        f"{model} lacks weights of a causal language model: {min(found['missing_keys'])}. "
                        "Choose one saved with its language-model head."
                    )
            except VispaError:
                raise
            except Exception as error:  # of a library, of a quantisation, or of the model's own code
                raise _load_error(model, error) from error
        if device_map is None:
            try:
                loaded.to(torch.device(device))
            except (RuntimeError, AssertionError) as error:
                raise SettingsError(
                    f"The model cannot be put on the device {device!r} ({_first_line(error)}). Choose another, such as cpu."
                ) from error
        return cls(
            loaded,
            tokenizer,
            name=name or model,
            linger=linger,
            capacity=capacity,
            queue_size=queue_size,
            timeout=timeout,
            packed_bytes=packed_bytes,
        )

    @property
    def name(self) -> str:
        """The model's name."""
        return self._name

    @property
    def fingerprint(self) -> str:
        """See the function `fingerprint`."""
        return self._fingerprint

    @property
    def _dtype(self) -> str:
        return str(self._model.dtype).removeprefix("torch.")

    @property
    def depth(self) -> int:
        """Number of decoder blocks."""
        return len(self._blocks)

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return int(self._model.config.get_text_config(decoder=True).hidden_size)

    def describe(self) -> dict[str, Any]:
        """What the checks at loading found, as plain data. An engine that exists has passed them."""
        return {
            "model": self.name,
            "architecture": type(self._model).__name__,
            "blocks": type(self._blocks[0]).__name__,
            "depth": self.depth,
            "width": self.width,
            "default_layers": list(default_layers(self.depth)),
            "dtype": self._dtype,
            "adds_exactly": True,
            "same_alone_and_in_a_batch": True,
            "generated_positions": self._sharing_problem is None,
            "packed_megabytes": round(self._packed.bytes / 1e6, 1),
            "chat_template": self._tokenizer.chat_template is not None,
            "fingerprint": self.fingerprint,
        }

    def generate(self, request: GenerationRequest) -> Future[Generation]:
        """Queue a generation."""
        return self._submit(_Kind("generate", _shared(request)), request, request.max_new_tokens)

    def score(self, request: ScoreRequest) -> Future[Scores]:
        """Queue a scoring of option letters."""
        return self._submit(_Kind("score", _shared(request)), request, 1)

    def _submit(self, kind: _Kind, request: GenerationRequest | ScoreRequest, new_tokens: int) -> Future[Any]:
        """Queue a request; what is wrong with it fails its future."""
        job = Job(kind, 0, Work(request, []), new_tokens, self._timeout if request.timeout is None else request.timeout)
        try:
            self._check(request)
            job.payload = self._prepare(request, request.messages, new_tokens)
        except VispaError as error:
            job.fail(error)
            return job.future
        except Exception as error:
            # The text of the error may quote the conversation: it stays in the cause.
            ours = InputError(f"The conversation cannot be put into a prompt ({type(error).__name__}). Give turns with a role and a text.")
            ours.__cause__ = error
            job.fail(ours)
            return job.future
        job.prompt = len(job.payload.tokens)
        return self._batcher.submit(job)

    def read(self, conversations: Sequence[str | Sequence[Message]], progress: Callable[[int], None] | None = None) -> Floats:
        """The states at the last token of each text, [texts, depth, width]; batched by length.

        Raises:
            InputError: A text is empty.
        """
        tokens = [self._raw_tokens(c) if isinstance(c, str) else self._chat_tokens(c) for c in conversations]
        if not all(tokens):
            raise InputError("A text without tokens has no last token to read. Leave out empty texts.")
        states = np.empty((len(tokens), self.depth, self.width), dtype=np.float32)
        laid = sorted(shared_rows(tokens, self._widest()) if self._shares_rows else single_rows(tokens), key=lambda row: len(row.tokens))
        # Few rows at a time, so that other requests do not wait long.
        rows = max(1, min(64, self._capacity // 8 // max((len(row.tokens) for row in laid), default=1)))
        for start in range(0, len(laid), rows):
            chunk = laid[start : start + rows]
            jobs = [Job[Work](self._read_kind(row), len(row.tokens), Work(None, row.tokens, row=row), bounded=False) for row in chunk]
            futures = [self._batcher.submit(job) for job in jobs]
            for row, future in zip(chunk, futures, strict=True):
                states[list(row.texts)] = future.result()
            if progress:
                progress(sum(len(row.texts) for row in chunk))
        return states

    def close(self) -> None:
        """Finish what is running, refuse the rest, leave the model as it was."""
        self._batcher.close()

    def _release(self) -> None:
        self._hooks.remove()
        self._packed.remove()

    # Prompts

    def _check(self, request: GenerationRequest | ScoreRequest) -> None:
        """Refuse what would fail in the batch, where it would take its neighbours along."""
        if isinstance(request, GenerationRequest):
            if request.max_new_tokens < 1:
                raise InputError(f"max_new_tokens is {request.max_new_tokens}: ask for at least 1.")
            if not 0 <= request.temperature < math.inf:
                raise InputError(f"The temperature {request.temperature} is not a number from 0.")
            if not 0 <= request.seed < 2**63:
                raise InputError(f"The seed {request.seed} is not a number from 0 to 2**63 - 1.")
        elif not 1 <= len(request.letters) <= 26:
            raise InputError(f"{len(request.letters)} option letters cannot be scored. Give 1 to 26.")
        elif len(set(request.letters)) < len(request.letters):
            raise InputError("An option letter stands for two options. Give each its own.")
        else:
            for letter in request.letters:
                self._spellings(letter)
        for part in request.steering.parts if request.steering else ():
            if not math.isfinite(part.strength) or not 0 < part.target_probability < 1:
                raise InputError("A strength must be a finite number, and a target probability lie between 0 and 1.")
            self._check_direction(part.direction)
        if request.steering and request.steering.positions == "generated" and self._sharing_problem:
            raise UnsteerableModelError(
                f"{type(self._model).__name__} cannot be steered at generated positions only: {self._sharing_problem}. Steer all positions."
            )

    def _prepare(self, request: GenerationRequest | ScoreRequest, messages: Sequence[Message], new_tokens: int) -> Work:
        tokens = self._chat_tokens(messages)
        if not tokens:
            raise InputError("The prompt has no tokens for this tokenizer. Write a question that it has words for.")
        room = self._context() - new_tokens
        if len(tokens) <= room:
            return Work(request, tokens)
        if room < 32:
            raise ContextLengthError(
                f"The model's context of {self._context()} tokens has no room for a prompt beside {new_tokens} new tokens. Ask for fewer new tokens."
            )
        # Beginning and end of a prompt carry the instructions and the header; what gives way is the middle.
        head = room // 2
        return Work(request, tokens[:head] + tokens[len(tokens) - (room - head) :], cut=len(tokens) - room)

    def _check_direction(self, direction: Direction) -> None:
        check_layers(direction.layers, self.depth)
        if direction.vectors.shape != (len(direction.layers), self.width):
            raise UnsteerableModelError(
                f"The direction of {direction.value!r} has the shape {direction.vectors.shape}, but this model needs "
                f"{(len(direction.layers), self.width)}: it was fitted on another model. Fit it on this one."
            )
        if not all(np.isfinite(numbers).all() for numbers in (direction.vectors, direction.bias, direction.alpha)):
            raise NonFiniteError(f"The direction of {direction.value!r} holds numbers that are not finite. Fit it again.")

    def _context(self) -> int:
        config = self._model.config.get_text_config(decoder=True)
        # MPT has a name of its own for it.
        limits = [getattr(config, "max_position_embeddings", None), getattr(config, "max_seq_len", None), self._tokenizer.model_max_length]
        return min([int(limit) for limit in limits if limit] or [1 << 30])

    def _raw_tokens(self, text: str) -> list[int]:
        limit = min(_READ_TOKENS, self._context())
        tokens = self._tokenize(text, truncation=True, max_length=limit)
        bos = self._tokenizer.bos_token_id
        return tokens if bos is None or tokens[:1] == [bos] or self._tokenizer.chat_template is None else [bos, *tokens][:limit]

    def _chat_tokens(self, messages: Sequence[Message]) -> list[int]:
        if self._tokenizer.chat_template is None:
            text = "\n\n".join(self._as_data(message["content"]) for message in messages) + "\n\n"
            return self._tokenize(text)
        turns = [{"role": str(m["role"]), "content": self._as_data(m["content"])} for m in messages]
        # A model that would think aloud first (Qwen3, SmolLM3) is told not to: neither a comment nor an option letter comes first otherwise.
        # Templates that do not know the switch ignore it.
        text = cast(str, self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False))
        return self._tokenize(text, add_special_tokens=False)

    def _as_data(self, text: str) -> str:
        """The text with the tokenizer's special tokens broken by an invisible space, so that no text can end its own turn."""
        special = {t.content for t in self._tokenizer.added_tokens_decoder.values() if t.special} | set(self._tokenizer.all_special_tokens)
        for token in sorted((t for t in special if len(t) > 1), key=len, reverse=True):
            text = text.replace(token, f"{token[0]}\N{ZERO WIDTH SPACE}{token[1:]}")
        return text

    def _tokenize(self, text: str, **options: Any) -> list[int]:
        """Token ids. One thread at a time: truncation is a state of the tokenizer, and would cut another thread's prompt too."""
        with self._lock:
            return cast("list[int]", self._tokenizer(text, verbose=False, **options)["input_ids"])  # no warning of what is cut here

    # Batches, in the worker thread

    def _run(self, jobs: Sequence[Job[Work]]) -> None:
        with torch.inference_mode():
            for group in self._fitting(jobs):
                self._run_group(group)

    def _run_group(self, jobs: Sequence[Job[Work]]) -> None:
        """Run jobs in one batch; where it fails, in smaller ones, so that no request's failure becomes its neighbours'."""
        jobs = [job for job in jobs if not job.dropped()]  # earlier batches of its own took their time
        if not jobs:
            return
        run = {"generate": self._run_generate, "score": self._run_score, "read": self._run_read, "read long": self._run_read}[
            cast(_Kind, jobs[0].kind).task
        ]
        try:
            run(jobs)
            return
        except Exception as error:
            left = [job for job in jobs if not job.dropped()]
            if not left:
                return
            memory = _out_of_memory(error)
            if len(jobs) == 1:
                for job in left:
                    job.fail(_memory_error(job) if memory else as_ours(error))
                return
        # Only here, with the error and the frames it holds gone, is the batch's memory free.
        size = 1
        if memory:
            size = (len(left) + 1) // 2
            _log.warning("A batch of %d rows did not fit into memory; its %d open requests run in batches of %d.", len(jobs), len(left), size)
            for job in left:
                job.halved += 1
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        for start in range(0, len(left), size):
            self._run_group(left[start : start + size])

    def _fitting(self, jobs: Sequence[Job[Work]]) -> list[list[Job[Work]]]:
        """The jobs in groups whose longest prompt and longest answer fit the context together: a row that is done goes on counting positions."""
        groups: list[list[Job[Work]]] = []
        for job in jobs:
            for group in groups:
                together = [*group, job]
                if max(j.prompt for j in together) + max(j.new for j in together) <= self._context():
                    group.append(job)
                    break
            else:
                groups.append([job])
        return groups

    def _run_generate(self, jobs: Sequence[Job[Work]]) -> None:
        requests = [cast(GenerationRequest, job.payload.request) for job in jobs]
        plan = BatchPlan([request.steering for request in requests], self._model.device)
        rows = [GrowingRow(self._tokenizer, job, request, self._stops) for job, request in zip(jobs, requests, strict=True)]
        width = max(len(job.payload.tokens) for job in jobs)

        def finished(row: GrowingRow) -> None:
            job, request = row.job, row.request
            job.finish(
                Generation(
                    text=row.text,
                    prompt_tokens=len(job.payload.tokens),
                    completion_tokens=len(row.tokens),
                    finish="stop" if row.stopped else "length",
                    steering=plan.report(rows.index(row)) if request.steering else None,
                    cut_tokens=job.payload.cut,
                    batch_rows=len(jobs),
                    batch_width=width,
                    dtype=self._dtype,
                    halved=job.halved,
                    first_token_seconds=job.payload.first,
                )
            )

        self._forward(
            jobs,
            plan,
            max_new_tokens=max(request.max_new_tokens for request in requests),
            logits_processor=LogitsProcessorList([Sampler(requests, self._model.device)]),
            stopping_criteria=StoppingCriteriaList([GrowingRows(rows, finished, self._batcher.sweep)]),
        )

    def _run_score(self, jobs: Sequence[Job[Work]]) -> None:
        requests = [cast(ScoreRequest, job.payload.request) for job in jobs]
        plan = BatchPlan([request.steering for request in requests], self._model.device)
        output = self._forward(jobs, plan, max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
        logits = output.logits[0].float().cpu()  # [rows, vocabulary]
        if torch.isnan(logits).any():
            raise NonFiniteError("The model's logits are not finite. Try dtype float32 or bfloat16, or a smaller strength.")
        for row, (job, request) in enumerate(zip(jobs, requests, strict=True)):
            probabilities = logits[row].double().softmax(-1)
            spellings = [self._spellings(letter) for letter in request.letters]
            letters = torch.stack([probabilities[ids].sum() for ids in spellings])
            mass = float(letters.sum())
            if not mass > 0:
                job.fail(
                    NonFiniteError("The model gives none of the option letters any probability. Ask it with fewer options or choose another model.")
                )
                continue
            scores = Scores(tuple(float(p) for p in letters / mass), mass, job.payload.cut, prompt_tokens=len(job.payload.tokens), halved=job.halved)
            if request.full:
                scores = replace(scores, logits=logits[row].numpy().copy(), spellings=tuple(map(tuple, spellings)))
            job.finish(scores)

    def _run_read(self, jobs: Sequence[Job[Work]]) -> None:
        rows = [cast(Row, job.payload.row) for job in jobs]
        states = self._states(rows)
        if not torch.isfinite(states).all():
            raise NonFiniteError("The model's activations are not finite. Try dtype float32 or bfloat16.")
        of_text = iter(states.numpy())
        for job, row in zip(jobs, rows, strict=True):
            job.finish(np.stack([next(of_text) for _ in row.texts]))

    def _states(self, rows: Sequence[Row]) -> torch.Tensor:
        """The states at the last token of each text of each row, [texts, depth, width]."""
        ids, real = laid_out(rows, self._tokenizer.pad_token_id)
        options: dict[str, Any] = {"attention_mask": real, "use_cache": False}
        if any(len(row.texts) > 1 for row in rows):
            options["attention_mask"], options["position_ids"] = apart(rows, ids.shape[1], self._model.dtype)
        options = {name: option.to(self._model.device) if isinstance(option, torch.Tensor) else option for name, option in options.items()}
        if self._keeps_logits:
            options["logits_to_keep"] = 1
        of_row = torch.tensor([number for number, row in enumerate(rows) for _ in row.texts])
        ends = torch.tensor([end for row in rows for end in row.ends])
        with self._hooks.recording(of_row, ends) as states:
            self._model(input_ids=ids.to(self._model.device), **options)
        return torch.stack(states, dim=1)

    def _widest(self) -> int:
        return min(WIDEST, self._context())

    def _read_kind(self, row: Row) -> _Kind:
        return _Kind("read" if len(row.tokens) <= self._widest() else "read long")

    def _takes_two_in_a_row(self) -> bool:
        """Whether two texts in one row give the states that they give apart; not in a model with a mask, positions or a memory of its own."""
        if "position_ids" not in inspect.signature(self._model.forward).parameters:
            return False
        # As wide as a row can be: if it does not, the second's positions are far off, it sees much that it must not, and windows end before it.
        texts = [[1] * 4 + [2, 3] * (self._widest() // 2 - 3), [1] * 4 + [3, 2]]
        with torch.inference_mode():
            alone = self._states(single_rows(texts))
            try:
                together = self._states(shared_rows(texts))
            except Exception as error:  # each architecture refuses in its own way
                _log.debug("%s reads no two texts in one row (%s).", type(self._model).__name__, _first_line(error))
                return False
        return difference(together, alone) <= tolerance(self._model.dtype)

    def _forward(self, jobs: Sequence[Job[Work]], plan: BatchPlan, **options: Any) -> Any:
        """Generate with a plan; for jobs that share prompts, over caches of all but their last token, read once and unsteered."""
        prompts = [job.payload.tokens for job in jobs]
        cache = self._prompt_cache(prompts) if cast(_Kind, jobs[0].kind).shared else None
        with self._hooks.steering(plan):
            return self._decode(*self._padded(prompts), past_key_values=cache, **options)

    def _two_steps(self, prompts: Sequence[Sequence[int]], shared: bool) -> torch.Tensor:
        """Logits [rows, 2, vocabulary] of the first two steps after each prompt, the token between them always the same."""
        with torch.inference_mode():
            cache = self._prompt_cache(prompts) if shared else None
            always = LogitsProcessorList([Always(1)])
            options: dict[str, Any] = {"max_new_tokens": 2, "return_dict_in_generate": True, "output_logits": True}
            output = self._decode(*self._padded(prompts), past_key_values=cache, logits_processor=always, stops=False, **options)
            # `generate` returns float32 whatever it computed in; how far rounding goes, the checks tell by the precision.
            return torch.stack(output.logits, dim=1).to(self._model.dtype)

    def _takes_roomy_cache(self) -> bool:
        """Whether `generate` gives this model a cache that copies itself at every token, and a roomy one gives the same logits."""
        options: dict[str, Any] = {"max_new_tokens": 2, "stops": False, "return_dict_in_generate": True, "output_logits": True}
        options["logits_processor"] = LogitsProcessorList([Always(1)])
        prompts = self._padded([[1, 1], [1, 1]])
        with torch.inference_mode():
            own = self._decode(*prompts, **options)
            if not copies_itself(getattr(own, "past_key_values", None), self._model.config):
                return False
            try:
                roomy = self._decode(*prompts, past_key_values=roomy_cache(self._model.config), **options)
            except Exception as error:  # of a model whose own code needs its keys side by side in memory
                _log.debug("%s takes no roomy cache (%s).", type(self._model).__name__, _first_line(error))
                return False
        one, other = (torch.stack(output.logits) for output in (roomy, own))
        return difference(one, other) <= tolerance(self._model.dtype)

    def _prompt_cache(self, prompts: Sequence[Sequence[int]]) -> Any:
        """The keys and values of each prompt without its last token, one row each; equal prompts are read once. None where that is nothing."""
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        ids, mask = self._padded(list(distinct))
        if ids.shape[1] < 2:
            return None
        cache = self._decode(ids[:, :-1], mask[:, :-1], max_new_tokens=1, return_dict_in_generate=True).past_key_values
        cache.batch_select_indices(torch.tensor([distinct[tuple(prompt)] for prompt in prompts]))
        return cache

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts as ids and mask [rows, width], padded left."""
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self._tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        return ids.to(self._model.device), mask.to(self._model.device)

    def _decode(self, ids: torch.Tensor, mask: torch.Tensor, *, max_new_tokens: int, stops: bool = True, **options: Any) -> Any:
        """Run Hugging Face's own `generate`, greedily and without the model's own generation settings."""
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            eos_token_id=self._stops if stops else None,
            pad_token_id=self._tokenizer.pad_token_id,
            return_dict_in_generate=options.pop("return_dict_in_generate", False),
            output_logits=options.pop("output_logits", False),
        )
        # `generate` would fill what is unset from the model's own settings (sampling, penalties): they must not decide here.
        own, self._model.generation_config = self._model.generation_config, GenerationConfig()  # type: ignore[no-untyped-call]
        given = {name: option for name, option in options.items() if option is not None}
        if self._roomy:
            if "past_key_values" not in given:
                given["past_key_values"] = roomy_cache(self._model.config)
            expect(given["past_key_values"], ids.shape[1] + max_new_tokens - 1)  # the last token that is chosen is never read
        try:
            return cast(Any, self._model).generate(input_ids=ids, attention_mask=mask, generation_config=settings, **given)
        finally:
            self._model.generation_config = own

    def _spellings(self, letter: str) -> list[int]:
        """Ids of all tokens of the vocabulary that read as the letter, with or without blanks around it."""
        if letter not in self._letters:
            byte = "".join(f"<0x{number:02X}>" for number in letter.encode())  # how vocabularies with a fallback to bytes name it
            vocabulary = self._tokenizer.get_vocab().items()
            likely = [number for text, number in vocabulary if text == byte or (letter in text and len(text) <= _SPELLING)]
            found = sorted(number for number in likely if str(self._tokenizer.decode([number])).strip() == letter)
            if not found:
                raise UnsteerableModelError(
                    f"The tokenizer has no single token for the option letter {letter}, so options cannot be scored with this model."
                )
            self._letters[letter] = found
        return self._letters[letter]


def configured_depth(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> int | None:
    """The number of decoder blocks in a model's configuration, which is all that is read; None where it does not tell.

    Raises:
        ModelNotFoundError, NotCausalError, SettingsError: See `HuggingFaceEngine.load`.
    """
    config = _read_config(find_model(model), revision=revision, trust_remote_code=trust_remote_code)
    return getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)


def _read_config(model: str, **options: Any) -> Any:
    """The configuration of a model that generates text."""
    with quiet():
        try:
            config = AutoConfig.from_pretrained(model, **options)
        except Exception as error:  # of a library, or of the model's own code
            raise _load_error(model, error) from error
    known = type(config) in AutoModelForCausalLM._model_mapping or getattr(config, "auto_map", None)
    if not known or config.is_encoder_decoder:
        raise NotCausalError(
            f"{model} is a {config.model_type} model, which is not a causal language model. Choose one that generates text, such as Qwen/Qwen3-4B."
        )
    return config


def _shared(request: GenerationRequest | ScoreRequest) -> bool:
    """Whether the request steers generated positions only, over an unsteered reading of its prompt."""
    return request.steering is not None and request.steering.positions == "generated"


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Ids of the tokens that end a text: the tokenizer's, and those the model came with."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    ids = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    return sorted(ids) or None


def _load_error(model: str, error: Exception) -> VispaError:
    """The reason why a model did not load, as one of ours."""
    if isinstance(error, ImportError):
        return SettingsError(f"{model} needs a package that is not installed ({_first_line(error)}). Install it, or choose another model.")
    if _out_of_memory(error):
        return SettingsError(
            f"{model} does not fit into memory ({_first_line(error)}). Choose a larger device, several (device_map), or a smaller dtype such as bfloat16."
        )
    if Path(model).is_dir():
        return NotCausalError(
            f"The folder {model} does not hold a causal language model that can be loaded ({_first_line(error)}). "
            "It needs config.json, safetensors weights and a tokenizer, as save_pretrained writes them."
        )
    return ModelNotFoundError(
        f"{model} is neither a folder here nor a model that could be fetched from the hub ({_first_line(error)}). "
        "Check the name and the network, or give the folder of a model saved before."
    )


def _out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; on the processor and on mps torch has no error class for that."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ("can't allocate memory", "out of memory"))


def _memory_error(job: Job[Work]) -> EngineMemoryError:
    return EngineMemoryError(
        f"One request of {job.size} tokens does not fit into memory by itself. "
        "Shorten the prompt, ask for fewer new tokens, or load the model in bfloat16."
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else 'no reason given'}"
