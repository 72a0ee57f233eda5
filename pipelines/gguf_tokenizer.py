"""Tokenizers as GGUF spells them, in both directions.

GGUF keeps the vocabulary, merges and special tokens, but of the pre-tokenizer only a name that
llama.cpp knows. `PRE_TOKENIZERS` says what each name stands for; reading and writing share it, and a
tokenizer that is not in it is refused, because llama.cpp would split text differently and say nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from zoo.errors import FormatError, SourceError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
SPACE = "\u2581"  # how SentencePiece writes a space
KEYS = "tokenizer.ggml."
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before merging, in the words of `tokenizer.json`."""

    steps: tuple[tuple[Any, ...], ...]  # ("ByteLevel", use_regex), ("Digits",) or ("Split", regex)
    ignore_merges: bool = False  # a whole piece that is in the vocabulary is taken as it is
    nfc: bool = False  # llama.cpp leaves this out, which matters for decomposed text alone


_GPT2 = ("ByteLevel", True)
_BYTES = ("ByteLevel", False)
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "gpt-2": PreTokenizer((_GPT2,)),
    "mpt": PreTokenizer((_GPT2,), nfc=True),
    "smollm": PreTokenizer((("Digits",), _GPT2)),
    "llama-bpe": PreTokenizer((("Split", _LLAMA3_SPLIT), _BYTES), ignore_merges=True),
    "smaug-bpe": PreTokenizer((("Split", _LLAMA3_SPLIT), _BYTES)),
    "qwen2": PreTokenizer((("Split", _LLAMA3_SPLIT.replace("{1,3}", "")), _BYTES), nfc=True),
    "tekken": PreTokenizer((("Split", _TEKKEN_SPLIT), _BYTES), ignore_merges=True),
}
# Other names for the same splitting, met when reading.
_READ_AS = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "olmo": "gpt-2", "starcoder": "smollm",
    "refact": "smollm", "command-r": "smollm", "dbrx": "smaug-bpe", "default": "",
}  # fmt: skip


def _steps(node: Any) -> list[Any]:
    """A `Sequence` of tokenizer.json, flattened; nothing for null."""
    if not isinstance(node, dict):
        return []
    if node.get("type") != "Sequence":
        return [node]
    inner = node.get("pretokenizers") or node.get("normalizers") or []
    return [step for part in inner for step in _steps(part)]


def _describe(tokenizer: Mapping[str, Any]) -> PreTokenizer | None:
    """The pre-tokenizer of a byte-level BPE tokenizer.json; None if it has parts that GGUF cannot name."""
    steps: list[tuple[Any, ...]] = []
    for step in _steps(tokenizer.get("pre_tokenizer")):
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False}:
                steps.append(("ByteLevel", bool(step.get("use_regex", True))))
            case {"type": "Digits", "individual_digits": True}:
                steps.append(("Digits",))
            case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated"}:
                if step.get("invert"):
                    return None
                steps.append(("Split", regex))
            case _:
                return None
    normalizers = [step.get("type") for step in _steps(tokenizer.get("normalizer"))]
    if normalizers not in ([], ["NFC"]):
        return None
    ignore_merges = bool(tokenizer["model"].get("ignore_merges"))
    return PreTokenizer(tuple(steps), ignore_merges, nfc=normalizers == ["NFC"])


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a parsed byte-level BPE `tokenizer.json`.

    Raises SourceError when no name means exactly this.
    """
    found = _describe(tokenizer)
    for name, known in PRE_TOKENIZERS.items():
        if found == known:
            return name
    raise SourceError(
        "this tokenizer splits text in a way that has no name in GGUF",
        saw=json.dumps([tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")])[:300],
        expected=f"the splitting of one of {', '.join(PRE_TOKENIZERS)}",
        try_="leave the GGUF exports out of the recipe",
    )


# Hugging Face -> GGUF


def write_tokenizer(folder: Path, vocabulary: int, writer: gguf.GGUFWriter) -> None:
    """Add the tokenizer of the model folder `folder` to `writer`.

    `vocabulary` is the number of rows of the embeddings; ids beyond the tokenizer become unused
    tokens. Raises SourceError for a tokenizer that llama.cpp cannot reproduce.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise SourceError(
            f"{folder} has no tokenizer.json", try_="save it with AutoTokenizer.save_pretrained"
        )
    tokenizer = json.loads(path.read_bytes())
    config = _read_json(folder / "tokenizer_config.json")
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise SourceError(f"{path}: a {model.get('type')} tokenizer", expected="BPE")
    sentencepiece = "<0x00>" in model["vocab"]
    tokens, types = _vocabulary(tokenizer, vocabulary, model.get("unk_token") if sentencepiece else None)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if sentencepiece:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(_scores(folder, tokens, merges))
        writer.add_token_types(types)
        writer.add_add_space_prefix(_adds_space(tokenizer))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer_name(tokenizer))
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges([f"{left} {right}" for left, right in merges])
    _write_special(folder, tokenizer, config, writer)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes()) if path.is_file() else {}


def _vocabulary(
    tokenizer: Mapping[str, Any], vocabulary: int, unknown: str | None
) -> tuple[list[str], list[int]]:
    """Text and type of every token id below `vocabulary`."""
    tokens: dict[int, tuple[str, int]] = {}
    for text, index in tokenizer["model"]["vocab"].items():
        is_byte = unknown is not None and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        tokens[index] = (text, BYTE if is_byte else NORMAL)
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]] = (added["content"], CONTROL if added["special"] else USER_DEFINED)
    tokens = {i: (text, UNKNOWN if text == unknown else kind) for i, (text, kind) in tokens.items()}
    if tokens and max(tokens) >= vocabulary:
        raise SourceError(
            "the tokenizer has more tokens than the model has embeddings",
            saw=f"token id {max(tokens)}",
            expected=f"ids below {vocabulary}",
        )
    filled = [tokens.get(i, (f"[PAD{i}]", UNUSED)) for i in range(vocabulary)]
    if len({text for text, _ in filled}) != vocabulary:
        raise SourceError("the tokenizer has two tokens with one text, which llama.cpp refuses")
    return [text for text, _ in filled], [kind for _, kind in filled]


def _scores(folder: Path, tokens: list[str], merges: list[list[str]]) -> list[float]:
    """SentencePiece scores: its own where tokenizer.model is there, else the order of the merges.

    llama.cpp merges the pair whose result scores highest, so minus the rank of a token's first
    merge gives the order in which the merges would be applied.
    """
    path = folder / "tokenizer.model"
    if path.is_file():
        from sentencepiece import SentencePieceProcessor

        model = SentencePieceProcessor(model_file=str(path))
        own = {model.id_to_piece(i): model.get_score(i) for i in range(model.get_piece_size())}
        if sum(token in own for token in tokens) >= 0.9 * len(own):
            return [float(own.get(token, -1000.0)) for token in tokens]
    rank: dict[str, int] = {}
    for index, (left, right) in enumerate(merges):
        rank.setdefault(left + right, index)
    return [-float(rank[token]) if token in rank else -1e6 for token in tokens]


def _adds_space(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a space goes before the text, as SentencePiece's add_dummy_prefix does."""
    for step in (*_steps(tokenizer.get("normalizer")), *_steps(tokenizer.get("pre_tokenizer"))):
        match step:
            case {"type": "Prepend", "prepend": "\u2581"}:
                return True
            case {"type": "Metaspace"}:
                return bool(step.get("prepend_scheme", "always") != "never")
    return False


def _write_special(
    folder: Path, tokenizer: Mapping[str, Any], config: Mapping[str, Any], writer: gguf.GGUFWriter
) -> None:
    ids = dict(tokenizer["model"]["vocab"]) | {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    model_config = _read_json(folder / "config.json")
    for role, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        text = config.get(f"{role}_token")
        text = text.get("content") if isinstance(text, dict) else text
        index = ids.get(text) if text is not None else model_config.get(f"{role}_token_id")
        if type(index) is int:
            add(index)
    before, after = _template_ends(tokenizer)
    writer.add_add_bos_token(before)
    writer.add_add_eos_token(after)
    template = config.get("chat_template")
    if (file := folder / "chat_template.jinja").is_file():
        template = file.read_text()
    if isinstance(template, str):
        writer.add_chat_template(template)


def _template_ends(tokenizer: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether encoding puts a special token before and after a text (in practice: bos and eos)."""
    processors = tokenizer.get("post_processor") or {}
    for processor in processors.get("processors", [processors]):
        if processor.get("type") == "TemplateProcessing":
            kinds = ["SpecialToken" in part for part in processor["single"]]
            at = kinds.index(False)
            return any(kinds[:at]), any(kinds[at + 1 :])
    return False, False


# GGUF -> Hugging Face


def read_tokenizer(fields: Mapping[str, Any], folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja from GGUF metadata.

    `fields` maps metadata keys to values. Raises SourceError for a tokenizer we cannot rebuild and
    FormatError for one that contradicts itself.
    """
    tokens: list[str] = fields.get(KEYS + "tokens") or []
    types: list[int] = fields.get(KEYS + "token_type") or [NORMAL] * len(tokens)
    if not tokens or len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise FormatError(
            "the GGUF's tokenizer contradicts itself",
            saw=f"{len(tokens)} tokens, {len(set(tokens))} different, {len(types)} types",
            expected="as many types as tokens, each token once",
        )
    kind, vocab = fields.get(KEYS + "model"), {token: index for index, token in enumerate(tokens)}
    special: dict[str, int] = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = fields.get(f"{KEYS}{key}_token_id")
        if index is not None and index < len(tokens):
            special[role] = index
    if kind == "gpt2":
        tokenizer = _byte_level(fields, vocab)
    elif kind == "llama":
        tokenizer = _sentencepiece(fields, vocab, tokens[special["unk"]] if "unk" in special else None)
    else:
        raise SourceError(f"GGUF tokenizer {kind!r} is not supported", expected="gpt2 or llama")
    tokenizer["added_tokens"] = [
        {
            "id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": types[index] != USER_DEFINED,
        }
        for index, token in enumerate(tokens)
        if types[index] in (CONTROL, USER_DEFINED, UNKNOWN)
    ]  # fmt: skip
    tokenizer["post_processor"] = _template(fields, kind, tokens, special)
    _write(folder / "tokenizer.json", tokenizer)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    config |= {f"{role}_token": tokens[index] for role, index in special.items()}
    if "pad" not in special and "eos" in special:
        config["pad_token"] = tokens[special["eos"]]
    _write(folder / "tokenizer_config.json", config)
    if isinstance(template := fields.get("tokenizer.chat_template"), str):
        (folder / "chat_template.jinja").write_text(template)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def _byte_level(fields: Mapping[str, Any], vocab: dict[str, int]) -> dict[str, Any]:
    name = str(fields.get(KEYS + "pre"))
    name = _READ_AS.get(name, name)
    if name not in PRE_TOKENIZERS:
        raise SourceError(
            f"GGUF pre-tokenizer {fields.get(KEYS + 'pre')!r} is not supported",
            expected=", ".join(PRE_TOKENIZERS),
            try_="use the model's own repository or folder instead of the GGUF",
        )
    known = PRE_TOKENIZERS[name]
    merges = [merge.split(" ", 1) for merge in fields.get(KEYS + "merges") or []]
    for merge in merges:
        if len(merge) != 2 or not {*merge, merge[0] + merge[-1]} <= vocab.keys():
            raise FormatError("the GGUF's tokenizer has a bad merge", saw=repr(" ".join(merge))[:80])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    steps: list[dict[str, Any]] = []
    for step in known.steps:
        match step:
            case ("ByteLevel", use_regex):
                steps.append(byte_level | {"use_regex": use_regex})
            case ("Digits",):
                steps.append({"type": "Digits", "individual_digits": True})
            case ("Split", regex):
                split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"}
                steps.append(split | {"invert": False})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": {"type": "NFC"} if known.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0],
        "decoder": byte_level,
        "model": _bpe(vocab, merges) | {"ignore_merges": known.ignore_merges},
    }


def _bpe(vocab: dict[str, int], merges: list[list[str]]) -> dict[str, Any]:
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": vocab, "merges": merges,
    }  # fmt: skip


def _sentencepiece(fields: Mapping[str, Any], vocab: dict[str, int], unknown: str | None) -> dict[str, Any]:
    scores: list[float] = fields.get(KEYS + "scores") or []
    if len(scores) != len(vocab) or not np.isfinite(scores).all():
        raise FormatError("the GGUF's tokenizer has bad scores", saw=f"{len(scores)} for {len(vocab)} tokens")
    # SentencePiece merges any two neighbours whose union is a token, the highest score first. As a
    # BPE: every split of every token, by the token's score.
    merges: list[tuple[float, int, str, str]] = []
    for token, index in vocab.items():
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in vocab and right in vocab:
                merges.append((-scores[index], vocab[left], left, right))
    merges.sort(key=lambda merge: merge[:2])
    space_first = fields.get(KEYS + "add_space_prefix", True)
    normalizers: list[dict[str, Any]] = [{"type": "Prepend", "prepend": SPACE}] if space_first else []
    normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if space_first:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    bpe = _bpe(vocab, [[left, right] for *_, left, right in merges])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": bpe | {"byte_fallback": True, "fuse_unk": True, "unk_token": unknown},
    }


def _template(
    fields: Mapping[str, Any], kind: str, tokens: list[str], special: Mapping[str, int]
) -> dict[str, Any] | None:
    """Put bos before and eos after a text where the file, or llama.cpp's default, says so."""
    pre = fields.get(KEYS + "pre")
    known = PRE_TOKENIZERS.get(_READ_AS.get(str(pre), str(pre)))
    bos_default = kind == "llama" or (known is not None and known.ignore_merges)
    add_bos = fields.get(KEYS + "add_bos_token", bos_default) and "bos" in special
    add_eos = fields.get(KEYS + "add_eos_token", False) and "eos" in special
    if not (add_bos or add_eos):
        return None
    ends = {"bos": add_bos, "eos": add_eos}
    used = {tokens[special[role]]: special[role] for role, wanted in ends.items() if wanted}

    def token(role: str) -> list[dict[str, Any]]:
        text = tokens[special[role]] if ends[role] else ""
        return [{"SpecialToken": {"id": text, "type_id": 0}}] if ends[role] else []

    def text(name: str) -> list[dict[str, Any]]:
        return [*token("bos"), {"Sequence": {"id": name, "type_id": 0}}, *token("eos")]

    return {
        "type": "TemplateProcessing",
        "single": text("A"),
        "pair": text("A") + text("B"),
        "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in used.items()},
    }
