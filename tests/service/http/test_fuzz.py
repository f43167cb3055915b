"""The API under generated requests, right and wrong: it answers what its document says, and leaks nothing.

Half of the cases follow the schemas of all operations. The other half knock at the two doors that draw, with
bodies that are right but for a few fields, so that they come past the first refusal. `--fuzz-cases 20000`
generates more:

    make test ARGS="tests/service/http/test_fuzz.py --fuzz-cases 20000"
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from pydantic import BaseModel, SecretStr
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from ditserve.service.api_keys import add
from ditserve.service.errors import ERRORS
from ditserve.service.http.api import configured
from ditserve.service.http.app import create_app
from ditserve.service.http.openai_schemas import EditRequest, ImagesRequest
from ditserve.service.http.schemas import GenerateRequest
from ditserve.service.queue.broker import Broker
from ditserve.service.settings import Settings
from tests.conftest import close_books, wait_until
from tests.service.http.conftest import StubWorker
from tests.service.http.test_pictures import halves, png_with, saved

CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]
# The API runs in a thread of this process, so hypothesis sees its random numbers.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the .random. module inside strategies")
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
    assert started.wait(120)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(120)
    assert not thread.is_alive()


@pytest.mark.timeout(3600)
def test_answers_only_what_the_document_says(api: tuple[str, dict[str, str]], fuzz_cases: int) -> None:
    url, headers = api
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    results: Iterable[Any] = schema.get_all_operations()
    operations = [result.ok() for result in results]
    answered: Counter[int] = Counter()
    inputs = sum(
        bool(operation.body) + any(True for _ in operation.iter_parameters()) for operation in operations
    )
    # The rest is for the other kind of API, and for the doors; each input gets as many as any other.
    share = -(-fuzz_cases // (4 * inputs))
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
                response = case.call(headers=headers, timeout=120)
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
    assert answered.total() >= fuzz_cases // 4, answered
    assert answered[200] > 0
    assert answered[422] > 0
    # The API still runs.
    assert httpx.get(f"{url}/docs").status_code == 200


GENERATE, OPENAI, EDITS = "/generate", "/v1/images/generations", "/v1/images/edits"
BODIES: dict[str, dict[str, Any]] = {
    GENERATE: {"condition": {"label": "lemon"}},
    OPENAI: {"prompt": "a lemon"},
    EDITS: {"prompt": "a lemon"},
}
MODELS: dict[str, type[BaseModel]] = {GENERATE: GenerateRequest, OPENAI: ImagesRequest, EDITS: EditRequest}
# What a picture may be: right, damaged, none, and far more pixels than bytes.
PICTURES = (saved(halves()), saved(halves(), "WEBP")[:-9], b"", b"GIF89a", png_with(2**15, 2**15))
# Fields of the other door, and OpenAI's parameters that this service has no field for.
FOREIGN = ("prompt", "sampler", "image", "mask", "input_fidelity", "metadata", "store", "service_tier")
# Values at which readers of JSON, and of numbers in texts, part ways, by the type of field they fit.
WORDS = ("auto", "png", "jpeg", "high", "low", "ddim", "dpmpp-2m", "trailing", "b64_json", "null", "0", "")
SIZES = ("16x16", "32x16", "32X32", "032x032", "0x0", "\u0663\u0662x\u0663\u0662", "16x16\n", " 16x16", "big")
TEXTS = ("\x00", "\ud800", "\u202e", "\u0663", "x" * 3000)
COMPOSED = [{"label": "lemon", "weight": 1.5}, {"label": "apple", "weight": -0.5}, {}]
EDGES: dict[str, tuple[Any, ...]] = {
    "str": (*WORDS, *SIZES, *TEXTS),
    "int": (0, 1, 2, -1, 2**31, 2**53 - 1, 2**53, 2**63, 10**30),
    "float": (-0.0, 0.5, 1.0, 2.0, 1e-320, 1e308, float("nan"), float("inf")),
    "bool": (True, False),
    "list": ([], [None], [0, 1], [1.0, 0.0], [-0.0, 0.5], [{"label": "lemon", "weight": -0.0}], COMPOSED),
    "None": (None, {}, {"": 0}),
}
ANYTHING = st.sampled_from([value for values in EDGES.values() for value in values])
ANYTHING |= st.integers() | st.floats() | st.text(max_size=30)
HEADERS = {
    "idempotency-key": st.sampled_from(["a", "b c", "\u00e9", "k" * 256]) | st.uuids().map(str),
    "prefer": st.sampled_from(["respond-async", "wait=10", "respond-async, wait=0", ";;,", "x" * 300]),
    "accept": st.sampled_from(["image/png", "*/*", "text/html", "multipart/mixed", "image/*;q=nan", ",;"]),
    "content-type": st.sampled_from(["application/json", "application/json; charset=x", "text/x"]),
    "connection": st.sampled_from(["upgrade", "close", "keep-alive, Upgrade", "content-length"]),
    "upgrade": st.sampled_from(["h2c", "websocket", "TLS/1.0"]),
    "x-request-id": st.sampled_from(["a b", "\u00e9", "r" * 129, "fine"]),
    "traceparent": st.sampled_from(["00-" + "0" * 32 + "-" + "0" * 16 + "-00", "zz", ""]),
}


def values(path: str, name: str) -> st.SearchStrategy[Any]:
    """Return values of a field: mostly of a type that it takes."""
    field = MODELS[path].model_fields.get(name)
    fitting = [
        value for kind, some in EDGES.items() if field and kind in str(field.annotation) for value in some
    ]
    return st.sampled_from(fitting) | st.sampled_from(fitting) | ANYTHING if fitting else ANYTHING


FILES: tuple[tuple[str, ...], ...] = (("image",), ("image[]",), ("image", "mask"), ("mask",), ())


def as_form(fields: Mapping[str, Any], files: Mapping[str, bytes]) -> bytes:
    """Return a form, in which texts have no quotes."""
    head, parts = b'--b\r\nContent-Disposition: form-data; name="%s"', []
    for name, value in fields.items():
        text = value if isinstance(value, str) else json.dumps(value)
        parts.append(head % name.encode() + b"\r\n\r\n" + text.encode(errors="replace"))
    parts += [head % name.encode() + b'; filename="a"\r\n\r\n' + data for name, data in files.items()]
    return b"\r\n".join([*parts, b"--b--\r\n"])


@st.composite
def knocks(draw: st.DrawFn) -> tuple[str, bytes, dict[str, str]]:
    """Draw a door, a body that is right but for a few fields, and headers."""
    path = draw(st.sampled_from([GENERATE, OPENAI, EDITS]))
    names = draw(st.lists(st.sampled_from([*MODELS[path].model_fields, *FOREIGN]), max_size=2))
    fields = BODIES[path] | {name: draw(values(path, name)) for name in names}
    kind, body = "application/json", json.dumps(fields).encode()
    if path == EDITS or draw(st.sampled_from([False, False, True])):
        files = {name: draw(st.sampled_from(PICTURES)) for name in draw(st.sampled_from(FILES))}
        kind, body = "multipart/form-data; boundary=b", as_form(fields, files)
    if draw(st.sampled_from([False] * 30 + [True])):
        body = body[: draw(st.integers(0, len(body)))]
    chosen = draw(st.lists(st.sampled_from(sorted(HEADERS)), max_size=2, unique=True))
    return path, body, {"content-type": kind} | {name: draw(HEADERS[name]) for name in chosen}


@pytest.mark.timeout(3600)
def test_both_doors_answer_only_what_the_document_says(
    api: tuple[str, dict[str, str]], fuzz_cases: int
) -> None:
    url, own_headers = api
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    answered: Counter[tuple[str, int]] = Counter()

    @seed(7)
    @settings(
        max_examples=-(-fuzz_cases // 4),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(knock=knocks())
    def probe(knock: tuple[str, bytes, dict[str, str]]) -> None:
        path, body, headers = knock
        raw = [(name.encode(), value.encode("latin-1")) for name, value in (headers | own_headers).items()]
        response = client.post(path, content=body, headers=raw)
        answered[path, response.status_code] += 1
        documented = paths[path]["post"]["responses"]
        assert str(response.status_code) in documented, response.text
        kind = response.headers["content-type"].partition(";")[0]
        assert kind in documented[str(response.status_code)]["content"], (knock, kind)
        assert response.status_code < 500 or response.status_code in MAY_FAIL, response.text
        assert not LEAKS.search(response.content), response.text
        assert response.headers["x-request-id"]
        if response.status_code >= 400:
            assert response.json().get("error", response.json())["code"] in ERRORS

    with httpx.Client(base_url=url, timeout=120) as client:
        probe()
    assert answered.total() >= fuzz_cases // 4, answered
    assert answered[GENERATE, 200] > 0
    assert answered[OPENAI, 200] > 0
    assert answered[EDITS, 200] > 0
