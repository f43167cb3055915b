"""The description of a model, as `GET /models` and the command `schema` give it: all a client can choose."""

from __future__ import annotations

from collections.abc import Sequence

from ditserve.model.spec.bundle import encodes_pictures
from ditserve.model.spec.grids import grid_names
from ditserve.model.spec.manifest import Manifest, RungSpec
from ditserve.model.spec.sizes import Size
from ditserve.model.spec.solvers import SOLVERS
from ditserve.service.fleet import LoadedAdapter
from ditserve.service.formats import MediaFormat, kind_of
from ditserve.service.http.answer_schemas import (
    AdapterOut,
    DefaultsOut,
    FactorOut,
    LimitsOut,
    ModelOut,
    RungOut,
    StretchOut,
)
from ditserve.service.http.media import DEFAULT_FPS
from ditserve.service.http.sizes import frame_count, size_text
from ditserve.service.settings import Settings
from ditserve.service.wire import fields_of


def describe(
    manifest: Manifest,
    settings: Settings,
    *,
    size_steps: Size | None,
    formats: Sequence[MediaFormat],
    text_tokens: int | None,
    networks: Sequence[str] = (),
    adapters: Sequence[LoadedAdapter] | None = None,
) -> ModelOut:
    """Return what the model of `manifest` takes within the limits of `settings`.

    Args:
        size_steps: what the sides of other sizes are multiples of, in pixels; None: there are no others.
        formats: of the files that all workers write.
        text_tokens: the most tokens of a text; None: they are not counted.
        networks: what the workers run it in.
        adapters: those that all workers have loaded; None: not all take them.
    """
    return ModelOut(
        name=manifest.name,
        version=manifest.version,
        description=manifest.description,
        size=size_text(manifest),
        size_step=None if size_steps is None else size_steps[-1],
        kind=kind_of(manifest),
        formats=list(formats),
        frames=frame_count(manifest),
        frames_step=size_steps[0] if size_steps and len(size_steps) == 3 else None,
        fps=None if kind_of(manifest) == "picture" else manifest.fps or DEFAULT_FPS,
        text=manifest.config.text_size > 0,
        pictures=encodes_pictures(manifest) and kind_of(manifest) != "volume",
        guidance=manifest.guidance,
        text_tokens=text_tokens,
        networks=sorted(networks),
        adapters=None if adapters is None else [AdapterOut(**fields_of(adapter)) for adapter in adapters],
        factors=[
            FactorOut(name=factor.name, classes=list(factor.classes), default=factor.default)
            for factor in manifest.factors
        ],
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
            picture_bytes=settings.max_picture_bytes,
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
