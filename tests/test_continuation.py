"""Text that a model writes, against its distribution as one forward pass without a cache has it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipelines.continuation import TOP_K, continued
from tests.tiny import tiny_llama, tiny_mistral, tiny_mpt
from zoo.errors import NumericsError

WRITTEN = 2000
WINDOW = 64  # of tiny_mistral


@pytest.fixture(scope="module", params=[tiny_llama, tiny_mistral, tiny_mpt])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    torch.set_num_threads(1)
    folder = request.param(tmp_path_factory.mktemp("model") / "model")
    found: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return found.eval()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_from_the_models_likeliest(model: torch.nn.Module, temperature: float) -> None:
    """The mean surprise of what was drawn, everywhere, is the entropy of what it is to be drawn from."""
    start = torch.arange(5).expand(WRITTEN, 5)
    torch.manual_seed(0)
    ids = continued(model, start, 9, "", temperature)
    assert ids.shape == (WRITTEN, 9) and torch.equal(ids[:, :5], start)
    odds = log_odds(model, ids, temperature)[:, 4:-1]
    drawn = odds.gather(-1, ids[:, 5:, None])[..., 0]
    assert drawn.isfinite().all(), "one of the likeliest, and none that ends the text"
    p = odds.exp()
    finite = odds.nan_to_num(neginf=0.0).double()
    mean, square = (p * finite).sum(-1), (p * finite.square()).sum(-1)
    z = (drawn - mean).sum(0) / (square - mean.square()).sum(0).sqrt()
    assert (z.abs() < 4.5).all(), z
    first = torch.bincount(ids[:, 5], minlength=p.shape[-1]) / WRITTEN
    error = (p[0, 0] * (1 - p[0, 0]) / WRITTEN).sqrt()
    assert ((first - p[0, 0]).abs() <= 5 * error + 1e-12).all()


def test_long_texts_see_what_the_model_sees(model: torch.nn.Module) -> None:
    """Also beyond a sliding window: at no temperature every token is the likeliest."""
    start = torch.randint(5, 200, (2, WINDOW - 10), generator=torch.Generator().manual_seed(1))
    ids = continued(model, start, WINDOW + 20, "", 1e-6)
    odds = log_odds(model, ids, 1.0)[:, start.shape[1] - 1 : -1]
    chosen = odds.gather(-1, ids[:, start.shape[1] :, None])[..., 0]
    assert (odds.max(-1).values - chosen < 1e-4).all()


def test_a_model_that_overflows_is_told_of(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "m"), dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.inf)
    with pytest.raises(NumericsError, match="the model cannot write"):
        continued(model, torch.ones(2, 3, dtype=torch.int64), 6, "")


@torch.no_grad()
def log_odds(model: torch.nn.Module, ids: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities (batch, length, vocabulary) in float64 of the TOP_K likeliest; -inf of all others."""
    logits = model(ids, use_cache=False).logits.double()
    logits[..., model.generation_config.eos_token_id] = -torch.inf  # type: ignore[union-attr, index]
    kept = logits >= logits.topk(TOP_K).values[..., -1:]
    return (logits / temperature).masked_fill(~kept, -torch.inf).log_softmax(-1)
