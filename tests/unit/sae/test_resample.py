"""Resampling against a naive version, for every architecture; and that it does what it is there for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from midiscover.config import TrainConfig
from midiscover.member import Member, Slot, Trained
from midiscover.sae.base import Sae, StepContext
from midiscover.sae.registry import ARCHITECTURES
from midiscover.sae.resample import resample_
from midiscover.saeconfig import BatchTopKConfig, GatedConfig, JumpReluConfig, SaeConfig, StandardConfig, TopKConfig
from midiscover.train import train
from tests.planted import PlantedDictionary, PlantedSource, scores
from tests.unit.sae.naive import CONFIGS, D_SAE, TOKENS, batch, dead_of, make_used, some_dead
from tests.workers import MemoryWorker

WINDOW = 100


def stepped(sae: Sae, steps: int = 3) -> torch.optim.Optimizer:
    """An optimiser that has moments of every parameter."""
    optimizer = torch.optim.Adam([p for p in sae.parameters() if p.requires_grad], lr=1e-3)
    x, y = batch(sae)
    for _ in range(steps):
        optimizer.zero_grad()
        sae.loss(x, y, StepContext(sparsity=0.1, dead=dead_of(some_dead()) if sae.uses_dead else None)).total.backward()
        optimizer.step()
        sae.after_step()
    return optimizer


def silent(dead: Tensor) -> Tensor:
    """[D_SAE] tokens since a feature fired: at least the window where it is dead."""
    return torch.where(dead, WINDOW, WINDOW - 1)


@pytest.fixture(params=sorted(ARCHITECTURES))
def sae(request: pytest.FixtureRequest) -> Sae:
    return make_used(CONFIGS[request.param])


def test_it_equals_the_naive_version(sae: Sae) -> None:
    optimizer, dead, (x, y) = stepped(sae), some_dead(), batch(sae)
    since_fired, before = silent(dead), {name: value.detach().clone() for name, value in sae.named_parameters()}
    moments = {name: dict(optimizer.state[value]) for name, value in sae.named_parameters()}
    moments = {name: {key: value.clone() for key, value in held.items()} for name, held in moments.items()}
    residual = (y - sae(x)).detach()
    assert resample_(sae, optimizer.state, since_fired, x, y, window=WINDOW, seed=5) == int(dead.sum())

    weight = torch.tensor([float((row**2).sum()) ** 2 for row in residual], dtype=torch.float64)
    drawn = torch.multinomial(weight + 1e-12, 10, replacement=False, generator=torch.Generator().manual_seed(5))
    alive = [i for i in range(D_SAE) if not dead[i]]
    decoder_norm = sum(math.dist(before["W_dec"][i].tolist(), [0] * sae.d_out) for i in alive) / len(alive)
    encoder_norm = sum(math.dist(before["W_enc"][:, i].tolist(), [0] * sae.d_in) for i in alive) / len(alive)
    wanted = {name: value.clone() for name, value in before.items()}
    for row, i in zip(drawn.tolist(), dead.nonzero().flatten().tolist(), strict=True):
        wanted["W_dec"][i] = residual[row] / math.dist(residual[row].tolist(), [0] * sae.d_out) * decoder_norm
        shorter = 1 if "topk" in sae.kind else 5
        wanted["W_enc"][:, i] = x[row] / math.dist(x[row].tolist(), [0] * sae.d_in) * encoder_norm / shorter
        for name in ("b_enc", "b_gate", "b_mag", "r_mag"):
            if name in wanted:
                wanted[name][i] = 0
        if "threshold" in wanted:
            # Column and threshold shrink together, so that the feature fires where an unshrunk one would.
            wanted["threshold"][i] = sum(float(before["threshold"][j]) for j in alive) / len(alive) / shorter
    for name, value in sae.named_parameters():
        assert torch.allclose(value, wanted[name], atol=1e-12), name
        for key, held in optimizer.state[value].items():
            was = moments[name][key].clone()
            if key != "step" and name == "W_enc":
                was[:, dead] = 0
            elif key != "step" and name not in ("b_dec", "W_skip"):
                was[dead] = 0
            assert torch.equal(held, was), (name, key)
    assert since_fired.tolist() == [0 if dead[i] else WINDOW - 1 for i in range(D_SAE)]


def test_new_features_differ_look_at_rows_and_depend_on_the_seed_alone(sae: Sae) -> None:
    state = {name: value.clone() for name, value in sae.state_dict().items()}
    dead, (x, y) = some_dead(), batch(sae)
    made = []
    for seed in (5, 5, 6):
        sae.load_state_dict(state)
        resample_(sae, stepped(sae).state, silent(dead), x, y, window=WINDOW, seed=seed)
        made.append(sae.W_dec[dead].detach())
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    unit = made[0] / made[0].norm(dim=1, keepdim=True)
    assert float((unit @ unit.T - torch.eye(len(unit))).max()) < 1 - 1e-6  # no twins
    assert bool((sae.encode(x)[:, dead] > 0).any(0).all())  # each on its row, at least


def test_few_living_features_and_few_rows_are_enough(sae: Sae) -> None:
    optimizer, (x, y) = stepped(sae), batch(sae)
    for living in (0, 1):
        dead = torch.arange(D_SAE) >= living
        since_fired = silent(dead)
        assert resample_(sae, optimizer.state, since_fired, x, y, window=WINDOW, seed=1) == TOKENS < D_SAE - living
        assert int((since_fired == 0).sum()) == TOKENS
        assert all(bool(value.isfinite().all()) for value in sae.state_dict().values())
        assert float(sae.W_dec.detach().norm(dim=1).min()) > 0


def test_nothing_moves_where_none_is_dead_or_the_decoder_is_frozen(sae: Sae) -> None:
    x, y = batch(sae)
    optimizer = stepped(sae)
    state = {name: value.clone() for name, value in sae.state_dict().items()}
    assert resample_(sae, optimizer.state, silent(torch.zeros(D_SAE).bool()), x, y, window=WINDOW, seed=1) == 0
    sae.W_dec.requires_grad_(False)
    assert resample_(sae, optimizer.state, silent(some_dead()), x, y, window=WINDOW, seed=1) == 0
    assert all(torch.equal(value, state[name]) for name, value in sae.state_dict().items())


@pytest.mark.parametrize(
    "config",
    [
        StandardConfig(l1_coefficient=2.0),
        GatedConfig(l1_coefficient=2.0),
        JumpReluConfig(l0_coefficient=0.7),
        TopKConfig(k=6, auxk_coefficient=0.0),
        BatchTopKConfig(k=6, auxk_coefficient=0.0),
    ],
    ids=lambda config: config.kind,
)
def test_features_that_were_killed_come_back_and_find_atoms(config: SaeConfig) -> None:
    """Half of 192 features begin far below zero, where no gradient reaches them; the rest is too few for 128 atoms."""
    planted = PlantedDictionary(d_in=64, n_true=128, l0=6)
    source, held_out = PlantedSource(planted, batch_size=256, steps=300), planted.held_out(4096)
    before, after = (
        scores(_train_with_half_dead(config, source, at), source, held_out) for at in ((), (0.2, 0.35, 0.5))
    )
    assert before.dead >= 0.5
    assert after.dead < 0.34  # 128 atoms need two thirds of 192 features
    assert after.fvu < 0.9 * before.fvu
    assert after.mean_max_cosine > before.mean_max_cosine + 0.1


def test_it_comes_before_the_last_step_at_the_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A share next to 1 would round to a step that never comes."""
    source = PlantedSource(PlantedDictionary(d_in=8, n_true=16, l0=2), batch_size=16, steps=20)
    seeds: list[int] = []
    monkeypatch.setattr("midiscover.member.resample_", lambda *_, seed, **__: seeds.append(seed))
    settings = TrainConfig(batch_size=16, epochs=1, resample_at=(0.5, 0.99), seed=100)
    train([Member(id="a", config=StandardConfig(), train=settings, d_sae=16)], source, MemoryWorker())
    assert seeds == [110, 119]


def _train_with_half_dead(config: SaeConfig, source: PlantedSource, resample_at: tuple[float, ...]) -> Trained:
    settings = TrainConfig(batch_size=256, epochs=1, lr=5e-3, dead_window=256 * 20, resample_at=resample_at)
    member = Member(id="a", config=config, train=settings, d_sae=192)
    cpu = torch.device("cpu")
    slot = Slot(member, source.inputs, source.outputs, rows_per_epoch=source.rows_per_epoch, steps=300, device=cpu)
    with torch.no_grad():
        slot.sae.get_parameter(slot.sae.per_feature[0])[:96] = -100  # b_enc, or the gate's
    for step, raw in enumerate(source.batches(0)):
        assert isinstance(raw, Tensor)
        x = (raw - source.inputs.mean) * source.inputs.scale
        slot.step(x, x, step)
    trained = slot.finish(tokens=300 * 256)
    assert isinstance(trained, Trained)
    return trained
