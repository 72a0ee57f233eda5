"""The commands by which an entry is fetched and run, to be copied."""

from __future__ import annotations

import json
import shlex
from pathlib import PurePosixPath
from typing import NamedTuple

from zoo.entry import Artifact, Entry

PROMPT = "The capital of France is"


class Command(NamedTuple):
    title: str
    language: str
    text: str


def commands(entry: Entry) -> list[Command]:
    """What can be done with this entry, the simplest first. Every name is quoted for its language."""
    name = shlex.quote(entry.id)
    found = [Command("Get it", "sh", f"zoo pull {name}")]
    if any(a.kind == "packed" for a in entry.artifacts):
        found.append(Command("Sparse runner", "sh", f"zoo generate {name} {shlex.quote(PROMPT)}"))
        found.append(
            Command(
                "Sparse runner in Python",
                "python",
                f"import zoo\n\nmodel = zoo.load({json.dumps(entry.id)})\n"
                f"print(model.generate({json.dumps(PROMPT)}, max_tokens=32).text)",
            )
        )
    if loadable := _transformers(entry):  # of a published entry, from anywhere
        found.append(Command("transformers, in the folder of the files", "python", loadable))
    if gguf := _smallest_gguf(entry):
        path = shlex.quote(gguf.path)
        found.append(Command("llama.cpp", "sh", f"llama-cli -m {path} -p {shlex.quote(PROMPT)} -n 32"))
    return found


def _transformers(entry: Entry) -> str | None:
    kinds = ("safetensors", "compressed-tensors")
    weights = next((a for kind in kinds for a in entry.artifacts if a.kind == kind), None)
    if weights is None:
        return None
    folder = str(PurePosixPath(weights.path).parent)
    where, subfolder, revision = folder, "", ""
    hub = next((p for p in entry.publications if p.endpoint.rstrip("/") == "https://huggingface.co"), None)
    if hub is not None:
        where, revision = hub.repository, f", revision={json.dumps(hub.tag)}"
        subfolder = "" if folder == "." else f", subfolder={json.dumps(folder)}"
    arguments = json.dumps(where) + subfolder + revision
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({arguments})\n"
        f"model = AutoModelForCausalLM.from_pretrained({arguments})\n"
        f"prompt = tokenizer({json.dumps(PROMPT)}, return_tensors='pt')\n"
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32)[0]))"
    )


def _smallest_gguf(entry: Entry) -> Artifact | None:
    """The smallest GGUF file of those that passed verification, or else of all."""
    passed = {v.artifact for v in entry.verifications if v.passed}
    ggufs = [a for a in entry.artifacts if a.kind == "gguf"]
    return min(ggufs, key=lambda a: (a.path not in passed, a.size), default=None)
