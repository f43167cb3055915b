"""Train the variants of the DiT with equal compute, and set them side by side.

    python -m bench.variants --data data/emoji64.npz --out runs/variants [--flops 2e13] [--seeds 3]

Every network of the family (`--family`, as for `python -m model.scaling`) is trained with the same
multiply-adds. Then 200 pictures of each, drawn without guidance, are judged by the Fréchet distance of the
emoji classifier's features to the training pictures, and a row is timed in torch. The full attention is also
judged with a part of its tokens merged, without training. Last, a row alone is measured at 1,024 to 16,384
tokens, in networks of two blocks that are not trained, each in a process of its own.

Without `--data` nothing is trained, and only a row alone is measured. What was trained and judged is not done
again: a run of hours may be stopped, and goes on with the same command. Writes variants.json, variants.md,
variants.png and variants-trained.png into bench/results.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path

import torch
from pydantic import ValidationError
from rich.console import Console
from torch import Tensor

from ditserve.bench import report
from ditserve.bench.variants.forward import ForwardCost, forward_costs
from ditserve.bench.variants.table import VariantResult, draw, markdown
from ditserve.model.evaluation.classifier_network import CLASSIFIER, open_classifier
from ditserve.model.evaluation.features import classifier_features
from ditserve.model.evaluation.fidelity import frechet_distance
from ditserve.model.evaluation.picture_sets import (
    GENERATED,
    TRAINING,
    EvaluationPlan,
    choose_rows,
    collect_sets,
    open_data,
)
from ditserve.model.nets.autoencoder import open_decoder
from ditserve.model.nets.cost import cost
from ditserve.model.nets.factory import network_of
from ditserve.model.scaling.family import Family, FamilyRun, plan_runs
from ditserve.model.scaling.measuring import measure_family
from ditserve.model.scaling.record import ScalingRecord
from ditserve.model.spec.bundle import write_atomic
from ditserve.model.spec.command_line import finite, named_path, positive, thread_count
from ditserve.model.spec.dit_config import DiTConfig
from ditserve.model.spec.output_folder import SCALING, claim
from ditserve.model.train.config import first_mistake
from ditserve.model.train.load import load_model
from ditserve.model.train.loaded_model import LoadedModel

FAMILY = Path(__file__).parents[1] / "variants.json"
JUDGED = "judged.json"
STEPS, SOLVER, GRID = 20, "unipc-1", "trailing"
# Shares of tokens that the full attention's networks merge when they draw.
MERGED = (0.25, 0.5)
ROWS, TURNS = 4, 10


@dataclass(frozen=True, slots=True)
class TrainedVariant:
    """A trained network, or one of its weights with tokens merged; `run` and the title tell which."""

    title: str
    run: FamilyRun
    merge_tokens: float = 0.0

    def load(self) -> LoadedModel:
        model = load_model(self.run.config.output)
        if not self.merge_tokens:
            return model
        config = replace(model.dit.config, merge_tokens=self.merge_tokens)
        manifest = model.manifest.model_copy(update={"config": config})
        return LoadedModel(network_of(config, model.dit.state_dict()), manifest)


def trained_variants(runs: Sequence[FamilyRun]) -> Iterator[TrainedVariant]:
    """Yield every run, and those of full attention with tokens merged too."""
    for run in runs:
        yield TrainedVariant(run.title, run)
        config = run.config.network_config(run.config.open_dataset())
        if isinstance(config, DiTConfig) and not config.varies_attention and not any(config.level_plan):
            for share in MERGED:
                yield TrainedVariant(f"{run.title}, {share:.0%} merged", run, share)


class Judge:
    """The Fréchet distance to the training pictures, whose features are computed once."""

    def __init__(self, pictures: int) -> None:
        self.pictures, self.real = pictures, dict[Path, Tensor]()
        self.features = classifier_features(open_classifier(CLASSIFIER))

    def distance(self, variant: TrainedVariant) -> float:
        """Return the distance between pictures that the network draws and those that it was trained on."""
        model, path = variant.load(), variant.run.config.data.path
        plan = EvaluationPlan(
            limit=self.pictures, per_pair=None, reference=10_000, steps=STEPS, solver=SOLVER, grid=GRID,
            guidance_scale=1.0, guidance_interval=(0.0, 1.0), seed=0,
        )  # fmt: skip
        dataset, decoder = open_data(model, path), open_decoder(model.manifest, None)
        rows = choose_rows(dataset, plan)
        wanted = [GENERATED] if path in self.real else [TRAINING, GENERATED]
        kept = {name: rows[name] for name in wanted}
        sets = collect_sets(model, decoder, dataset, self.features, plan, kept)
        if path not in self.real:
            self.real[path] = sets[TRAINING].features.pooled
        return frechet_distance(sets[GENERATED].features.pooled, self.real[path])


def judge_all(variants: Sequence[TrainedVariant], folder: Path, judge: Judge) -> dict[str, float]:
    """Judge the variants that are not in judged.json yet; return the distances of all."""
    file = folder / JUDGED
    judged: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}
    keys = {variant.title: f"{variant.title}, {judge.pictures} pictures" for variant in variants}
    for variant in variants:
        if keys[variant.title] not in judged:
            judged[keys[variant.title]] = judge.distance(variant)
            write_atomic(file, (json.dumps(judged, indent=1) + "\n").encode())
    return {title: judged[key] for title, key in keys.items()}


@torch.no_grad()
def row_times(variants: Sequence[TrainedVariant]) -> dict[str, float]:
    """Return the processor's milliseconds for a row of each variant; the networks take turns."""
    networks = {variant.title: variant.load().network for variant in variants}
    fastest = dict.fromkeys(networks, inf)
    for _ in range(TURNS):
        for title, network in networks.items():
            x = torch.zeros(ROWS, network.config.in_channels, *network.config.image_size)
            labels = torch.zeros(ROWS, len(network.config.classes), dtype=torch.int64)
            state = network.modulate(torch.full((ROWS,), 500.0), network.embed(labels))
            began = time.process_time()
            network.backbone(x, state)
            fastest[title] = min(fastest[title], 1e3 * (time.process_time() - began) / ROWS)
    return fastest


def results(
    variants: Sequence[TrainedVariant],
    records: Sequence[ScalingRecord],
    distances: Sequence[Mapping[str, float]],
) -> list[VariantResult]:
    """Return the measurements of every variant, over the seeds."""
    times = row_times(variants)
    last = [{look.run: look for look in sorted(r.looks, key=lambda look: look.step)} for r in records]
    measured = []
    for variant in variants:
        looks = [of_seed[variant.run.title] for of_seed in last]
        dataset = variant.run.config.open_dataset()
        config = variant.run.config.network_config(dataset)
        if isinstance(config, DiTConfig):
            config = replace(config, merge_tokens=variant.merge_tokens)
        row = cost(config)
        measured.append(
            VariantResult(
                name=variant.title,
                tokens=row.tokens,
                parameters=row.parameters,
                macs=row.macs,
                attention_macs=row.attention_macs,
                convolution_macs=row.convolution_macs,
                steps=looks[0].step,
                # The loss is that of the whole network.
                losses=[] if variant.merge_tokens else [look.loss for look in looks],
                distances=[of_seed[variant.title] for of_seed in distances],
                row_ms=round(times[variant.title], 3),
                inference_bytes=row.inference_bytes,
                training_bytes=row.training_bytes,
            )
        )
    return measured


def train_and_judge(options: argparse.Namespace) -> list[VariantResult]:
    """Train and judge the family with every seed.

    Raises:
        OSError, ValueError, ModelError: the family or its data cannot be used.
    """
    try:
        given = Family.model_validate_json(options.family.read_text())
        if options.flops is not None:
            given = Family.model_validate({**given.model_dump(), "flops": options.flops})
    except ValidationError as error:
        raise ValueError(f"{options.family}: {first_mistake(error)}") from None
    records, distances, judge = [], [], Judge(options.pictures)
    for seed in range(options.seeds):
        family = given.model_copy(update={"set": (*given.set, f"seed={seed}")})
        folder = options.out / f"seed-{seed}"
        runs = list(plan_runs(family, options.data, folder))
        with claim(folder, SCALING, apart=tuple({run.config.data.path for run in runs})):
            records.append(measure_family(family, runs, folder))
            variants = list(trained_variants(runs))
            distances.append(judge_all(variants, folder, judge))
    return results(variants, records, distances)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("variants", __doc__)
    parser.add_argument(
        "--data", type=named_path, help="the emoji data of 64 pixels; none: nothing is trained"
    )
    parser.add_argument("--out", type=named_path, default=Path("runs/variants"), help="of the training runs")
    parser.add_argument("--family", type=named_path, default=FAMILY, help="a JSON file of networks")
    parser.add_argument("--flops", type=finite, help="of training, for each network (the family's)")
    parser.add_argument("--seeds", type=positive, default=1, help="trainings of each network")
    parser.add_argument("--pictures", type=positive, default=200, help="of each network, to judge it by")
    parser.add_argument(
        "--sides",
        type=positive,
        nargs="*",
        default=[32, 64, 128],
        help="of the grids of tokens of a row alone",
    )
    parser.add_argument("--threads", type=thread_count, default=1)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options, console, background = parse(arguments), Console(width=140), report.BackgroundLoad()

    def work() -> None:
        torch.set_num_threads(options.threads)
        trained = train_and_judge(options) if options.data else []
        forward: list[ForwardCost] = list(forward_costs(options.sides, options.threads))
        text = markdown(trained, forward, options)
        console.print(text, markup=False)
        figures = {
            "trained": [asdict(each) for each in trained],
            "forward": [asdict(each) for each in forward],
        }
        report.save("variants", options, background, figures)
        write_atomic(report.result_path("variants.md"), text.encode())
        draw(trained, forward, report.result_path("variants.png"))

    return report.run_command("variants", work)


if __name__ == "__main__":
    sys.exit(main())
