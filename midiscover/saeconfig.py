"""Settings of each architecture. Standard library only.

A new architecture is a dataclass here with a line in `SAE_KINDS`, and a class in `sae/` with a line in its registry;
CONTRIBUTING.md has the rest.
What sets the sparsity is named in one way for all: `sparsity()` gives the table's label and value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Control = Literal["none", "neurons", "frozen_decoder", "random_model", "untrained"]
UNSTEPPED_CONTROLS = ("neurons", "untrained")
"""Controls that take no training step."""
SHARES_NO_BATCH = ("batchtopk", "matryoshka_batchtopk")
"""Kinds that select their features over the whole batch, so that no two processes can share one."""

LONGEST_WARMUP = 0.4
"""Share of the steps that `train.l1_warmup` may take beside `target_l0`, whose steering begins after it and needs half
of all steps. By measurement: tests/bench/RESULTS.md."""


def require(condition: bool, message: str) -> None:
    """ValueError with `message` where a setting is out of its range; the reader makes it a ConfigError."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class CommonConfig:
    """What every architecture has: a width, and whether the SAE stands as a control.

    The number of features is `expansion_factor` times d_in, or `d_sae`.
    """

    expansion_factor: float | None = None
    """d_sae as a multiple of d_in; 8 where neither is given."""
    d_sae: int | None = None
    """Number of features; takes precedence over the expansion factor."""
    control: Control = "none"
    """What a score is held against: `neurons` (the hook's own dimensions, each with either sign, as features; no
    training), `frozen_decoder` (random decoder directions that stay), `random_model` (trained on the language model
    with its weights shuffled), `untrained` (the SAE as initialised)."""

    def __post_init__(self) -> None:
        require(self.expansion_factor is None or self.expansion_factor > 0, "sae.expansion_factor must be above 0")
        require(self.d_sae is None or self.d_sae > 0, "sae.d_sae must be a whole number above 0")

    def width(self, d_in: int) -> int:
        """The number of features d_sae for an input of `d_in` dimensions."""
        if self.control == "neurons":
            return 2 * d_in
        return self.d_sae if self.d_sae is not None else round((self.expansion_factor or 8) * d_in)


@dataclass(frozen=True, kw_only=True, slots=True)
class PenaltyConfig(CommonConfig):
    """Architectures whose sparsity is a penalty's doing: a coefficient, or the L0 that it is steered to."""

    target_l0: float | None = None
    """Features per token to end at, within 10 %, or a third in fewer than 200 steps. The coefficient is then where its
    control starts; of JumpReLU it stays, and the thresholds are moved. An L0 above that of the SAE without any penalty
    can't be reached."""
    initial_density: float | None = 0.02
    """Share of tokens on which each feature fires at initialisation, set by its bias or threshold on the first batch;
    null: biases start at 0 and about half of the features fire, fewer where there is an initial threshold."""

    def __post_init__(self) -> None:
        CommonConfig.__post_init__(self)
        require(self.target_l0 is None or self.target_l0 > 0, "sae.target_l0 must be above 0")
        require(
            self.initial_density is None or 0 < self.initial_density < 1,
            "sae.initial_density is a share of the tokens, between 0 and 1",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class L1Config(PenaltyConfig):
    """Architectures with an L1 penalty."""

    l1_coefficient: float = 5.0
    """Weight of sum_i f_i * norm(W_dec_i), on inputs whose mean norm is sqrt(d_in)."""

    def __post_init__(self) -> None:
        PenaltyConfig.__post_init__(self)
        require(self.l1_coefficient >= 0, "sae.l1_coefficient must be 0 or above")

    def sparsity(self) -> tuple[str, float]:
        """What sets the sparsity: the setting's short name and its value."""
        return ("L0", self.target_l0) if self.target_l0 is not None else ("l1", self.l1_coefficient)


@dataclass(frozen=True, kw_only=True, slots=True)
class StandardConfig(L1Config):
    """ReLU SAE with an L1 penalty weighted by decoder norms (Anthropic, April 2024; SAELens `standard`)."""

    kind: str = "standard"
    decoder: Literal["free", "unit_norm"] = "free"
    """`unit_norm`: decoder rows of norm 1, their gradients projected (Bricken et al. 2023)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedConfig(L1Config):
    """Gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014)."""

    kind: str = "gated"
    initial_density: float | None = 0.05
    """As of PenaltyConfig; where it trains best."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JumpReluConfig(PenaltyConfig):
    """JumpReLU SAE with an L0 penalty by straight-through gradients (Rajamanoharan et al. 2024, arXiv 2407.14435)."""

    kind: str = "jumprelu"
    initial_density: float | None = 0.1
    """As of PenaltyConfig; where it trains best."""
    l0_coefficient: float = 1.0
    """Weight of the number of active features, on inputs whose mean norm is sqrt(d_in)."""
    bandwidth: float = 0.3
    """Width of the kernel around the threshold within which a pre-activation moves the threshold."""

    def __post_init__(self) -> None:
        PenaltyConfig.__post_init__(self)
        require(self.l0_coefficient >= 0, "sae.l0_coefficient must be 0 or above")
        require(self.bandwidth > 0, "sae.bandwidth must be above 0")

    def sparsity(self) -> tuple[str, float]:
        """What sets the sparsity: the setting's short name and its value."""
        return ("L0", self.target_l0) if self.target_l0 is not None else ("l0c", self.l0_coefficient)


@dataclass(frozen=True, kw_only=True, slots=True)
class TopKConfig(CommonConfig):
    """TopK SAE with the AuxK loss against dead features (Gao et al. 2024, arXiv 2406.04093, sections 2.3 and A.2)."""

    kind: str = "topk"
    k: int = 32
    """Features kept per token."""
    auxk_coefficient: float = 1 / 32
    """Weight of the AuxK loss, which is divided by the residual's variance; 0 turns it off."""
    k_aux: int | None = None
    """Dead features that reconstruct the residual; null: d_in / 2."""

    def __post_init__(self) -> None:
        CommonConfig.__post_init__(self)
        require(self.k > 0, "sae.k must be a whole number above 0")
        require(self.auxk_coefficient >= 0, "sae.auxk_coefficient must be 0 or above")
        require(self.k_aux is None or self.k_aux > 0, "sae.k_aux must be above 0")

    def sparsity(self) -> tuple[str, float]:
        """What sets the sparsity: the setting's short name and its value."""
        return ("k", self.k)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchTopKConfig(TopKConfig):
    """BatchTopK SAE (Bussmann et al. 2024, arXiv 2412.06410): k features per token on average over a batch."""

    kind: str = "batchtopk"
    threshold_decay: float = 0.9
    """Decay per step of the running mean of the smallest kept pre-activation, the threshold outside training. One batch
    tells it to a per cent; a mean over many steps lags behind (k 6, 100 steps: L0 3.5 with 0.99, 6.1 with 0.9)."""

    def __post_init__(self) -> None:
        TopKConfig.__post_init__(self)
        require(0 <= self.threshold_decay < 1, "sae.threshold_decay must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class MatryoshkaConfig(BatchTopKConfig):
    """Matryoshka BatchTopK SAE (Bussmann et al. 2025, arXiv 2503.17547): each prefix reconstructs by itself."""

    kind: str = "matryoshka_batchtopk"
    prefixes: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    """Shares of the features, each prefix of which reconstructs the input; rising, the last one 1."""

    def __post_init__(self) -> None:
        BatchTopKConfig.__post_init__(self)
        rising = all(a < b for a, b in zip(self.prefixes, self.prefixes[1:], strict=False))
        require(
            bool(self.prefixes) and rising and self.prefixes[0] > 0 and self.prefixes[-1] == 1,
            "sae.prefixes must rise from above 0 to 1, for example [0.25, 0.5, 1]",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TranscoderConfig(L1Config):
    """Transcoder (Dunefsky et al. 2024, arXiv 2406.11944): reads one hook and predicts another; ReLU with L1."""

    kind: str = "transcoder"
    output_hook: str | None = None
    """The hook that is predicted; `{layer}` stands for the input hook's layer. null: the output of the module whose
    input is read (`model.layers.16.mlp` for the hook `model.layers.16.mlp:in`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SkipTranscoderConfig(TranscoderConfig):
    """Transcoder with a linear skip connection (Paulo et al. 2025, arXiv 2501.18823)."""

    kind: str = "skip_transcoder"
    initial_density: float | None = 0.1
    """As of PenaltyConfig; the skip connection leaves little to few features."""


SaeConfig = (
    StandardConfig
    | GatedConfig
    | JumpReluConfig
    | TopKConfig
    | BatchTopKConfig
    | MatryoshkaConfig
    | TranscoderConfig
    | SkipTranscoderConfig
)
"""One architecture's settings; `kind` chooses in YAML."""

SAE_KINDS: dict[str, type[SaeConfig]] = {
    "standard": StandardConfig,
    "gated": GatedConfig,
    "topk": TopKConfig,
    "batchtopk": BatchTopKConfig,
    "jumprelu": JumpReluConfig,
    "matryoshka_batchtopk": MatryoshkaConfig,
    "transcoder": TranscoderConfig,
    "skip_transcoder": SkipTranscoderConfig,
}
