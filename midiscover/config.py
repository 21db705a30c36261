"""Every setting of a run, as frozen dataclasses. Standard library only: reading a config loads no torch.

One YAML file holds one `RunConfig`. `configio` reads it strictly; nothing writes to a config after its birth, and
variants come from `dataclasses.replace`. The store's address, secrets and hosts are never settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from midiscover.errors import ConfigError
from midiscover.saeconfig import SaeConfig, StandardConfig
from midiscover.saeconfig import require as _require

Dtype = Literal["auto", "bfloat16", "float32"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The language model whose activations are read."""

    id: str = "embedded"
    """Hub id (`microsoft/phi-2`), local folder, GGUF file, `store:<name>` (a model in the run's store, put there by
    `midiscover model push`), or `embedded` (SmolLM2-135M-Instruct)."""
    revision: str | None = None
    """Hub branch, tag or commit; resolved to a commit once. Hub ids only."""
    dtype: Dtype = "bfloat16"
    """Precision of the forward pass. `auto`: bfloat16 where this machine, which may only submit the run, computes in it
    natively, else float32."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation of transformers."""
    weights: Literal["trained", "shuffled"] = "trained"
    """`shuffled`: the entries of each weight matrix in random order, as `sae.control: random_model` has them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusConfig:
    """The text, and how it becomes token windows."""

    source: str = "builtin"
    """`builtin`, `builtin-code`, a hub data set id, a parquet, jsonl or txt file, or a folder or s3:// prefix of
    such files."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    revision: str | None = None
    """Hub data set branch, tag or commit; resolved to a commit once."""
    text_field: str = "text"
    """Column (parquet, hub) or key (jsonl) that holds the text."""
    max_samples: int | None = None
    """Read at most this many documents."""
    max_tokens: int | None = None
    """Stop after this many tokens (training and held-out together)."""
    context_size: int = 128
    """Tokens in a window; documents are packed end to end."""
    held_out: float = 0.1
    """Share of documents kept out of training, by hash of the document."""
    prepend_bos: bool | None = None
    """Start each window with the tokenizer's BOS token. null: as the tokenizer itself does."""
    seed: int = 0
    """Chooses the held-out documents, and the order of the built-in text."""

    def __post_init__(self) -> None:
        _require(self.max_samples is None or self.max_samples > 0, "corpus.max_samples must be a whole number above 0")
        _require(self.max_tokens is None or self.max_tokens > 0, "corpus.max_tokens must be a whole number above 0")
        _require(8 <= self.context_size <= 1 << 15, "corpus.context_size must lie between 8 and 32,768 tokens")
        _require(0 < self.held_out < 1, "corpus.held_out must lie between 0 and 1, for example 0.1")


@dataclass(frozen=True, kw_only=True, slots=True)
class HarvestConfig:
    """Which activations are read, and how they are cut into blocks."""

    hooks: tuple[str, ...] = ()
    """Module paths, `model.layers.16.mlp.fc2` (output) or `model.layers.16.mlp:in` (input); `{8,16}` expands."""
    block_tokens: int = 12_288
    """Rows of a block, the unit that is written, verified and redone; 63 MB of bfloat16 at d_in 2,560."""
    batch_tokens: int | None = None
    """Tokens per forward pass, at most a block; halved on out-of-memory. null: 4,096 on CPU, by its memory on a GPU."""
    mask_first: bool = True
    """Leave the first position of each window out of training: an attention sink, whatever its token."""
    outlier_norm: float = 10.0
    """Leave out rows whose norm exceeds this many times the median norm of their block (attention sinks elsewhere)."""

    def __post_init__(self) -> None:
        _require(self.block_tokens > 0, "harvest.block_tokens must be above 0")
        _require(self.batch_tokens is None or self.batch_tokens > 0, "harvest.batch_tokens must be above 0")
        _require(self.outlier_norm > 1, "harvest.outlier_norm must be above 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The training loop, the same for every SAE of a pack."""

    epochs: int = 1
    """Passes over the training rows."""
    batch_size: int = 4096
    """Tokens per step."""
    lr: float | None = None
    """Peak learning rate of Adam; null: what suits the width and the number of steps."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    lr_warmup: float = 0.05
    """Share of all steps over which the learning rate rises linearly from 0."""
    lr_decay: float = 0.2
    """Share of all steps, at the end, over which it falls linearly to 0."""
    l1_warmup: float = 0.0
    """Share of all steps over which the sparsity coefficient rises linearly from 0; beside `sae.target_l0` at most
    0.4."""
    clip: float = 1.0
    """Gradient norm to which each SAE is clipped by itself; 0 turns it off."""
    dtype: Dtype = "float32"
    """Precision of the matrix products; weights, losses and Adam stay in float32."""
    shuffle_tokens: int = 1_000_000
    """Rows shuffled together; the loader holds two such pools in memory, or one that is everything."""
    dead_window: int | None = None
    """A feature that did not fire in this many training tokens counts as dead; null: half an epoch, at most 10M,
    and with resampling at most half of what comes before its first time."""
    resample_at: tuple[float, ...] = ()
    """Shares of the steps at which dead features are pointed at what is reconstructed worst (Bricken et al. 2023).
    `sae.target_l0` is met again some 80 steps after the last."""
    retire_after: float | None = None
    """Share of the steps after which an SAE is dropped that another of its pack and architecture beats at L0 and FVU
    alike; null: none is. Those that stay are not changed by it."""
    seed: int = 0
    """Seeds the weights and the order of the rows."""
    report_every: int = 10
    """Steps between two points of the loss curve."""
    checkpoint_every: float = 60.0
    """Seconds between two checkpoints of a pack."""

    def pool_tokens(self, hooks: int) -> int:
        """Rows of each hook that are shuffled together where a source reads so many: they share the memory of one."""
        return max(1, self.shuffle_tokens // hooks)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr", "shuffle_tokens", "report_every", "checkpoint_every"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"train.{name} must be above 0")
        _require(self.dead_window is None or self.dead_window > 0, "train.dead_window must be above 0")
        for name in ("lr_warmup", "lr_decay", "l1_warmup"):
            _require(0 <= getattr(self, name) <= 1, f"train.{name} is a share of the steps, between 0 and 1")
        _require(all(0 <= b < 1 for b in self.betas), "train.betas must lie between 0 and 1")
        _require(-(2**63) <= self.seed < 2**63, "train.seed must fit into 64 bits, with its sign")
        _require(self.clip >= 0, "train.clip must be 0 or above")
        shares = (*self.resample_at, *([] if self.retire_after is None else [self.retire_after]))
        _require(
            all(0 < share < 1 for share in shares),
            "train.resample_at and train.retire_after are shares of the steps, between 0 and 1",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What is measured on held-out text after training."""

    max_tokens: int = 500_000
    """Held-out rows for L0, FVU, dead features and density."""
    ce_tokens: int = 4096
    """Held-out tokens for cross-entropy and KL with the reconstruction spliced into the model; 0 leaves them out."""
    foreign_source: str | None = None
    """A second text, unlike the one trained on, for the FVU and L0 there; whatever corpus.source may be, or
    `builtin-code`, the source of Python's standard library. null: none."""
    foreign_text_field: str | None = None
    """Column or key that holds its text; null: that of corpus.text_field."""
    foreign_subset: str | None = None
    """Configuration name, where it is a hub data set."""
    foreign_split: str = "train"
    """Split, where it is a hub data set."""
    foreign_tokens: int = 8192
    """Tokens of it that are run through the model, excerpts of many documents."""

    def __post_init__(self) -> None:
        _require(self.max_tokens > 0, "evaluate.max_tokens must be above 0")
        _require(self.ce_tokens >= 0, "evaluate.ce_tokens must be 0 or above")
        _require(self.foreign_tokens > 0, "evaluate.foreign_tokens must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class FeaturesConfig:
    """What is written down of each feature, from stored training activations."""

    max_tokens: int = 1_000_000
    """Training rows that are read, in whole blocks spread evenly over the harvest."""
    top_contexts: int = 20
    """Contexts with the highest activations, one per window of the corpus at most."""
    interval_contexts: int = 5
    """Contexts drawn at random from each of up to 8 equal intervals of activation."""
    random_contexts: int = 5
    """Contexts drawn at random from all rows, whether the feature fires there or not."""
    context_before: int = 24
    """Tokens of a context before the one it is about."""
    context_after: int = 8
    """Tokens of a context after it."""
    sample_tokens: int = 16_384
    """Rows, drawn at random, on which a feature's correlations with other features and with neurons are measured."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_contexts", "sample_tokens"):
            _require(getattr(self, name) > 0, f"features.{name} must be above 0")
        for name in ("interval_contexts", "random_contexts", "context_before", "context_after"):
            _require(getattr(self, name) >= 0, f"features.{name} must be 0 or above")


@dataclass(frozen=True, kw_only=True, slots=True)
class NeuronpediaConfig:
    """How SAEs are called on Neuronpedia."""

    model: str | None = None
    """Its id of the language model, such as `phi-2`; null: made from the model's name."""
    release: str = "midiscover"
    """Name of the release."""
    source_set: str | None = None
    """Name of the source set, without dots; null: made from hook, width and sparsity, such as `mdc-mlp-20k-l1-3`."""
    creator_name: str = "miDiscover"
    """Who is shown as the creator."""
    creator_id: str = "clkht01d40000jv08hvalcvly"
    """A user that the importing Neuronpedia knows; this one its own importer is seeded with."""
    url: str | None = None
    """Where people read about the release."""


EXPORTS = ("saelens", "neuronpedia", "bundle")
"""Formats that an SAE is exported in."""


NO_LICENCE = "must be a hub's short name of a licence, such as mit, apache-2.0 or cc-by-4.0"


def is_licence(text: str) -> bool:
    """Whether a hub may have a licence of that short name."""
    return text.isascii() and text.replace(".", "").replace("-", "").isalnum() and text == text.lower()


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishConfig:
    """What `midiscover publish` writes of a sweep, and where."""

    formats: tuple[str, ...] = EXPORTS
    """Any of saelens, neuronpedia, bundle."""
    saes: str = "frontier"
    """Which SAEs of the sweep: `all`; `frontier`, those no other SAE of their hook beats, without controls; `best`, of
    each hook the one of these with the lowest FVU; or the beginning of an id."""
    out: str | None = None
    """Folder or s3:// prefix, which gets `<SAE>/<format>/`; null: `exports/` in the folder of each SAE in the store."""
    push: str | None = None
    """`hf://org/repo`: put the SAELens layout with a model card there as well."""
    license: str | None = None
    """A hub's short name of the licence, such as `mit`, for the head of the model card; null: the card states none."""
    neuronpedia: NeuronpediaConfig = field(default_factory=NeuronpediaConfig)

    def __post_init__(self) -> None:
        wrong = [name for name in self.formats if name not in EXPORTS]
        _require(not wrong, f"publish.formats holds '{wrong[0] if wrong else ''}'; known are {', '.join(EXPORTS)}")
        _require(bool(self.formats), f"publish.formats is empty; known are {', '.join(EXPORTS)}")
        _require(self.push is None or self.push.startswith("hf://"), "publish.push must look like hf://org/repo")
        _require(self.license is None or is_licence(self.license), f"publish.license {NO_LICENCE}")
        _require(self.push is None or "saelens" in self.formats, "publish.push needs saelens among publish.formats")


KEEP, UNTIL_DONE = "always", "until_done"
"""Words of `resources.keep_activations`; the first where nothing is said."""


def days_of(keep: str) -> float | None:
    """Days after which activations may go, 0 for `until_done`; None for `always`. ValueError for anything else."""
    if keep == KEEP:
        return None
    if keep == UNTIL_DONE:
        return 0.0
    number = keep.removesuffix("d")
    if number == keep or not number.replace(".", "", 1).isdigit():
        raise ValueError(keep)
    return float(number)


@dataclass(frozen=True, kw_only=True, slots=True)
class ResourcesConfig:
    """How the work is laid over the machine. Never part of an id."""

    trainer: Literal["auto", "inline", "ray_train"] = "auto"
    """A pack's loop runs inside its Tune trial, or in a TorchTrainer. auto: ray_train where there are GPUs."""
    nodes: int | None = None
    """Nodes to ask a cluster's autoscaler for, for as long as a stage runs; null: those that are there."""
    harvest_actors: int | None = None
    """Language-model actors; null: one per GPU share, or one on CPU."""
    gpus_per_actor: float = 1.0
    """GPU share of a language-model actor, where there are GPUs."""
    gpus_per_model: int = 1
    """Whole GPUs of one node that a language model is spread over, layer by layer, where it is too large for one."""
    pack_size: int | None = None
    """SAEs at most in a pack; null: all that read one hook, or fewer where GPUs would stay idle. 1: the plain grid."""
    gpus_per_pack: float = 1.0
    """GPU share of a pack, where there are GPUs; each of several workers has a whole one."""
    workers: int = 1
    """Processes that train a pack together, each on its share of every batch, in a TorchTrainer: for SAEs of which one
    card is too slow. Numbers are those of one process but for the order of sums."""
    stacked: bool = False
    """Step the small L1 SAEs of a pack together, in batched products: several times faster where a step takes longer to
    call than to compute, and the same to the rounding of sums instead of bit for bit. In float32 only."""
    threads: int | None = None
    """Torch threads of an actor or pack on CPU; null: the cores divided by what runs at once."""
    max_failures: int = 3
    """Tries again of a pack that fails by its own error; lost nodes are retried without limit."""
    stall_seconds: float = 1800.0
    """A pack that has not moved for so long is killed and started again, `max_failures` times; a stage in which nothing
    moves is ended with an error."""
    activations: Literal["store", "stream", "auto"] = "store"
    """store: the language model runs once and writes activation blocks, which every later stage reads. stream: it runs
    in the process that trains the SAEs of all hooks, and nothing is stored; for one epoch, or for as many as
    train.shuffle_tokens holds, rows of every hook in memory at once; features harvest the text later. auto: what
    `midiscover plan` finds quicker, where a node's RAM holds it."""
    keep_activations: str = KEEP
    """always; until_done: the sweep removes them when all its SAEs stand; or days, such as 14d, after which
    `midiscover store gc` removes them. Those that another sweep keeps stay. What needs them later harvests again."""

    def __post_init__(self) -> None:
        try:
            days_of(self.keep_activations)
        except ValueError:
            _require(False, "resources.keep_activations must be always, until_done or days such as 14d")
        for name in ("nodes", "harvest_actors", "pack_size", "threads"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"resources.{name} must be a whole number above 0")
        _require(self.gpus_per_model > 0, "resources.gpus_per_model must be a whole number above 0")
        if self.activations == "stream":
            for name in ("workers", "gpus_per_model"):
                _require(getattr(self, name) == 1, f"resources.{name} must be 1 where resources.activations is stream")
        _require(self.workers > 0, "resources.workers must be a whole number above 0")
        _require(
            self.workers == 1 or self.trainer != "inline",
            "resources.workers above 1 needs resources.trainer ray_train, or auto",
        )
        for name in ("gpus_per_actor", "gpus_per_pack"):
            value = getattr(self, name)
            _require(0 < value <= 1, f"resources.{name} must be a share of one GPU, above 0 and at most 1")
        _require(self.max_failures >= 0, "resources.max_failures must be 0 or above")
        _require(self.stall_seconds > 0, "resources.stall_seconds must be above 0")

    def pack_share(self) -> float:
        """The share of a GPU that each process of a pack has. ConfigError where several were to share one."""
        if self.workers > 1 and self.gpus_per_pack < 1:
            raise ConfigError(
                f"resources.gpus_per_pack is {self.gpus_per_pack:g}, and must be 1 where resources.workers is above 1: "
                "workers of a pack can't share a GPU."
            )
        return self.gpus_per_pack

    def trainer_on(self, *, gpus: bool) -> Literal["inline", "ray_train"]:
        """What `trainer` comes to where there are GPUs, or none."""
        if self.trainer != "auto":
            return self.trainer
        return "ray_train" if gpus or self.workers > 1 else "inline"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One YAML file: a model, a text, and a grid of SAEs."""

    name: str = "sweep"
    """What people call it; becomes part of the sweep's id."""
    model: ModelConfig = field(default_factory=ModelConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    harvest: HarvestConfig = field(default_factory=HarvestConfig)
    sae: SaeConfig = field(default_factory=StandardConfig)
    grid: tuple[Mapping[str, tuple[Any, ...]], ...] = ()
    """Axes of the sweep besides the hooks: dotted path in `sae` or `train` -> values. Several such grids, as a list,
    are run one beside the other; `sae.kind` and `sae.control` are axes like any other. Another architecture than that
    of `sae` takes over what is set there otherwise than by default, where it has such a setting; but no `target_l0`
    where a grid of other architectures alone goes through their coefficient."""
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    publish: PublishConfig = field(default_factory=PublishConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)

    def __post_init__(self) -> None:
        ok = self.name and all(c.islower() or c.isdigit() or c in "-_" for c in self.name)
        _require(bool(ok), "name may hold lower-case letters, digits, '-' and '_' only")


@dataclass(frozen=True, kw_only=True, slots=True)
class SaePoint:
    """One point of the grid: what makes one SAE."""

    hook: str
    sae: SaeConfig
    train: TrainConfig
