"""Tiny models with random weights in the Hugging Face form, one per family, made in well under a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 384
BOS, EOS, UNK = 0, 1, 2
SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "A sparse model keeps the weights that matter and drops the rest.",
    "In 1969 two people walked on the moon; in 2024 nobody did.",
    "She sold sea shells by the sea shore, didn't she? They'll say she's selling still.",
    "Memory bandwidth, not arithmetic, decides how fast a small model writes its words.",
    "def add(a, b):\n    return a + b\n",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def tiny_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE with GPT-2's pre-tokenizer, trained on SENTENCES; written into `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|start|>", "<|end|>", "<|unknown|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|start|>",
        eos_token="<|end|>",
        unk_token="<|unknown|>",
        pad_token="<|end|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return fast


def _write(model: PreTrainedModel, folder: Path, seed: int, dtype: torch.dtype) -> Path:
    """Give `model` weights that make its output depend on its input, and save it with a tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Norms near one; matrices so that activations neither vanish nor explode.
            parameter.copy_(1 + 0.1 * noise if "norm" in name else noise * parameter.shape[-1] ** -0.5)
    folder.mkdir(parents=True, exist_ok=True)
    model.to(dtype).save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


def tiny_llama(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float16, **changes: Any) -> Path:
    """Three layers, width 128, 4 heads on 2 key-value heads, untied head. `changes` go to LlamaConfig."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
    }
    return _write(LlamaForCausalLM(LlamaConfig(**settings | changes)), folder, seed, dtype)


def tiny_mistral(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float16, **changes: Any) -> Path:
    """As `tiny_llama`, with a sliding window of 64 positions. `changes` go to MistralConfig."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "sliding_window": 64,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
    }
    return _write(MistralForCausalLM(MistralConfig(**settings | changes)), folder, seed, dtype)


def tiny_mpt(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float16, **changes: Any) -> Path:
    """Two layers, width 128, 4 heads, ALiBi, head tied to the embeddings. `changes` go to MptConfig."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "d_model": 128,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 512,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
    }
    return _write(MptForCausalLM(MptConfig(**settings | changes)), folder, seed, dtype)
