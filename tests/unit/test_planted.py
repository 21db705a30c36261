"""Known answers: every architecture finds the atoms of a planted dictionary, down to a stated floor.

128 atoms in 64 dimensions, 6 of them per row; 192 features, 800 steps of 256 new rows, all at the true L0 and with
their own defaults. The floors are the lowest (FVU: the highest) of five seeds, each with a dictionary of its own, and a
margin below.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import midiscover.sae.code
from midiscover.config import TrainConfig
from midiscover.progress import Progress
from midiscover.sae.base import Sae
from midiscover.sae.registry import ARCHITECTURES, make_sae
from midiscover.saeconfig import (
    LONGEST_WARMUP,
    BatchTopKConfig,
    GatedConfig,
    JumpReluConfig,
    MatryoshkaConfig,
    PenaltyConfig,
    SaeConfig,
    SkipTranscoderConfig,
    StandardConfig,
    TopKConfig,
    TranscoderConfig,
)
from midiscover.train import Member, Trained, train
from tests.planted import (
    MAX_RATE,
    RECOVERED,
    PlantedDictionary,
    PlantedSource,
    Scores,
    _share,
    atom_cosines,
    firing_rates,
    recovered,
    recovered_by_maximum,
    scores,
)

D_SAE, BATCH, STEPS, TRUE_L0 = 192, 256, 800, 6.0
TRAIN = TrainConfig(batch_size=BATCH, checkpoint_every=1e9, report_every=100, dead_window=5000)
SEEDS = (0, 1)


class Known(NamedTuple):
    """An architecture's settings and the worst that five seeds gave."""

    config: SaeConfig
    recovered: float
    cosine: float
    fvu: float


KNOWN = {
    "standard": Known(StandardConfig(target_l0=TRUE_L0), 0.984, 0.980, 0.204),
    "standard, unit norm": Known(StandardConfig(target_l0=TRUE_L0, decoder="unit_norm"), 0.977, 0.978, 0.167),
    "gated": Known(GatedConfig(target_l0=TRUE_L0), 0.953, 0.973, 0.076),
    # With `initial_density: null`: sparsity early on may cost nothing in the end.
    "jumprelu": Known(JumpReluConfig(target_l0=TRUE_L0), 0.992, 0.985, 0.070),
    "topk": Known(TopKConfig(k=6), 0.953, 0.966, 0.115),
    "batchtopk": Known(BatchTopKConfig(k=6), 0.906, 0.959, 0.082),
    # Its first twelve features have to reconstruct by themselves, so they are sums of atoms; that is no fault of it.
    "matryoshka_batchtopk": Known(MatryoshkaConfig(k=6), 0.609, 0.850, 0.146),
    "transcoder": Known(TranscoderConfig(target_l0=TRUE_L0), 0.945, 0.963, 0.213),
    "skip_transcoder": Known(SkipTranscoderConfig(target_l0=TRUE_L0), 0.820, 0.912, 0.055),
}
RECOVERED_MARGIN, COSINE_MARGIN, FVU_MARGIN = 0.05, 0.02, 1.1
"""Below the worst share of atoms and mean cosine; times the worst FVU."""
PENALTIES = [name for name, known in KNOWN.items() if isinstance(known.config, PenaltyConfig)]


class Worker:
    """Keeps nothing."""

    device = torch.device("cpu")

    def load_checkpoint(self, read: object) -> None:
        return None

    def save_checkpoint(self, step: int, data: bytes) -> None:
        raise AssertionError("the interval is longer than the run")

    def is_saving(self) -> bool:
        return False

    def report(self, progress: Progress) -> None:
        pass


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order: two runs are then equal bit for bit, and small products are fastest so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def planted(seed: int = 0) -> PlantedDictionary:
    return PlantedDictionary(l0=TRUE_L0, skip=0.5, seed=seed)


def trained(
    configs: Sequence[SaeConfig], *, seed: int = 0, steps: int = STEPS, settings: TrainConfig = TRAIN
) -> list[Trained]:
    """One pack of SAEs on the stream `seed`; all of them transcoders or none."""
    source = stream(configs[0], seed=seed, steps=steps)
    settings = dataclasses.replace(settings, seed=seed)
    members = [Member(id=str(i), config=c, train=settings, d_sae=D_SAE) for i, c in enumerate(configs)]
    results = train(members, source, Worker())
    assert all(isinstance(result, Trained) for result in results)
    return [result for result in results if isinstance(result, Trained)]


def stream(config: SaeConfig, *, seed: int = 0, steps: int = STEPS) -> PlantedSource:
    return PlantedSource(planted(seed), batch_size=BATCH, steps=steps, seed=seed, pairs=transcodes(config))


def transcodes(config: SaeConfig) -> bool:
    return ARCHITECTURES[config.kind].transcodes


def scored(
    configs: Sequence[SaeConfig], *, seed: int = 0, steps: int = STEPS, settings: TrainConfig = TRAIN
) -> list[Scores]:
    held_out = planted(seed).held_out()
    results = trained(configs, seed=seed, steps=steps, settings=settings)
    return [scores(result, stream(configs[0], seed=seed), held_out) for result in results]


@functools.cache
def known_scores(seed: int, *, sparse: bool = False) -> dict[str, Scores]:
    """Every architecture trained with its settings of KNOWN; with sparse codes, which batches so small do not get."""
    found: dict[str, Scores] = {}
    for pairs in (False, True):
        names = [name for name, known in KNOWN.items() if transcodes(known.config) == pairs]
        with patch.object(midiscover.sae.code, "SPARSE_FROM", 0 if sparse else 2**62):
            found |= zip(names, scored([KNOWN[name].config for name in names], seed=seed), strict=True)
    return found


def test_every_architecture_has_a_floor_here() -> None:
    assert {known.config.kind for known in KNOWN.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", KNOWN)
def test_the_planted_atoms_are_found(name: str, seed: int) -> None:
    known, found = KNOWN[name], known_scores(seed)[name]
    print(f"{name} seed {seed}: {found}, {found.l0 / TRUE_L0:.2f} of the true L0")
    assert found.recovered >= known.recovered - RECOVERED_MARGIN
    assert found.mean_max_cosine >= known.cosine - COSINE_MARGIN
    assert found.fvu <= known.fvu * FVU_MARGIN
    assert found.l0 == pytest.approx(TRUE_L0, rel=0.1)


@pytest.mark.parametrize("name", KNOWN)
def test_sparse_steps_train_the_same_sae(name: str) -> None:
    """Steps are equal to rounding, and a whole training by what is found: rounding grows on its way."""
    dense, sparse = known_scores(SEEDS[0])[name], known_scores(SEEDS[0], sparse=True)[name]
    print(f"{name}: {dense}, sparse {sparse}")
    assert sparse != dense
    assert abs(sparse.recovered - dense.recovered) <= 0.03
    assert sparse.mean_max_cosine == pytest.approx(dense.mean_max_cosine, abs=0.01)
    assert sparse.fvu == pytest.approx(dense.fvu, rel=0.03)
    assert sparse.l0 == pytest.approx(dense.l0, rel=0.03)


@pytest.mark.parametrize("name", KNOWN)
def test_two_seeds_agree(name: str) -> None:
    one, two = (known_scores(seed)[name] for seed in SEEDS)
    print(f"{name}: recovered {one.recovered:.3f} {two.recovered:.3f}, FVU {one.fvu:.4f} {two.fvu:.4f}")
    assert one != two
    assert abs(one.recovered - two.recovered) <= 0.1
    assert one.fvu == pytest.approx(two.fvu, rel=0.15)


@pytest.mark.parametrize("name", KNOWN)
def test_an_untrained_sae_finds_nothing(name: str) -> None:
    """The same test on the same widths: what passes above is training's doing."""
    (found,) = scored([dataclasses.replace(KNOWN[name].config, control="untrained")])
    assert found.recovered == 0
    assert found.mean_max_cosine < 0.4
    assert found.fvu > 4 * KNOWN[name].fvu


@pytest.mark.parametrize("pairs", [False, True])
def test_two_runs_are_equal_bit_for_bit(pairs: bool) -> None:
    configs = [known.config for known in KNOWN.values() if transcodes(known.config) == pairs]
    for one, two in zip(trained(configs, steps=40), trained(configs, steps=40), strict=True):
        assert one.history == two.history
        assert all(torch.equal(value, two.weights[name]) for name, value in one.weights.items())


@pytest.mark.parametrize("name", PENALTIES)
def test_target_l0_is_met_on_held_out_rows(name: str) -> None:
    """Half and twice the true L0, from the same coefficient to begin with; the true one is asked for above.

    A skip transcoder has L0 7.5 here without any penalty, since its skip does half of the work: twice the true L0 is
    out of a coefficient's reach, and the biases make up for it.
    """
    targets = (TRUE_L0 / 2, 2 * TRUE_L0)
    for target, found in zip(targets, _steered(name, targets), strict=True):
        print(f"{name} target {target}: {found}")
        assert found.l0 == pytest.approx(target, rel=0.1)


@pytest.mark.parametrize("name", ["standard", "jumprelu"])
def test_target_l0_is_met_after_the_longest_warm_up(name: str) -> None:
    """6 % at most here. After 0.5 of the steps JumpReLU missed half the true L0 by 22 %; after 1 all end at one L0."""
    targets = (TRUE_L0 / 2, 2 * TRUE_L0)
    for target, found in zip(targets, _steered(name, targets, 200, l1_warmup=LONGEST_WARMUP), strict=True):
        print(f"{name} target {target}: {found}")
        assert found.l0 == pytest.approx(target, rel=0.1)


@pytest.mark.parametrize("steps", [30, 45])
@pytest.mark.parametrize("name", PENALTIES)
def test_a_short_run_misses_its_target_l0_by_less_than_a_third(name: str, steps: int) -> None:
    """0.2 at most here. With what suits 800 steps it was 0.74: the running L0 lagged, and swung the coefficient."""
    targets = (TRUE_L0 / 2, 2 * TRUE_L0)
    for target, found in zip(targets, _steered(name, targets, steps), strict=True):
        print(f"{name} target {target} in {steps} steps: {found}")
        assert found.l0 == pytest.approx(target, rel=0.3)


def _steered(name: str, targets: Sequence[float], steps: int = STEPS, *, l1_warmup: float = 0.0) -> list[Scores]:
    base = KNOWN[name].config
    assert isinstance(base, PenaltyConfig)
    configs = [dataclasses.replace(base, target_l0=target) for target in targets]
    return scored(configs, steps=steps, settings=dataclasses.replace(TRAIN, l1_warmup=l1_warmup))


def _asleep(monkeypatch: pytest.MonkeyPatch, config: SaeConfig) -> None:
    """Let half of the features begin so that they do not fire; the other 96 are too few for 128 atoms.

    Two thirds in TopK, where weak ones wake by themselves on rows with fewer than k others above zero.
    """
    cls = ARCHITECTURES[config.kind]
    original = cls.calibrate_  # the last word on the weights before the first step

    def calibrate_(sae: Sae, x: Tensor) -> None:
        original(sae, x)
        with torch.no_grad():
            if isinstance(config, TopKConfig):
                sae.W_enc[:, : D_SAE * 2 // 3] *= 0.1
            else:
                sae.get_parameter("b_gate" if config.kind == "gated" else "b_enc")[: D_SAE // 2] = -100

    monkeypatch.setattr(cls, "calibrate_", calibrate_)


@pytest.mark.parametrize("cls", [TopKConfig, BatchTopKConfig, MatryoshkaConfig])
def test_a_constant_added_to_all_rows_costs_no_features(cls: type[TopKConfig]) -> None:
    """Of twenty times the norm of what varies, against none."""

    def found(size: float) -> Scores:
        made = PlantedDictionary(l0=TRUE_L0)
        made.mean = made.mean * size
        source = PlantedSource(made, batch_size=BATCH, steps=300)
        member = Member(id="a", config=cls(k=6), train=TRAIN, d_sae=D_SAE)
        (one,) = train([member], source, Worker())
        assert isinstance(one, Trained)
        return scores(one, source, made.held_out())

    far, near = found(20.0), found(0.0)
    assert far.fvu == pytest.approx(near.fvu, rel=0.05)
    assert far.dead < 0.2
    assert far.recovered >= near.recovered - 0.05


@pytest.mark.parametrize("cls", [TopKConfig, BatchTopKConfig])
def test_auxk_wakes_features_that_do_not_fire(cls: type[TopKConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    _asleep(monkeypatch, cls())
    without, with_it = scored([cls(k=6, auxk_coefficient=0), cls(k=6)])
    assert without.dead > 0.4
    assert with_it.dead < without.dead - 0.1
    assert with_it.recovered > without.recovered + 0.1
    assert with_it.fvu < 0.85 * without.fvu


@pytest.mark.parametrize("name", ["standard", "gated", "jumprelu"])
def test_resampling_wakes_features_that_do_not_fire(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = KNOWN[name].config
    _asleep(monkeypatch, config)
    (without,) = scored([config])
    (with_it,) = scored([config], settings=dataclasses.replace(TRAIN, resample_at=(0.25,)))
    assert without.dead >= 0.5
    assert with_it.dead < 0.3
    assert with_it.recovered > without.recovered + 0.1
    assert with_it.fvu < without.fvu


def test_rates_follow_a_power_law_and_groups_fire_together() -> None:
    made = PlantedDictionary(group_size=8, correlation=0.5)
    fires = torch.cat([(made.rows(10_000, seed=1, number=i).code > 0).double() for i in range(10)])
    rate = fires.mean(0)
    assert torch.allclose(rate, made.rates.double(), atol=0.006)
    assert float(rate.sum()) == pytest.approx(TRUE_L0, rel=0.02)
    assert float(firing_rates(128, TRUE_L0).max()) == pytest.approx(MAX_RATE)
    rates = firing_rates(128, TRUE_L0).double()
    assert float(rates[63] / rates[31]) == pytest.approx(2**-0.7, rel=1e-3)
    together = fires.T @ fires / len(fires) / (rate[:, None] * rate)
    friends = [float(together[i, i + 16]) for i in range(100)]
    strangers = [float(together[i, i + 1]) for i in range(100)]
    assert min(friends) > 1.2
    assert sum(strangers) / 100 == pytest.approx(1, abs=0.02)


def test_magnitudes_have_mean_one_and_a_long_tail() -> None:
    code = planted().held_out(50_000).code
    values = code[code > 0]
    assert float(values.mean()) == pytest.approx(1, abs=0.01)
    assert float(values.log().std()) == pytest.approx(0.5, abs=0.01)
    assert float((values > 2.82).double().mean()) == pytest.approx(0.01, abs=0.002)  # exp(0.5 * 2.326 - 0.125)


def test_a_stream_begins_anywhere_and_no_row_comes_twice() -> None:
    source = PlantedSource(planted(), batch_size=8, steps=6)
    whole = [batch for batch in source.batches(0) if isinstance(batch, torch.Tensor)]
    later = [batch for batch in source.batches(4) if isinstance(batch, torch.Tensor)]
    assert len(whole) == len(source) == 6
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], later, strict=True))
    rows = torch.cat([*whole, planted().held_out(48).x])
    assert len(torch.unique(rows, dim=0)) == 96
    again = PlantedSource(planted(), batch_size=8, steps=6, rows=16)
    first, second, third, *_ = (batch for batch in again.batches(0) if isinstance(batch, torch.Tensor))
    assert len(torch.unique(torch.cat([first, second]).float(), dim=0)) == 16
    assert len(torch.unique(torch.cat([first, second, third]).float(), dim=0)) == 16


def test_the_true_dictionary_scores_one_and_a_doubled_one_half() -> None:
    atoms = planted().atoms
    shuffled = atoms[torch.randperm(128, generator=torch.Generator().manual_seed(0))]
    assert recovered(atoms @ shuffled.T) == 1
    # Every feature may stand for one atom only: of two equal atoms one stays without a partner.
    pairs = atoms[:64].repeat(2, 1)
    assert recovered(pairs @ atoms[:64].T) == 0.5
    assert RECOVERED == 0.9


def test_atoms_are_counted_where_there_is_no_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that has a GPU and little else: the benches that run there take these scores."""
    made = planted()
    cosines = made.atoms @ made.atoms[:96].T
    for name in ("scipy", "scipy.optimize"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError):
        recovered(cosines)
    assert _share(cosines, made) == pytest.approx(96 / 128)


@pytest.mark.parametrize("noise", [0.03, 0.06, 0.1])
def test_the_largest_cosines_count_what_the_matching_counts(noise: float) -> None:
    """Where atoms are too many for a matching; here at a width where both can be had."""
    made = PlantedDictionary(d_in=256, n_true=200)
    g = torch.Generator().manual_seed(0)
    rows = torch.cat([made.atoms, made.atoms[:50]]) + noise * torch.rand(250, 1, generator=g) * torch.randn(
        250, 256, generator=g
    )
    cosines = made.atoms @ torch.nn.functional.normalize(rows, dim=1).T
    assert recovered_by_maximum(cosines, made) == pytest.approx(recovered(cosines))


def test_a_skip_connection_takes_its_share_off_the_atoms() -> None:
    """A skip transcoder set to the true answer, for any W_skip, reconstructs y and finds every atom."""
    made = PlantedDictionary(skip=0.5, noise=0)
    rows = made.held_out(64)
    sae = make_sae(SkipTranscoderConfig(), 64, 128, 64)
    with torch.no_grad():
        skip = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) / 16
        sae.W_dec.copy_(made.atoms_out + made.atoms @ (made.skip - skip.T))
        sae.get_parameter("W_skip").copy_(skip)
        sae.b_dec.copy_((made.mean_out - made.mean @ skip.T).squeeze())
        assert torch.allclose(sae.output(rows.x, rows.code), rows.y, atol=1e-4)
    source = PlantedSource(made, batch_size=8, steps=1, pairs=True)
    assert recovered(atom_cosines(sae, source)) == 1
    assert float(atom_cosines(sae, source).diagonal().min()) == pytest.approx(1, abs=1e-5)
