"""`python -m model.scaling FAMILY.json --data FILE --out FOLDER`: train a family, and fit a scaling law.

The networks differ in size and have equal compute; `model.scaling.family` shows the JSON file. Every run
keeps the learning rate of the training configuration, constant, so that a loss midway is the loss that a
shorter run would have reached. Losses are those of the averaged weights on the pairs that no run trains on.

Writes scaling.json after every measurement (runs that are already there are not trained again). At the end it
writes the law, if there are enough DiTs for one, into scaling.json; scaling.md with the networks side by
side; and scaling.png. Each run's folder can be sampled and evaluated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pydantic import ValidationError

from ditserve.commands import command_line
from ditserve.model.scaling.family import Family, plan_runs
from ditserve.model.scaling.measuring import measure_costs, measure_family
from ditserve.model.scaling.report import write_report
from ditserve.model.spec.command_line import guarded, named_path, positive
from ditserve.model.spec.output_folder import SCALING, claim
from ditserve.model.train.config import first_mistake


def main(arguments: Sequence[str]) -> int:
    """Run the command line. Return 0, or 2 after a mistake, which is reported in one sentence."""
    parser = argparse.ArgumentParser(
        prog=command_line("model.scaling"), description="Train a family and fit its scaling law."
    )
    parser.add_argument("family", type=named_path, help="a JSON file")
    parser.add_argument(
        "--data", type=named_path, help="the pictures, if not where the training configuration says"
    )
    parser.add_argument("--out", type=named_path, required=True, help="a folder")
    parser.add_argument("--draws", type=positive, default=200, help="of runs, for the confidence of the fit")
    options = parser.parse_args(arguments)
    return guarded("model.scaling", lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    try:
        family = Family.model_validate_json(options.family.read_text())
        runs = list(plan_runs(family, options.data, options.out))
        with claim(options.out, SCALING, apart=tuple({run.config.data.path for run in runs})):
            record = measure_family(family, runs, options.out)
            print(write_report(record, measure_costs(runs), options.draws, options.out))
    except ValidationError as error:
        raise ValueError(f"{options.family}: {first_mistake(error)}") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
