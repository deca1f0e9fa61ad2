"""Tiny random models and a byte-level tokenizer for the tests of the engine: made on the spot, nothing is fetched."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from vispa_graph.engine.contract import Direction, GenerationRequest, Method, Positions, Steering
from vispa_graph.engine.huggingface import HuggingFaceEngine

torch.set_num_threads(1)

WIDTH, VOCABULARY, CONTEXT, DEPTH = 32, 320, 512, 5
LETTERS = "ABCDEFGH"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)

_COMMON = {"vocab_size": VOCABULARY, "initializer_range": 0.2, "pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}
_LLAMA = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
_HEADS = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 4, "max_position_embeddings": CONTEXT}

_MOE = {**_LLAMA, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_expand": 2}
_GPT = {"n_embd": WIDTH, "n_layer": DEPTH, "n_head": 4, "n_positions": CONTEXT}

# Architecture: configuration class and what it takes. Where the name is not enough, an empty line sets kinds apart: dense decoders
# of the Llama kind, mixtures of experts, older ones (some of whose blocks return tuples), hybrids with recurrent blocks.
ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", _LLAMA),
    "mistral": ("MistralConfig", {**_LLAMA, "sliding_window": 16}),
    "qwen2": ("Qwen2Config", _LLAMA),
    "qwen3": ("Qwen3Config", {**_LLAMA, "head_dim": 8}),
    "gemma": ("GemmaConfig", {**_LLAMA, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**_LLAMA, "head_dim": 8, "sliding_window": 16}),
    "gemma3": ("Gemma3TextConfig", {**_LLAMA, "head_dim": 8, "sliding_window": 16, "sliding_window_pattern": 3}),
    "phi": ("PhiConfig", _LLAMA),
    "phi3": ("Phi3Config", _LLAMA),
    "olmo2": ("Olmo2Config", _LLAMA),
    "granite": ("GraniteConfig", _LLAMA),
    "smollm3": ("SmolLM3Config", _LLAMA),
    "cohere": ("CohereConfig", _LLAMA),
    "cohere2": ("Cohere2Config", {**_LLAMA, "sliding_window": 16}),
    "glm": ("GlmConfig", {**_LLAMA, "head_dim": 8}),
    "glm4": ("Glm4Config", {**_LLAMA, "head_dim": 8}),
    "stablelm": ("StableLmConfig", _LLAMA),
    "starcoder2": ("Starcoder2Config", _LLAMA),
    "nemotron": ("NemotronConfig", _LLAMA),
    "exaone4": ("Exaone4Config", {**_LLAMA, "sliding_window": 16}),
    #
    "mixtral": ("MixtralConfig", {**_LLAMA, "num_local_experts": 4}),
    "qwen2_moe": ("Qwen2MoeConfig", {**_MOE, "num_experts": 4, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_MOE, "num_experts": 4, "head_dim": 8}),
    "olmoe": ("OlmoeConfig", {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": ("GraniteMoeConfig", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOssConfig", {**_LLAMA, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}),
    "deepseek_v3": ("DeepseekV3Config", {**_MOE, **_LATENT, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}),
    "llama4": ("Llama4TextConfig", {**_LLAMA, "head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 48}),
    #
    "gpt2": ("GPT2Config", _GPT),
    "gptj": ("GPTJConfig", {**_GPT, "rotary_dim": 8}),
    "gpt_neox": ("GPTNeoXConfig", {**_HEADS, "intermediate_size": 48}),
    "bloom": ("BloomConfig", {"hidden_size": WIDTH, "n_layer": DEPTH, "n_head": 4}),
    "opt": ("OPTConfig", {**_HEADS, "ffn_dim": 48, "word_embed_proj_dim": WIDTH}),
    "mpt": ("MptConfig", {"d_model": WIDTH, "n_layers": DEPTH, "n_heads": 4, "max_seq_len": CONTEXT}),
    "falcon": ("FalconConfig", _HEADS),
    "xglm": ("XGLMConfig", {"d_model": WIDTH, "num_layers": DEPTH, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": CONTEXT}),
    #
    "lfm2": ("Lfm2Config", {**_LLAMA, "full_attn_idxs": [2, 4]}),
    "jamba": (
        "JambaConfig",
        {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1},
    ),
    "qwen3_next": ("Qwen3NextConfig", {**_MOE, **_LINEAR, "num_experts": 4, "head_dim": 8, "shared_expert_intermediate_size": 24}),
    "falcon_h1": ("FalconH1Config", {**_LLAMA, **_MAMBA, "mamba_d_ssm": 64}),
}
# Their rows cannot share one reading of a prompt: what their recurrent or convolving blocks remember cannot be copied to several rows.
UNSHARED = {"lfm2", "jamba", "qwen3_next", "falcon_h1"}
# Causal language models that cannot be steered, and the reason that is given.
REFUSED: dict[str, tuple[str, dict, str]] = {
    "mamba": ("MambaConfig", {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "state_size": 8}, "not the model's hidden state"),
    "rwkv": ("RwkvConfig", {"hidden_size": WIDTH, "num_hidden_layers": DEPTH}, "not the model's hidden state"),
    "xlm": ("XLMConfig", {"emb_dim": WIDTH, "n_layers": DEPTH, "n_heads": 4, "causal": True}, "not the model's hidden state"),
    "openai-gpt": ("OpenAIGPTConfig", _GPT, "returned list, not a hidden state"),
}


def tiny_config(architecture: str = "llama", **changes: object) -> transformers.PreTrainedConfig:
    """The configuration of a tiny model."""
    name, own = {**ARCHITECTURES, **REFUSED}[architecture][:2]
    return getattr(transformers, name)(**{**_COMMON, **own, **changes})


def tiny_model(architecture: str = "llama", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A tiny causal language model with random weights."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(architecture, **changes), dtype=torch.float32)
    return model.eval()


def byte_tokenizer(*, chat: bool = False, spaced_letters: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes; the option letters also exist with a space before them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    vocabulary |= {"<pad>": 256, "<bos>": 257, "<eos>": 258}
    merges = []
    if spaced_letters:
        vocabulary |= {f"Ġ{letter}": 259 + number for number, letter in enumerate(LETTERS)}
        merges = [("Ġ", letter) for letter in LETTERS]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_engine(architecture: str = "llama", *, chat: bool = False, seed: int = 0, capacity: int = 32768, **changes: object) -> HuggingFaceEngine:
    """A steering engine on a tiny model; the caller closes it."""
    return HuggingFaceEngine(tiny_model(architecture, seed, **changes), byte_tokenizer(chat=chat), name="tiny", linger=0.0, capacity=capacity)


def reciting_model(text: str, *, then_stop: bool = True) -> PreTrainedModel:
    """A model that answers any prompt ending in a line break with `text`, whose bytes must all differ.

    Its blocks add nothing, so each token's embedding decides the next token.
    """
    model = tiny_model("llama", tie_word_embeddings=False)
    tokens = byte_tokenizer()("\n" + text)["input_ids"] + ([258] if then_stop else [])
    assert len(set(tokens)) == len(tokens), "each token can have one successor only"
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        head, embeddings = model.lm_head.weight, model.model.embed_tokens.weight
        head.zero_()
        for token, following in pairwise(tokens):
            head[following] = embeddings[token] / embeddings[token].norm()
    return model


def random_direction(
    layers: Sequence[int], *, method: Method = "probe", seed: int = 0, scale: float = 0.3, alpha: float = 1.0, bias: float = 0.0, width: int = WIDTH
) -> Direction:
    """A direction of Gaussian vectors."""
    vectors = np.random.default_rng(seed).normal(0, scale, (len(layers), width)).astype(np.float32)
    biases = np.full(len(layers), bias, dtype=np.float32)
    return Direction("value", method, tuple(layers), vectors, biases, alpha, np.ones(len(layers), dtype=np.float32))


def ask(text: str, **options: object) -> GenerationRequest:
    """A request with one user turn."""
    return GenerationRequest([{"role": "user", "content": text}], **options)


def steer(direction: Direction, strength: float = 1.0, target: float = 0.9, positions: Positions = "all") -> Steering:
    """A steering plan."""
    return Steering(direction, strength, target, positions)


@contextmanager
def worker_held(engine: HuggingFaceEngine) -> Iterator[None]:
    """Keeps the engine's worker busy, so that everything submitted inside waits and then shares its batches."""
    entered, gate = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        entered.set()
        gate.wait(30)

    handle = engine._model.register_forward_pre_hook(wait)
    blocker = threading.Thread(target=engine.read, args=(["hold"],), daemon=True)
    blocker.start()
    try:
        assert entered.wait(30)
        yield
    finally:
        handle.remove()
        gate.set()
        blocker.join()


@contextmanager
def block_outputs(model: PreTrainedModel) -> Iterator[list[list[torch.Tensor]]]:
    """What each decoder block returns from now on: for each block, a tensor [rows, positions, width] a forward pass.

    Entered before an engine is made, it sees the outputs before the engine's hooks; entered afterwards, the steered ones.
    """
    blocks = find_blocks(model)
    seen: list[list[torch.Tensor]] = [[] for _ in blocks]

    def hook(layer: int) -> Callable[..., None]:
        def record(_module: object, _inputs: object, output: object) -> None:
            seen[layer].append((output[0] if isinstance(output, tuple) else output).detach().clone())

        return record

    handles = [block.register_forward_hook(hook(layer)) for layer, block in enumerate(blocks)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def find_blocks(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The decoder blocks by the name they have in each of the tiny architectures."""
    places = dict.fromkeys(("gpt2", "gptj", "bloom", "falcon"), "transformer.h")
    places |= {"gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers", "mpt": "transformer.blocks"}
    return model.get_submodule(places.get(model.config.model_type, "model.layers"))
