"""Everything that vispa_graph raises on purpose.

VispaError
+-- InputError                  what the caller gave cannot be answered (also a ValueError)
|   +-- EmptyQueryError
|   +-- UnknownModeError
|   +-- ModeInputError          a mode whose inputs are missing
|   +-- OptionsError            too few, too many, blank or duplicate options
|   +-- UnknownValueError
|   +-- SelectionSizeError      k outside 1..size of the taxonomy
|   +-- NoValuesError           no value is at stake enough to be heard
|   +-- ThreadError             a run that cannot be kept, or gone on with, as it was asked
+-- SettingsError               a setting is unknown, malformed or out of range
+-- PromptError                 a prompt file is missing or lacks a placeholder
+-- TaxonomyError               a taxonomy file cannot be used; names file and line
+-- StoreError                  a stored index or direction is corrupt or belongs to something else, or the cache cannot be used
+-- TraceError                  a trace file cannot be read
+-- ResumeError                 a run that was begun with other settings or models
+-- ModelError
|   +-- ModelNotFoundError      no such folder, or a hub that cannot be reached
|   +-- NotCausalError          a model, but not a causal language model
|   +-- UnsteerableModelError   its decoder blocks cannot be found, or adding at one does not do what it must
|   +-- LayerError              a layer the model does not have
|   +-- NonFiniteError          activations or logits became NaN or infinite, or give the options no probability
|   +-- ContextLengthError      a prompt that cannot be made to fit the model's context
|   +-- EngineClosedError
|   +-- EngineBusyError         its queue is full
|   +-- EngineMemoryError       one request alone does not fit into memory
|   +-- BatchError              the model failed in the middle of a batch
|   +-- DeadlineError           a request's time was up (also a TimeoutError)
|   +-- NotARerankerError       a model that cannot judge the values at stake
+-- SelectionError              the language model's judgement of the values cannot be read
+-- AggregationError            the main language model gave nothing that could be used

Every message says what happened, why, and how to fix it. No message holds text of a query, a comment or a response:
exceptions end up in traces and logs.
"""

from __future__ import annotations


class VispaError(Exception):
    """Base of everything vispa_graph raises on purpose."""


class InputError(VispaError, ValueError):
    """What the caller gave cannot be answered."""


class EmptyQueryError(InputError):
    """The query is missing, blank or not text."""


class UnknownModeError(InputError):
    """The mode is none of overton, steerable and distributional."""


class ModeInputError(InputError):
    """The mode needs an input that was not given."""


class OptionsError(InputError):
    """The answer options are too few, too many, blank or duplicate."""


class UnknownValueError(InputError):
    """The taxonomy does not hold the value asked for."""


class SelectionSizeError(InputError):
    """k is below 1 or above the number of values."""


class NoValuesError(InputError):
    """No value of the taxonomy is at stake enough to be heard."""


class ThreadError(InputError):
    """The run cannot be kept, or gone on with: no checkpointer, no thread, or nothing in it."""


class SettingsError(VispaError):
    """A setting is unknown, malformed or out of range."""


class PromptError(VispaError):
    """A prompt file is missing or lacks a placeholder."""


class TaxonomyError(VispaError):
    """A taxonomy file cannot be used. The message begins with the file and, where known, the line."""


class StoreError(VispaError):
    """A stored index or direction is corrupt or belongs to something else, or the cache folder cannot be used."""


class TraceError(VispaError):
    """A trace file is missing, or is none."""


class ResumeError(VispaError):
    """A run that was begun with other settings or models cannot go on with these."""


class ModelError(VispaError):
    """Base of the errors of the steering engine and its model."""


class ModelNotFoundError(ModelError):
    """There is no such model on this machine, and no hub to get it from."""


class NotCausalError(ModelError):
    """The model exists but is not a causal language model."""


class UnsteerableModelError(ModelError):
    """The model's decoder blocks cannot be found, or adding to one does not do what it must."""


class LayerError(ModelError):
    """A layer the model does not have."""


class NonFiniteError(ModelError):
    """Activations or logits became NaN or infinite, or give the options no probability at all."""


class ContextLengthError(ModelError):
    """A prompt that cannot be made to fit the model's context."""


class EngineClosedError(ModelError):
    """The engine was closed before the request could run."""


class EngineBusyError(ModelError):
    """The engine's queue is full."""


class EngineMemoryError(ModelError):
    """One request alone does not fit into memory."""


class BatchError(ModelError):
    """The model, or a listener, failed in the middle of a batch; the cause is chained."""


class DeadlineError(ModelError, TimeoutError):
    """The request's time was up before it was answered."""


class NotARerankerError(ModelError):
    """A model that was loaded but cannot judge the values at stake."""


class SelectionError(VispaError):
    """The language model's judgement of the values at stake cannot be read."""


class AggregationError(VispaError):
    """The main language model gave nothing that could be used."""
