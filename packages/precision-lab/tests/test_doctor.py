import dataclasses
import io
import json
import platform
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from precision_core import MODES, SupportRow, supports
from precision_core import hardware as formats
from precision_core.hardware import is_available
from precision_core.support import discovery
from precision_lab import machine
from precision_lab.cli import main
from precision_lab.doctor import examine
from precision_lab.findings import print_findings
from precision_lab.installed import Missing

MODULE = """
from precision_core import Precision, Strategy, SupportRow

print("noise of an import")

class Mine(Precision):
    mode = "mine"

    def __init__(self, mode):
        super().__init__(policy="32-true")

class Ring(Strategy):
    name = "ring"

def rows():
    print("noise of a call")
    yield SupportRow("mine", "cpu", "emulated", "by [red]hand[/red]")
    yield SupportRow("mine", "cpu", "no", "not in a ring", strategy="ring")
    yield SupportRow("16-true", "cpu", "no", "the ring has no float16", strategy="ring")
    yield SupportRow("mine", "cpu", "native", "of a strategy that is not installed", strategy="deepspeed-x")
    yield SupportRow("mine", "hpu", "native", "of a device that is not here")
    yield SupportRow("not-registered", "cpu", "native", "of a mode that nobody brings")
"""
ENTRIES = """
[precision.plugins]
mine = mine_module:Mine
silent = mine_module:Mine
[precision.strategies]
ring = mine_module:Ring
[precision.support]
mine = mine_module:rows
"""


def run_doctor(*options):
    result = CliRunner().invoke(main, ["doctor", *options])
    assert not result.exception or isinstance(result.exception, SystemExit), result.exception
    return result


def as_json():
    result = run_doctor("--json")
    return result.exit_code, json.loads(result.stdout)


def unwrapped(text):
    return " ".join(text.split())


def test_it_answers_as_supports_does(install):
    install("mine", ENTRIES, "mine_module", MODULE)
    code, found = as_json()
    rows = {(row["mode"], row["device"], row["strategy"]): (row["level"], row["reason"]) for row in found["support"]}
    here = [device["type"] for device in found["devices"] if device["here"]]
    assert "cpu" in here and {(mode, device, None) for mode in MODES for device in here} <= rows.keys()
    mine = [key for key in rows if "mine" in key or "ring" in key]
    assert mine == [("mine", "cpu", None), ("mine", "cpu", "ring"), ("16-true", "cpu", "ring")]
    assert len(rows) == len(found["support"]) and "not-registered" not in str(rows)
    for key, (level, reason) in rows.items():
        answer = supports(*key)
        assert (answer.level, answer.reason) == (level, reason), key
    assert found["unrated"] == {"silent": here} | ({"mine": here[1:]} if here[1:] else {})
    assert (code, found["problems"]) == (0, [])


def test_the_machine_and_its_devices():
    _, found = as_json()
    this = found["machine"]
    assert (this["python"], this["torch"], this["threads"]) == (platform.python_version(), torch.__version__, 1)
    assert this["cpu"] and this["memory_bytes"] > 2**28
    for name, dtype in {"float16": torch.float16, "bfloat16": torch.bfloat16}.items():
        assert tuple(this["formats"][name].values()) == formats.FORMATS["cpu"][dtype]()
    devices = {device["type"]: device for device in found["devices"]}
    assert list(devices) == ["cpu", "cuda", "xpu", "mps"]
    assert devices["cpu"] == {"type": "cpu", "here": True, "count": 1, "names": [this["cpu"]], "error": ""}
    for name, device in devices.items():
        assert device["here"] == is_available(name) == (len(device["names"]) > 0) == (device["count"] > 0)


def test_packages_libraries_and_what_is_missing(install):
    install("mine", ENTRIES, "mine_module", MODULE)
    install("precision-bnb", "[precision.plugins]\nnf4 = a:b\nint8 = a:b\n", version="3.1")
    install("bystander", "[console_scripts]\nx = y:z\n")
    install("bitsandbytes", version="0.99")
    install("transformer_engine_torch", version="2.13")
    _, found = as_json()
    packages = {package.pop("name"): package for package in found["packages"]}
    assert packages["mine"] == {
        "version": "1.0",
        "modes": ["mine", "silent"],
        "strategies": ["ring"],
        "support": ["mine"],
    }
    assert (packages["precision-bnb"]["version"], packages["precision-bnb"]["modes"]) == ("3.1", ["int8", "nf4"])
    assert packages["precision-core"]["modes"] == list(MODES)
    assert packages["precision-core"]["strategies"] == ["single_device", "ddp"]
    assert "precision-lab" in packages and "bystander" not in packages
    vendors = found["vendors"]
    assert (vendors["bitsandbytes"], vendors["transformer-engine-torch"]) == ("0.99", "2.13")
    assert set(vendors) > {"torch", "deepspeed", "torch_xla", "transformer_engine", "torchao"} and vendors["torch"]
    missing = {each["package"]: each for each in found["missing"]}
    assert missing["precision-bnb"]["names"] == ["nf4-dq", "fp4", "fp4-dq", "int8-training"]  # an old precision-bnb
    for group, extras in discovery.KNOWN.items():
        for name in (name for extra, known in extras.items() for name in known if f"precision-{extra}" in missing):
            each = missing[f"precision-{discovery.extra_of(group, name)}"]
            if name in each["names"]:
                assert f"needs {each['package']}: {each['install']} in a checkout" in discovery.missing(group, name)


@pytest.mark.parametrize(
    ("entries", "claim"),
    [
        ("[precision.plugins]\nmine = a:b\n", 'precision "mine" is claimed by mine and by thief'),
        ("[precision.strategies]\nring = a:b\n", 'strategy "ring" is claimed by mine and by thief'),
        ("[precision.support]\nmine = a:b\n", 'support "mine" is claimed by mine and by thief'),
        ("[precision.plugins]\nbf16 = a:b\n", 'precision "bf16" is claimed by precision-core and by thief'),
        ("[precision.strategies]\nsingle_device = a:b\n", 'strategy "single_device" is claimed by precision-core and'),
    ],
)
def test_a_name_that_is_claimed_twice_is_a_problem(entries, claim, install):
    install("mine", ENTRIES, "mine_module", MODULE)
    install("thief", entries)
    code, found = as_json()
    assert code == 1 and len(found["problems"]) == 1 and found["problems"][0].startswith(claim)
    result = run_doctor()
    assert result.exit_code == 1 and claim in unwrapped(result.stdout) and "no problems" not in result.stdout
    assert "bf16-mixed" in result.stdout


BROKEN = """
def raises():
    raise RuntimeError("no [/red] driver")

def odd():
    return ["native"]

def later():
    yield from raises()
"""


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (
            "gone_module:rows",
            'support "broken" is gone_module:rows of broken, which cannot be imported: ModuleNotFound',
        ),
        ("broken_module:gone", 'support "broken" is broken_module:gone of broken, which cannot be imported: Attribute'),
        ("broken_module:raises", 'support "broken": RuntimeError: no [/red] driver'),
        ("broken_module:later", 'support "broken": RuntimeError: no [/red] driver'),
        ("broken_module:odd", "support \"broken\": TypeError: expected rows of the support table, got 'native'"),
    ],
)
def test_rows_that_cannot_be_loaded_are_a_problem_and_the_others_are_shown(function, problem, install):
    install("broken", f"[precision.support]\nbroken = {function}\n", "broken_module", BROKEN)
    install("mine", ENTRIES, "mine_module", MODULE)
    code, found = as_json()
    assert code == 1 and len(found["problems"]) == 1 and found["problems"][0].startswith(problem)
    assert ("mine", "emulated") in {(row["mode"], row["level"]) for row in found["support"]}
    result = run_doctor()
    assert result.exit_code == 1
    assert problem in unwrapped(result.stdout) and "by [red]hand[/red]" in unwrapped(result.stdout)


@pytest.mark.parametrize(
    ("requires", "problem"),
    [
        ("precision-core>=0.0.1", None),
        ("precision-core>=99", "asks needs precision-core>=99, but precision-core {core} is installed"),
        ("torch<2", "asks needs torch<2, but torch {torch} is installed"),
        ("no-such-library>=1", "asks needs no-such-library>=1, which is not installed"),
        ("no-such-library>=1; extra == 'x'", None),
        ("torch<2; extra == 'x'", None),
        (
            "precision-lab<0.0.1; extra == 'x'",
            'asks needs precision-lab<0.0.1; extra == "x", but precision-lab {lab} is',
        ),
        ("precision core", "asks: "),
    ],
)
def test_a_requirement_that_is_not_met_is_a_problem(requires, problem, install):
    install("asks", "[precision.support]\nasks = json:loads\n", requires=[requires])
    _, found = as_json()
    versions = {package["name"][10:]: package["version"] for package in found["packages"]} | {
        "torch": found["vendors"]["torch"]
    }
    problems = [text for text in found["problems"] if text.startswith("asks")]
    assert len(problems) == (problem is not None)
    assert not problem or problems[0].startswith(problem.format(**versions))


def test_a_device_whose_driver_raises_is_a_row_and_a_problem(monkeypatch):
    monkeypatch.setattr(machine, "is_available", lambda device_type: device_type in ("cpu", "cuda"))
    monkeypatch.setattr(machine, "device_count", {"cpu": 1, "cuda": 2, "xpu": 0, "mps": 0}.get)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: 1 / 0)
    findings = examine()
    cuda = next(device for device in findings.devices if device.type == "cuda")
    assert (cuda.here, cuda.count, cuda.error) == (True, 2, "ZeroDivisionError: division by zero")
    assert "cuda: ZeroDivisionError: division by zero" in findings.problems
    assert {row.mode for row in findings.support if row.device == "cpu"} == set(MODES)
    assert "cannot be asked: ZeroDivisionError: division by zero" in unwrapped(run_doctor().stdout)


def test_a_format_whose_probe_raises_is_a_problem(monkeypatch):
    monkeypatch.setattr(machine, "is_available", lambda device_type: device_type in ("cpu", "cuda"))
    monkeypatch.setattr(machine, "device_count", {"cpu": 1, "cuda": 1, "xpu": 0, "mps": 0}.get)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU")
    monkeypatch.setattr(formats, "is_available", lambda device_type: True)
    monkeypatch.setitem(formats.FORMATS, "cuda", dict.fromkeys(formats.FORMATS["cuda"], lambda: 1 / 0))
    findings = examine()
    assert findings.problems == ["cuda: ZeroDivisionError: division by zero"]
    assert {row.device for row in findings.support} == {"cpu"}


VENDORS = ("bitsandbytes", "deepspeed", "torch_xla", "transformer_engine", "torchao")


@pytest.mark.slow_start
def test_a_process_of_its_own_imports_no_vendor_and_a_file_gets_80_columns(install):
    """As an object and in words, one after the other. Any vendor would raise when it is imported, one package does."""
    for vendor in VENDORS:
        install(vendor, "", vendor, "raise ImportError('was imported')")
    install("mine", ENTRIES, "mine_module", MODULE)
    install("broken", "[precision.support]\nbroken = gone_module:rows\n")
    code = (
        "import sys; from precision_lab.cli import main;"
        "main(['doctor', '--json'], standalone_mode=False);"
        "print('in words', flush=True);"
        "code = main(['doctor'], standalone_mode=False);"
        f"print(code, sorted(set({VENDORS!r}) & set(sys.modules)), file=sys.stderr);"
        "sys.exit(code)"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.stderr == "noise of an import\nnoise of a call\nnoise of a call\n1 []\n"
    assert finished.returncode == 1
    assert "\x1b" not in finished.stdout and "\r" not in finished.stdout
    as_object, _, in_words = finished.stdout.partition("in words\n")
    assert {"type": "xla", "here": None, "count": None, "names": [], "error": ""} in json.loads(as_object)["devices"]
    lines = in_words.splitlines()
    assert max(map(len, lines)) <= 80 and all(line == line.rstrip() for line in lines)
    for line in (
        "xla not asked: that would import torch_xla",
        "mine 1.0 modes mine, silent; strategies ring; support mine",
        "native: by instructions for the format",
    ):
        assert line in unwrapped(in_words)
    rows = [line.split() for line in lines if " cpu " in line]
    assert ["bf16-mixed", "cpu", "any", formats.by_dtypes(MODES["bf16-mixed"], "cpu")[0]] in [row[:4] for row in rows]
    assert ["mine", "cpu", "ring", "no", "not", "in", "a", "ring"] in rows


@pytest.mark.parametrize("width", [50, 80, 200])
def test_no_word_of_a_reason_is_lost(width):
    reason = "what the driver of this device says of the format in question: [/red] 0x1f"
    row = SupportRow("a-mode-with-a-name-of-its-own", "cuda", "emulated", reason, strategy="deepspeed")
    text = io.StringIO()
    findings = dataclasses.replace(examine(), support=[row], problems=[f"cuda: {reason}"])
    print_findings(findings, Console(file=text, width=width))
    table, problems = text.getvalue().partition("\nsupport\n")[2].split("native: by")
    assert set(reason.split()) < set(table.split()) and f"cuda: {reason}" in unwrapped(problems)
    assert max(map(len, text.getvalue().splitlines())) <= width


@pytest.mark.parametrize("width", [50, 80])
def test_a_command_that_installs_more_is_one_line_to_copy(width):
    text = io.StringIO()
    installs = {extra: discovery.install_command(extra) for extra in ("bnb", "deepspeed", "te")}
    missing = [Missing(["nf4", "nf4-dq"] * 9, f"precision-{extra}", install) for extra, install in installs.items()]
    print_findings(dataclasses.replace(examine(), missing=missing), Console(file=text, width=width))
    lines = text.getvalue().splitlines()
    assert [line for line in lines if "pip install" in line] == [f"    {install}" for install in installs.values()]
    assert max(map(len, lines)) <= width and text.getvalue().count("nf4-dq") == 27


def test_help_says_what_the_exit_code_means():
    assert "exit code is 1" in unwrapped(run_doctor("--help").output)


def test_help_does_not_wait_for_torch():
    code = "import sys; from precision_lab.cli import main; main(['doctor', '--help'], standalone_mode=False)"
    code += "; print(sorted({'torch', 'rich', 'matplotlib'} & set(sys.modules)), file=sys.stderr)"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert finished.stderr == "[]\n"
