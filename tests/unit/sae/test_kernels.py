"""The GPU's kernels against plain formulas, and whole steps with them against the steps of a CPU.

Where there is no GPU Triton interprets the kernels, so that every line of them runs here too.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import midiscover.member
import midiscover.sae.code
import midiscover.sae.pattern
from midiscover.config import TrainConfig
from midiscover.member import Member, Slot
from midiscover.sae import replay
from midiscover.sae.base import Dead, Normalisation, Sae, StepContext
from midiscover.sae.checkpoint import pack_state, unpack_state
from midiscover.sae.jumprelu import JumpReluStep
from midiscover.sae.registry import ARCHITECTURES
from midiscover.sae.update import HalvedUpdate
from midiscover.saeconfig import SaeConfig
from tests.unit.sae.naive import CONFIGS, rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read where the kernels are defined
pytest.importorskip("triton")

from midiscover.sae import kernels  # noqa: E402 - see above

TOKENS, D_SAE, D = 37, 300, 70
BATCH, STEPS = 24, 6
HALF = 2**-8 if DEVICE == "cuda" else 2**-7
"""Relative error of a number in bfloat16: GPUs round, Triton's interpreter cuts off."""


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def segments() -> tuple[Tensor, Tensor, Tensor]:
    """Starts of an empty, a short and a long segment, and [n] rows and weights."""
    starts = torch.tensor([0, 3, 3, 20, 53], device=DEVICE)
    which = torch.randint(0, TOKENS, (53,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return starts, which, normal(2, 53)


def test_sums_of_weighted_rows() -> None:
    starts, which, weights = segments()
    held = normal(3, TOKENS, D)
    found = kernels.weighted_rows(which, starts, weights, held, torch.float32)
    for segment, (begin, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        assert torch.allclose(found[segment], weights[begin:end] @ held[which[begin:end]], atol=1e-5)


def test_dot_products_at_places() -> None:
    starts, _, _ = segments()
    feature = torch.randint(0, D_SAE, (53,), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    left, right = normal(5, 4, D), normal(6, D_SAE, D)
    token = torch.repeat_interleave(torch.arange(4, device=DEVICE), starts.diff())
    found = kernels.row_dots(starts, feature, left, right)
    assert torch.allclose(found, (left[token] * right[feature]).sum(1), atol=1e-5)


def test_sums_of_segments() -> None:
    starts, _, weights = segments()
    sums = [weights[begin:end].sum() for begin, end in zip(starts[:-1], starts[1:], strict=True)]
    assert torch.allclose(kernels.segment_sums(starts, weights), torch.stack(sums), atol=1e-5)


def awkward() -> Tensor:
    """[TOKENS, D_SAE] bfloat16 with a row of equal values, one of negative ones, and an infinite value."""
    values = normal(7, TOKENS, D_SAE).bfloat16()
    values[0], values[1], values[2, 5] = 1.0, -values[1].abs(), float("-inf")
    return values


@pytest.mark.parametrize("k", [1, 9, D_SAE])
def test_the_k_largest_of_each_token_and_the_first_of_equal_ones(k: int) -> None:
    values = awkward()
    token, feature, starts = (found.cpu() for found in kernels.top_of_tokens(values, k))
    assert torch.equal(token, torch.arange(TOKENS).repeat_interleave(k))
    assert torch.equal(starts, k * torch.arange(TOKENS + 1))
    for row, found in zip(values.tolist(), feature.view(TOKENS, k).tolist(), strict=True):
        assert found == sorted(sorted(range(D_SAE), key=lambda i: (-row[i], i))[:k])


@pytest.mark.parametrize("count", [1, 333, 9 * TOKENS, D_SAE * TOKENS])
def test_the_largest_of_a_batch_and_the_first_of_equal_ones(count: int) -> None:
    values = awkward()
    flat = values.flatten().tolist()
    expected = sorted(sorted(range(len(flat)), key=lambda i: (-flat[i], i))[:count])
    token, feature, starts = (found.cpu() for found in kernels.top_of_batch(values, count))
    assert (token * D_SAE + feature).tolist() == expected
    assert torch.equal(starts, torch.searchsorted(token, torch.arange(TOKENS + 1)))


def test_scaled_rows() -> None:
    rows, factors = normal(5, TOKENS, D).bfloat16(), normal(6, TOKENS)
    expected = rows.float() * factors[:, None]
    assert torch.allclose(kernels.scaled_rows(rows, factors).float(), expected, rtol=HALF, atol=1e-6)


def test_relu_and_its_gradient_with_sums_over_the_tokens() -> None:
    pre, grad, column = normal(8, TOKENS, D_SAE).bfloat16(), normal(9, TOKENS, D_SAE).bfloat16(), normal(10, D_SAE)
    features = pre.clone()
    sums, counts = kernels.relu_with_sums_(features)
    assert torch.equal(features, pre.relu())
    assert torch.allclose(sums, pre.relu().float().sum(0), atol=1e-4)
    assert torch.equal(counts, (pre > 0).sum(0))
    found, sums = kernels.relu_backward(grad, column, features)
    expected = torch.where(pre > 0, grad.float() + column, 0)
    assert torch.allclose(found.float(), expected, rtol=HALF, atol=1e-6)
    assert torch.allclose(sums, expected.sum(0), atol=1e-4)


def test_jumprelu_and_its_gradients_are_those_of_the_step_on_a_cpu() -> None:
    pre, grad = normal(8, TOKENS, D_SAE).bfloat16(), normal(9, TOKENS, D_SAE).bfloat16()
    threshold, width, by_count = normal(10, D_SAE).abs(), 0.25, 0.7
    features, counts = kernels.jump(pre, threshold)
    passed, sums, near_grads, nears = kernels.jump_backward(grad, pre, threshold, width)
    wide, cut = pre.float().requires_grad_(), threshold.clone().requires_grad_()
    expected, count = JumpReluStep.apply(wide, cut, width, TOKENS)
    torch.autograd.backward([expected, count], [grad.float(), torch.tensor(by_count, device=DEVICE)])
    assert wide.grad is not None
    assert cut.grad is not None
    assert torch.equal(features.float(), expected)
    assert torch.equal(counts, (expected > 0).sum(0))
    assert torch.equal(passed.float(), wide.grad)
    assert torch.allclose(sums, wide.grad.sum(0), atol=1e-4)
    by_threshold = -(threshold * near_grads + nears * (by_count / TOKENS)) / width
    assert torch.allclose(by_threshold, cut.grad, atol=1e-4)


@pytest.mark.parametrize("unit", [False, True])
def test_adam_is_pytorchs(unit: bool) -> None:
    weight = normalize(normal(11, D_SAE, D))
    parameter = torch.nn.Parameter(weight.clone())
    theirs = torch.optim.Adam([parameter], lr=1e-2)
    first, second, half = torch.zeros_like(weight), torch.zeros_like(weight), weight.bfloat16()
    scale, knobs = torch.tensor(0.5, device=DEVICE), torch.zeros(2, device=DEVICE)
    for step in range(1, 4):
        grad = normal(11 + step, D_SAE, D).bfloat16()
        parameter.grad = grad.float() * scale
        if unit:
            parameter.grad -= (parameter.grad * parameter.data).sum(1, keepdim=True) * parameter.data
        theirs.step()
        if unit:
            parameter.data /= parameter.data.norm(dim=1, keepdim=True)
        knobs.copy_(torch.tensor([1e-2 / (1 - 0.9**step), (1 - 0.999**step) ** -0.5]))
        kernels.adam_(weight, grad, first, second, half=half, scale=scale, knobs=knobs, betas=(0.9, 0.999), unit=unit)
    assert torch.allclose(weight, parameter.data, atol=1e-6)
    assert torch.allclose(half.float(), weight, rtol=HALF)


@pytest.fixture
def kernel_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels serve whatever device there is."""
    monkeypatch.setattr(midiscover.sae.pattern, "KERNEL_DEVICES", (DEVICE,))


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """Whether kernels can be built is found out once for a process."""
    midiscover.sae.pattern._usable.cache_clear()
    yield
    midiscover.sae.pattern._usable.cache_clear()


@pytest.mark.usefixtures("kernel_device", "asked_anew")
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler."),
        torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device"),
    ],
    ids=["compiler", "image"],
)
def test_where_no_kernel_runs_pytorchs_operators_take_the_steps(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    pattern = midiscover.sae.pattern
    assert pattern.kernels_of(torch.device(DEVICE)) is kernels
    pattern._usable.cache_clear()
    tried: list[torch.device] = []

    def fails(device: torch.device) -> None:
        tried.append(device)
        raise error

    monkeypatch.setattr(pattern, "try_kernel", fails)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert [pattern.kernels_of(torch.device(DEVICE)) for _ in range(3)] == [None] * 3
    assert len(tried) == 1
    (told,) = caplog.messages
    assert told.endswith(f"no kernel can be built: {error}")


@pytest.mark.usefixtures("kernel_device", "asked_anew")
@pytest.mark.parametrize("message", ["out of memory", "an illegal memory access was encountered"])
def test_a_card_that_fails_is_no_lack_of_a_compiler(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    def fails(_: torch.device | None = None) -> None:
        raise torch.AcceleratorError(f"CUDA error: {message}")

    monkeypatch.setattr(midiscover.sae.pattern, "try_kernel", fails)
    monkeypatch.setattr(torch.cuda, "synchronize", fails if "illegal" in message else lambda: None)
    with pytest.raises(torch.AcceleratorError, match=message):
        midiscover.sae.pattern.kernels_of(torch.device(DEVICE))


def slot(config: SaeConfig, dtype: str, device: str) -> Slot:
    """Of a member whose activations have mean 0 and mean square 1."""
    transcodes = ARCHITECTURES[config.kind].transcodes
    d_in, d_out, d_sae = 24, 20 if transcodes else 24, 40
    train = TrainConfig(batch_size=BATCH, lr=1e-3, dtype=dtype, clip=0.5)  # type: ignore[arg-type]
    inputs, outputs = (Normalisation(torch.zeros(d), 1.0, float(d)) for d in (d_in, d_out))
    member = Member(id="x", config=config, train=train, d_sae=d_sae)
    return Slot(member, inputs, outputs, rows_per_epoch=STEPS * BATCH, steps=STEPS, device=torch.device(device))


def gradients(one: Slot, x: Tensor, y: Tensor, *, autocast: bool) -> dict[str, Tensor]:
    """Of every parameter, float64 on the CPU, with a tenth of the features dead."""
    sae, device = one.sae, one.since_fired.device
    dead = torch.arange(sae.d_sae, device=device) % 10 == 0
    x, y = (rows.to(device, sae.b_dec.dtype) for rows in (x, y))
    with one.update.computing(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        losses = sae.loss(x, y, StepContext(sparsity=0.3, dead=Dead(dead, 7) if sae.uses_dead else None))
    losses.total.backward()
    halves = one.update.halves if isinstance(one.update, HalvedUpdate) else {}
    found = {name: halves.get(name, parameter).grad for name, parameter in sae.named_parameters()}
    assert losses.code.fired().any()
    return {name: grad.double().cpu() for name, grad in found.items() if grad is not None}


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_gradients_are_as_exact_as_pytorchs_own_in_bfloat16(
    kind: str, sparse: bool, kernel_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their distance from the gradients in float64 is that of autocast's, or little more.

    Thrice as much, and one rounding: which entries lie so near a cut that rounding moves them over it is chance.
    """
    monkeypatch.setattr(midiscover.sae.code, "SPARSE_BELOW_ON_GPU", 1.0 if sparse else 0.0)
    monkeypatch.setattr(midiscover.sae.code, "SPARSE_FROM", 0)
    halved, autocast, exact = (slot(CONFIGS[kind], dtype, d) for dtype, d in zip(
        ("bfloat16", "float32", "float32"), (DEVICE, "cpu", "cpu"), strict=True))  # fmt: skip
    assert isinstance(halved.update, HalvedUpdate)
    assert not isinstance(autocast.update, HalvedUpdate)
    exact.sae.double()
    x = rows(1, exact.sae.d_in, BATCH)
    y = rows(2, exact.sae.d_out, BATCH) if exact.sae.transcodes else x
    for one in (halved, autocast, exact):
        use(one.sae)
        one.update.changed()
    truth = gradients(exact, x, y, autocast=False)
    ours, theirs = gradients(halved, x, y, autocast=True), gradients(autocast, x, y, autocast=True)
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        allowed = 3 * float((theirs[name] - expected).norm()) + HALF * float(expected.norm())
        assert float((ours[name] - expected).norm()) <= allowed, name


@torch.no_grad()
def use(sae: Sae) -> None:
    """Values that bfloat16 holds, none of them 0, so that only what is computed is rounded."""
    for seed, (_, parameter) in enumerate(sae.named_parameters()):
        noise = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        parameter.add_(noise.to(parameter)).copy_(parameter.bfloat16())


@pytest.mark.parametrize("kind", ["standard", "topk"])
def test_a_training_goes_on_bit_for_bit_and_learns_as_in_float32(kind: str, kernel_device: None) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (STEPS * BATCH, 40)
    codes = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.1)
    inputs = codes @ normalize(torch.randn(40, 24, generator=generator), dim=1)
    batches = ((inputs - inputs.mean(0)) / inputs.std()).to(DEVICE).split(BATCH)
    halved, again, plain = (slot(CONFIGS[kind], dtype, DEVICE) for dtype in ("bfloat16", "bfloat16", "float32"))
    for one in (halved, plain):
        one.sae.calibrate_(batches[0])
    point = expected = None
    for step, x in enumerate(batches):
        if step == STEPS // 2:
            again.restore(*unpack_state(pack_state(*halved.state())))
            halved.update.changed()  # a copy made anew: Triton's interpreter does not round as PyTorch does
        point, expected = halved.step(x, x, step), plain.step(x, x, step)
        if step >= STEPS // 2:
            again.step(x, x, step)
    for (name, one), two in zip(halved.sae.named_parameters(), again.sae.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert point is not None
    assert expected is not None
    assert float(point.mse) == pytest.approx(float(expected.mse), rel=0.02)
    assert float(point.l0) == pytest.approx(float(expected.l0), rel=0.05)
    assert halved.sae.W_enc.dtype == torch.float32


class Unrecorded:
    """In a recording's place where there is no card to record."""

    def __init__(self, function: Callable[..., Sequence[Tensor]]) -> None:
        self.function = function

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        return self.function(*inputs)


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_recorded_steps_ask_seldom_for_dead_features_and_learn_the_same(
    kind: str, kernel_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(midiscover.member, "ASKED_EVERY", 2)
    monkeypatch.setattr(midiscover.member, "FEWEST_COLUMNS", 8)
    if DEVICE == "cpu":
        monkeypatch.setattr(midiscover.member, "Replayed", Unrecorded)
    recorded, asking = (slot(CONFIGS[kind], "bfloat16", DEVICE) for _ in range(2))
    x = rows(1, recorded.sae.d_in, BATCH).float().to(DEVICE)
    rooms: list[int] = []
    for one in (recorded, asking):
        one.aux_window, one.records = 3 * BATCH, one is recorded
        use(one.sae)
        one.update.changed()
    for step in range(STEPS + 2):
        batch = x + 0.1 * normal(step, *x.shape)
        for one in (recorded, asking):
            one.step(batch, batch, step)
        rooms.append(recorded.dead_at_most)
        assert int((recorded.since_fired - BATCH >= recorded.aux_window).sum()) <= recorded.dead_at_most
        assert torch.equal(recorded.since_fired, asking.since_fired)
    assert asking.dead_at_most > 0, "features are dead at the end"
    assert rooms[0] == 0
    assert set(rooms) <= {0, 8, 16, 32, 40}
    assert len(recorded.recordings) == len(set(rooms)) > 1
    for (name, one), two in zip(recorded.sae.named_parameters(), asking.sae.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-5), name


@pytest.mark.parametrize("window", [1, BATCH // 2, 3 * BATCH, 20 * BATCH])
def test_what_has_just_fired_never_counts_as_dead(window: int, kernel_device: None) -> None:
    """However short the window is beside the steps for which one answer would hold."""
    recorded = slot(CONFIGS["topk"], "bfloat16", DEVICE)
    recorded.aux_window, recorded.records = window, True
    for step in range(40):
        recorded.since_fired.zero_()
        assert recorded._dead_at_most(step, BATCH) == 0
    recorded.since_fired[:3] = 10**6
    recorded.known_before = 0
    assert 3 <= recorded._dead_at_most(40, BATCH) <= recorded.member.d_sae


def test_recordings_read_an_argument_of_one_form_from_one_place() -> None:
    rows = normal(0, 3, 4)
    held = replay._shared(0, rows)
    assert torch.equal(held, rows)
    assert replay._shared(0, rows + 1) is held
    assert all(replay._shared(*other) is not held for other in ((1, rows), (0, rows.double()), (0, rows[:2])))
    name = weakref.ref(held)
    del held
    assert name() is None, "and it is gone with the last of them"
