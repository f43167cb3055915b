"""`GET /models`: the models served, with everything a client can choose."""

import json
from collections.abc import Sequence

from fastapi import APIRouter
from starlette.responses import Response

from ditserve.model.spec.bundle import Manifest, RungSpec
from ditserve.model.spec.grids import grid_names
from ditserve.model.spec.solvers import SOLVERS
from ditserve.service.http.context import Api
from ditserve.service.http.models import Model
from ditserve.service.http.schemas import (
    DefaultsOut,
    FactorOut,
    LimitsOut,
    ModelOut,
    ModelsOut,
    RungOut,
    StretchOut,
)
from ditserve.service.http.sizes import size_step, size_text
from ditserve.service.jobs import WorkerState
from ditserve.service.settings import Settings

router = APIRouter()


@router.get("/models", tags=["models"], summary="What is being served", response_model=ModelsOut)
async def models(api: Api) -> Response:
    """Names, classes, samplers, defaults, limits, licence, and the measured operating points of each model.

    The default model comes first.
    """
    described = [
        _describe(model, await _workers(model), api.settings).model_dump(mode="json")
        for model in api.models.values()
    ]
    content = json.dumps({"models": described}, ensure_ascii=False)
    return Response(content, media_type="application/json")


async def _workers(model: Model) -> Sequence[WorkerState]:
    """Return the workers as they are known, without waiting long for Redis."""
    await model.submissions.load.refresh()
    load = model.submissions.load.last()
    return () if load is None else load.workers


def _describe(model: Model, workers: Sequence[WorkerState], settings: Settings) -> ModelOut:
    manifest = model.manifest
    networks = {f"{worker.network.backend} {worker.network.precision}".strip() for worker in workers}
    return ModelOut(
        name=manifest.name,
        version=manifest.version,
        description=manifest.description,
        size=size_text(manifest),
        size_step=size_step(manifest, workers),
        text=manifest.config.text_size > 0,
        guidance=manifest.guidance,
        text_tokens=model.submissions.prompts.tokens,
        networks=sorted(networks),
        factors=[FactorOut(name=factor.name, classes=list(factor.classes)) for factor in manifest.factors],
        samplers=list(SOLVERS),
        step_counts=sorted(manifest.diffusion.step_counts),
        grids=list(grid_names(manifest.diffusion.noise_schedule())),
        defaults=_defaults(manifest),
        ladder=[_rung(rung) for rung in manifest.ladder],
        ladder_order=manifest.ladder_order if manifest.ladder else None,
        limits=LimitsOut(
            n=settings.max_images,
            steps=manifest.diffusion.timesteps,
            deadline_ms=round(settings.max_deadline_s * 1000),
            body_bytes=settings.max_body_bytes,
        ),
        metrics=manifest.metrics,
        licence=manifest.licence,
        attribution=list(manifest.attribution),
    )


def _defaults(manifest: Manifest) -> DefaultsOut:
    defaults = manifest.defaults
    return DefaultsOut(
        steps=defaults.steps,
        sampler=defaults.solver,
        grid=defaults.grid,
        guidance_scale=defaults.guidance_scale,
        guidance_embedded=manifest.guidance_embedded,
        guidance_interval=defaults.guidance_interval,
    )


def _rung(rung: RungSpec) -> RungOut:
    return RungOut(
        name=rung.name,
        sampler=rung.solver,
        steps=rung.steps,
        grid=rung.grid,
        guidance_interval=rung.guidance_interval,
        rows=rung.rows,
        quality=rung.quality,
        own=rung.own,
        real=rung.real,
        stretches=[StretchOut(above=part.above, backbone=part.backbone) for part in rung.stretches],
    )
