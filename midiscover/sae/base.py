"""What every architecture shares: weights, initialisation, folding into the raw activation space.

An SAE trains on x' = scale * (x - mean), whose mean norm is sqrt(d_in). `fold` turns its weights into ones that take
raw activations and have unit decoder rows, the form in which SAEs are saved, compared and served; `from_folded` reads
that form.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from midiscover.sae.code import Code, PreActivations, product

DENSE_INIT_NORM = 0.1
LARGEST_MEAN = 0.4
"""Norm of the inputs' mean over sqrt(d_in), the norm of what varies about it, up to which features see their whole
share of it at first. Of a larger one b_dec would not come back. By measurement: tests/bench/RESULTS.md."""
FOLDED_AT_ONCE = 512
"""Features whose weights are in float64 at a time: what a CPU's cache holds, and little beside a full card."""


class Normalisation(NamedTuple):
    """x' = scale * (x - mean), whose mean norm is sqrt(d)."""

    mean: Tensor
    """[d] float32."""
    scale: float
    variance: float
    """Mean squared distance of raw rows to `mean`, the denominator of FVU."""


class Losses(NamedTuple):
    """Losses of one batch; each a scalar tensor, in normalised units."""

    total: Tensor
    """What is minimised."""
    mse: Tensor
    """Squared error summed over d_out, mean over tokens."""
    sparsity: Tensor
    """The unweighted penalty: sum_i f_i * norm(W_dec_i) for L1, the count of active features for L0, the AuxK loss for
    TopK. Mean over tokens."""
    code: Code
    """What fired."""


class Dead(NamedTuple):
    """Features that count as dead."""

    mask: Tensor
    """[d_sae] bool."""
    at_most: int
    """No fewer than there are; known without asking the device, which a step would have to wait for."""

    def columns(self) -> tuple[Tensor, Tensor]:
        """[at_most] features: the dead ones, rising, and others where there are not so many; and which are dead."""
        found = self.mask.byte().sort(descending=True, stable=True).indices[: self.at_most]
        return found, self.mask[found]


class StepContext(NamedTuple):
    """What a loss needs besides the batch."""

    sparsity: float | Tensor
    """Weight of the sparsity penalty at this step: the coefficient times its warm-up. A scalar tensor where it is
    steered, so that no step waits for a GPU."""
    dead: Dead | None
    """None where nothing asks for them or none is."""
    mean: Callable[[Tensor], Tensor] | None = None
    """Mean of a value without gradient over the processes that share the batch; None: the batch is whole."""


class Sae(nn.Module, ABC):
    """f = activate((x - b_dec) @ W_enc + b_enc);  x_hat = f @ W_dec + b_dec.

    Shapes: x [tokens, d_in], f [tokens, d_sae], W_enc [d_in, d_sae], W_dec [d_sae, d_out]; d_out is d_in but for
    transcoders, which predict another hook. A new architecture is one subclass and one line in `registry.py`.
    """

    kind: ClassVar[str]
    """Name in the YAML and in records."""
    saelens_architecture: ClassVar[str]
    """`architecture` in a SAELens cfg.json."""
    uses_dead: ClassVar[bool] = False
    """Whether the loss wants to know which features are dead."""
    transcodes: ClassVar[bool] = False
    """Whether the output is another hook than the input."""
    per_feature: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Names of the parameters [d_sae], in units of pre-activations; 0 at initialisation and where a feature starts
    anew, unless a class says otherwise."""
    encoder_norm: ClassVar[float] = 1.0
    """Norm of the encoder's columns at initialisation, as a multiple of the decoder rows'."""
    initial_centring: ClassVar[float] = 1.0
    """Share of the inputs' mean that is taken off at first, by b_dec, where the mean is not large; the rest of it the
    features see."""
    resampled_norm: ClassVar[float] = 0.2
    """Norm of a resampled feature's encoder column over the mean of the living ones (Bricken et al. 2023)."""
    b_enc: nn.Parameter
    """[d_sae], in architectures whose `per_feature` names it."""

    def __init__(self, config: Any, d_in: int, d_sae: int, d_out: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.d_in, self.d_sae, self.d_out = d_in, d_sae, d_out or d_in
        self.W_enc = nn.Parameter(torch.zeros(d_in, d_sae))
        for name in self.per_feature:
            self.register_parameter(name, nn.Parameter(torch.zeros(d_sae)))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))

    @property
    def coefficient(self) -> float:
        """Weight of the sparsity penalty in the settings; 0 for an architecture without one."""
        return 0.0

    @property
    def unit_decoder(self) -> bool:
        """Whether decoder rows keep norm 1, by projected gradients and a division after each step."""
        return False

    @property
    def initial_norm(self) -> float:
        """Norm of the decoder rows at initialisation.

        1 where few features fire at first. Where about half do, as with biases of 0, their sum must stay small: rows
        of norm 0.1, SAELens' default.
        """
        sparse = getattr(self.config, "initial_density", None) is not None
        return 1.0 if self.unit_decoder or sparse else DENSE_INIT_NORM

    @torch.no_grad()
    def initialise_(self, seed: int) -> None:
        """Random decoder directions, the encoder their transpose, zero biases; the same on every machine."""
        rows = random_directions(self.d_sae, self.d_out, torch.Generator().manual_seed(seed))
        self.W_dec.copy_(rows).mul_(self.initial_norm)
        if not self.transcodes:
            self.W_enc.copy_(self.W_dec.T * self.encoder_norm)
        for name in (*self.per_feature, "b_dec"):
            self.get_parameter(name).zero_()

    @torch.no_grad()
    def initialise_neurons_(self) -> None:
        """The hook's own dimensions as features, each with either sign: f = relu([x, -x]) before any threshold."""
        eye = torch.eye(self.d_in)
        rows = torch.cat([eye, -eye])
        self.W_dec.copy_(rows)
        self.W_enc.copy_(rows.T)

    @torch.no_grad()
    def uncentre_(self, mean: Tensor) -> None:
        """Let the features see a share of the inputs' mean [d_in] at first, from which x is measured.

        mean: in units of x, whose mean norm is sqrt(d_in). Of a large one they see no more than of LARGEST_MEAN.
        """
        if self.initial_centring != 1:
            bound = LARGEST_MEAN * math.sqrt(self.d_in)
            seen = mean * (bound / mean.double().norm()).clamp(max=1)
            self.b_dec.sub_((1 - self.initial_centring) * seen.to(self.b_dec))

    @torch.no_grad()
    def calibrate_(self, x: Tensor) -> None:
        """Fit what depends on the data's scale, on the first batch [tokens, d_in]; nothing by default."""

    def pre_activations(self, x: Tensor) -> Tensor:
        """[tokens, d_sae] before the activation function."""
        return (x - self.b_dec) @ self.W_enc + self.b_enc

    def training_pre(self, x: Tensor, bias: Tensor) -> PreActivations:
        """(x - b_dec) @ W_enc + bias for a normalised batch, as a loss should compute it."""
        return PreActivations(x, self.W_enc, bias, self.b_dec)

    @abstractmethod
    def activate(self, pre: Tensor) -> Tensor:
        """The code of given pre-activations, both [tokens, d_sae]."""

    def encode(self, x: Tensor) -> Tensor:
        """Features [tokens, d_sae] of activations [tokens, d_in]."""
        return self.activate(self.pre_activations(x))

    def decode(self, features: Tensor) -> Tensor:
        """Reconstruction [tokens, d_out] of features [tokens, d_sae]."""
        return product(features, self.W_dec) + self.b_dec

    def output(self, x: Tensor, features: Tensor) -> Tensor:  # noqa: ARG002 - for those that have a way past features
        """Reconstruction [tokens, d_out] from activations and their features: `decode`, plus what goes past them."""
        return self.decode(features)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction [tokens, d_out] of activations [tokens, d_in]."""
        return self.output(x, self.encode(x))

    @abstractmethod
    def loss(self, x: Tensor, y: Tensor, context: StepContext) -> Losses:
        """Losses of a normalised batch: x [tokens, d_in], and y [tokens, d_out], which is x but for transcoders."""

    @torch.no_grad()
    def before_step(self) -> None:
        """Change gradients between the backward pass and the optimiser's step."""
        grad = self.W_dec.grad
        if self.unit_decoder and grad is not None:
            grad.addcmul_((grad * self.W_dec).sum(1, keepdim=True), self.W_dec, value=-1)

    @torch.no_grad()
    def after_step(self) -> None:
        """Restore constraints on the weights after the optimiser's step."""
        if self.unit_decoder and self.W_dec.requires_grad:
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-8))
        self.constrain_()

    @torch.no_grad()
    def constrain_(self) -> None:
        """Restore what an architecture asks of its parameters besides unit rows; nothing by default."""

    @torch.no_grad()
    def make_rarer_(self, shift: Tensor) -> None:
        """Let every feature fire only where its pre-activation is higher by `shift`, a scalar, or lower by -shift."""
        self.b_enc.sub_(shift)

    @torch.no_grad()
    def restart_(self, dead: Tensor, alive: Tensor) -> None:  # noqa: ARG002 - for those that start at no constant
        """Set what belongs to single features, but for directions, where features start anew: indices `dead`.

        alive: [d_sae] bool, features whose values may be copied.
        """
        for name in self.per_feature:
            self.get_parameter(name)[dead] = 0

    def saelens_fields(self) -> dict[str, Any]:
        """Fields of cfg.json that only this architecture has."""
        return {}

    @torch.no_grad()
    def fold(self, inputs: Normalisation, outputs: Normalisation) -> dict[str, Tensor]:
        """Weights for raw activations with unit decoder rows, under SAELens' names; float32 copies on the CPU.

        `inputs` and `outputs` are the same but for transcoders. Features come out in raw units: multiplied by the
        norm of their decoder row and divided by the scale of the outputs.
        """
        inputs, outputs = _double(inputs, self.W_dec.device), _double(outputs, self.W_dec.device)
        features, whole = self._by_feature()
        whole = {name: value.double() for name, value in whole.items()}
        parts = []
        for part in torch.arange(self.d_sae).split(FOLDED_AT_ONCE):  # no matrix is there in float64 as a whole
            some = slice(int(part[0]), int(part[-1]) + 1)
            own = {name: value[..., some] if name == "W_enc" else value[some] for name, value in features.items()}
            w = whole | {name: value.double() for name, value in own.items()}
            parts.append(_singles(self.folded(w, inputs, outputs)))
        matrices = {name: torch.cat([part[name] for part in parts], 1 if name == "W_enc" else 0) for name in parts[0]}
        return matrices | _singles(self.folded_rest(whole, inputs, outputs))

    def _by_feature(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters and buffers: those of single features, and the rest."""
        state = {name: value.detach() for name, value in self.state_dict().items()}
        own = ("W_enc", "W_dec", *self.per_feature)
        return {name: state[name] for name in own}, {name: v for name, v in state.items() if name not in own}

    def folded(self, w: Mapping[str, Tensor], inputs: Normalisation, outputs: Normalisation) -> dict[str, Tensor]:
        """What `fold` makes of some features' share of the parameters `w`, everything in float64."""
        norms = feature_norms(w["W_dec"], outputs.scale)
        return {
            "W_enc": w["W_enc"] * inputs.scale * norms,
            **{name: w[name] * norms for name in self.per_feature},
            "W_dec": w["W_dec"] / outputs.scale / norms[:, None],
        }

    def folded_rest(self, w: Mapping[str, Tensor], inputs: Normalisation, outputs: Normalisation) -> dict[str, Tensor]:  # noqa: ARG002 - for transcoders
        """What `fold` makes of the parameters `w` that belong to no feature, everything in float64."""
        return {"b_dec": outputs.mean + w["b_dec"] / outputs.scale}

    @classmethod
    def from_folded(cls, cfg: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Self:
        """The SAE of a SAELens folder of this architecture: its cfg.json and its weights, as `fold` names them."""
        sae = cls(cls.config_of(cfg), cfg["d_in"], cfg["d_sae"], cfg.get("d_out"))
        sae.load_state_dict(dict(weights))
        return sae

    @classmethod
    @abstractmethod
    def config_of(cls, cfg: Mapping[str, Any]) -> Any:
        """The settings that matter for encoding, from a cfg.json."""


def random_directions(count: int, dim: int, generator: torch.Generator) -> Tensor:
    """[count, dim] unit vectors, evenly distributed."""
    rows = torch.randn(count, dim, generator=generator)
    return rows / rows.norm(dim=1, keepdim=True)


def feature_norms(decoder: Tensor, scale: float) -> Tensor:
    """[d_sae] what multiplies features when decoder rows [d_sae, d_out] are brought to norm 1 in raw units."""
    return (decoder.norm(dim=1) / scale).clamp(min=1e-8)


def _double(n: Normalisation, device: torch.device) -> Normalisation:
    return n._replace(mean=n.mean.detach().to(device, torch.float64))


def _singles(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float().contiguous().cpu() for name, value in weights.items()}  # turned round where it is fast


def squared_error(y_hat: Tensor, y: Tensor) -> Tensor:
    """Squared error summed over d_out, mean over tokens; both [tokens, d_out], in the precision of `y`, mere data."""
    return _SquaredError.apply(y_hat, y)


class _SquaredError(torch.autograd.Function):
    """Its gradient is one pass over the error; autograd's own are four."""

    @staticmethod
    def forward(ctx: Any, y_hat: Tensor, y: Tensor) -> Tensor:
        error = y_hat.to(y.dtype) - y
        ctx.save_for_backward(error)
        ctx.dtype = y_hat.dtype
        return error.square().sum(-1).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (error,) = ctx.saved_tensors
        return (error * (grads[0] * (2 / len(error)))).to(ctx.dtype), None


def bias_for_density(pre: Tensor, density: float) -> Tensor:
    """[d_sae] biases with which each feature fires on a share `density` of the tokens, for pre-activations without."""
    rank = min(len(pre) - 1, max(1, round(density * len(pre))))
    return -pre.float().topk(rank + 1, dim=0, sorted=True).values[rank]


def l1_conventions(coefficient: float, *, scale: float, d_in: int, d_sae: int) -> dict[str, float]:
    """The same L1 penalty in the conventions people compare.

    coefficient: on inputs of mean norm sqrt(d_in), squared error summed over d_in (SAELens).
    unit_norm: on inputs of unit mean squared norm (dictionary_learning's recipe).
    raw_scale: on raw activations with unit decoder rows.
    seed: raw activations, squared error averaged over d_in and L1 over d_sae.
    """
    raw = coefficient / scale
    return {
        "coefficient": coefficient,
        "unit_norm": coefficient / math.sqrt(d_in),
        "raw_scale": raw,
        "seed": raw * d_sae / d_in,
    }
