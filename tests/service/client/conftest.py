"""The API in this process, as the tests of `service.http` have it."""

from tests.service.http.conftest import (  # noqa: F401 (fixtures)
    _load_always_fresh,
    bundle_path,
    open_stage,
    serve,
    stage,
)
