"""The flows that other projects train: what their networks are told, and which of them a file is.

The published DiT and SiT have the same names and shapes. So a flow is known from its trainer's arguments, or
the user says which it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from ditserve.model.spec.diffusion_spec import DiffusionSpec
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.sigma_grids import SigmaGrid
from ditserve.model.weights.official import WeightsError

FlowKind = Literal["sit", "repa", "lightningdit"]
FLOW_KINDS: tuple[FlowKind, ...] = get_args(FlowKind)
# What a flow's network is told, and the sign of its output. SiT's time runs from noise, 0, to image, 1, and
# its velocity to the image (Ma et al., arXiv:2401.08740). LightningDiT has SiT's time and guidance
# (arXiv:2501.01423). REPA's time runs the other way (arXiv:2410.06940).
_SIT: Mapping[str, Any] = {"noise_input": "1-sigma", "output_sign": -1, "guidance_channels": 3}
_REPA: Mapping[str, Any] = {"noise_input": "sigma", "output_sign": 1, "guidance_channels": None}
_FLOWS: Mapping[FlowKind, Mapping[str, Any]] = MappingProxyType(
    {"sit": _SIT, "repa": _REPA, "lightningdit": _SIT}
)
# How the trainers name a linear path with a velocity: (path_type, prediction).
_LINEAR: Mapping[tuple[str, str], FlowKind]
_LINEAR = MappingProxyType({("Linear", "velocity"): "sit", ("linear", "v"): "repa"})


@dataclass(frozen=True, slots=True)
class TrainerArguments:
    """The arguments of a training that tell its function; None where they say nothing.

    `kind` is the kind of flow where their form tells it.
    """

    model: str | None = None
    prediction: str | None = None
    path_type: str | None = None
    num_classes: int | None = None
    kind: FlowKind | None = None

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> TrainerArguments:
        """Return the arguments that the trainers of DiT, SiT and REPA keep in a checkpoint."""
        names = ("model", "prediction", "path_type")
        model, prediction, path_type = (None if (v := stored.get(name)) is None else str(v) for name in names)
        classes = stored.get("num_classes")
        return cls(model, prediction, path_type, classes if isinstance(classes, int) else None)

    @property
    def words(self) -> str:
        """The arguments of a flow as a message tells them, such as "model SiT-XL/2, prediction velocity"."""
        told = {"model": self.model, "prediction": self.prediction, "path_type": self.path_type}
        return ", ".join(f"{name} {value}" for name, value in told.items() if value)


def flow_diffusion(kind: FlowKind, config: DiTConfig, grid: SigmaGrid | None = None) -> DiffusionSpec:
    """Return the diffusion of a flow of that kind, whose steps lie on `grid`."""
    told = dict(_FLOWS[kind])
    if told["guidance_channels"] and told["guidance_channels"] >= config.in_channels:
        told["guidance_channels"] = None
    return DiffusionSpec(
        schedule="flow", prediction="flow", noise_scale=1.0, clip_x0=False, sigma_grid=grid, **told
    )


def told_flow(
    path: Path, arguments: TrainerArguments, wanted: FlowKind | None
) -> tuple[FlowKind | None, tuple[str, ...]]:
    """Return the kind of flow that the user or a trainer's arguments tell, and notes; no notes: neither does.

    Raises:
        WeightsError: the arguments tell a flow that is not in FLOW_KINDS, or not which, or another than
            `wanted`.
    """
    model, prediction, path_type = arguments.model or "", arguments.prediction, arguments.path_type
    if path_type is None and prediction in (None, "epsilon", "eps", "noise") and not model.startswith("SiT"):
        if prediction is not None or model.startswith("DiT"):
            if wanted is not None:
                raise WeightsError(f"{path} says that it predicts the noise: leave out --function {wanted}")
            return None, (f"the file's own arguments say that it predicts the noise ({model or prediction})",)
        return wanted, () if wanted is None else (f"it is a flow as {wanted} trains, as --function says",)
    words = f"{arguments.words} in its own arguments"
    if path_type not in (None, "Linear", "linear") or prediction not in (None, "velocity", "v"):
        raise WeightsError(
            f"{path} was trained on another flow ({words}): only a linear path with a velocity can be "
            "imported"
        )
    kind = arguments.kind or _LINEAR.get((str(path_type), str(prediction)), wanted)
    if kind is None:
        raise WeightsError(
            f"{path} was trained as a flow ({words}), which does not tell its time: "
            "--function sit if the time is 0 for noise, --function repa if it is 1"
        )
    if wanted not in (None, kind):
        raise WeightsError(f"{path} is a flow as {kind} trains ({words}), not {wanted}")
    return kind, (f"it is a flow as {kind} trains ({words})",)
