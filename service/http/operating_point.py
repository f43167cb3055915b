"""The operating point that a request asks for: solver, steps, grid or noise levels, guidance interval. Pure.

A fault is the error of the field that it is in.
"""

from __future__ import annotations

from collections.abc import Collection

from ditserve.model.spec.diffusion import Schedule
from ditserve.model.spec.grids import choose_grid, explicit_grid, grid_names
from ditserve.model.spec.manifest import Manifest
from ditserve.model.spec.solvers import SOLVERS
from ditserve.service.errors import InvalidRequest
from ditserve.service.http.schemas import GenerateRequest
from ditserve.service.planning.ladder import Ladder
from ditserve.service.rung import Rung


def requested_rung(request: GenerateRequest, manifest: Manifest, ladder: Ladder) -> Rung:
    """Return the operating point that the request asks for. Raises `InvalidRequest`."""
    defaults = manifest.defaults
    solver = _one_of("sampler", request.sampler or defaults.solver, SOLVERS)
    steps = _steps(request, manifest, ladder.schedule)
    low, high = request.guidance_interval or defaults.guidance_interval
    if low > high:
        raise field_error("guidance_interval", "Its low end is above its high end.")
    # The best rung of a solver tells which grid suits it.
    stated = {rung.solver: rung.grid for rung in reversed(ladder.rungs)}.get(solver, defaults.grid)
    field, wanted = _wanted_grid(request, ladder)
    try:
        grid = choose_grid(wanted, stated=stated, solver=solver, steps=steps, schedule=ladder.schedule)
    except ValueError as error:
        raise field_error(field, sentence(error)) from None
    guided = guidance_scale(request, manifest) != 1.0
    decay = request.guidance_decay if guided else 0.0
    strength = 1.0 if request.image is None else _strength(request, manifest)
    rung = ladder.requested(solver, steps, grid, (low, high), guided, decay=decay, strength=strength)
    if (request.min_steps or 1) > rung.walked:
        raise field_error("min_steps", f"It cannot be more than the {rung.walked} steps asked for.")
    return rung


def guidance_scale(request: GenerateRequest, manifest: Manifest) -> float:
    """Return the guidance scale of the request, or the model's, as the weight of the difference; 1: none.

    Raises:
        InvalidRequest: guidance is asked of a model that has none.
    """
    scale = request.guidance_scale
    if scale not in (None, 1.0) and manifest.guidance == "embedded":
        raise field_error(
            "guidance_scale", "The network of this model is told its guidance: choose guidance_embedded."
        )
    if scale not in (None, 1.0) and manifest.guidance == "none":
        raise field_error(
            "guidance_scale",
            "No unconditional prediction of this model was trained, so it has no guidance: leave it out.",
        )
    return manifest.guidance_weight(scale)


def guidance_embedded(request: GenerateRequest, manifest: Manifest) -> float | None:
    """Return the guidance scale that the network is told, of the request or the model; None: it is told none.

    Raises:
        InvalidRequest: it is asked of a model that is told none.
    """
    if request.guidance_embedded is not None and manifest.guidance != "embedded":
        raise field_error(
            "guidance_embedded", "The network of this model is told no guidance: choose guidance_scale."
        )
    given = request.guidance_embedded
    return manifest.guidance_embedded if given is None else given


def field_error(field: str, detail: str) -> InvalidRequest:
    """Return the error of one field of the request that this model or service cannot take."""
    return InvalidRequest(
        f"{field}: {detail}", extra={"errors": [{"pointer": f"#/{field}", "detail": detail}]}
    )


def sentence(error: ValueError) -> str:
    """Return the message of an error as a sentence: with a capital letter and a full stop."""
    message = str(error)
    return f"{message[:1].upper()}{message[1:]}."


def _strength(request: GenerateRequest, manifest: Manifest) -> float:
    """Return the strength of a request with a picture; of a clip, whose first frame stays, 1 unless asked."""
    said = "strength" in request.model_fields_set
    return request.strength if said or manifest.first_axis is None else 1.0


def _steps(request: GenerateRequest, manifest: Manifest, schedule: Schedule) -> int:
    """Return the number of steps: one for each noise level that the request lists, or as it says."""
    levels = request.noise_levels
    if levels is not None and request.steps not in (None, len(levels)):
        raise field_error("steps", f"The noise_levels listed are {len(levels)} steps: leave steps out.")
    steps = request.steps or (len(levels) if levels else manifest.defaults.steps)
    try:
        schedule.check_steps(steps)
    except ValueError as error:
        raise field_error("steps" if levels is None else "noise_levels", sentence(error)) from None
    return steps


def _wanted_grid(request: GenerateRequest, ladder: Ladder) -> tuple[str, str | None]:
    """Return the field that says where the steps are, and the grid that it means; None: neither says so."""
    if request.noise_levels is None:
        return "grid", request.grid and _one_of("grid", request.grid, grid_names(ladder.schedule))
    if request.grid is not None:
        raise field_error("grid", "The noise_levels listed are the grid: leave grid out.")
    return "noise_levels", explicit_grid(request.noise_levels)


def _one_of(field: str, name: str, known: Collection[str]) -> str:
    if name not in known:
        raise field_error(field, f"There is no {name!r}; choose among {', '.join(known)}.")
    return name
