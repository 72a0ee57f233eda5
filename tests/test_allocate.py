"""OWL's sparsities against the paper's formula and activations seen by transformers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from pipelines.allocate import outlier_ratio, owl_sparsities, spread_around
from pipelines.checkpoint import Checkpoint
from pipelines.recipe import Owl, SparsityPattern
from tests import reference
from tests.tiny import VOCABULARY, tiny_llama, tiny_mistral, tiny_mpt

SETTING = Owl(kind="owl", threshold=3.0, spread=0.08)


def test_outlier_ratio_is_the_paper_s() -> None:
    rng = np.random.default_rng(0)
    scores = [rng.exponential(size=shape) for shape in [(4, 8), (8, 8), (2, 32)]]
    for threshold in (1.5, 3.0, 5.0):
        found = outlier_ratio([torch.from_numpy(s) for s in scores], threshold)
        assert found == reference.outlier_ratio(scores, threshold)
        assert found > 0
    assert outlier_ratio([torch.zeros(3, 4)], 5.0) == 0.0


@settings(derandomize=True, deadline=None)
@given(
    st.lists(st.integers(0, 1000).map(lambda n: n / 1000), min_size=1, max_size=40),
    st.floats(0, 0.99),
    st.floats(0.001, 0.49),
)
def test_sparsities_keep_their_mean_within_the_spread(
    ratios: list[float], mean: float, spread: float
) -> None:
    found = spread_around(mean, ratios, spread)
    assert len(found) == len(ratios)
    assert sum(found) / len(found) == pytest.approx(mean, abs=1e-9)
    assert all(abs(s - mean) <= spread + 1e-9 and 0 <= s < 1 for s in found)
    order = sorted(range(len(ratios)), key=lambda i: ratios[i])
    assert all(found[a] >= found[b] - 1e-9 for a, b in pairwise(order))


def test_one_layer_full_of_outliers_is_spared_by_the_whole_spread() -> None:
    found = spread_around(0.5, [0.01, 0.01, 0.01, 0.05], 0.08)
    assert found[3] == pytest.approx(0.42)
    assert found[:3] == pytest.approx([0.5 + 0.08 / 3] * 3)


@pytest.mark.parametrize("make", [tiny_llama, tiny_mistral, tiny_mpt])
def test_ratios_come_from_the_model_s_own_activations(make: Callable[..., Path], tmp_path: Path) -> None:
    torch.set_num_threads(1)
    layers = "n_layers" if make is tiny_mpt else "num_hidden_layers"
    folder = make(tmp_path, dtype=torch.float32, **{layers: 4})
    ids = torch.randint(0, VOCABULARY, (5, 70), generator=torch.Generator().manual_seed(0))
    checkpoint = Checkpoint(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _m, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        model(ids)
        embedded = model.get_input_embeddings()(ids)
    ratios = []
    for index in range(4):
        names = [checkpoint.family.layer_prefix(index) + n for n in checkpoint.family.linears]
        scores = [
            reference.wanda(
                model.get_submodule(n).weight.detach().double().numpy(),
                seen[n].flatten(0, 1).double().numpy(),
            )
            for n in names
        ]
        ratios.append(reference.outlier_ratio(scores, SETTING.threshold))
    assert len(set(ratios)) == 4

    batches = list(torch.split(embedded, 2))
    found = owl_sparsities(checkpoint, batches, SETTING, SparsityPattern(sparsity=0.6), torch.device("cpu"))
    assert [found[i] for i in range(4)] == pytest.approx(spread_around(0.6, ratios, 0.08), abs=2e-3)
    assert sum(found.values()) / 4 == pytest.approx(0.6)
