"""The API process before it serves: a configuration that cannot work ends with one sentence and status 2."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from pydantic import SecretStr

from ditserve.service.exit_statuses import MISCONFIGURED
from ditserve.service.fleet import Starting
from ditserve.service.http import api
from ditserve.service.limits import Limits
from ditserve.service.queue.broker import Broker
from ditserve.service.settings import Settings
from tests.conftest import close_books


def test_a_namespace_of_another_model_is_refused(
    redis_url: str,
    namespace: str,
    bundle_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(api, "Limits", lambda: Limits(report_ttl_s=-1))

    async def announce() -> None:
        broker = await Broker.connect(redis_url, namespace=namespace)
        await broker.report(Starting("w1", "vegetables", "warming up"))
        await broker.aclose()

    asyncio.run(announce())
    settings = Settings.parse([f"--bundle={bundle_path}", f"--namespace={namespace}", "--port=0"])
    assert api.run(settings.model_copy(update={"redis_url": SecretStr(redis_url)})) == MISCONFIGURED
    assert f"--namespace: {namespace} is in use by workers of vegetables" in capsys.readouterr().err
    asyncio.run(close_books(redis_url, namespace))
