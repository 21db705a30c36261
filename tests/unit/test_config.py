"""Settings: every mistake gets one sentence that names it, and what is read is what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from midiscover import cli
from midiscover.config import RunConfig
from midiscover.configio import (
    build_config,
    expand_grid,
    find_config,
    load_config,
    parse_value,
    to_tree,
    to_yaml,
)
from midiscover.cores import native_bfloat16
from midiscover.errors import ConfigError
from midiscover.launch import parse_calibrate, parse_doctor, parse_job, parse_overrides
from midiscover.saeconfig import StandardConfig, TopKConfig
from midiscover.submission import parse_submit, split_cluster

HOOKS = {"hooks": ["a.0.b", "a.1.b"]}

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"modl": 1}, "'modl' is not a setting of the config; did you mean 'model'?"),
    ({"train": {"lrr": 1}}, "'train.lrr' is not a setting of 'train'; did you mean 'lr'?"),
    ({"train": {"lr": "fast"}}, "train.lr is 'fast'; it must be a number or null."),
    ({"train": {"lr": -1.0}}, "train.lr must be above 0."),
    ({"train": {"seed": 2**63}}, "train.seed must fit into 64 bits, with its sign."),
    ({"train": {"lr": float("nan")}}, "train.lr is nan; it must be a number or null."),
    ({"train": {"epochs": 2.5}}, "train.epochs is 2.5; it must be a whole number."),
    ({"train": {"epochs": "3"}}, "train.epochs is '3'; it must be a whole number."),
    ({"train": {"dtype": "float16"}}, "train.dtype is 'float16'; it must be one of auto, bfloat16, float32."),
    ({"train": 3}, "train must be a section of settings, not a number."),
    ({"train": {"resample_at": 0.3}}, "train.resample_at is 0.3; it must be a list of numbers."),
    ({"sae": {"l1_coefficient": True}}, "sae.l1_coefficient is True; it must be a number."),
    ({"sae": {"l1_coefficient": -3}}, "sae.l1_coefficient must be 0 or above."),
    ({"sae": {"d_sae": 0}}, "sae.d_sae must be a whole number above 0."),
    ({"sae": {"kind": "gatd"}}, "sae.kind is 'gatd', which is no architecture; known are standard, gated, topk,"),
    ({"sae": {"kind": ["topk", "standard"]}}, "sae.kind is ['topk', 'standard'], which is no architecture; known are"),
    ({"sae": {"kind": "topk", "l1": 3}}, "'sae.l1' is not a setting of 'sae'"),
    ({"sae": {"kind": "batchtopk", "l1_coefficient": 3}}, "'sae.l1_coefficient' is a setting of standard, gated, "),
    ({"corpus": {"held_out": 0}}, "corpus.held_out must lie between 0 and 1"),
    ({"corpus": {"context_size": 7}}, "corpus.context_size must lie between 8 and 32,768 tokens"),
    ({"corpus": {"context_size": 32769}}, "corpus.context_size must lie between 8 and 32,768 tokens"),
    ({"corpus": {"max_samples": 0}}, "corpus.max_samples must be a whole number above 0."),
    ({"harvest": {"hooks": 3}}, "harvest.hooks is 3; it must be a list of texts."),
    ({"harvest": {"hooks": ["a", "{a,b}"]}}, "harvest.hooks names 'a' twice"),
    ({"harvest": HOOKS, "grid": {"sae.l1": [1]}}, "'sae.l1' is not a setting of 'sae'"),
    ({"harvest": HOOKS, "grid": {"corpus.seed": [1]}}, "grid.corpus.seed is not a setting of an SAE"),
    ({"harvest": HOOKS, "grid": {"sae.l1_coefficient": 3}}, "grid.sae.l1_coefficient is 3; it must be a list"),
    ({"harvest": HOOKS, "grid": {"sae.l1_coefficient": ["x"]}}, "sae.l1_coefficient is 'x'; it must be a number."),
    ({"harvest": HOOKS, "grid": {"sae.l1_coefficient": [1, 1]}}, "names the same SAE twice"),
    ({"name": "My Sweep"}, "name may hold lower-case letters"),
    ({"resources": {"gpus_per_pack": 2.0}}, "resources.gpus_per_pack must be a share of one GPU"),
]


@pytest.mark.parametrize(("tree", "sentence"), WRONG, ids=[sentence[:40] for _, sentence in WRONG])
def test_every_mistake_is_named(tree: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config(tree)
    assert sentence in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [1", "not readable as YAML"),
        ("- 1", "must hold settings"),
        ("name: a\nname: b", "stands twice, line 1"),
        ("train: {lr: 1}\nname: 2024-02-30", "'2024-02-30' can't be read: day is out of range for month, line 2"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=problem):
        load_config(tmp_path / "x.yaml")


def test_a_config_reads_back_as_it_was_written() -> None:
    config = build_config(
        {
            "name": "x",
            "harvest": {"hooks": "model.layers.{1,2}.mlp"},
            "sae": {"kind": "topk", "k": 8},
            "grid": {"sae.k": [4, 8], "train.seed": [0, 1]},
        }
    )
    assert build_config(yaml.safe_load(to_yaml(config))) == config
    assert isinstance(config.sae, TopKConfig)


def test_numbers_as_people_write_them() -> None:
    assert parse_value("1e-3") == 0.001
    assert parse_value("[1E5, -2e+3, .5e1]") == [1e5, -2e3, 5.0]
    assert parse_value("1e-3x") == "1e-3x"
    assert parse_value("null") is None
    assert type(build_config({"train": {"lr": 1}}).train.lr) is float


def test_the_grid_is_the_product_with_hooks_first() -> None:
    config = build_config(
        {"harvest": HOOKS, "grid": {"sae.l1_coefficient": [1, 2], "train.seed": [0, 7]}, "train": {"lr": 0.5}}
    )
    points = expand_grid(config)
    seen = [(p.hook, p.sae.l1_coefficient, p.train.seed) for p in points if isinstance(p.sae, StandardConfig)]
    assert seen == [(h, l1, s) for h in HOOKS["hooks"] for l1 in (1, 2) for s in (0, 7)]
    assert all(p.train.lr == 0.5 for p in points)


def test_a_grid_may_change_the_architecture() -> None:
    config = build_config(
        {"harvest": HOOKS, "sae": {"expansion_factor": 2}, "grid": {"sae.kind": ["standard", "topk"]}}
    )
    assert [p.sae.kind for p in expand_grid(config)] == ["standard", "topk"] * 2
    assert all(p.sae.expansion_factor == 2 for p in expand_grid(config))


def test_another_architecture_takes_over_what_it_has_of_what_is_set() -> None:
    def points(sae: dict[str, Any], *kinds: str) -> list[Any]:
        config = build_config({"harvest": {"hooks": "a.0.b"}, "sae": sae, "grid": {"sae.kind": list(kinds)}})
        # As a job on a cluster or in a pipeline reads it: every default is written down there.
        assert expand_grid(build_config(yaml.safe_load(to_yaml(config)))) == expand_grid(config)
        return [point.sae for point in expand_grid(config)]

    assert [sae.k for sae in points({"kind": "topk", "k": 64}, "topk", "batchtopk")] == [64, 64]
    steered = points({"target_l0": 60, "expansion_factor": 4, "decoder": "unit_norm"}, "standard", "gated", "jumprelu")
    assert [(sae.target_l0, sae.expansion_factor) for sae in steered] == [(60, 4)] * 3
    # What is left at a default is each architecture's own; what is set holds for all.
    assert [sae.initial_density for sae in steered] == [0.02, 0.05, 0.1]
    assert [sae.initial_density for sae in points({"initial_density": 0.2}, "standard", "gated")] == [0.2, 0.2]
    mixed = points({"kind": "gated", "l1_coefficient": 2, "control": "frozen_decoder"}, "topk", "standard")
    assert [(sae.control, *sae.sparsity()) for sae in mixed] == [
        ("frozen_decoder", "k", 32),
        ("frozen_decoder", "l1", 2),
    ]


def test_a_grid_that_goes_through_coefficients_of_other_architectures_steers_none(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "harvest: {hooks: a.0.b}\nsae: {target_l0: 60, expansion_factor: 4}\ngrid:\n"
        "  - {sae.kind: [gated], sae.l1_coefficient: [1, 2]}\n  - {sae.kind: [jumprelu], sae.l0_coefficient: [1, 2]}\n"
    )
    swept = [point.sae for point in expand_grid(load_config(path))]
    assert [sae.sparsity() for sae in swept] == [("l1", 1), ("l1", 2), ("l0c", 1), ("l0c", 2)]
    assert [sae.expansion_factor for sae in swept] == [4] * 4
    sentence = r"target_l0 changes no SAE: the grid goes through the coefficient; give --grid.sae.target_l0 '\[30\]'\."
    with pytest.raises(ConfigError, match=sentence):
        load_config(path, {"sae.target_l0": 30})
    # As an axis of its own it is steered to, and so is that of the architecture that `sae` itself is of.
    steered = expand_grid(load_config(path, {"grid": {"sae.target_l0": [30]}}))
    assert [point.sae.sparsity() for point in steered] == [("L0", 30)] * 4
    path.write_text(path.read_text().replace("sae: {", "sae: {kind: gated, "))
    assert [point.sae.sparsity() for point in expand_grid(load_config(path))] == [("L0", 60)] * 2 + [
        ("l0c", 1),
        ("l0c", 2),
    ]


def test_a_grid_with_the_architecture_of_sae_steers_all_that_it_has_to_the_l0_of_sae(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "harvest: {hooks: a.0.b}\nsae: {target_l0: 60}\n"
        "grid: {sae.kind: [standard, gated], sae.l1_coefficient: [1, 2]}\n"
    )
    steered = [point.sae for point in expand_grid(load_config(path))]
    assert [sae.kind for sae in steered] == ["standard", "standard", "gated", "gated"]
    assert [(*sae.sparsity(), to_tree(sae)["l1_coefficient"]) for sae in steered] == [("L0", 60, 1), ("L0", 60, 2)] * 2
    assert all(point.sae.sparsity() == ("L0", 30) for point in expand_grid(load_config(path, {"sae.target_l0": 30})))


def test_a_section_without_a_line_is_left_at_its_defaults(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("harvest: {hooks: a.0.b}\nsae:\n  # kind: topk\ngrid:\n  # sae.k: [1]\ntrain:\n")
    assert load_config(tmp_path / "x.yaml") == build_config({"name": "x", "harvest": {"hooks": "a.0.b"}})


def test_several_grids_stand_side_by_side_and_a_flag_goes_into_each_of_them(tmp_path: Path) -> None:
    path = tmp_path / "many.yaml"
    path.write_text(
        "harvest: {hooks: [a.0.b, a.1.b]}\n"
        "grid:\n"
        "  - {sae.kind: [standard, jumprelu], sae.target_l0: [20, 60]}\n"
        "  - {sae.kind: [topk], sae.k: [20, 60]}\n"
        "  - {sae.control: [untrained, neurons]}\n"
    )
    found = [
        (p.sae.kind, p.sae.control, *p.sae.sparsity()) for p in expand_grid(load_config(path)) if p.hook == "a.0.b"
    ]
    penalised = [(kind, "none", "L0", target) for kind in ("standard", "jumprelu") for target in (20, 60)]
    topk = [("topk", "none", "k", k) for k in (20, 60)]
    assert found == [*penalised, *topk, ("standard", "untrained", "l1", 5), ("standard", "neurons", "l1", 5)]
    seeded = load_config(path, parse_job("sweep", [str(path), "--grid.train.seed=[0, 1]"]).overrides)
    assert len(expand_grid(seeded)) == 2 * len(expand_grid(load_config(path)))


def test_auto_names_a_real_dtype() -> None:
    config = build_config({"train": {"dtype": "auto"}, "model": {"dtype": "auto"}})
    expected = "bfloat16" if native_bfloat16() else "float32"
    assert (config.train.dtype, config.model.dtype) == (expected, expected)


def test_nothing_can_write_to_a_config() -> None:
    with pytest.raises(AttributeError):
        RunConfig().train.lr = 1  # type: ignore[misc]  # that is the point


def test_flags_go_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("train: {lr: 1e-3}\ngrid: {sae.l1_coefficient: [1], train.seed: [0, 1]}\nharvest: {hooks: a.0.b}")
    args = parse_job("sweep", [str(path), "--train.lr", "5e-4", "--grid.sae.l1_coefficient=[3, 4]", "--store", "s"])
    config = load_config(path, args.overrides)
    assert (config.name, config.train.lr, args.store) == ("my", 5e-4, "s")
    assert config.grid == ({"sae.l1_coefficient": (3, 4), "train.seed": (0, 1)},)


def test_a_flag_goes_into_a_section_without_a_line(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("train:\nharvest: {hooks: a.0.b}")
    assert load_config(tmp_path / "x.yaml", {"train.lr": 0.5}).train.lr == 0.5
    (tmp_path / "x.yaml").write_text("train: 3")
    with pytest.raises(ConfigError, match="'train.lr' names a setting inside 'train', which is a value"):
        load_config(tmp_path / "x.yaml", {"train.lr": 0.5})


def test_train_takes_settings_of_any_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[RunConfig] = []
    monkeypatch.setattr(cli, "_job", lambda _stage, argv: made.append(load_config(argv[0])))
    line = ["train", "--hook", "a.0.b", "--k", "4", "--train.lr_warmup", "0.1"]
    names = {"creator_name": "me", "release": "mine", "source_set": "first"}
    flags = [word for name, value in names.items() for word in (f"--publish.neuronpedia.{name}", value)]
    assert cli.main([*line, *flags]) == 0
    assert {name: getattr(made[0].publish.neuronpedia, name) for name in names} == names
    assert (made[0].train.lr_warmup, made[0].sae.kind) == (0.1, "topk")


def test_the_value_of_a_setting_is_no_config() -> None:
    given: dict[str, Any] = {"sae.d_sae": 20480}
    line = ["--sae.d_sae", "20480"]
    assert parse_calibrate(line).config == "quick"
    assert parse_calibrate([*line, "demo"]).config == "demo"
    assert parse_doctor(["--json", *line]).config is None
    for args in (parse_calibrate(line), parse_doctor(["demo", *line]), parse_job("sweep", [*line, "demo"])):
        assert args.overrides == given
    named = parse_job("sweep", ["--name", "own", "--train.lr=-1", "demo", "--grid.sae.k", "[1, 2]", "--tag", "a.b"])
    assert (named.config, named.tags) == ("demo", ("a.b",))
    assert named.overrides == {"name": "own", "train.lr": -1, "grid": {"sae.k": [1, 2]}}
    submitted = parse_submit(["run", "calibrate", *line, "--cluster", "http://head:8265"])
    assert (submitted.target, submitted.flags) == ("", ("--sae.d_sae", "20480"))
    assert split_cluster([*line, "--cluster", "http://head:8265", "demo"]) == ("http://head:8265", ["demo", *line])
    with pytest.raises(ConfigError, match="--sae.d_sae needs a value"):
        parse_job("sweep", ["demo", "--sae.d_sae", "--force"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--epochs", "3"], "did you mean --train.epochs?"),
        (["--l1-coefficient", "3"], "did you mean --sae.l1_coefficient?"),
        (
            ["--grid", "{sae.k: [1]}"],
            "'--grid' is not a flag; an axis of the grid is given by its path, such as --grid.",
        ),
        (["--train.lr"], "--train.lr needs a value"),
        (["stray"], "'stray' is not expected here"),
        (["--train.lr", "[1"], "not readable as YAML"),
    ],
)
def test_wrong_flags(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides(arguments)
    assert sentence in str(caught.value)


def test_configs_are_found_by_path_and_by_name(tmp_path: Path) -> None:
    assert find_config("demo").name == "demo.yaml"
    for wrong in ("no-such", str(tmp_path)):
        with pytest.raises(ConfigError, match=wrong.rpartition("/")[2]):
            find_config(wrong)
