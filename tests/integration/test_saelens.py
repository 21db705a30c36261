"""Our SAE folders in the real SAELens: it loads them, computes what we compute, and finds where they belong.

`MIDISCOVER_TEST_SAE_FOLDERS=store/saes/a:store/saes/b python -m pytest tests/integration/test_saelens.py` checks those
folders as well. SAELens lives in an environment of its own, made at the first run (torch and 200 packages).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from midiscover import load_sae
from midiscover.config import ModelConfig
from midiscover.configio import load_config
from midiscover.evaluate import reconstruction_metrics
from midiscover.lm import LanguageModel
from midiscover.models import resolve_model
from midiscover.resolve import PlannedSae, Resolved, resolve
from midiscover.sae.registry import ARCHITECTURES
from midiscover.saeconfig import SAE_KINDS, JumpReluConfig, L1Config, TopKConfig
from midiscover.saes import SAELENS_VERSION, SPARSITY, commit_record, write_trained
from midiscover.store import layout
from midiscover.store.storage import Storage, open_store
from midiscover.train import Member, Pair, Trained, train
from tests.planted import normalisation
from tests.runs import write_run
from tests.tiny import make_tiny_model
from tests.venvs import checked, saelens_python
from tests.workers import SilentWorker

# The first run on a machine downloads torch once more; what was made is kept.
pytestmark = [pytest.mark.saelens, pytest.mark.slow, pytest.mark.timeout(1800)]

D_IN, ROWS, BATCH, CONTEXT = 64, 512, 64, 32
TOLERANCE = 1e-5
"""Largest difference to SAELens, times the largest entry where that exceeds 1: float32 has 7 digits, not 7 decimals."""
SCALES = (1.0, 40.0)
"""Of raw activations: norms of about 10, and of several hundred as in the middle of a real model."""
GIVEN = [folder for folder in os.environ.get("MIDISCOVER_TEST_SAE_FOLDERS", "").split(":") if folder]
AS_WHAT = {
    "standard": ("standard", "StandardSAE"),
    "gated": ("gated", "GatedSAE"),
    "topk": ("topk", "TopKSAE"),
    "batchtopk": ("jumprelu", "JumpReLUSAE"),
    "jumprelu": ("jumprelu", "JumpReLUSAE"),
    "matryoshka_batchtopk": ("jumprelu", "JumpReLUSAE"),
    "transcoder": ("transcoder", "Transcoder"),
    "skip_transcoder": ("skip_transcoder", "SkipTranscoder"),
}
"""Architecture and class that SAELens has for each kind: its own BatchTopK and Matryoshka SAEs are saved so too."""
SPARSITY_OF = {L1Config: {"l1_coefficient": 0.5}, TopKConfig: {"k": 8}, JumpReluConfig: {"l0_coefficient": 0.1}}
MADE = [(kind, scale) for kind in AS_WHAT for scale in SCALES]
NAMES = [f"{kind}, activations x {scale:g}" for kind, scale in MADE] + [Path(folder).name for folder in GIVEN]


class MemorySource:
    """Rows of sparse structure about a mean far from zero, in order; for transcoders with rows that depend on them."""

    rows_per_epoch, batch_size = ROWS, BATCH

    def __init__(self, scale: float, d_out: int | None = None) -> None:
        """d_out: for transcoders, the width of what is predicted."""
        generator = torch.Generator().manual_seed(0)
        atoms = torch.randn(4 * D_IN, D_IN, generator=generator) / math.sqrt(D_IN)
        codes = torch.relu(torch.randn(ROWS, 4 * D_IN, generator=generator) - 1.5)
        self.rows = scale * (4 * codes @ atoms + torch.randn(D_IN, generator=generator))
        self.predicted = self.rows
        if d_out is not None:
            noise = torch.randn(D_IN + 1, d_out, generator=generator)
            self.predicted = torch.tanh(self.rows / scale) @ noise[1:] * (scale / 5) + scale * noise[0]
        self.inputs, self.outputs = normalisation(self.rows), normalisation(self.predicted)

    def __len__(self) -> int:
        return 4 * ROWS // BATCH

    def batches(self, start: int) -> Iterator[Tensor | Pair]:
        for step in range(start, len(self)):
            x, y = (rows.roll(-step * BATCH, 0)[:BATCH] for rows in (self.rows, self.predicted))
            yield x if self.predicted is self.rows else Pair(x, y)


class Answer(NamedTuple):
    """An SAE folder, ours and theirs of it."""

    folder: Path
    given: dict[str, Tensor]
    facts: dict[str, Any]
    tensors: dict[str, Tensor]


class Answers(NamedTuple):
    """All that one process of SAELens said."""

    version: str
    saes: list[Answer]
    acts: Tensor
    """[b, t, d_in] at the hook of the first SAE."""
    ids: Tensor
    changed: list[str]
    """Files of SAE folders that are new, gone or different after SAELens had them."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("lm") / "model-llama", d_model=D_IN)


@pytest.fixture(scope="module")
def folders(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One SAE of each kind and scale, trained a little and written as a sweep writes it; then those that are given."""
    storage = open_store(str(tmp_path_factory.mktemp("store")))
    made = []
    for kind, scale in MADE:
        cls = ARCHITECTURES[kind]
        sparsity = next(value for config, value in SPARSITY_OF.items() if issubclass(SAE_KINDS[kind], config))
        sae = {"kind": kind, "expansion_factor": 4, **sparsity}
        hooks = {"hooks": f"model.layers.{{0,1}}.mlp.{'up_proj:in' if cls.transcodes else 'down_proj'}"}
        resolved = resolve(load_config(write_run(model.parent, sae=sae, grid={}, harvest=hooks)))
        planned = resolved.saes[SCALES.index(scale)]  # one hook for each scale
        source = MemorySource(scale, planned.d_out if cls.transcodes else None)
        write_sae(storage, planned, resolved, source, prepend_bos=kind == "standard")
        folder = storage.local_path(layout.sae_folder(planned.id))
        assert folder is not None
        made.append(folder)
    return made + [Path(folder) for folder in GIVEN]


def write_sae(
    storage: Storage, planned: PlannedSae, resolved: Resolved, source: MemorySource, *, prepend_bos: bool
) -> None:
    """Everything that stands in a committed folder but the evaluation."""
    member = Member(id=planned.id, config=planned.point.sae, train=planned.point.train, d_sae=planned.d_sae)
    (trained,) = train([member], source, SilentWorker())
    assert isinstance(trained, Trained)
    write_trained(storage, planned, resolved, trained, prepend_bos=prepend_bos, run={"threads": 1})
    loaded = load_sae(str(storage.local_path(layout.sae_folder(planned.id))))
    rows = Pair(source.rows, source.predicted) if loaded.module.transcodes else source.rows
    sums = reconstruction_metrics({planned.id: loaded.module}, [rows], source.outputs.mean)[planned.id]
    storage.create(layout.sae_file(planned.id, SPARSITY), save({"sparsity": sums.log_sparsity()}))
    commit_record(storage, planned, resolved, metrics=sums.result())


def inputs(folder: Path, scale: float | None) -> dict[str, Tensor]:
    """Activations [4, 16, d_in] and our features of them: rows it was trained on, where scale tells which those were.

    Else random ones about where the SAE expects them; about 0 for a transcoder, whose weights do not tell the mean of
    its inputs.
    """
    sae = load_sae(str(folder))
    d_in = sae.module.d_in
    if scale is not None:
        x = MemorySource(scale).rows[:64].view(4, 16, d_in)
    else:
        norm = json.loads((folder / "training.json").read_text())["normalisation"]["mean_norm"]
        noise = torch.randn(4, 16, d_in, generator=torch.Generator().manual_seed(1))
        x = (0 if sae.module.transcodes else sae.module.b_dec) + noise * norm / math.sqrt(d_in)
    return {"x": x, "features": sae.encode(x)}


def contents(folders: list[Path]) -> dict[str, str]:
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def answers(folders: list[Path], model: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Everything is asked in one process: SAELens takes five seconds to import."""
    python = saelens_python()
    there = tmp_path_factory.mktemp("answers")
    scales = [scale for _, scale in MADE] + [None] * len(GIVEN)
    given = [inputs(folder, scale) for folder, scale in zip(folders, scales, strict=True)]
    ids = torch.arange(3, 3 + 2 * CONTEXT).view(2, CONTEXT)
    for i, tensors in enumerate(given):
        save_file(tensors, there / f"{i}-in.safetensors")
    save_file({"ids": ids}, there / "model-in.safetensors")
    hook = json.loads((folders[0] / "cfg.json").read_text())["metadata"]["hook_name"]
    request = {
        "saes": [
            {"folder": str(folder.resolve()), "input": str(there / f"{i}-in.safetensors")}
            for i, folder in enumerate(folders)
        ],
        "model": {"folder": str(model), "input": str(there / "model-in.safetensors"), "hook": hook},
    }
    (there / "request.json").write_text(json.dumps(request))
    before = contents(folders)
    script = Path(__file__).with_name("in_saelens.py")
    checked([str(python), "-I", str(script), str(there / "request.json"), str(there)], timeout=240)
    after = contents(folders)
    told = json.loads((there / "answers.json").read_text())
    return Answers(
        version=told["version"],
        saes=[
            Answer(folder, given[i], told["saes"][i], load_file(there / f"{i}.safetensors"))
            for i, folder in enumerate(folders)
        ],
        acts=load_file(there / "model.safetensors")["acts"],
        ids=ids,
        changed=[name for name in before.keys() | after.keys() if before.get(name) != after.get(name)],
    )


def difference(theirs: Tensor, ours: Tensor) -> float:
    """As TOLERANCE counts it."""
    assert theirs.shape == ours.shape
    return float((theirs - ours).abs().max()) / max(1.0, float(ours.abs().max()))


def test_every_kind_is_here() -> None:
    assert sorted(AS_WHAT) == sorted(ARCHITECTURES)


def test_it_is_the_release_whose_format_we_write(answers: Answers) -> None:
    assert answers.version == SAELENS_VERSION


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_encode_and_decode_agree(answers: Answers, index: int) -> None:
    folder, given, _, theirs = answers.saes[index]
    sae, features = load_sae(str(folder)), given["features"]
    whole = sae.reconstruct(given["x"])
    assert 0 < float((features > 0).double().mean()) < 0.9  # neither all silent nor a linear map
    assert difference(theirs["features"], features) < TOLERANCE
    assert difference(theirs["x_hat"], sae.decode(features)) < TOLERANCE
    assert difference(theirs["forward"], whole) < TOLERANCE
    assert difference(theirs["folded_features"], features) < TOLERANCE
    assert difference(theirs["folded_x_hat"], sae.decode(features)) < TOLERANCE
    assert difference(theirs["folded_forward"], whole) < TOLERANCE
    carried = difference(whole, sae.decode(features))
    assert (carried > 0.01) == (sae.module.kind == "skip_transcoder")  # the skip connection is not nothing


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_class_shape_and_metadata_arrive(answers: Answers, index: int) -> None:
    folder, _, facts, _ = answers.saes[index]
    cfg = json.loads((folder / "cfg.json").read_text())
    record = json.loads((folder / "record.json").read_text())
    assert (facts["architecture"], facts["class"]) == AS_WHAT[record["kind"]]
    assert facts["k"] == (record["sae"]["k"] if facts["architecture"] == "topk" else None)
    assert (facts["d_in"], facts["d_sae"]) == (record["d_in"], record["d_sae"])
    assert facts["d_out"] == cfg.get("d_out", record["d_in"])
    assert facts["metadata"] == {name: cfg["metadata"].get(name) for name in facts["metadata"]}
    assert facts["metadata"]["training_architecture"] == record["kind"]
    details = facts["metadata"]["training_architecture_details"]
    assert details == {name: value for name, value in record["sae"].items() if name != "kind"}
    assert facts["metadata"]["hook_name"] == record["hook"]
    assert facts["metadata"]["hook_layer"] == record["layer"]
    assert facts["metadata"]["model_class_name"] == "AutoModelForCausalLM"
    assert isinstance(facts["metadata"]["prepend_bos"], bool)
    assert facts["metadata"]["context_size"] > 0


@pytest.mark.parametrize("index", range(len(MADE)), ids=NAMES[: len(MADE)])
def test_metadata_are_those_of_the_run(answers: Answers, index: int) -> None:
    kind, scale = MADE[index]
    metadata = answers.saes[index].facts["metadata"]
    layer = f"model.layers.{SCALES.index(scale)}.mlp"
    transcodes = ARCHITECTURES[kind].transcodes
    assert metadata["hook_name"] == f"{layer}.{'up_proj:in' if transcodes else 'down_proj'}"
    assert metadata["hook_name_out"] == (f"{layer}.up_proj" if transcodes else None)
    assert metadata["context_size"] == CONTEXT
    assert metadata["prepend_bos"] is (kind == "standard")
    assert metadata["dataset_path"] == "text.jsonl"


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_sparsity_is_read(answers: Answers, index: int) -> None:
    folder, _, facts, theirs = answers.saes[index]
    assert theirs["sparsity"].shape == (facts["d_sae"],)
    assert torch.equal(theirs["sparsity"], load_file(folder / SPARSITY)["sparsity"])
    assert -10.001 < float(theirs["sparsity"].min()) <= float(theirs["sparsity"].max()) <= 1e-6


def test_the_hook_name_means_the_same_activations(answers: Answers, model: Path) -> None:
    hook = answers.saes[0].facts["metadata"]["hook_name"]
    ours = LanguageModel.load(resolve_model(ModelConfig(id=str(model))), dtype="float32")
    assert difference(answers.acts, ours.activations(answers.ids, [hook])[hook]) < TOLERANCE


def test_the_folders_are_left_as_they_were(answers: Answers) -> None:
    assert answers.changed == []
