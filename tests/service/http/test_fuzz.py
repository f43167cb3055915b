"""The API under generated requests, right and wrong: it answers what its document says, and leaks nothing.

`--fuzz-cases 20000` generates more:

    make test ARGS="tests/service/http/test_fuzz.py --fuzz-cases 20000 --timeout 0"
"""

from __future__ import annotations

import asyncio
import re
import secrets
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from pydantic import SecretStr
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from ditserve.service.api_keys import add
from ditserve.service.http.api import configured
from ditserve.service.http.app import create_app
from ditserve.service.queue.broker import Broker
from ditserve.service.settings import Settings
from tests.conftest import close_books, wait_until
from tests.service.http.conftest import StubWorker

CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]
# An answer must never show how the program is built and where it lies.
LEAKS = re.compile(rb"Traceback|site-packages|\.py\b|/home/|/root/|/usr/|0x[0-9a-f]{8}|redis://")
MAY_FAIL = {503, 504}
# The answer to what is not HTTP, for example an empty Content-Length: no route was asked.
NOT_HTTP = "This is not a request of HTTP/1.1."


@pytest.fixture(scope="module", params=["open", "keyed"])
def api(
    request: pytest.FixtureRequest,
    embedded_url: str,
    bundle_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the address of a running API whose jobs a stub worker finishes, and the headers that it needs."""
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    headers = {"authorization": f"Bearer {add(keys, 'fuzzer')[1]}"} if request.param == "keyed" else {}
    namespace = f"fuzz-{secrets.token_hex(4)}"
    options = Settings.parse(
        [
            "--port=0",
            f"--bundle={bundle_path}",
            f"--namespace={namespace}",
            *([f"--keys-file={keys}"] if headers else []),
        ]
    ).model_copy(update={"redis_url": SecretStr(embedded_url)})
    with serving(options) as port:
        yield f"http://127.0.0.1:{port}", headers
    asyncio.run(close_books(embedded_url, namespace))


@contextmanager
def serving(options: Settings) -> Iterator[int]:
    """Run the API and a stub worker in a thread of their own; yield the port."""
    server = uvicorn.Server(configured(create_app(options), options))
    started = threading.Event()

    async def main() -> None:
        assert options.redis_url
        broker = await Broker.connect(options.redis_url.get_secret_value(), namespace=options.namespace)
        worker = StubWorker(broker)
        await worker.report()
        working, serving = asyncio.create_task(worker.run()), asyncio.create_task(server.serve())
        await wait_until(lambda: server.started)
        started.set()
        await serving
        working.cancel()
        await asyncio.wait([working])
        await broker.aclose()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert started.wait(20)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.timeout(600)
def test_answers_only_what_the_document_says(api: tuple[str, dict[str, str]], fuzz_cases: int) -> None:
    url, headers = api
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    results: Iterable[Any] = schema.get_all_operations()
    operations = [result.ok() for result in results]
    answered: Counter[int] = Counter()
    inputs = sum(
        bool(operation.body) + any(True for _ in operation.iter_parameters()) for operation in operations
    )
    # Half of the cases are for the other kind of API; each input gets as many as any other.
    share = -(-fuzz_cases // (2 * inputs))
    for number, operation in enumerate(operations):
        for mode in GenerationMode:

            @seed(number)
            @settings(
                max_examples=share,
                deadline=None,
                database=None,
                phases=[Phase.explicit, Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def probe(case: Any) -> None:
                response = case.call(headers=headers, timeout=30)
                if response.status_code == 400 and response.json().get("detail") == NOT_HTTP:
                    return
                answered[response.status_code] += 1
                assert response.status_code < 500 or response.status_code in MAY_FAIL, response.text
                assert not LEAKS.search(response.content), response.text
                case.validate_response(response, checks=CHECKS)

            try:
                probe()
            except Unsatisfiable:
                # Any text is a valid path, so there is no wrong one.
                assert mode is GenerationMode.NEGATIVE, operation.label
    assert answered.total() >= fuzz_cases // 2, answered
    assert answered[200] > 0
    assert answered[422] > 0
    # The API still runs.
    assert httpx.get(f"{url}/docs").status_code == 200
