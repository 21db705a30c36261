"""The loop: resumed equals uninterrupted, packs do not change their members, schedules follow their formulas."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from midiscover.config import TrainConfig
from midiscover.errors import CorruptError
from midiscover.sae.base import Normalisation
from midiscover.sae.checkpoint import pack_state, unpack_state
from midiscover.sae.registry import make_sae
from midiscover.sae.schedule import aux_window, dead_window, l1_scale, lr_scale, peak_lr
from midiscover.saeconfig import StandardConfig, TopKConfig
from midiscover.train import Diverged, Member, Retired, Trained, train
from tests.workers import MemoryWorker

D_IN, ROWS, BATCH = 10, 160, 16
TRAIN = TrainConfig(batch_size=BATCH, epochs=3, lr=1e-2, report_every=4, checkpoint_every=1e-9, dead_window=40)


class MemorySource:
    """Fixed rows, shuffled by epoch."""

    def __init__(self, rows: Tensor, epochs: int = 3) -> None:
        self.rows, self.epochs = rows, epochs
        mean = rows.mean(0)
        scale = math.sqrt(D_IN) / float((rows - mean).norm(dim=1).mean())
        self.inputs = self.outputs = Normalisation(mean, scale, float((rows - mean).pow(2).sum(1).mean()))
        self.rows_per_epoch, self.batch_size = len(rows), BATCH

    def __len__(self) -> int:
        return self.rows_per_epoch * self.epochs // BATCH

    def batches(self, start: int) -> Iterator[Tensor]:
        orders = [torch.randperm(ROWS, generator=torch.Generator().manual_seed(e)) for e in range(self.epochs)]
        order = torch.cat(orders)
        for step in range(start, len(self)):
            yield self.rows[order[step * BATCH : (step + 1) * BATCH]].bfloat16()


@pytest.fixture
def source() -> MemorySource:
    g = torch.Generator().manual_seed(0)
    atoms = torch.randn(24, D_IN, generator=g)
    codes = torch.relu(torch.randn(ROWS, 24, generator=g) - 1)
    return MemorySource(codes @ atoms + 5)


def members() -> list[Member]:
    return [
        Member(id="a", config=StandardConfig(l1_coefficient=0.3), train=TRAIN, d_sae=32),
        Member(id="b", config=TopKConfig(k=4), train=TRAIN, d_sae=32),
        Member(id="c", config=StandardConfig(l1_coefficient=3), train=dataclasses.replace(TRAIN, lr=1e-3), d_sae=16),
    ]


def trained(results: list[Trained | Diverged | Retired]) -> list[Trained]:
    assert all(isinstance(result, Trained) for result in results)
    return [result for result in results if isinstance(result, Trained)]


def assert_equal(one: Trained, two: Trained) -> None:
    assert one.weights.keys() == two.weights.keys()
    for name in one.weights:
        assert torch.equal(one.weights[name], two.weights[name]), name
    assert one.history == two.history
    assert one.dead_in_window == two.dead_in_window


@pytest.mark.parametrize("stop", [1, 7, 13, 29])
def test_a_resumed_pack_equals_the_uninterrupted_one_bit_for_bit(source: MemorySource, stop: int) -> None:
    whole = trained(train(members(), source, MemoryWorker()))
    first = MemoryWorker(stop_at=stop)
    with pytest.raises(KeyboardInterrupt):
        train(members(), source, first)
    resumed = MemoryWorker(data=first.data)
    again = trained(train(members(), source, resumed))
    assert min(report.step for report in resumed.reports) > stop  # nothing before the checkpoint was done again
    for one, two in zip(whole, again, strict=True):
        assert_equal(one, two)


def test_an_sae_does_not_depend_on_who_shares_its_pack(source: MemorySource) -> None:
    together = trained(train(members(), source, MemoryWorker()))
    for member, one in zip(members(), together, strict=True):
        (alone,) = trained(train([member], source, MemoryWorker()))
        assert_equal(alone, one)


def test_a_checkpoint_of_the_whole_pack_serves_the_part_that_is_missing(source: MemorySource) -> None:
    whole = trained(train(members(), source, MemoryWorker()))
    first = MemoryWorker(stop_at=20)
    with pytest.raises(KeyboardInterrupt):
        train(members(), source, first)
    resumed = MemoryWorker(data=first.data)
    (rest,) = trained(train(members()[1:2], source, resumed))
    assert_equal(rest, whole[1])
    assert min(report.step for report in resumed.reports) > 20


def test_training_never_waits_for_a_slow_checkpoint(source: MemorySource) -> None:
    """One is asked for after every step, and each takes as long as five of them."""

    class Slow(MemoryWorker):
        steps: list[int] = []
        left = 0

        def is_saving(self) -> bool:
            self.left -= 1
            return self.left >= 0

        def save_checkpoint(self, step: int, data: bytes) -> None:
            assert self.left < 0
            self.left = 5
            self.steps.append(step)

    worker = Slow()
    trained(train(members(), source, worker))
    assert worker.steps == list(range(1, len(source), 6))


class Learned(MemorySource):
    """Of a live model: another mean and scale, which a checkpoint keeps."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__(rows)
        self.inputs = self.outputs = Normalisation(self.inputs.mean + 1, self.inputs.scale / 2, self.inputs.variance)

    def state(self) -> dict[str, float]:
        return {"scale": self.inputs.scale}

    def restore(self, state: dict[str, float]) -> None:
        assert state == self.state()


@pytest.mark.parametrize("first", [MemorySource, Learned])
def test_stored_and_streamed_activations_are_never_mixed(source: MemorySource, first: type[MemorySource]) -> None:
    """A pack that was interrupted under the one goes on under itself, and begins anew under the other."""
    then = Learned if first is MemorySource else MemorySource
    interrupted = MemoryWorker(stop_at=13)
    with pytest.raises(KeyboardInterrupt):
        train(members(), first(source.rows), interrupted)
    for kind in (first, then):
        whole = trained(train(members(), kind(source.rows), MemoryWorker()))
        resumed = MemoryWorker(data=interrupted.data)
        for one, two in zip(whole, trained(train(members(), kind(source.rows), resumed)), strict=True):
            assert_equal(one, two)
        assert (min(report.step for report in resumed.reports) > 13) is (kind is first)


def test_an_sae_that_was_retired_is_trained_whole_where_nobody_asks_for_it_any_more(source: MemorySource) -> None:
    def pack(after: float | None) -> list[Member]:
        settings = dataclasses.replace(TRAIN, retire_after=after)
        worse = dataclasses.replace(settings, lr=1e-6)
        config = StandardConfig(l1_coefficient=2, initial_density=None)
        return [
            Member(id="better", config=config, train=settings, d_sae=32),
            Member(id="worse", config=config, train=worse, d_sae=32),
        ]

    worker = MemoryWorker(stop_at=len(source) - 2)
    with pytest.raises(KeyboardInterrupt):
        train(pack(0.4), source, worker)
    better, worse = train(pack(0.4), source, MemoryWorker())
    again = train(pack(0.4), source, MemoryWorker(data=worker.data))
    assert isinstance(worse, Retired), "the fault is there"
    assert worse.step < len(source) - 2
    assert again[1] == worse
    assert_equal(*trained([again[0], better]))
    whole = trained(train(pack(None), source, MemoryWorker()))
    for one, two in zip(whole, trained(train(pack(None), source, MemoryWorker(data=worker.data))), strict=True):
        assert_equal(one, two)


def test_training_equals_a_plain_loop(source: MemorySource) -> None:
    """Adam by its formula, gradients by autograd of the naive loss, schedules written out."""
    config = StandardConfig(l1_coefficient=0.3, initial_density=None)
    settings = dataclasses.replace(TRAIN, l1_warmup=0.05)
    (ours,) = trained(train([Member(id="a", config=config, train=settings, d_sae=32)], source, MemoryWorker()))
    sae = make_sae(config, D_IN, 32)
    sae.initialise_(0)
    params = list(sae.parameters())
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    steps = len(source)
    for step, raw in enumerate(source.batches(0)):
        x = (raw.float() - source.inputs.mean) * source.inputs.scale
        f = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
        error = ((f @ sae.W_dec + sae.b_dec - x) ** 2).sum(1).mean()
        ramp = min(1, step / round(0.05 * steps))
        loss = error + 0.3 * ramp * (f * sae.W_dec.norm(dim=1)).sum(1).mean()
        grads = torch.autograd.grad(loss, params)
        norm = torch.sqrt(sum(((g**2).sum() for g in grads), torch.zeros(())))
        lr = 1e-2 * min((step + 1) / round(0.05 * steps), 1, (steps - step) / round(0.2 * steps))
        with torch.no_grad():
            for p, g, (m, v) in zip(params, grads, moments, strict=True):
                g = g * min(1, 1 / float(norm))
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                unbiased = m / (1 - 0.9 ** (step + 1))
                p -= lr * unbiased / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    expected = sae.fold(source.inputs, source.outputs)
    for name, value in expected.items():
        assert torch.allclose(ours.weights[name], value, atol=2e-3), name
    assert ours.history["fvu"][-1] < 0.5 * ours.history["fvu"][0]


def test_a_diverging_sae_is_named_and_the_others_go_on(source: MemorySource) -> None:
    wild = Member(id="wild", config=StandardConfig(), train=dataclasses.replace(TRAIN, lr=1e30, clip=0), d_sae=16)
    first, second = train([wild, members()[0]], source, MemoryWorker())
    assert isinstance(first, Diverged)
    assert "lower train.lr" in first.reason
    (alone,) = trained(train(members()[:1], source, MemoryWorker()))
    assert isinstance(second, Trained)
    assert_equal(second, alone)


def test_a_diverged_sae_that_is_to_be_resampled_leaves_its_pack_alone(source: MemorySource) -> None:
    """The loss is not finite before its next point says so, and resampling comes in between."""
    config = dataclasses.replace(TRAIN, lr=1e30, clip=0, report_every=20, resample_at=(0.3,), dead_window=1)
    wild = Member(id="wild", config=StandardConfig(), train=config, d_sae=16)
    first, second = train([wild, members()[0]], source, MemoryWorker())
    assert isinstance(first, Diverged)
    assert isinstance(second, Trained)


def test_schedules_follow_their_formulas() -> None:
    config = TrainConfig(lr_warmup=0.1, lr_decay=0.2, l1_warmup=0.5)
    rates = [lr_scale(step, 100, config) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:80] == [1.0] * 70
    assert rates[80:] == pytest.approx([(100 - i) / 20 for i in range(80, 100)])
    assert [l1_scale(step, 100, config) for step in (0, 25, 50, 99)] == [0, 0.5, 1, 1]
    none = TrainConfig(lr_warmup=0, lr_decay=0, l1_warmup=0)
    assert {lr_scale(step, 10, none) for step in range(10)} == {l1_scale(step, 10, none) for step in range(10)} == {1.0}


def test_dead_features_are_those_that_did_not_fire_in_the_window(source: MemorySource) -> None:
    still = dataclasses.replace(TRAIN, lr=1e-30, dead_window=40)  # the weights stay what they were
    (result,) = trained(train([Member(id="s", config=TopKConfig(k=1), train=still, d_sae=64)], source, MemoryWorker()))
    sae = make_sae(TopKConfig(k=1), D_IN, 64)
    sae.initialise_(0)
    with torch.no_grad():
        sae.b_dec.sub_(0.75 * 0.4 * math.sqrt(D_IN) * source.inputs.mean / source.inputs.mean.norm())  # a large one
    last = torch.cat(
        [(raw.float() - source.inputs.mean) * source.inputs.scale for raw in source.batches(len(source) - 3)]
    )
    silent = ~(sae.encode(last) > 0).any(0)  # 40 tokens without firing are reached after three batches of 16
    assert 0 < silent.sum() < 64
    assert result.dead_in_window == pytest.approx(float(silent.double().mean()))
    tokens = len(source) * BATCH
    for window in (tokens, tokens + 1):
        longer = dataclasses.replace(result.member, train=dataclasses.replace(TRAIN, dead_window=window))
        (one,) = trained(train([longer], source, MemoryWorker()))
        assert (one.dead_in_window is None) is (window > tokens), "where none could be silent all along"
    assert dead_window(TrainConfig(), 1000) == 500
    assert dead_window(TrainConfig(), 10**9) == 10_000_000
    assert dead_window(TRAIN, 10**9) == 40
    # Resampling first after 30 % of two epochs of 1,000: at most half of that.
    assert dead_window(TrainConfig(epochs=2, resample_at=(0.6, 0.3)), 1000) == 300


def test_auxk_calls_a_feature_dead_after_a_thirtieth_of_the_training() -> None:
    given, free = TrainConfig(dead_window=40), TrainConfig(epochs=2)
    assert aux_window(given, 40, 90_000) == 40
    assert aux_window(free, dead_window(free, 90_000), 90_000) == 90_000 * 2 // 30
    assert aux_window(free, 10, 90_000) == 10, "never later than the dead features that are reported"


@pytest.mark.parametrize("control", ["untrained", "neurons"])
@pytest.mark.parametrize("size", [0.0, 0.1, 0.4, 0.8, 20.0])
def test_topk_sees_three_quarters_of_a_mean_of_moderate_size_at_first(
    source: MemorySource, control: str, size: float
) -> None:
    """size: of the mean, over the mean distance to it; from 0.4 on, as much of it as there. Neurons stay centred."""
    config = TopKConfig(k=3, control=control)  # type: ignore[arg-type]
    member = Member(id="s", config=config, train=TRAIN, d_sae=2 * D_IN)
    centred = source.rows - source.inputs.mean
    mean = source.inputs.mean / source.inputs.mean.norm() * size * centred.norm(dim=1).mean()
    (made,) = trained(train([member], MemorySource(centred + mean), MemoryWorker()))
    seen = 0.75 * 0.4 / max(size, 0.4) if control == "untrained" else 0.0
    assert torch.allclose(made.weights["b_dec"], (1 - seen) * mean, atol=1e-4)


def test_bfloat16_products_train_to_nearly_the_same_loss(source: MemorySource) -> None:
    half = dataclasses.replace(members()[0], train=dataclasses.replace(TRAIN, dtype="bfloat16"))
    (low,) = trained(train([half], source, MemoryWorker()))
    (full,) = trained(train(members()[:1], source, MemoryWorker()))
    assert low.history["fvu"][-1] == pytest.approx(full.history["fvu"][-1], rel=0.1)
    assert low.weights["W_enc"].dtype == torch.float32


def test_checkpoints_hold_tensors_and_fields_and_refuse_other_bytes() -> None:
    tensors = {"x": torch.arange(5), "y": torch.randn(2, 3)}
    found, fields = unpack_state(pack_state(tensors, {"step": 3, "nan": math.nan}))
    assert fields["step"] == 3
    assert math.isnan(fields["nan"])
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    for broken in (b"", b"no such file", pack_state(tensors, {})[:-1]):
        with pytest.raises(CorruptError):
            unpack_state(broken)


def test_a_target_l0_is_reached_and_its_control_resumes_bit_for_bit(source: MemorySource) -> None:
    long = MemorySource(source.rows, epochs=100)
    config = dataclasses.replace(TRAIN, epochs=100, lr=3e-3, checkpoint_every=1e9)
    steered = [Member(id=str(t), config=StandardConfig(target_l0=t), train=config, d_sae=32) for t in (2, 4)]
    whole = trained(train(steered, long, MemoryWorker()))
    for member, result in zip(steered, whole, strict=True):
        target = member.config.target_l0 if isinstance(member.config, StandardConfig) else None
        assert target is not None
        x = (source.rows - source.inputs.mean) * source.inputs.scale
        l0 = float((result.sae.encode(x) > 0).sum(1).double().mean())
        assert l0 == pytest.approx(target, rel=0.1)
        assert result.coefficient == pytest.approx(result.history["coefficient"][-1])
        assert result.coefficient != member.config.l1_coefficient
    often = [dataclasses.replace(m, train=dataclasses.replace(m.train, checkpoint_every=1e-9)) for m in steered]
    first = MemoryWorker(stop_at=500)
    with pytest.raises(KeyboardInterrupt):
        train(often, long, first)
    for one, two in zip(whole, trained(train(steered, long, MemoryWorker(data=first.data))), strict=True):
        assert_equal(one, two)


def test_a_dominated_sae_is_dropped_and_the_others_are_unchanged(source: MemorySource) -> None:
    """A crippled twin (its learning rate is a thousandth) is worse at FVU and, still dense, at L0."""
    good = dataclasses.replace(TRAIN, retire_after=0.5)
    bad = dataclasses.replace(good, lr=1e-5)
    pack = [
        Member(id="good", config=StandardConfig(l1_coefficient=0.3), train=good, d_sae=32),
        Member(id="bad", config=StandardConfig(l1_coefficient=0.3, initial_density=None), train=bad, d_sae=32),
        Member(id="sparse", config=StandardConfig(l1_coefficient=3), train=good, d_sae=32),
    ]
    one, two, three = train(pack, source, MemoryWorker())
    assert isinstance(two, Retired)
    assert two.by in ("good", "sparse")
    assert 15 <= two.step < 29
    alone = trained(train([pack[0], pack[2]], source, MemoryWorker()))
    for survivor, undisturbed in zip(trained([one, three]), alone, strict=True):
        assert_equal(survivor, undisturbed)
    off = [dataclasses.replace(m, train=dataclasses.replace(m.train, retire_after=None)) for m in pack]
    assert len(trained(train(off, source, MemoryWorker()))) == 3


def test_controls_without_training_take_no_step_and_a_frozen_decoder_stays(source: MemorySource) -> None:
    kinds = ("untrained", "neurons", "frozen_decoder")
    configs = {control: StandardConfig(l1_coefficient=0.3, control=control) for control in kinds}
    pack = [Member(id=c, config=config, train=TRAIN, d_sae=config.width(D_IN)) for c, config in configs.items()]
    untrained, neurons, frozen = trained(train([*members()[:1], *pack], source, MemoryWorker()))[1:]
    initial = make_sae(configs["untrained"], D_IN, pack[0].d_sae)
    initial.initialise_(0)
    initial.calibrate_((next(source.batches(0)).float() - source.inputs.mean) * source.inputs.scale)
    for name, value in initial.fold(source.inputs, source.outputs).items():
        assert torch.equal(untrained.weights[name], value)
    assert (untrained.steps, untrained.tokens, untrained.history["step"]) == (0, 0, [])
    rows = source.rows - source.inputs.mean
    features = torch.relu(rows @ neurons.weights["W_enc"] + neurons.weights["b_enc"])
    assert torch.allclose(features, torch.cat([rows.clamp(min=0), (-rows).clamp(min=0)], 1), atol=1e-5)
    directions = torch.nn.functional.normalize(frozen.weights["W_dec"], dim=1)
    initial = make_sae(configs["frozen_decoder"], D_IN, pack[2].d_sae)
    initial.initialise_(0)
    assert torch.allclose(directions, torch.nn.functional.normalize(initial.W_dec.detach(), dim=1), atol=1e-6)
    assert frozen.history["fvu"][-1] < 0.8 * frozen.history["fvu"][0]


def test_the_learning_rate_follows_width_and_steps() -> None:
    auto = TrainConfig()
    base = peak_lr(auto, d_sae=4608, steps=300)
    assert peak_lr(auto, d_sae=4 * 4608, steps=300) == pytest.approx(base / 2)
    assert peak_lr(auto, d_sae=4608, steps=30_000) == pytest.approx(base * 100**-0.4)
    assert peak_lr(TrainConfig(lr=0.7), d_sae=4608, steps=300) == 0.7
