"""Measure what a preview costs by a bundle's own decoder and by the projection, and how far they differ.

    python -m bench.previews BUNDLE [--backend torch] [--threads 1] [--repeats 5]

Both decode a latent of the model's own size. The difference is the mean square of colours over the squares
that a latent's pixels cover, as a share of the variance of those that the decoder makes, on latents that the
projection was not fitted to. Writes bench/results/previews-<name>.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from ditserve.bench import report
from ditserve.model.spec.bundle import Bundle
from ditserve.model.spec.command_line import named_path, positive, thread_count
from ditserve.model.spec.errors import ModelError
from ditserve.service.backends import BACKENDS, load_backend
from ditserve.service.worker.postprocess import Decoder
from ditserve.service.worker.previews import (
    LARGE_DECODERS,
    PreviewDecoder,
    fitted_latents,
    mean_colours,
)

UNSEEN_SEED = 1


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the processor seconds of the fastest of some runs."""
    times = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def unexplained_share(decoder: Decoder, previews: Decoder, *, channels: int, factor: int) -> float:
    """Return the mean square of the differences as a share of the variance of the decoder's colours."""
    latents = fitted_latents(channels, UNSEEN_SEED)
    target, shown = (mean_colours(made.decode(latents), factor) for made in (decoder, previews))
    return float(np.square(shown - target).mean() / target.var(axis=(0, 1, 2)).mean())


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("previews", __doc__)
    parser.add_argument("bundle", type=named_path)
    parser.add_argument("--backend", choices=BACKENDS, default="torch")
    parser.add_argument("--threads", type=thread_count, default=1)
    parser.add_argument("--repeats", type=positive, default=5)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options, background = parse(arguments), report.BackgroundLoad()

    def work() -> None:
        bundle = Bundle.open(options.bundle)
        manifest = bundle.manifest
        if manifest.decoder not in LARGE_DECODERS:
            raise ModelError(
                f"previews of {manifest.name} are decoded as its pictures are: name another bundle"
            )
        backend = load_backend(options.backend, bundle, threads=options.threads)
        channels, factor = manifest.config.in_channels, manifest.upscale
        previews = PreviewDecoder(backend, channels=channels, factor=factor)
        began = time.process_time()
        unexplained = unexplained_share(backend, previews, channels=channels, factor=factor)
        fit_s = time.process_time() - began
        latent = np.zeros((1, channels, *manifest.config.image_size), np.float32)
        decode_s = seconds(lambda: backend.decode(latent), options.repeats)
        preview_s = seconds(lambda: previews.decode(latent), options.repeats)
        print(
            f"{manifest.name}: {1e3 * decode_s:.1f} ms by the decoder, {1e3 * preview_s:.2f} ms by the "
            f"projection (fitted and compared in {fit_s:.2f} s); it leaves {100 * unexplained:.1f} % of the "
            "variance unexplained"
        )
        figures = {"decode_s": decode_s, "preview_s": preview_s, "fit_s": fit_s, "unexplained": unexplained}
        report.save(f"previews-{manifest.name}", options, background, figures)

    return report.run_command("previews", work)


if __name__ == "__main__":
    sys.exit(main())
