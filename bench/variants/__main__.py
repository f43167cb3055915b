"""Train the variants of the DiT with equal compute, and set them side by side.

    python -m bench.variants --data data/emoji64.npz --out runs/variants [--flops 4e12] [--seeds 3]

A row alone is measured first, at 1,024 to 16,384 tokens, in networks of two blocks that are not trained, each
in a process of its own; without `--data` that is all. Then every network of the family (`--family`, as for
`python -m model.scaling`) is trained with the same multiply-adds, all of them with one seed before the next.
200 pictures of each, drawn without guidance, are judged by the Fréchet distance of the emoji classifier's
features to the training pictures. The full attention is also judged with a part of its tokens merged, without
training.

variants.json, variants.md, variants.png and variants-trained.png in bench/results are written again after
each network. What was trained and judged is not done again: a run of hours may be stopped, and goes on with
the same command.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path

import torch
from pydantic import ValidationError
from rich.console import Console
from torch import Tensor

from ditserve.bench import report
from ditserve.bench.variants.forward import forward_costs
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
from ditserve.model.nets.factory import NetworkConfig, make_network, network_of
from ditserve.model.scaling.family import Family, FamilyRun, plan_runs
from ditserve.model.scaling.measuring import measure_family
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
class Variant:
    """A network of the family, or one with tokens merged in `config` and the same weights."""

    title: str
    run: FamilyRun
    config: NetworkConfig

    def load(self) -> LoadedModel:
        """Open the weights of its training."""
        model = load_model(self.run.config.output)
        manifest = model.manifest.model_copy(update={"config": self.config})
        return LoadedModel(network_of(self.config, model.network.state_dict()), manifest)


def variants_of(run: FamilyRun) -> list[Variant]:
    """Return the network of a run, and if it is the plain DiT also those with tokens merged."""
    config = run.config.network_config(run.config.open_dataset())
    variants = [Variant(run.title, run, config)]
    if isinstance(config, DiTConfig) and is_plain(config):
        merged = {f"{run.title}, {share:.0%} merged": share for share in MERGED}
        variants += [Variant(t, run, replace(config, merge_tokens=share)) for t, share in merged.items()]
    return variants


def is_plain(config: DiTConfig) -> bool:
    """Return True for a network that is none of the variants itself, and whose tokens can be merged."""
    varies = config.varies_attention or config.conv_mlp or any(config.level_plan) or config.rope
    varies = varies or config.experts > 0 or config.shared_modulation or config.condition_gate
    return not varies and not config.merge_tokens and not any(side % 2 for side in config.grid_size)


class Judge:
    """The Fréchet distance to the training pictures, whose features are computed once.

    Raises:
        ValueError: the classifier reads pictures of another size than the first run trains on.
    """

    def __init__(self, pictures: int, first: FamilyRun) -> None:
        classifier, size = open_classifier(CLASSIFIER), first.config.open_dataset().size
        if size != classifier.card.image_size:
            height, width = classifier.card.image_size
            raise ValueError(
                f"data.size is {size[0]}×{size[1]}, and the classifier that judges reads {height}×{width}: "
                f"leave data.size out, and give --data of {height} pixels"
            )
        self.pictures, self.real = pictures, dict[Path, Tensor]()
        self.features = classifier_features(classifier)

    def distance(self, variant: Variant) -> float:
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


def judge_all(variants: Sequence[Variant], folder: Path, judge: Judge) -> dict[str, float]:
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
def row_times(variants: Sequence[Variant]) -> dict[str, float]:
    """Return the processor's milliseconds for a row of each variant; the networks take turns."""
    networks = {variant.title: make_network(variant.config) for variant in variants}
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


def without_training(variants: Sequence[Variant]) -> dict[str, VariantResult]:
    """Return what is known of each variant before it is trained, by its title.

    It stands beside the last plain DiT before it in the family.
    """
    times, known, plain = row_times(variants), {}, variants[0].title
    for variant in variants:
        if isinstance(variant.config, DiTConfig) and is_plain(variant.config):
            plain = variant.title
        row = cost(variant.config)
        known[variant.title] = VariantResult(
            name=variant.title,
            beside=plain,
            tokens=row.tokens,
            parameters=row.parameters,
            macs=row.macs,
            attention_macs=row.attention_macs,
            convolution_macs=row.convolution_macs,
            steps=variant.run.config.steps,
            losses=[],
            distances=[],
            row_ms=round(times[variant.title], 3),
            inference_bytes=row.inference_bytes,
            training_bytes=row.training_bytes,
        )
    return known


@dataclass(frozen=True, slots=True)
class Seed:
    """The trainings of a family with one seed, in a folder of their own."""

    family: Family
    folder: Path
    runs: Sequence[FamilyRun]


def plan_seeds(options: argparse.Namespace) -> list[Seed]:
    """Return the trainings of every seed.

    Raises:
        OSError, ValueError, ModelError: the family or its data cannot be used.
    """
    try:
        given = Family.model_validate_json(options.family.read_text())
        if options.flops is not None:
            given = Family.model_validate({**given.model_dump(), "flops": options.flops})
    except ValidationError as error:
        raise ValueError(f"{options.family}: {first_mistake(error)}") from None
    seeds = []
    for seed in range(options.seeds):
        family = given.model_copy(update={"set": (*given.set, f"seed={seed}")})
        folder = options.out / f"seed-{seed}"
        seeds.append(Seed(family, folder, list(plan_runs(family, options.data, folder))))
    return seeds


def train_and_judge(seeds: Sequence[Seed], judge: Judge) -> Iterator[list[VariantResult]]:
    """Train and judge all networks seed by seed. Yield the results so far after each network."""
    results = without_training([variant for run in seeds[0].runs for variant in variants_of(run)])
    for seed in seeds:
        apart = tuple({run.config.data.path for run in seed.runs})
        with claim(seed.folder, SCALING, apart=apart):
            for run in seed.runs:
                record = measure_family(seed.family, [run], seed.folder)
                ends = {look.run: look.loss for look in record.looks if look.step == run.config.steps}
                variants = variants_of(run)
                for title, distance in judge_all(variants, seed.folder, judge).items():
                    result = results[title]
                    # The loss is that of the whole network.
                    losses = [*result.losses, ends[title]] if title == run.title else []
                    results[title] = replace(result, losses=losses, distances=[*result.distances, distance])
                yield [result for result in results.values() if result.distances]


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
        seeds, judge = [], None
        if options.data:
            seeds = plan_seeds(options)
            judge = Judge(options.pictures, seeds[0].runs[0])
            options.flops = seeds[0].family.flops
        forward = list(forward_costs(options.sides, options.threads))
        for trained in train_and_judge(seeds, judge) if judge else [[]]:
            text = markdown(trained, forward, options)
            figures = {
                "trained": [asdict(each) for each in trained],
                "forward": [asdict(each) for each in forward],
            }
            report.save("variants", options, background, figures)
            write_atomic(report.result_path("variants.md"), text.encode())
            draw(trained, forward, report.result_path("variants.png"))
        console.print(text, markup=False)

    return report.run_command("variants", work)


if __name__ == "__main__":
    sys.exit(main())
