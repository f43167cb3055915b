"""LitServe with dynamic batching, around diffusers' network or around our ONNX graphs.

LitServe does not limit the requests that wait, so it gets the same cap as the others.
"""

# mypy: disable-error-code="import-not-found, misc"
from typing import Any

import litserve
from starlette.responses import Response

from ditserve.bench.peers.cap import Cap
from ditserve.bench.peers.graph import open_pipeline
from ditserve.bench.peers.options import PeerOptions
from ditserve.bench.peers.requests import CONTENT_TYPE, PeerRequest


class LitServePeer(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.pipeline = open_pipeline(PeerOptions.read())

    def decode_request(self, request: dict[str, Any]) -> PeerRequest:
        return PeerRequest.read(request)

    def batch(self, inputs: list[PeerRequest]) -> list[PeerRequest]:
        return inputs

    def predict(self, requests: PeerRequest | list[PeerRequest]) -> bytes | list[bytes]:
        # LitServe gives a batch size of one as a single request.
        if isinstance(requests, PeerRequest):
            return self.pipeline([requests])[0]
        return self.pipeline(requests)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type=CONTENT_TYPE)


def main() -> None:
    options = PeerOptions.read()
    api = LitServePeer(max_batch_size=options.batch, batch_timeout=options.wait_s, api_path="/generate")
    cap = (Cap, {"cap": options.cap})
    server = litserve.LitServer(api, accelerator="cpu", timeout=False, middlewares=[cap])
    server.run(host="127.0.0.1", port=options.port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
