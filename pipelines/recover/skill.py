"""Skill distillation: a teacher answers a seed set of prompts, and the student trains on what it wrote.

The teacher is a model folder, or any server with OpenAI's chat completions. Every answer of a server is
written down as it comes, and every batch of a model's, so an interrupted run asks for none twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipelines import text
from pipelines.recipe import Skill
from pipelines.recover.data import store_tokens
from zoo.errors import SourceError
from zoo.files import Store, canonical_json, sha256_json, told_plainly
from zoo.progress import track

LONGEST_PROMPT = 1024  # tokens

Answers = Callable[[list[str], int], list[str]]  # of prompts, with a seed


def skill_tokens(skill: Skill, teacher: Path, teacher_sha256: str, model: Path, store: Store) -> Path:
    """The file of token ids of all prompts with their answers, tokenized with the tokenizer of `model`."""
    prompts = _prompts(skill)
    writer = "" if skill.endpoint else teacher_sha256
    identity = sha256_json({"skill": skill.model_dump(), "prompts": prompts, "teacher": writer})
    written = store.root / "training" / f"{identity}.jsonl"
    with store.locked(identity):
        answer = _endpoint(skill) if skill.endpoint else _local(skill, teacher)
        documents = list(_written(skill, prompts, written, answer))
    return store_tokens(
        _conversations(documents, model), [identity, f"answers to {skill.prompts}"], None, model, store
    )


def _prompts(skill: Skill) -> list[str]:
    found = list(text.read_text(skill.prompts, column=skill.column).documents)
    if len(found) == 1:  # a .txt file
        found = found[0].splitlines()
    asked = [
        template.replace("{}", prompt.strip())
        for prompt in found
        if prompt.strip()
        for template in skill.templates
    ]
    return [prompt for prompt in asked for _ in range(skill.samples)]


def _written(skill: Skill, prompts: list[str], path: Path, answer: Answers) -> Iterator[tuple[str, str]]:
    """(prompt, answer) of all prompts, those that `path` has already and then new ones, which it gets."""
    count = 1 if skill.endpoint else skill.batch
    with told_plainly(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        done = _complete_lines(path, len(prompts), count)
        with path.open("a") as file:
            batches = range(len(done), len(prompts), count)
            for start in track(batches, f"answers to {skill.prompts}, {count} at a time"):
                asked = prompts[start : start + count]
                for pair in zip(asked, answer(asked, skill.seed + start), strict=True):
                    file.write(canonical_json(pair) + "\n")
                    done.append(pair)
                file.flush()
    return iter(done)


def _complete_lines(path: Path, wanted: int, batch: int) -> list[tuple[str, str]]:
    """What was written before; half a line, left by a kill, is cut off."""
    lines = path.read_bytes().split(b"\n")
    pairs = [json.loads(line) for line in lines[:-1]]
    if len(pairs) < wanted:  # whole batches, so that seeds stay those of the first try
        pairs = pairs[: len(pairs) // batch * batch]
    with path.open("rb+") as file:
        file.truncate(sum(len(line) + 1 for line in lines[: len(pairs)]))
    return [(prompt, answer) for prompt, answer in pairs]


def _conversations(pairs: list[tuple[str, str]], model: Path) -> Iterator[str]:
    """Prompt and answer as one text, in the model's chat template if it has one."""
    tokenizer = text.load_tokenizer(model)
    for prompt, answer in pairs:
        if tokenizer.chat_template is None:
            yield f"{prompt}\n{answer}"
            continue
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        yield str(tokenizer.apply_chat_template(turns, tokenize=False))


def _endpoint(skill: Skill) -> Answers:
    from huggingface_hub import InferenceClient

    client = InferenceClient(base_url=skill.endpoint, api_key=os.environ.get("OPENAI_API_KEY") or "none")

    def one(prompt: str, seed: int) -> str:
        try:
            done = client.chat_completion(
                [{"role": "user", "content": prompt}],
                model=skill.model,
                max_tokens=skill.new_tokens,
                temperature=skill.temperature,
                seed=seed,
            )
        except Exception as error:  # the client raises its HTTP library's errors as they are
            raise SourceError(
                f"{skill.endpoint} did not answer",
                saw=str(error).splitlines()[0][:200] if str(error) else type(error).__name__,
                try_="check the URL, the model's name and OPENAI_API_KEY; answers so far are kept",
            ) from error
        return done.choices[0].message.content or ""

    return lambda prompts, seed: [one(prompt, seed + n) for n, prompt in enumerate(prompts)]


def _local(skill: Skill, teacher: Path) -> Answers:
    loaded: list[Any] = []

    def answers(prompts: list[str], seed: int) -> list[str]:
        import torch

        from pipelines.evaluate import load_model

        if not loaded:
            loaded.extend(load_model(teacher))
        model, tokenizer = loaded
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        asked = prompts
        if tokenizer.chat_template is not None:
            turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
            asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(
            asked, return_tensors="pt", padding=True, truncation=True, max_length=LONGEST_PROMPT
        ).to(model.device)
        inputs.pop("token_type_ids", None)
        torch.manual_seed(seed)
        ids = model.generate(
            **inputs,
            do_sample=True,
            temperature=skill.temperature,
            max_new_tokens=skill.new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        written = ids[:, inputs["input_ids"].shape[1] :]
        return [str(answer) for answer in tokenizer.batch_decode(written, skip_special_tokens=True)]

    return answers
