"""lm.py against a plain transformers model with plain hooks, which runs to the end; six families, float32 on CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
)

from midiscover import hookfacts
from midiscover.attach import fuse_gelu
from midiscover.config import ModelConfig
from midiscover.errors import ModelError
from midiscover.lm import LanguageModel, compute_dtype, convert_gguf, hook_facts, load_tokenizer
from midiscover.models import resolve_model
from tests.tiny import KINDS, MLP_OUTPUT, Kind, make_tiny_model


@dataclass
class Family:
    kind: Kind
    lm: LanguageModel
    plain: Any
    ids: Tensor

    def mlp(self, layer: int) -> str:
        return MLP_OUTPUT[self.kind].format(layer)

    def block(self, layer: int) -> str:
        return self.mlp(layer).rsplit(".", 2)[0]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIDISCOVER_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module", params=KINDS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    kind: Kind = request.param
    folder = make_tiny_model(kind, tmp_path_factory.mktemp("models") / kind)
    attention = "eager" if kind == "gemma2" else "sdpa"
    lm = LanguageModel.load(resolve_model(ModelConfig(id=str(folder))), dtype="float32", attention=attention)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    ids = torch.randint(lm.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))
    return Family(kind, lm, plain, ids)


def test_a_model_that_is_spread_over_devices(family: Family) -> None:
    """accelerate moves what passes between its parts; here its parts are the CPU and the disk."""
    if family.kind != "llama":
        pytest.skip("one family is enough")
    places = {name: "cpu" for name, _ in family.plain.model.named_children()} | {"layers.1": "disk"}
    places |= {f"layers.{i}": "cpu" for i in range(len(family.plain.model.layers)) if i != 1}
    places.pop("layers")
    spread = LanguageModel.load(
        family.lm.identity,
        dtype="float32",
        device_map={f"model.{name}": place for name, place in places.items()} | {"lm_head": "cpu"},
    )
    assert spread.model.get_submodule("model.layers.1.mlp.down_proj").weight.device.type == "meta", (
        "it lies on the disk"
    )
    hooks = [family.mlp(0), family.mlp(1), family.mlp(1) + ":in"]
    for hook, acts in spread.activations(family.ids, hooks).items():
        assert torch.equal(acts, family.lm.activations(family.ids, hooks)[hook]), hook
    edit = {family.mlp(1): lambda x: 0.5 * x}
    assert torch.equal(spread.logits(family.ids, replace=edit), family.lm.logits(family.ids, replace=edit))


def plain_run(model: Any, ids: Tensor, hooks: list[str], **kwargs: Any) -> tuple[dict[str, Tensor], Any]:
    """A whole forward pass; copies what PyTorch's own hooks show of each module."""
    seen: dict[str, Tensor] = {}

    def output_of(hook: str) -> Callable[..., None]:
        def keep(_module: Any, _args: Any, output: Any) -> None:
            seen[hook] = (output[0] if isinstance(output, tuple) else output).detach().clone()

        return keep

    def input_of(hook: str) -> Callable[..., None]:
        def keep(_module: Any, args: Any, kwargs: Any) -> None:
            seen[hook] = (args[0] if args else kwargs["hidden_states"]).detach().clone()

        return keep

    handles = []
    for hook in hooks:
        module = model.get_submodule(hook.removesuffix(":in"))
        if hook.endswith(":in"):
            handles.append(module.register_forward_pre_hook(input_of(hook), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(output_of(hook)))
    with torch.no_grad():
        output = model(input_ids=ids, **kwargs)
    for handle in handles:
        handle.remove()
    return seen, output


def assert_identical(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_activations_are_the_plain_models_module_tensors(family: Family) -> None:
    hooks = [family.mlp(2), family.mlp(0), f"{family.mlp(1)}:in", family.block(1), f"{family.block(1)}:in"]
    hooks += [family.mlp(1).rpartition(".")[0], f"{family.mlp(1).rpartition('.')[0]}:in"]
    expected, _ = plain_run(family.plain, family.ids, hooks)
    found = family.lm.activations(family.ids, hooks)
    assert list(found) == hooks
    for hook in hooks:
        assert_identical(found[hook], expected[hook])  # bit for bit, so also token by token


def test_block_outputs_are_the_hidden_states_except_the_last(family: Family) -> None:
    _, output = plain_run(family.plain, family.ids, [], output_hidden_states=True)
    found = family.lm.activations(family.ids, [family.block(0), family.block(1), f"{family.block(0)}:in"])
    assert_identical(found[f"{family.block(0)}:in"], output.hidden_states[0])
    assert_identical(found[family.block(0)], output.hidden_states[1])
    assert_identical(found[family.block(1)], output.hidden_states[2])


def test_the_pass_ends_at_the_last_hook(family: Family) -> None:
    ran: list[str] = []

    def count(path: str) -> Any:
        return lambda _module, _args: ran.append(path)

    watched = [family.block(0), family.block(2), "lm_head"]
    handles = [family.lm.model.get_submodule(path).register_forward_pre_hook(count(path)) for path in watched]
    family.lm.activations(family.ids, [family.mlp(1), family.mlp(0)])
    assert ran == [family.block(0)]
    family.lm.activations(family.ids, [f"{family.block(2)}:in"])
    family.lm.logits(family.ids)
    for handle in handles:
        handle.remove()
    assert ran.count("lm_head") == 1


def test_no_hook_stays_behind(family: Family) -> None:
    family.lm.activations(family.ids, [family.mlp(1), f"{family.mlp(0)}:in"])
    with pytest.raises(ModelError):
        family.lm.activations(family.ids, [family.mlp(1), "no.such.module"])
    modules = family.lm.model.modules()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


@pytest.mark.parametrize("suffix", ["", ":in"])
def test_replacing_by_the_same_changes_nothing(family: Family, suffix: str) -> None:
    _, output = plain_run(family.plain, family.ids, [])
    hooks = (family.mlp(1) + suffix, family.block(0) + suffix)
    assert_identical(family.lm.logits(family.ids), output.logits)
    assert_identical(family.lm.logits(family.ids, replace=dict.fromkeys(hooks, torch.clone)), output.logits)


def test_replacing_by_zero_equals_a_naive_ablation(family: Family) -> None:
    def zero(_module: Any, _args: Any, output: Tensor) -> Tensor:
        return output * 0

    handle = family.plain.get_submodule(family.mlp(1)).register_forward_hook(zero)
    _, ablated = plain_run(family.plain, family.ids, [])
    handle.remove()
    _, clean = plain_run(family.plain, family.ids, [])
    found = family.lm.logits(family.ids, replace={family.mlp(1): torch.zeros_like})
    assert_identical(found, ablated.logits)
    assert (found - clean.logits).abs().max() > 1e-3


def test_replacing_the_input_reaches_the_module(family: Family) -> None:
    found = family.lm.logits(family.ids, replace={f"{family.block(1)}:in": lambda x: 2 * x})
    expected = family.lm.logits(family.ids, replace={family.block(0): lambda x: 2 * x})
    assert_identical(found, expected)


def test_padding_does_not_change_the_tokens_before_it(family: Family) -> None:
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[1, 9:] = 0
    hook = family.mlp(2)
    padded = family.lm.activations(family.ids, [hook], mask)[hook]
    alone = family.lm.activations(family.ids[1:, :9], [hook])[hook]
    torch.testing.assert_close(padded[1:, :9], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(padded[:1], family.lm.activations(family.ids[:1], [hook])[hook], rtol=1e-5, atol=1e-5)


def test_hook_facts_hold_every_module_with_its_width(family: Family) -> None:
    facts = hook_facts(Path(family.lm.identity.folder or ""))
    assert (facts["n_layers"], facts["d_model"], facts["vocab_size"]) == (3, 24, 332)
    assert (facts["context_length"], facts["supports_sdpa"]) == (256, family.kind != "gemma2")
    assert facts["parameters"] == sum(parameter.numel() for parameter in family.plain.parameters())
    assert facts["recommended"] == [family.mlp(1), family.mlp(2)]
    paths = [path for path, _ in family.plain.named_modules() if path]
    outputs: dict[str, tuple[int, ...]] = {}

    def note(path: str, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor):
            outputs[path] = tuple(first.shape)

    handles = [
        family.plain.get_submodule(path).register_forward_hook(lambda _m, _a, output, path=path: note(path, output))
        for path in paths
    ]
    plain_run(family.plain, family.ids, [])
    for handle in handles:
        handle.remove()
    expected = {path: shape[2] for path, shape in outputs.items() if len(shape) == 3 and shape[:2] == (2, 17)}
    assert {hook: fact[0] for hook, fact in facts["hooks"].items() if not hook.endswith(":in")} == expected
    read = family.lm.activations(family.ids, facts["hooks"])
    assert {hook: x.shape[2] for hook, x in read.items()} == {hook: fact[0] for hook, fact in facts["hooks"].items()}


def test_flops_are_two_per_weight_and_the_causal_half_of_attention(family: Family) -> None:
    facts = hook_facts(Path(family.lm.identity.folder or ""))
    names = [name for name, tensor in family.plain.named_parameters() if name.endswith("weight") and tensor.ndim == 2]
    weights = {name: family.plain.get_parameter(name).numel() for name in names}
    in_layers = sum(size for name, size in weights.items() if name.startswith(family.block(0)[:-1]))
    attention_width = 2 * (16 if family.kind == "gemma2" else 12)
    linear, attention = facts["full"]
    assert linear == 2 * (in_layers + 24 * 332)
    assert attention == 3 * 2 * attention_width
    _, up_to_block_1, attention_to_block_1 = facts["hooks"][family.block(1)]
    assert (up_to_block_1, attention_to_block_1) == (2 * in_layers * 2 / 3, 2 * 2 * attention_width)


def test_sizes_stand_in_where_the_model_cannot_run_without_numbers(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(family.lm.identity.folder or "")
    exact = hook_facts(folder)

    def refuse(_model: Any) -> Any:
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr(hookfacts, "_dry_run", refuse)
    estimate = hook_facts(folder)
    assert estimate["recommended"] == exact["recommended"]
    assert {family.mlp(1), f"{family.mlp(1)}:in", family.block(2)} <= estimate["hooks"].keys()
    for hook, (d_in, *_) in estimate["hooks"].items():
        assert d_in == exact["hooks"][hook][0]
    assert estimate["full"][0] == exact["full"][0]


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("phi", tmp_path_factory.mktemp("phi") / "tiny-phi")


def load(folder: Path, **kwargs: Any) -> LanguageModel:
    return LanguageModel.load(resolve_model(ModelConfig(id=str(folder))), **{"dtype": "float32", **kwargs})


def test_bfloat16_in_and_out(phi: Path) -> None:
    lm = load(phi, dtype="bfloat16")
    hook = "model.layers.1.mlp.fc2"
    ids = torch.arange(12).reshape(1, 12)
    assert lm.activations(ids, [hook])[hook].dtype == torch.bfloat16
    clean = lm.logits(ids)
    assert clean.dtype == torch.bfloat16
    assert_identical(lm.logits(ids, replace={hook: lambda x: x.float()}), clean)


def test_the_gelu_of_phi_may_be_pytorchs_own(phi: Path) -> None:
    """As on a GPU: the same activations to rounding, and hooks on the activation function stay."""
    hook = "model.layers.0.mlp.activation_fn"
    one, two = load(phi), load(phi)
    fuse_gelu(two.model)
    assert isinstance(two.model.get_submodule(hook), torch.nn.GELU)
    assert not isinstance(one.model.get_submodule(hook), torch.nn.GELU)
    ids = torch.arange(12)[None]
    assert torch.allclose(one.activations(ids, [hook])[hook], two.activations(ids, [hook])[hook], atol=1e-6)
    assert torch.allclose(one.logits(ids), two.logits(ids), atol=1e-5)


def test_vocabulary_and_tokenizer_of_a_model_with_spare_rows(phi: Path) -> None:
    lm = load(phi)
    assert (lm.vocab_size, len(lm.tokenizer)) == (332, 320)
    text = "The river is an empty list."
    assert lm.tokenizer.decode(lm.tokenizer(text)["input_ids"]) == text
    assert load_tokenizer(lm.identity).get_vocab() == lm.tokenizer.get_vocab()
    assert torch.isfinite(lm.logits(torch.tensor([[331, 0, 320]]))).all()


def test_no_hooks_means_no_pass(phi: Path) -> None:
    assert load(phi).activations(torch.zeros(1, 3, dtype=torch.long), []) == {}


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("model.layers.1.mlp.fc9", "has no hook"),
        ("model.layers", "not part of a forward pass"),
        ("model.rotary_emb", r"gives \[1, 5, 6\]"),
        ("model.embed_tokens:in", r"gives \[2, 5\]"),
    ],
)
def test_a_hook_that_gives_no_activations_is_named(phi: Path, hook: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(phi).activations(torch.zeros(2, 5, dtype=torch.long), [hook])


def test_a_replacement_of_another_shape_is_refused(phi: Path) -> None:
    with pytest.raises(ValueError, match="has shape"):
        load(phi).logits(torch.zeros(1, 5, dtype=torch.long), replace={"model.layers.1": lambda x: x[:, :3]})


def test_float16_is_refused() -> None:
    float16: Any = "float16"
    with pytest.raises(ModelError, match="auto, bfloat16 or float32"):
        compute_dtype(float16, torch.device("cpu"))
    assert compute_dtype("auto", torch.device("cpu")) in (torch.bfloat16, torch.float32)


def test_weights_that_lack_a_tensor_are_refused(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "llama")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj"):
        load(folder)


def test_code_in_a_model_folder_never_runs(tmp_path: Path) -> None:
    folder, ran = make_tiny_model("llama", tmp_path / "llama"), tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "modeling_trap.Trap", "AutoModelForCausalLM": "modeling_trap.Trap"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": classes}))
    (folder / "modeling_trap.py").write_text(f"open({str(ran)!r}, 'w')\nclass Trap: pass\n")
    assert type(load(folder).model).__name__ == "LlamaForCausalLM"
    assert not ran.exists()


def test_a_model_without_sdpa_says_so(tmp_path: Path) -> None:
    folder = make_tiny_model("gemma2", tmp_path / "gemma")
    with pytest.raises(ModelError, match="eager"):
        load(folder)


def test_what_is_no_language_model_is_refused(tmp_path: Path) -> None:
    transformers.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no causal language model"):
        hook_facts(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "never_heard_of"}')
    with pytest.raises(ModelError, match="no causal language model"):
        hook_facts(tmp_path)


def test_a_gguf_file_with_a_part_of_the_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the first file of a split one: transformers fills the rest with random numbers and only warns."""
    model = AutoModelForCausalLM.from_config(transformers.PhiConfig(num_hidden_layers=1, hidden_size=32, vocab_size=64))
    report = {"missing_keys": {"model.layers.3.mlp.fc1.weight"}, "mismatched_keys": set()}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: (model, report))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: None)
    with pytest.raises(ModelError, match=r"big-00001-of-00002\.gguf lacks .*layers\.3\.mlp\.fc1.* join its parts"):
        convert_gguf(tmp_path / "big-00001-of-00002.gguf", tmp_path / "made", {})
    assert not (tmp_path / "made").exists()
