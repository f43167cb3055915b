"""Settings: one definition behind variables and flags; every mistake is one sentence."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from pydantic_settings import SettingsError
from redis.asyncio.connection import parse_url

from ditserve.service.settings import Settings, reference


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("DIT_") or name in ("REDIS_URL", "REDIS_PASSWORD", "PROMETHEUS_MULTIPROC_DIR"):
            monkeypatch.delenv(name)


def test_flags_win_over_variables_win_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.parse().port == 8000
    monkeypatch.setenv("DIT_PORT", "9000")
    assert Settings.parse().port == 9000
    assert Settings.parse(["--port", "9001"]).port == 9001
    assert Settings.parse(["--port=9002", "--no-metrics"]).metrics is False


def test_every_switch_can_be_turned_off() -> None:
    assert Settings.parse(["--no-compile", "--no-metrics"]).compile is False
    assert Settings.parse(["--compile"]).compile is True


def test_redis_url_has_its_conventional_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://:hunter2@localhost:6379")
    url = Settings.parse().redis_url
    assert url is not None
    assert url.get_secret_value() == "redis://:hunter2@localhost:6379"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--prot", "1"], "unknown flag --prot; did you mean --port?"),
        (["--qqqqqqq"], "unknown flag --qqqqqqq; --help lists them."),
        (["--port", "many"], "--port: input should be a valid integer"),
        (["--port", "70000"], "--port: input should be less than or equal to 65535"),
        (["--log-format", "xml"], "--log-format: input should be 'auto', 'json' or 'text'"),
        (
            ["--backend", "torch", "--precision", "int8"],
            "--precision: int8 is not there with --backend torch",
        ),
        (["--backend", "onnx", "--precision", "bf16"], "--precision: bf16 is not there with --backend onnx"),
        (["--backend", "jax"], "--backend: input should be 'auto', 'onnx', 'torch' or 'tensorrt'"),
        (["--precision", "int4"], "--precision: input should be 'auto', 'fp32'"),
        (["--providers", "CUDA;CPU"], "--providers: string should match pattern"),
        (["--strict-rows", "-1"], "--strict-rows: input should be greater than or equal to 0"),
        (["--no-bundle"], "unknown flag --no-bundle"),
        (["--bundle", "a,,b"], "--bundle: string should match pattern"),
        (["--root-path", "/dit/"], "--root-path: string should match pattern"),
        (["--trusted-proxies", "10.0.0.1/8"], "--trusted-proxies: 10.0.0.1/8 has host bits set"),
        (["--trusted-proxies", "10.0.0.0/8, nginx"], "--trusted-proxies: ' nginx' does not appear to be"),
        (["--allowed-hosts", "https://example.org"], "--allowed-hosts: string should match pattern"),
        (["stray"], "stray"),
        (["--port"], "expected one argument"),
        (["--lease-s", "nan"], "--lease-s: input should be less than or equal to 3600"),
        (["--lease-s", "1e300"], "--lease-s: input should be less than or equal to 3600"),
        (["--lease-s", "0.001"], "--lease-s: input should be greater than or equal to 1"),
        (["--canary-s", "inf"], "--canary-s: input should be less than or equal to 604800"),
        (["--max-rows", "1000000000000"], "--max-rows: input should be less than or equal to 4096"),
        (
            ["--default-deadline-s", "700"],
            "--default-deadline-s 700 is above --max-deadline-s 600: change one",
        ),
        (["--strict-rows", "65"], "--strict-rows 65 is above --max-rows 64: change one of them"),
        (["--prometheus-multiproc-dir", "/nowhere"], "--prometheus-multiproc-dir: path does not point to a"),
    ],
)
def test_a_wrong_flag_is_one_sentence(argv: list[str], sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.parse(argv)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("DIT_QUEUE_LIMITS", "5", "did you mean DIT_QUEUE_LIMIT?"),
        ("dit_prot", "5", "did you mean DIT_PORT?"),
        ("DIT_LEASE_S", "soon", "--lease-s: input should be a valid number"),
    ],
)
def test_a_wrong_variable_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        Settings.parse()
    assert sentence in str(caught.value)


def test_every_number_has_a_range() -> None:
    schemas = Settings.model_json_schema()["properties"]
    options = {name: schema.get("anyOf", [schema])[0] for name, schema in schemas.items()}
    numbers = {name: option for name, option in options.items() if option["type"] in ("integer", "number")}
    assert {"lease_s", "port", "default_deadline_s", "max_area"} < set(numbers)
    assert [name for name, option in numbers.items() if not {"minimum", "maximum"} <= set(option)] == []


def test_a_mistake_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        Settings.load(["--prot", "1"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "error: unknown flag --prot; did you mean --port? "
        "(exit status 2: starting this again does not help before it is mended)\n"
    )


def test_print_config_masks_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        Settings.load(["--redis-url", "redis://:hunter2@localhost", "--print-config", "--port", "1234"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "hunter2" not in printed
    assert json.loads(printed)["port"] == 1234


def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        Settings.load(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in printed
        assert field.description


def test_the_reference_is_the_committed_one() -> None:
    committed = Path(__file__).parents[2] / "docs/configuration.md"
    assert committed.read_text() == reference(), f"python -m service.settings > {committed}"


def test_a_wrong_secret_is_not_echoed() -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.parse(["--redis-url", "redis://:hunter2@localhost", "--port", "hunter3"])
    assert "hunter" not in str(caught.value)


def test_a_child_process_loads_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.parse(
        ["--redis-url", "redis://:pw@h", "--port", "7", "--no-metrics", "--hang-s", "3"]
    )
    for name, value in settings.child_environment().items():
        monkeypatch.setenv(name, value)
    assert Settings.parse() == settings


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Settings.parse().port = 1


@pytest.mark.parametrize("password", ["p@ss/w#rd? %41", "plain", "'\"$\\"])
@pytest.mark.parametrize(
    "url", ["redis://dit@queue:6379/0", "rediss://queue/1?ssl_cert_reqs=none", "unix://dit@/run/queue.sock"]
)
def test_a_password_of_any_signs_comes_to_redis_as_it_is(
    url: str, password: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", url)
    monkeypatch.setenv("REDIS_PASSWORD", password)
    settings = Settings.parse()
    assert settings.redis_url is not None
    told: dict[str, Any] = {**parse_url(settings.redis_url.get_secret_value())}
    assert told == {**parse_url(url), "password": password}
    # A child process reads the same, and the password once.
    environment = settings.child_environment()
    assert environment["REDIS_URL"] == settings.redis_url.get_secret_value()
    assert "REDIS_PASSWORD" not in environment
    assert password not in settings.render()


@pytest.mark.parametrize("password", ["a/b", "1/2", "a#b", "a?b", "12?3", "a%b", "50%"])
def test_a_url_that_its_password_breaks_is_refused(password: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", f"redis://dit:{password}@queue:6379/0")
    with pytest.raises(SettingsError, match="REDIS_PASSWORD") as refused:
        Settings.parse()
    assert password not in str(refused.value).replace("/ ? # @ or %", "")


def test_two_passwords_are_a_contradiction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://dit:one@queue:6379/0")
    monkeypatch.setenv("REDIS_PASSWORD", "other")
    with pytest.raises(SettingsError, match="REDIS_URL has a password and REDIS_PASSWORD is set"):
        Settings.parse()


@pytest.mark.parametrize(
    ("given", "per_gpu"), [("3", None), ("1024", None), ("per-gpu=4", 4)], ids=["three", "most", "per-gpu"]
)
def test_workers_are_a_number_or_a_number_for_each_gpu(given: str, per_gpu: int | None) -> None:
    settings = Settings.parse([f"--workers={given}", "--backend=torch", "--device=cuda"])
    assert (settings.workers, settings.workers_per_gpu) == (given, per_gpu)


@pytest.mark.parametrize("given", ["0", "1025", "per-gpu", "per-gpu=0", "gpu=2", "-1", "1.5"])
def test_other_workers_are_refused(given: str) -> None:
    with pytest.raises(SettingsError, match="--workers"):
        Settings.parse([f"--workers={given}"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "is for workers that compute on a GPU: add --backend tensorrt"),
        (["--backend=torch", "--device=cuda:1"], "gives each worker a GPU: --device cuda:1 must be cuda"),
    ],
)
def test_workers_for_each_gpu_compute_on_it(flags: list[str], words: str) -> None:
    with pytest.raises(SettingsError, match=f"--workers per-gpu=2 {words}"):
        Settings.parse(["--workers=per-gpu=2", *flags])


def test_code_that_torch_compiles_is_kept_beside_the_engines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    Settings.load([f"--engines={tmp_path}"])
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    Settings.load([f"--engines={tmp_path}", "--compile"])
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "torch-compiled")
