"""Every setting, defined once: flags, `DIT_*` environment variables, and the usual `REDIS_URL`.

The only file that reads the environment. Settings are read once, refused when unknown or malformed, frozen,
and passed on. Flags win over environment variables, which win over defaults.

    python -m service.settings > docs/configuration.md      writes the reference of all settings
"""

import json
import os
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    DirectoryPath,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

from ditserve.commands import command_line
from ditserve.model.spec.zoo import FLAGSHIP, ROOT
from ditserve.service.callback_url import HOST_PATTERN
from ditserve.service.exit_statuses import refuse
from ditserve.service.queue_url import is_readable_url, with_password
from ditserve.service.setting_checks import (
    checked_callbacks,
    checked_networks,
    contradiction,
    is_callback_secret,
    refuse_unknown_flags,
    refuse_unknown_variables,
    sentence_about,
)

_PREFIX = "DIT_"
# The sub-folder of --engines for the code that torch compiles.
COMPILED = "torch-compiled"

Port = Annotated[int, Field(ge=0, le=65535)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Seconds = Annotated[float, Field(ge=0.01, le=7 * 86400)]
Bytes = Annotated[int, Field(ge=0, le=2**44)]


class ClientSettings(BaseSettings):
    """The address of the service and the API key for clients: `DITSERVE_URL`, `DITSERVE_API_KEY`."""

    model_config = SettingsConfigDict(
        env_prefix="DITSERVE_", env_ignore_empty=True, extra="forbid", frozen=True
    )

    url: str = "http://127.0.0.1:8000"
    api_key: SecretStr | None = None


class Settings(BaseSettings):
    """Serve images from a Diffusion Transformer bundle. Every flag is also an environment variable:
    --queue-limit is DIT_QUEUE_LIMIT; --redis-url is REDIS_URL."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_exit_on_error=False,
        cli_hide_none_type=True,
        nested_model_default_partial_update=False,
    )

    host: str = Field("127.0.0.1", description="address the API listens on")
    port: Port = Field(8000, description="port the API listens on; 0 picks a free one")
    bundle: Annotated[
        str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)
    ] = Field(
        str(FLAGSHIP),
        pattern=r"^[^,]+(,[^,]+)*$",
        description="folder of the model bundle to serve; of several (A,B) the first is the default model",
    )
    adapters: DirectoryPath | None = Field(
        None,
        description="folder of the low-rank adapters that requests may name, for torch; of several bundles, "
        "a sub-folder each; unset is adapters in the bundle",
    )
    verify: bool = Field(True, description="check the files of the bundle against their hashes")
    redis_url: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices("redis_url"),
        description="Redis or Valkey (redis://, rediss://, unix://, redis+sentinel://host:port,…/primary); "
        "unset starts a private one",
    )
    redis_password: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices("redis_password"),
        description="password of the user that REDIS_URL names, with any signs in it; unset is the URL's own",
    )
    namespace: str = Field(
        "dit",
        pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$",
        description="prefix of every Redis key; a further bundle has NAMESPACE-NAME, after its model's name",
    )

    backend: Literal["auto", "onnx", "torch", "tensorrt"] = Field(
        "auto",
        description="what runs the network; auto is onnx, and torch for an imported pipeline without graphs",
    )
    threads: int = Field(0, ge=0, le=1024, description="compute threads of a worker; 0 uses every core")
    precision: Literal["auto", "fp32", "fp16", "bf16", "int8", "fp8"] = Field(
        "auto",
        description="numbers the network computes in; auto is the backend's choice; "
        "bf16 is for tensorrt and torch, fp8 for a DiT of ours in torch, int8 for onnx and tensorrt",
    )
    providers: str = Field(
        "",
        pattern=r"^$|^[A-Za-z]+(,[A-Za-z]+)*$",
        description="ONNX Runtime's execution providers, preferred first, such as "
        "CUDAExecutionProvider,CPUExecutionProvider; empty is the backend's choice",
    )
    device: str = Field("cpu", description="device of the torch backend, such as cpu, cuda or cuda:1")
    compile: bool = Field(False, description="compile the network of the torch backend")
    text_encoder: str = Field(
        "",
        description="encoder of a model that takes text: minilm, a folder (BERT; CLIP, T5 and others need "
        "torch and transformers) or package.module:Class; empty is the model's own",
    )
    engines: Path | None = Field(
        None,
        description="folder of the tensorrt backend's engines, one sub-folder a model; unset is the bundle. "
        "With --compile torch keeps the code that it compiles in it; unset is a temporary folder of the user",
    )
    export_on_start: bool = Field(
        False,
        validation_alias=AliasChoices("export_on_start"),
        description="build the engines that the tensorrt backend lacks before it starts",
    )
    strict_rows: int = Field(
        0,
        ge=0,
        le=1024,
        description="run every forward pass at exactly this many rows, so that an image is the same to the "
        "last bit whatever else is in the batch; 0 runs as many as there are",
    )
    modulation_cache_bytes: Bytes = Field(
        256 * 2**20,
        description="bytes of a worker, of its GPU with torch, for the network's modulations; 0 keeps none",
    )
    embedding_cache_bytes: Bytes = Field(
        64 * 2**20, description="bytes of a worker, and of Redis, for embeddings of conditions"
    )
    workers: Annotated[str, BeforeValidator(str)] = Field(
        "1",
        pattern=r"^(per-gpu=)?([1-9]\d{0,2}|10[01]\d|102[0-4])$",
        description="worker processes the all-in-one starts for each model, 1 to 1024; per-gpu=N starts N on "
        "each GPU, to which they keep",
    )
    max_rows: int = Field(64, ge=1, le=4096, description="rows a worker may put into one forward pass")
    lookahead_rows: int = Field(
        64,
        ge=0,
        le=4096,
        description="rows that workers together claim beyond those they can run, for the planner to see, and "
        "each no fewer than an efficient batch; 0 claims none",
    )

    queue_limit: Count = Field(1000, description="jobs that may wait before new ones are refused")
    lease_s: float = Field(
        15.0, ge=1, le=3600, description="how long a worker may hold a job without renewing its lease"
    )
    max_run_s: float = Field(
        1800.0,
        ge=1,
        le=30 * 86400,
        description="least time for which a worker may hold a job; "
        "ten times its predicted time if that is more",
    )
    max_attempts: Count = Field(3, description="workers a job may lose before it is put aside as dead")
    result_ttl_s: float = Field(
        3600.0, ge=1, le=30 * 86400, description="how long results and events are kept"
    )
    reuse_s: float = Field(
        0.0,
        ge=0,
        le=30 * 86400,
        description="how long a request with a seed is answered with the images of an equal one, or waits "
        "for those being drawn; at most --result-ttl-s, in the memory that results have; 0 draws each",
    )
    reuse_across_keys: bool = Field(
        False, description="answer a request with the images of another caller's equal one, too"
    )
    drain_s: Seconds = Field(30.0, description="time to finish work after SIGTERM")

    default_deadline_s: Seconds | None = Field(
        None, description="deadline of requests that name none; unset means none"
    )
    max_deadline_s: Seconds = Field(600.0, description="longest deadline a request may name")
    max_area: float = Field(
        4.0, ge=1, le=64, description="largest image a request may ask for, in areas of the model's own size"
    )
    max_images: int = Field(16, ge=1, le=256, description="images one request may ask for")
    max_body_bytes: int = Field(
        65536, ge=256, le=2**26, description="largest request body, in bytes, besides the pictures in it"
    )
    max_picture_bytes: int = Field(
        2**23,
        ge=256,
        le=2**26,
        description="largest file of a picture to start from, and of its mask, in bytes",
    )
    body_timeout_s: Seconds = Field(
        10.0,
        description="time a client has to send the head of a request, and its body; "
        "of a body a second more for every 64 KiB received",
    )
    max_connections: int = Field(
        1000, ge=1, le=100_000, description="connections of clients that one API process keeps"
    )
    max_streams: Count = Field(
        128, description="event streams that one caller may have open in one API process"
    )
    ready_workers: int = Field(1, ge=0, le=1_000_000, description="workers that must be alive for /readyz")
    hang_s: float = Field(
        60.0,
        ge=1,
        le=86400,
        description="least time without a step, while work is running, after which a worker gives up and "
        "/readyz fails; 20 times the predicted time of the step if that is more",
    )
    keepalive_s: Seconds = Field(15.0, description="silence on an event stream before a keep-alive comment")

    keys_file: Path | None = Field(
        None, description=f"file of API keys ({command_line('service keys')}); unset lets everybody in"
    )
    open: bool = Field(False, description="let everybody in although --host is reachable from other machines")
    cors_origins: str = Field(
        "",
        pattern=r"^$|^\*$|^https?://[a-z0-9.:\[\]-]+(,https?://[a-z0-9.:\[\]-]+)*$",
        description="web origins whose pages may use the API (CORS), such as https://shop.example,…; "
        "* is every one, empty is none",
    )
    root_path: str = Field(
        "",
        pattern=r"^(/[A-Za-z0-9._~-]+)*$",
        description="path under which a proxy serves the API, such as /dit",
    )
    trusted_proxies: Annotated[str, AfterValidator(checked_networks)] = Field(
        "",
        description="networks of the proxies whose X-Forwarded-For, -Proto, -Host and Forwarded are "
        "believed, such as 10.0.0.0/8,::1/128",
    )
    allowed_hosts: str = Field(
        "",
        pattern=rf"^$|^{HOST_PATTERN}(,{HOST_PATTERN})*$",
        description="hosts that requests may name besides localhost, such as example.org,*.example.org; "
        "* is any. Unset is none where no key is asked and only this machine can connect, else any",
    )

    callback_allow: Annotated[str, AfterValidator(checked_callbacks)] = Field(
        "",
        description="the addresses that a request's callback_url may name: hosts by https "
        "(hooks.example.org, *.example.com, * for any) or URLs that it begins with "
        "(http://inside.example:8080/dit); empty is none",
    )
    callback_networks: Annotated[str, AfterValidator(checked_networks)] = Field(
        "",
        description="networks that callbacks may reach besides the public internet, such as 10.1.0.0/16; "
        "without it an address that resolves to this machine or a private network is not called",
    )
    callback_secret: SecretStr | None = Field(
        None,
        description="whsec_ and the base64 of 24 to 64 random bytes, which signs callbacks (Standard "
        "Webhooks); two with a comma between them both sign, while one replaces the other",
    )

    canary_s: float = Field(
        300.0,
        ge=0,
        le=7 * 86400,
        description="least time between drawings of the bundle's golden image, to see drift; they take at "
        "most 1 % of a worker's time, however large the model; 0 is never",
    )
    metrics: bool = Field(True, description="serve /metrics")
    worker_metrics_port: Port = Field(
        0, description="port a stand-alone worker serves its own /metrics on; 0 serves none"
    )
    prometheus_multiproc_dir: DirectoryPath | None = Field(
        None,
        validation_alias=AliasChoices("prometheus_multiproc_dir"),
        description="folder where processes of one host share their metrics (the all-in-one makes one)",
    )
    otlp_endpoint: str | None = Field(
        None, pattern=r"^https?://", description="collector of traces (OTLP over HTTP); unset sends none"
    )
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="auto is text in a terminal, else json"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe event logged"
    )

    @model_validator(mode="before")
    @classmethod
    def _join_password(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Put the password into the URL, in which it is read from then on."""
        url, password = given.get("redis_url"), given.get("redis_password")
        if not url or not password:
            return given
        url, password = (
            value if isinstance(value, str) else value.get_secret_value() for value in (url, password)
        )
        try:
            return {**given, "redis_url": with_password(url, password), "redis_password": None}
        except ValueError:
            raise contradiction("REDIS_URL has a password and REDIS_PASSWORD is set") from None

    @field_validator("redis_url")
    @classmethod
    def _readable_url(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None and not is_readable_url(url.get_secret_value()):
            raise PydanticCustomError(
                "url", "not a URL; a password with / ? # @ or % in it is given as REDIS_PASSWORD"
            )
        return url

    @field_validator("callback_secret")
    @classmethod
    def _readable_secrets(cls, secrets: SecretStr | None) -> SecretStr | None:
        for secret in secrets.get_secret_value().split(",") if secrets else ():
            if not is_callback_secret(secret):
                raise PydanticCustomError("secret", "write whsec_ and then 24 to 64 random bytes in base64")
        return secrets

    @field_validator("precision")
    @classmethod
    def _precision_of_backend(cls, precision: str, info: ValidationInfo) -> str:
        backend = info.data.get("backend")
        lacking = {"onnx": ("bf16", "fp8"), "torch": ("int8",), "tensorrt": ("fp8",)}.get(str(backend), ())
        if precision in lacking:
            reason = {"reason": f"{precision} is not there with --backend {backend}"}
            raise PydanticCustomError("precision", "{reason}", reason)
        return precision

    @model_validator(mode="after")
    def _related(self) -> Self:
        """Refuse settings that cannot work together, defaults included."""
        least, most = self.default_deadline_s, self.max_deadline_s
        if least is not None and least > most:
            raise contradiction(f"--default-deadline-s {least:g} is above --max-deadline-s {most:g}")
        if self.strict_rows > self.max_rows:
            raise contradiction(f"--strict-rows {self.strict_rows} is above --max-rows {self.max_rows}")
        if self.reuse_s > self.result_ttl_s:
            raise contradiction(f"--reuse-s {self.reuse_s:g} is above --result-ttl-s {self.result_ttl_s:g}")
        given = (self.backend, self.device, *self.providers.split(","))
        on_gpu = any(name.lower().startswith(("tensorrt", "cuda")) for name in given)
        if self.workers_per_gpu is not None and not on_gpu:
            raise contradiction(
                f"--workers {self.workers} is for workers that compute on a GPU: add --backend tensorrt, "
                "--backend torch --device cuda, or --providers CUDAExecutionProvider,CPUExecutionProvider"
            )
        if self.workers_per_gpu is not None and self.device not in ("cpu", "cuda"):
            raise contradiction(
                f"--workers {self.workers} gives each worker a GPU: --device {self.device} must be cuda"
            )
        if self.callback_allow and self.callback_secret is None:
            raise contradiction("--callback-allow is set and no --callback-secret signs what is sent")
        return self

    @property
    def workers_per_gpu(self) -> int | None:
        """The workers on each GPU; None where `workers` is their number in all."""
        kind, _, number = self.workers.rpartition("=")
        return int(number) if kind else None

    @property
    def max_upload_bytes(self) -> int:
        """The largest body that holds a picture and its mask, both in base64 beside all the rest."""
        return self.max_body_bytes + 2 * 4 * ceil(self.max_picture_bytes / 3)

    @classmethod
    def load(cls, argv: Sequence[str] = (), *, program: str = command_line("service")) -> Self:
        """Read settings from the environment and `argv` (flags only, without the program's name).

        Ends the process with status 0 after `--help` or `--print-config`, and after a wrong setting with
        status 2 and one sentence on stderr.
        """
        rest = [token for token in argv if token != "--print-config"]
        if {"-h", "--help"} & set(rest):
            print(cls._help(program))
            raise SystemExit(0)
        try:
            settings = cls.parse(rest, program=program)
        except SettingsError as error:
            _refuse(str(error))
        # Their libraries read the variables alone.
        if settings.prometheus_multiproc_dir is not None:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(settings.prometheus_multiproc_dir)
        if settings.compile and settings.engines is not None:
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(settings.engines / COMPILED))
        if len(rest) != len(argv):
            print(settings.render())
            raise SystemExit(0)
        return settings

    @classmethod
    def parse(cls, argv: Sequence[str] = (), *, program: str = command_line("service")) -> Self:
        """Read settings as `load` does. Raises `SettingsError`, with one sentence, for a wrong setting."""
        refuse_unknown_flags(argv, cls._flags())
        refuse_unknown_variables(os.environ, cls._variables(), prefix=_PREFIX)
        source = cls._source(program)
        try:
            return cls(_cli_settings_source=source(args=list(argv)))  # type: ignore[call-arg]
        except ValidationError as error:
            raise SettingsError(sentence_about(error)) from None

    def render(self) -> str:
        """Return the effective settings as JSON, secrets masked."""
        return json.dumps(self.model_dump(mode="json"), indent=2)

    @staticmethod
    def visible_gpus() -> tuple[str, ...] | None:
        """Return the GPUs that CUDA_VISIBLE_DEVICES names; None if it does not restrict them."""
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        return None if named is None else tuple(name for name in named.split(",") if name)

    def child_environment(self) -> dict[str, str]:
        """Return the environment in which a child process loads exactly these settings.

        Secrets are in clear.
        """
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_PREFIX)}
        for name, variable in self._names().items():
            value = getattr(self, name)
            environment.pop(variable, None)
            if isinstance(value, SecretStr):
                environment[variable] = value.get_secret_value()
            elif value is not None:
                environment[variable] = str(value)
        return environment

    @classmethod
    def _names(cls) -> dict[str, str]:
        """Return the environment variable of each field."""
        return {
            name: (name if field.validation_alias else f"{_PREFIX}{name}").upper()
            for name, field in cls.model_fields.items()
        }

    @classmethod
    def _variables(cls) -> list[str]:
        return list(cls._names().values())

    @classmethod
    def _flags(cls) -> list[str]:
        names = [name.replace("_", "-") for name in cls.model_fields]
        switches = [
            name
            for name, field in zip(names, cls.model_fields.values(), strict=True)
            if field.annotation is bool
        ]
        negated = [f"--no-{name}" for name in switches]
        return [*(f"--{name}" for name in names), *negated, "--print-config", "--help"]

    @classmethod
    def _source(cls, program: str) -> CliSettingsSource[Any]:
        return CliSettingsSource(cls, cli_prog_name=program)

    @classmethod
    def _help(cls, program: str) -> str:
        usage = cls._source(program).root_parser.format_help().rstrip()
        return f"{usage}\n  --print-config        print the effective settings, secrets masked, and stop"


def _refuse(sentence: str) -> NoReturn:
    raise SystemExit(refuse(sentence))


# The reference: the field that each of its sections begins with → the title.
_SECTIONS = {
    "host": "Address and models",
    "backend": "Computing",
    "queue_limit": "Queue",
    "default_deadline_s": "Limits of a request, and probes",
    "keys_file": "Access",
    "callback_allow": "Callbacks",
    "canary_s": "Watching",
}
_PREAMBLE = """<!-- Written by `python -m service.settings > docs/configuration.md`. Do not edit. -->
# Configuration

Every setting is a flag and an environment variable. Flags win over variables, variables over defaults; an
unknown or malformed one ends the process with one sentence. `--help` lists them, `--print-config` shows the
effective ones. A switch is turned off by `--no-…` or the value `false`. The clients (`python -m service
generate`) read `DITSERVE_URL` and `DITSERVE_API_KEY`.
"""


def reference() -> str:
    """Return the reference of all settings as Markdown, one table a section."""
    schemas = Settings.model_json_schema()["properties"]
    lines = [_PREAMBLE.rstrip()]
    for name, variable in Settings._names().items():
        field, flag = Settings.model_fields[name], f"--{name.replace('_', '-')}"
        if name in _SECTIONS:
            lines += ["", f"## {_SECTIONS[name]}", "", "| flag | variable | values | default | meaning |"]
            lines += ["|---|---|---|---|---|"]
        # The path of the shipped bundle is written as it is in a checkout.
        plain = str(FLAGSHIP.relative_to(ROOT)) if field.default == str(FLAGSHIP) else field.default
        default = "" if plain in (None, "") else f"`{json.dumps(plain).strip(chr(34))}`"
        cells = (f"`{flag}`", f"`{variable}`", _values(name, schemas[name]), default, field.description)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _values(name: str, schema: Mapping[str, Any]) -> str:
    """Return the values that a setting takes, in words: "whole number ≥ 1"."""
    schema = schema.get("anyOf", [schema])[0]
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    words = {"boolean": "switch", "integer": "whole number", "number": "number", "string": "text"}
    words |= {"password": "URL" if name == "redis_url" else "text", "directory-path": "path"}
    kind = "seconds" if name.endswith("_s") else schema.get("format", words[schema["type"]])
    limits = {"exclusiveMinimum": ">", "minimum": "≥", "maximum": "≤"}
    bounds = [f"{sign} {schema[key]:.15g}" for key, sign in limits.items() if key in schema]
    return " ".join([words.get(kind, kind), ", ".join(bounds)]).strip()


if __name__ == "__main__":
    print(reference(), end="")
