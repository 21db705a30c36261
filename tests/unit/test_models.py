"""models.py and modelfiles.py: identities of folders and GGUF files, and their hook tables."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import midiscover.lm  # noqa: F401  so that hook tables are made in this process
from midiscover import modelfiles, models
from midiscover.config import ModelConfig
from midiscover.digests import cache_dir
from midiscover.errors import ModelError
from midiscover.ids import hook_layer
from midiscover.models import ModelIdentity, hook_table, resolve_model
from tests.tiny import make_tiny_model


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIDISCOVER_HOME", str(tmp_path / "home"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_model("phi", tmp_path / "tiny-phi")


def resolve(id: str | Path, revision: str | None = None) -> ModelIdentity:
    return resolve_model(ModelConfig(id=str(id), revision=revision))


def test_a_folder_is_what_its_files_are(folder: Path, tmp_path: Path) -> None:
    identity = resolve(folder)
    assert (identity.name, identity.folder, identity.hub_id, identity.revision) == ("tiny-phi", str(folder), None, None)
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    assert resolve(copy).digest == identity.digest

    def sha(name: str) -> str:
        return hashlib.sha256((folder / name).read_bytes()).hexdigest()

    tokenizer = {name: sha(name) for name in ("tokenizer.json", "tokenizer_config.json")}
    text = json.dumps(tokenizer, sort_keys=True, separators=(",", ":"))
    assert identity.tokenizer_digest == hashlib.sha256(text.encode()).hexdigest()


def test_weights_config_and_tokenizer_each_change_the_digest(folder: Path) -> None:
    before = resolve(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "99.0"}))
    assert resolve(folder) == before
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))
    other_config = resolve(folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    other_weights = resolve(folder)
    assert len({before.digest, other_config.digest, other_weights.digest}) == 3
    assert before.tokenizer_digest == other_weights.tokenizer_digest
    with (folder / "tokenizer_config.json").open("a") as file:
        file.write("\n")
    assert resolve(folder).tokenizer_digest != before.tokenizer_digest
    assert resolve(folder).digest != other_weights.digest


def test_a_folder_may_name_itself(folder: Path) -> None:
    before = resolve(folder)
    (folder / "midiscover_model.json").write_text('{"name": "phi-from-somewhere", "source": "s", "licence": null}')
    assert resolve(folder).name == "phi-from-somewhere"
    assert resolve(folder).digest == before.digest


@pytest.mark.parametrize(
    ("id", "message"),
    [
        ("", "empty"),
        ("/no/such/folder", "neither an existing folder"),
        ("./phi-2", "neither an existing folder"),
        ("a/b/c", "neither an existing folder"),
        ("missing.gguf", "neither an existing folder"),
        ("two words", "neither an existing folder"),
    ],
)
def test_what_is_no_model_is_refused(id: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve(id)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_incomplete_folder_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    if name == "tokenizer.json":
        (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match=name.removesuffix(".json").removesuffix(".safetensors")):
        resolve(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors").rename(folder / shards["a"])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ModelError, match="model-00002-of-00002"):
        resolve(folder)


def test_a_single_file_comes_before_an_index(folder: Path, tmp_path: Path) -> None:
    """As transformers loads them: an index is what a model saved anew in one file leaves behind."""
    before = resolve(folder)
    shards = {"lm_head.weight": "model-00001-of-00001.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert resolve(folder) == before
    save_file({"lm_head.weight": torch.zeros(2, 2)}, folder / shards["lm_head.weight"])
    assert resolve(folder) == before
    (folder / "model.safetensors").unlink()
    assert resolve(folder).digest != before.digest


def test_a_file_and_a_revision_of_a_folder_are_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="is a file"):
        resolve(folder / "config.json")
    with pytest.raises(ModelError, match=r"model\.revision"):
        resolve(folder, "main")
    with pytest.raises(ModelError, match=r"model\.revision"):
        resolve("embedded", "main")


def test_a_gguf_file_is_converted_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def convert(module: str, verb: str, gguf: str, out: str, about: str) -> str:
        made.append(gguf)
        shutil.copytree(folder, out)
        (Path(out) / "midiscover_model.json").write_text(about)
        return "{}"

    monkeypatch.setattr(modelfiles, "run_module", convert)
    gguf = tmp_path / "Tiny.Q4_1.gguf"
    gguf.write_bytes(b"GGUF")
    first, second = resolve(gguf), resolve(gguf)
    assert first == second
    assert made == [str(gguf)]
    assert first.name == "Tiny.Q4_1-dequantized"
    assert first.digest == resolve(folder).digest
    gguf.write_bytes(b"GGUF of another model")
    resolve(gguf)
    assert len(made) == 2


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"not a gguf file")
    with pytest.raises(ModelError, match=r"broken\.gguf is not a GGUF file"):
        resolve(tmp_path / "broken.gguf")


def test_a_gguf_file_that_cannot_be_read_leaves_nothing(tmp_path: Path) -> None:
    gguf = tmp_path / "cut-off.gguf"
    gguf.write_bytes(b"GGUF and no more")
    with pytest.raises(ModelError, match=r"GGUF file .*cut-off\.gguf could not be read"):
        resolve(gguf)
    assert [path for path in (tmp_path / "home" / "models").iterdir() if path.is_dir()] == []


def test_hook_table_reads_as_the_model_is(folder: Path) -> None:
    table = hook_table(resolve(folder), context_size=100)
    assert (table.model, table.n_layers, table.d_model, table.vocab_size) == ("tiny-phi", 3, 24, 332)
    assert table.recommended == ("model.layers.1.mlp.fc2", "model.layers.2.mlp.fc2")
    hook = table.require("model.layers.1.mlp.fc2:in")
    assert (hook.d_in, hook.layer, hook.bytes_per_token, hook.recommended) == (56, 1, 112, False)
    assert table.require("model.layers.1.mlp.fc2").recommended
    # By hand: a Phi layer is four d x d products, then d x 56 and 56 x d; causal attention is 2 * context * d.
    layer = 2 * (4 * 24 * 24 + 2 * 24 * 56) + 2 * 100 * 24
    assert table.require("model.layers.1.mlp.fc2").flops_per_token == 2 * layer
    assert table.require("model.layers.2:in").flops_per_token == 2 * layer
    assert table.flops_per_token == 3 * layer + 2 * 24 * 332


def test_hook_table_is_made_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = resolve(folder)
    first = hook_table(identity)
    monkeypatch.setattr(sys.modules["midiscover.lm"], "hook_facts", None)
    assert hook_table(identity) == first
    assert hook_table(identity, context_size=1).flops_per_token < first.flops_per_token


@pytest.mark.parametrize("left", [b"", b'{"full": [1', b"\0" * 100])
def test_a_hook_table_that_a_power_cut_has_damaged_is_made_again(folder: Path, left: bytes) -> None:
    identity = resolve(folder)
    first = hook_table(identity)
    (kept,) = (cache_dir() / "hooks").glob(f"{identity.digest[:40]}-*.json")
    whole = kept.read_bytes()
    kept.write_bytes(left)
    assert hook_table(identity) == first
    assert kept.read_bytes() == whole


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("model.layers.3.mlp.fc2", "layer 3 is out of range; tiny-phi has layers 0 to 2"),
        ("model.layers.40.mlp:in", "layer 40 is out of range"),
        ("model.layers.1.mlp.fc3", r"nearest are .*model\.layers\.1\.mlp\.fc"),
        ("model.layer.1.mlp.fc2", r"nearest are .*model\.layers\.1\.mlp\.fc2"),
        ("blocks.1.hook_mlp_out", r"has no hook"),
        ("zzz", r"try model\.layers\.1\.mlp\.fc2"),
        ("model.layers.1.mlp.fc2:out", r"nearest are model\.layers\.1\.mlp\.fc2"),
    ],
)
def test_a_wrong_hook_names_the_right_ones(folder: Path, hook: str, message: str) -> None:
    table = hook_table(resolve(folder))
    with pytest.raises(ModelError, match=message):
        table.require(hook)


def test_an_attention_that_the_model_lacks_is_named_early(folder: Path, tmp_path: Path) -> None:
    hook_table(resolve(folder)).require_attention("sdpa")
    gemma = hook_table(resolve(make_tiny_model("gemma2", tmp_path / "gemma")))
    gemma.require_attention("eager")
    with pytest.raises(ModelError, match="gemma does not run with model.attention: sdpa; set it to eager"):
        gemma.require_attention("sdpa")


def test_hook_layer() -> None:
    assert hook_layer("model.layers.16.mlp.fc2") == hook_layer("transformer.h.16:in") == 16
    assert hook_layer("model.norm") is hook_layer("gpt2.wte") is None


def test_identity_and_hook_table_load_no_torch_here(folder: Path) -> None:
    program = (
        "import sys; from midiscover.models import *; from midiscover.config import ModelConfig\n"
        f"table = hook_table(resolve_model(ModelConfig(id={str(folder)!r})))\n"
        "print(len(table.hooks), [name for name in ('torch', 'transformers', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{len(hook_table(resolve(folder)).hooks)} []"


def test_a_folder_of_another_machine_is_named() -> None:
    identity = ModelIdentity(name="m", digest="d", tokenizer_digest="t", folder="/not/on/this/machine")
    with pytest.raises(ModelError, match="is not on this machine"):
        models.model_folder(identity)
