"""LitServe with dynamic batching (`max_batch_size`, `batch_timeout`), around diffusers' network or around our ONNX graphs.

It has no limit of its own on what waits, so it gets the same cap as the others.
"""

# mypy: disable-error-code="import-not-found, misc"
from typing import Any

import litserve
from starlette.responses import Response

from ditserve.bench.peers.cap import Cap
from ditserve.bench.peers.graph import open_pipeline
from ditserve.bench.peers.options import Options
from ditserve.bench.peers.pipeline import CONTENT_TYPE, Wish


class Drawing(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.pipeline = open_pipeline(Options.read())

    def decode_request(self, request: dict[str, Any]) -> Wish:
        return Wish.read(request)

    def batch(self, inputs: list[Wish]) -> list[Wish]:
        return inputs

    def predict(self, wishes: Wish | list[Wish]) -> bytes | list[bytes]:
        if isinstance(wishes, Wish):  # a batch size of one is no batch here
            return self.pipeline([wishes])[0]
        return self.pipeline(wishes)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type=CONTENT_TYPE)


def main() -> None:
    options = Options.read()
    api = Drawing(max_batch_size=options.batch, batch_timeout=options.wait_s, api_path="/generate")
    server = litserve.LitServer(
        api, accelerator="cpu", timeout=False, middlewares=[(Cap, {"cap": options.cap})]
    )
    server.run(host="127.0.0.1", port=options.port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
