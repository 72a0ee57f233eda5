"""The parts of recovery training, each against a plain float64 version of its formula."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pipelines.masks import Grouped, Unstructured
from pipelines.recipe import PruneInTraining, Recover, Rounding
from pipelines.recover import losses as recover_losses
from pipelines.recover import prune as recover_prune
from pipelines.recover.data import Blocks, open_tokens, tokenized, write_tokens
from pipelines.recover.losses import (
    IGNORED,
    HeadLoss,
    chunk_loss,
    cross_entropy,
    divergence,
    squarehead,
    weight_error,
)
from pipelines.recover.masks import (
    best,
    best_together,
    cubic,
    pattern_at,
    regrown_fraction,
    rigl_mask,
    saliency,
    snip_masks,
)
from pipelines.recover.masks import fits as mask_fits
from pipelines.recover.prune import Pruner
from pipelines.recover.resample import alternatives
from pipelines.recover.rounding import EffectiveLinear, add_rounder, check_exact, keep
from pipelines.recover.shards import shrink
from pipelines.recover.train import schedule, thinned
from pipelines.text import PROSE
from tests.tiny import VOCABULARY, tiny_llama
from zoo.entry import TrainingPoint
from zoo.errors import CalibrationError, NumericsError, PatternError, SourceError
from zoo.files import Store
from zoo.runner.format import Layout, fits

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def softmax64(logits: Tensor, temperature: float = 1.0) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    z = logits.double().numpy() / temperature
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True))


# --- losses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_hintons(temperature: float) -> None:
    student, teacher = normal(7, 33) * 3, normal(7, 33) * 3
    p, q = softmax64(teacher, temperature), softmax64(student, temperature)
    expected = temperature**2 * (p * np.log(p / q)).sum()
    assert float(divergence(student, teacher, temperature)) == pytest.approx(expected, rel=1e-5)


def test_divergence_of_the_top_k_has_the_rest_as_one_outcome() -> None:
    student, teacher = normal(5, 20), normal(5, 20)
    p, q = softmax64(teacher), softmax64(student)
    expected = 0.0
    for mine, theirs in zip(q, p, strict=True):
        top = np.argsort(theirs)[-4:]
        a, b = (np.append(x[top], 1 - x[top].sum()) for x in (theirs, mine))
        expected += (a * np.log(a / b)).sum()
    assert float(divergence(student, teacher, 1.0, 4)) == pytest.approx(expected, rel=1e-4)
    assert expected < float(divergence(student, teacher, 1.0))
    assert float(divergence(student, teacher, 1.0, 20)) == float(divergence(student, teacher, 1.0))


def test_squarehead_and_weight_error() -> None:
    ours, theirs = [normal(3, 4, 8), normal(3, 4, 8) * 9], [normal(3, 4, 8), normal(3, 4, 8) * 9]
    expected = np.mean([
        ((a.double() - b.double()) ** 2).mean().item() / (b.double() ** 2).mean().item()
        for a, b in zip(ours, theirs, strict=True)
    ])  # fmt: skip
    assert float(squarehead(ours, theirs)) == pytest.approx(expected, rel=1e-5)
    mask = normal(3, 4, 8) > 0
    kept = [(a[mask].double() - b[mask].double()).square().sum() / b[mask].double().square().sum()
            for a, b in zip(ours, theirs, strict=True)]  # fmt: skip
    found = weight_error(ours, theirs, [mask, mask])
    assert float(found) == pytest.approx(float(torch.stack(kept).mean()), rel=1e-5)


@pytest.mark.parametrize("chunk_logits", [1 << 28, 40 * 8])
def test_the_head_in_chunks_has_the_loss_and_gradients_of_the_whole(
    chunk_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recover_losses, "CHUNK_LOGITS", chunk_logits)
    hidden, head = normal(30, 12).requires_grad_(), normal(40, 12).requires_grad_()
    taught, taught_head = normal(30, 12), normal(40, 12)
    targets = torch.randint(0, 40, (30,), generator=GENERATOR)
    targets[::7] = IGNORED
    weights = (0.3 / 30, 0.7 / 25)

    def loss(*args: Tensor) -> tuple[Tensor, Tensor]:
        return chunk_loss(*args, weights, 1.5, None)

    total, parts = HeadLoss.apply(loss, hidden, head, taught, taught_head, targets)  # type: ignore[no-untyped-call]
    (2 * total).backward()
    h, w = (x.detach().double().requires_grad_() for x in (hidden, head))
    logits = h @ w.T
    p = F.log_softmax(taught.double() @ taught_head.double().T / 1.5, -1)
    q = F.log_softmax(logits / 1.5, -1)
    kl = 1.5**2 * (p.exp() * (p - q)).sum()
    entropy = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    expected = weights[0] * kl + weights[1] * entropy
    (2 * expected).backward()
    assert float(total.detach()) == pytest.approx(float(expected), rel=1e-5)
    assert parts.tolist() == pytest.approx([float(kl), float(entropy)], rel=1e-5)
    assert hidden.grad is not None and head.grad is not None and h.grad is not None and w.grad is not None
    assert torch.allclose(hidden.grad.double(), h.grad, atol=1e-6)
    assert torch.allclose(head.grad.double(), w.grad, atol=1e-6)
    assert float(cross_entropy(hidden @ head.T, targets)) == pytest.approx(float(entropy), rel=1e-5)


# --- pruning ----------------------------------------------------------------------------------------


def in_training(**settings: object) -> PruneInTraining:
    made: PruneInTraining = TypeAdapter(PruneInTraining).validate_python(settings)
    return made


def test_cubic_schedule_ends_exactly_at_its_target() -> None:
    assert cubic(0.0, 0.7) == 0.0 and cubic(1.0, 0.7) == 0.7
    # s_t = s_f (1 - (1 - t)^3): Zhu and Gupta's formula with s_0 = 0
    assert cubic(0.5, 0.8) == pytest.approx(0.8 * (1 - 0.125))
    step = in_training(method="magnitude", pattern={"sparsity": 0.7}, schedule="cubic")
    weight = normal(32, 64)
    mask = torch.ones_like(weight, dtype=torch.bool)
    zeros = []
    for fraction in (0.0, 0.25, 0.5, 1.0):
        pattern = pattern_at(step, step.pattern, fraction, mask)
        mask = best(saliency(weight * mask, mask), pattern)
        zeros.append(int((~mask).sum()))
    assert zeros == [round(2048 * 0.7 * (1 - (1 - t) ** 3)) for t in (0, 0.25, 0.5, 1)]


def test_stages_tighten_to_the_banded_target() -> None:
    step = in_training(
        method="magnitude",
        pattern={"keep": 4, "group": 16, "window": 8},
        schedule="stages",
        stages=[12, 8, 4],
    )
    weight = normal(16, 64)
    mask = torch.ones_like(weight, dtype=torch.bool)
    kept = []
    for fraction in (0.0, 0.3, 0.34, 0.6, 0.67, 1.0):
        pattern = pattern_at(step, step.pattern, fraction, mask)
        mask = best(saliency(weight * mask, mask), pattern)
        counts = mask.view(-1, 16).sum(dim=1)
        assert int(counts.min()) == int(counts.max())
        kept.append(int(counts[0]))
    assert kept == [12, 12, 8, 8, 4, 4]
    assert fits(Layout("banded", 16, 64, 5, 0, keep=4, offset_bits=3), mask.int().numpy())


def test_a_layer_that_is_sparser_already_is_left_so() -> None:
    step = in_training(method="magnitude", pattern={"keep": 4, "group": 16}, schedule="cubic")
    mask = torch.zeros(4, 32, dtype=torch.bool)
    mask[:, ::2] = True  # 8 of 16
    assert pattern_at(step, step.pattern, 0.0, mask) == Grouped(8, 16)
    loose = in_training(method="magnitude", pattern={"sparsity": 0.2})
    assert pattern_at(loose, loose.pattern, 1.0, mask) == Unstructured(0.5)


def test_the_zeros_of_a_large_layer_are_counted_exactly() -> None:
    """Of 59 million weights float32 cannot tell how many are kept."""
    mask = torch.ones(14336 * 4096, dtype=torch.bool)
    for sparsity in (0.3, 0.6, 0.7):
        mask[: round(mask.numel() * sparsity)] = False
        step = in_training(method="magnitude", pattern={"sparsity": sparsity}, schedule="cubic")
        whole = mask.view(14336, 4096)
        assert mask_fits(whole, pattern_at(step, step.pattern, 1.0, whole)), sparsity


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Grouped(8, 16), Grouped(8, 16, 8)])
def test_rigl_swaps_the_smallest_for_the_largest_gradients(pattern: Unstructured | Grouped) -> None:
    weight, gradient = normal(8, 64), normal(8, 64)
    start = best(saliency(weight, torch.ones(8, 64, dtype=torch.bool)), pattern)
    weight = weight * start
    mask = rigl_mask(weight, start, pattern, gradient, 0.25)
    assert int(mask.sum()) == int(start.sum()) == 256
    if isinstance(pattern, Grouped):
        assert int(mask.view(-1, 16).sum(dim=1).max()) == 8
    gone, grown = start & ~mask, mask & ~start
    assert 0 < int(gone.sum()) <= 64
    survivors = (weight.abs() * start).flatten().topk(192).indices
    assert bool(mask.flatten()[survivors].all()), "the largest weights stay"
    if isinstance(pattern, Unstructured):
        # of all but the survivors, exactly those with the largest gradients
        open_ = torch.ones(512, dtype=torch.bool)
        open_[survivors] = False
        largest = (gradient.abs().flatten() * open_).topk(64).indices
        assert bool(mask.flatten()[largest].all())
    else:
        assert gradient[grown].abs().mean() > gradient[gone].abs().mean()
    assert regrown_fraction(0.3, 0.0) == 0.3 and regrown_fraction(0.3, 1.0) == pytest.approx(0)


def test_wanda_weighs_by_the_inputs() -> None:
    weight, norm = normal(4, 32), normal(32).abs()
    every = torch.ones(4, 32, dtype=torch.bool)
    mask = best(saliency(weight, every, input_norm=norm), Grouped(4, 16))
    scores = (weight.double().abs() * norm.double()).numpy().reshape(-1, 16)
    expected = np.zeros_like(scores, bool)
    np.put_along_axis(expected, np.argsort(scores, axis=1)[:, -4:], True, axis=1)
    assert np.array_equal(mask.numpy().reshape(-1, 16), expected)


def test_weights_that_are_not_kept_may_come_back() -> None:
    weight = normal(4, 32)
    blocks = weight.abs().view(8, 16)
    largest = torch.zeros(8, 16, dtype=torch.bool)
    largest.scatter_(1, blocks.argsort(dim=1, descending=True)[:, :8], True)
    smallest, pattern = (~largest).view(4, 32), Grouped(8, 16)
    assert torch.equal(best(saliency(weight, smallest), pattern), smallest)
    back = best(saliency(weight, smallest, revive=True), pattern)
    assert torch.equal(back.view(8, 16), largest)


def test_masks_found_together_are_those_of_each_layer() -> None:
    scores = {name: normal(*shape).abs() for name, shape in
              {"a": (4, 32), "b": (8, 64), "c": (3, 48), "d": (4, 16)}.items()}  # fmt: skip
    banded = Grouped(8, 16, 8)
    patterns = {"a": banded, "b": Grouped(4, 16), "c": Unstructured(0.5), "d": banded}
    found = best_together(scores, patterns)
    assert found.keys() == scores.keys()
    assert all(torch.equal(mask, best(scores[name], patterns[name])) for name, mask in found.items())


@pytest.mark.parametrize("together", [1, 1 << 27])
def test_all_layers_are_pruned_however_many_at_a_time(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recover_prune, "TOGETHER", together)
    model = nn.ModuleDict({name: nn.Linear(32, 8, bias=False) for name in "abc"})
    step = in_training(method="magnitude", pattern={"keep": 8, "group": 16})
    masks = Pruner(step, ["a", "b"]).update(model, {"c": torch.ones(8, 32, dtype=torch.bool)}, 1.0, None)
    assert masks.keys() == {"a", "b", "c"} and bool(masks["c"].all())
    for name in "ab":
        weight = model.get_parameter(f"{name}.weight").detach().abs().view(-1, 16)
        assert torch.equal(masks[name].view(-1, 16), weight >= weight.topk(8).values[:, -1:])


@pytest.mark.parametrize("passing", [1.0, 0.0])
def test_masked_weights_compute_as_zeros_and_learn_if_gradients_pass(passing: float) -> None:
    """dL/dW of L = sum(Y * G), Y = X (M W)^T: G^T X, of what is not kept times `passing`."""
    linear = nn.Linear(16, 8, bias=False)
    mask = normal(8, 16) > 0
    keep(linear, mask, torch.tensor(passing))
    x, g = normal(5, 16), normal(5, 8)
    y = linear(x)
    expected = x.double() @ (linear.weight.detach().double() * mask).T
    assert torch.allclose(y.double(), expected, atol=1e-6)
    (y * g).sum().backward()
    assert linear.weight.grad is not None
    whole = g.double().T @ x.double()
    assert torch.allclose(linear.weight.grad.double(), torch.where(mask, whole, passing * whole), atol=1e-5)
    before = linear.weight.detach().clone()
    shrink(linear.weight, mask, 0.75)
    after = linear.weight.detach()
    assert torch.equal(after[mask], before[mask])
    assert torch.allclose(after[~mask], before[~mask] * 0.75)


def test_snip_keeps_the_largest_connection_sensitivity() -> None:
    """c_j = |g_j| with g = dL/dc = w dL/dw at c = 1; s_j = |g_j| / sum |g|, the top kappa of all layers."""
    first, second = nn.Linear(16, 24, bias=False), nn.Linear(24, 8, bias=False)
    x, y = normal(10, 16), normal(10, 8)
    F.mse_loss(second(first(x).tanh()), y).backward()
    w1, w2, x64, y64 = (t.detach().double() for t in (first.weight, second.weight, x, y))
    gates = [torch.ones_like(w, requires_grad=True) for w in (w1, w2)]
    loss = F.mse_loss((x64 @ (w1 * gates[0]).T).tanh() @ (w2 * gates[1]).T, y64)
    sensitivity = [g.abs() for g in torch.autograd.grad(loss, gates)]
    total = float(sum(s.sum() for s in sensitivity))
    flat = torch.cat([s.flatten() / total for s in sensitivity])
    kept = set(flat.argsort(descending=True)[: round(flat.numel() * 0.3)].tolist())
    assert first.weight.grad is not None and second.weight.grad is not None
    masks = snip_masks(
        {"a": first.weight, "b": second.weight},
        {"a": first.weight.grad, "b": second.weight.grad},
        {"a": Unstructured(0.7), "b": Unstructured(0.7)},
    )
    found = torch.cat([masks["a"].flatten(), masks["b"].flatten()])
    assert set(found.nonzero().flatten().tolist()) == kept
    blocks = snip_masks({"a": first.weight}, {"a": first.weight.grad}, {"a": Grouped(4, 16)})["a"]
    assert set(blocks.sum(dim=1).tolist()) == {4}
    best = sensitivity[0].topk(4, dim=1).indices
    assert bool(blocks.gather(1, best).all())


# --- rounding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rounding",
    [
        Rounding(bits=5, group=32),
        Rounding(bits=4, group=64),
        Rounding(bits=8, per="channel", group=None),
        Rounding(bits=4, group=32, symmetric=False),
        Rounding(bits=4, group=32, symmetric=False, zero_point="integer"),
    ],
    ids=lambda r: f"{r.bits}-{r.per}-{r.symmetric}-{r.zero_point}",
)
def test_rounded_weights_lie_on_a_storable_grid(rounding: Rounding) -> None:
    linear = nn.Linear(128, 24, bias=False)
    add_rounder(linear, "x", rounding, True, False)
    assert isinstance(linear, EffectiveLinear)
    before = linear(normal(3, 128))
    linear.rounder.fit(linear.weight)
    assert before.shape == (3, 24)
    with torch.no_grad():
        linear.rounder.delta.add_(normal(*linear.rounder.delta.shape) * 0.1)  # scales as if learned
        linear.weight.mul_(1.7)  # beyond the ends of the grid too
    weight = linear.rounder(linear.weight).detach()
    q, scale, low = linear.rounder.integers(linear.weight)
    assert torch.equal(scale, scale.half().float()), "a scale is a float16"
    assert q.min() >= (0 if not rounding.symmetric else max(-(2 ** (rounding.bits - 1)), -127))
    assert q.max() <= (2**rounding.bits - 1 if not rounding.symmetric else 2 ** (rounding.bits - 1) - 1)
    exact = q.double() * scale.double()[..., None]
    if low is not None:
        exact = exact + low.double()[..., None]
    assert torch.allclose(weight.double(), exact.view_as(weight), atol=1e-6)
    grid = linear.rounder.exported()
    check_exact("x", weight.half(), q, grid)
    with pytest.raises(NumericsError, match="not the trained integers"):
        check_exact("x", (weight * 1.3).half(), q, grid)


def test_gradients_of_weights_and_scales_are_lsqs() -> None:
    linear = nn.Linear(32, 4, bias=False)
    add_rounder(linear, "x", Rounding(bits=4, group=32), True, False)
    assert isinstance(linear, EffectiveLinear)
    linear.rounder.fit(linear.weight)
    with torch.no_grad():
        linear.rounder.base.mul_(0.6)  # so that some weights are clipped
    out = normal(4, 32)
    (linear.rounder(linear.weight) * out).sum().backward()
    scale = linear.rounder.grid()[0].detach().double()
    w, g = linear.weight.detach().double(), out.double()
    x = w / scale
    inside = (x >= -8) & (x <= 7)
    assert int((~inside).sum()) > 0
    assert linear.weight.grad is not None and linear.rounder.delta.grad is not None
    assert torch.allclose(linear.weight.grad.double(), g * inside, atol=1e-6)
    # d(s q)/ds = round(x) - x inside the range, the bound outside; times ds/d(delta) = s
    ds = torch.where(inside, x.round() - x, x.clamp(-8, 7))
    expected = (g * ds).sum(dim=1, keepdim=True) * linear.rounder.base.double()
    assert torch.allclose(linear.rounder.delta.grad.double(), expected, atol=1e-5)


def test_zeros_need_a_grid_that_holds_zero() -> None:
    with pytest.raises(PatternError, match="need not hold 0"):
        add_rounder(nn.Linear(64, 8), "x", Rounding(bits=4, group=32, symmetric=False), True, True)
    linear = nn.Linear(64, 8, bias=False)
    rounding = Rounding(bits=4, group=32, symmetric=False, zero_point="integer")
    add_rounder(linear, "x", rounding, True, True)
    with torch.no_grad():
        linear.weight.add_(0.3)[:, ::2] = 0
    linear.rounder.fit(linear.weight)  # type: ignore[union-attr, operator]
    assert int((linear.rounder(linear.weight)[:, ::2] != 0).sum()) == 0  # type: ignore[operator]
    with pytest.raises(PatternError, match="x: a quantization of groups of 48"):
        add_rounder(nn.Linear(64, 8), "x", Rounding(bits=4, group=48), True, False)


# --- text, schedule ---------------------------------------------------------------------------------


def test_every_block_once_a_pass_whatever_the_batches(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.npy", ([i, i + 1, i + 2] for i in range(0, 300, 3)), 1000, None)
    write_tokens(tmp_path / "b.npy", ([i] for i in range(500, 600)), 1000, 45)
    a, b = (open_tokens(tmp_path / f"{name}.npy", 1000) for name in "ab")
    assert a.tolist() == list(range(300)) and b.tolist() == list(range(500, 545))
    assert a.dtype == np.uint16
    blocks = Blocks([a, b], 8, seed=3)
    assert blocks.count == 300 // 8 + 45 // 8
    whole = blocks.at(range(2 * blocks.count))
    starts = sorted(whole[: blocks.count, 0].tolist())
    assert starts == [*range(0, 296, 8), *range(500, 540, 8)]
    assert sorted(whole[blocks.count :, 0].tolist()) == starts
    assert not torch.equal(whole[: blocks.count], whole[blocks.count :]), "shuffled anew"
    assert bool((whole.diff(dim=1) == 1).all()), "no block runs over the end of a text"
    pieces = [blocks.at(range(i, i + 3)) for i in range(0, 2 * blocks.count, 3)]
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(Blocks([a, b], 8, seed=3).at([50]), whole[50:51]), "no matter what was asked before"


def test_alternatives_replace_some_tokens_after_the_first_pass() -> None:
    ids = np.arange(0, 3200, dtype=np.uint16)
    others = np.stack([ids + 10_000, ids + 20_000], axis=1)
    blocks = Blocks([ids], 32, 5, [others], 0.25)
    plain = Blocks([ids], 32, 5)
    first, later = range(blocks.count), range(blocks.count, 9 * blocks.count)
    assert torch.equal(blocks.at(first), plain.at(first)), "text that was not seen before is left as it is"
    changed = blocks.at(later) - plain.at(later)
    values, counts = changed.unique(return_counts=True)
    assert values.tolist() == [0, 10_000, 20_000], "each is its own token, or a sample for its very place"
    rates = (counts / counts.sum()).tolist()
    # 25,600 draws: the standard error of a rate of 1/8 is 0.002
    assert rates == pytest.approx([0.75, 0.125, 0.125], abs=0.012)
    one, two = changed[: blocks.count] != 0, changed[blocks.count : 2 * blocks.count] != 0
    assert not torch.equal(one, two), "every pass has a choice of its own"
    assert torch.equal(blocks.at([250]), Blocks([ids], 32, 5, [others], 0.25).at([250])), "resumes alike"


def test_samples_follow_the_teachers_distribution(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "teacher", dtype=torch.float32)
    ids = torch.randint(0, VOCABULARY, (1, 16), generator=torch.Generator().manual_seed(2))
    text = ids.repeat(400, 1).flatten()
    np.save(tmp_path / "tokens.npy", np.append(text.numpy(), [5, 6, 7]).astype(np.uint16))
    step = Recover.model_validate(
        {"kind": "recover", "data": [{"source": "x.npy"}], "budget": {"tokens": 1}, "length": 16,
         "resample": {"samples": 5}}
    )  # fmt: skip
    store = Store(tmp_path / "store")
    arguments = step, [tmp_path / "tokens.npy"], folder, "name", store
    (path,) = alternatives(*arguments)
    made = open_tokens(path, VOCABULARY, dimensions=2)
    assert made.shape == (len(text) + 3, 5) and made.dtype == np.uint16
    assert (made[len(text) :] == [[5], [6], [7]]).all(), "what fills no block stays"
    blocks = made[: len(text)].reshape(400, 16, 5)
    assert (blocks[:, 0] == int(ids[0, 0])).all(), "nothing comes before a block's first token"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        expected = model(ids).logits[0].softmax(-1).numpy()
    for place in (1, 7, 15):
        drawn = np.bincount(blocks[:, place].ravel(), minlength=VOCABULARY) / 2000
        p = expected[place - 1]
        # the sum over outcomes of (o - e)^2 / e is chi-squared; its mean and variance are known
        chi = float((2000 * (drawn - p) ** 2 / p).sum())
        assert abs(chi - (VOCABULARY - 1)) < 6 * (2 * VOCABULARY + float((1 / p).sum()) / 2000) ** 0.5
    before = path.stat().st_mtime_ns
    assert alternatives(*arguments) == [path] and path.stat().st_mtime_ns == before, "made once"
    plain = step.model_copy(update={"resample": None})
    assert alternatives(plain, *arguments[1:]) == []


def test_token_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "big.npy", np.array([5, 1000]))
    np.save(tmp_path / "flat.npy", np.zeros((2, 2), int))
    np.save(tmp_path / "object.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "none.npy").write_bytes(b"no")
    for name, words in (("big", "another vocabulary"), ("flat", "no token ids"), ("object", "no token ids"),
                        ("none", "no token ids"), ("absent", "no token ids")):  # fmt: skip
        with pytest.raises(CalibrationError, match=words):
            open_tokens(tmp_path / f"{name}.npy", 1000)
    with pytest.raises(CalibrationError, match="too short"):
        Blocks([np.arange(7)], 8, 0)


def test_the_first_ids_of_a_file_alone(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(100))
    store = Store(tmp_path / "store")
    path = tokenized(str(tmp_path / "ids.npy"), "text", 40, tmp_path, store)
    assert np.load(path).tolist() == list(range(40))
    for limit in (None, 100, 200):
        assert tokenized(str(tmp_path / "ids.npy"), "text", limit, tmp_path, store) == tmp_path / "ids.npy"
    with pytest.raises(SourceError, match="no file"):
        tokenized(str(tmp_path / "absent.npy"), "text", None, tmp_path, store)
    with pytest.raises(SourceError, match="has no tokenizer"):
        tokenized(str(PROSE), "text", None, tmp_path, store)


def test_learning_rate_and_thinned_curve() -> None:
    assert schedule(0.0, 0.1) == 0 and schedule(0.05, 0.1) == pytest.approx(0.5)
    assert schedule(0.1, 0.1) == 1 and schedule(0.55, 0.1) == pytest.approx(0.5)
    assert schedule(1.0, 0.1) == pytest.approx(0) and schedule(0.0, 0.0) == 1
    points = [
        TrainingPoint(step=i, tokens=i, seconds=i, loss=1, learning_rate=1, terms={}) for i in range(1001)
    ]
    thin = thinned(points, 100)
    assert len(thin) <= 102 and thin[0] == points[0] and thin[-1] == points[-1]
    assert thinned(points[:5]) == points[:5] and thinned([]) == []
