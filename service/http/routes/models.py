"""`GET /models`: the models served, with everything a client can choose."""

import json
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from ditserve.service.formats import kind_of
from ditserve.service.http.adapters import common_adapters
from ditserve.service.http.answer_schemas import ModelsOut
from ditserve.service.http.context import Api
from ditserve.service.http.description import describe
from ditserve.service.http.media import written_formats
from ditserve.service.http.models import Model
from ditserve.service.http.sizes import size_steps
from ditserve.service.settings import Settings

router = APIRouter()


@router.get("/models", tags=["models"], summary="What is being served", response_model=ModelsOut)
async def models(api: Api) -> Response:
    """Names, classes, samplers, defaults, limits, licence, and the measured operating points of each model.

    The default model comes first.
    """
    described = [await _description(model, api.settings) for model in api.models.values()]
    content = json.dumps({"models": described}, ensure_ascii=False)
    return Response(content, media_type="application/json")


async def _description(model: Model, settings: Settings) -> dict[str, Any]:
    workers = await model.workers()
    networks = {str(worker.network) for worker in workers}
    described = describe(
        model.manifest,
        settings,
        size_steps=size_steps(model.manifest, workers),
        formats=written_formats(kind_of(model.manifest), workers),
        text_tokens=model.submissions.prompts.tokens,
        networks=sorted(networks),
        adapters=common_adapters(workers),
    )
    return described.model_dump(mode="json")
