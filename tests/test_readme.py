"""What the README shows runs as it stands there."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import WAIT_S
from torch import nn
from typer.testing import CliRunner

import parablock_rt as pb
from bench.cli import GPU_NAMES
from bench.cli import main as bench_main
from parablock_rt.cli import app
from parablock_rt.finetune import models

README = (Path(__file__).parent.parent / "README.md").read_text()
SERVER_CODE, CLIENT_CODE, RECORD_CODE = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def test_the_custom_loop_has_fewer_than_twenty_lines() -> None:
    assert len(CLIENT_CODE.strip().splitlines()) < 20


def test_the_custom_loop_trains_two_clients_to_the_server_s_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    served: dict[str, Any] = {"make_model": Stack}
    serving = threading.Thread(target=exec, args=(SERVER_CODE, served), daemon=True)
    serving.start()
    deadline = time.monotonic() + WAIT_S
    while "server" not in served:
        assert time.monotonic() < deadline, "the README's server does not start"
        serving.join(0.01)
    server: pb.Server = served["server"]
    clients: list[dict[str, Any]] = []

    def take_part(index: int) -> None:
        generator = torch.Generator().manual_seed(index)
        inputs = torch.randn(64, 16, generator=generator)
        loader = [(part, part.flip(1)) for part in inputs.split(8)]
        namespace = {"server": server, "model": Stack(), "loader": loader}
        clients.append(namespace)
        exec(CLIENT_CODE, namespace)

    threads = [threading.Thread(target=take_part, args=(index,), daemon=True) for index in range(2)]
    for thread in threads:
        thread.start()
    outcome = server.wait(WAIT_S)
    for thread in (serving, *threads):
        thread.join(WAIT_S)
    assert f"clients can join at {server.address}\n" in capsys.readouterr().out
    losses = [closed.loss for closed in outcome.rounds]
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    assert set(outcome.client_digests.values()) == {outcome.digest}
    assert len(outcome.client_digests) == 2
    result = torch.load("result.pt", weights_only=True)
    for namespace in clients:
        for name, value in result.items():
            assert torch.equal(namespace["model"].state_dict()[name], value)


def test_the_custom_loop_can_leave_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    with pb.serve(Stack(), rounds=3, clients=1, local_steps=2) as server:
        namespace: dict[str, Any] = {"pb": pb, "server": server, "model": Stack(), "loader": [torch.ones(2, 16)]}
        namespace["optimizer"] = lambda params: torch.optim.AdamW(params, lr=1e-3)
        namespace["loss_fn"] = lambda model, batch: model(batch).square().mean()
        exec(RECORD_CODE, namespace)
        server.wait(WAIT_S)
    assert "<html" in (tmp_path / "runs" / "mine" / "report.html").read_text()


# ---- What README, docs and the like tell the reader to run and to open

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def commands(program: str) -> list[tuple[str, list[str]]]:
    """Where each command line of a page that begins with `program` stands, and the words after it."""
    found = []
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        lines = [line.partition("#")[0] for block in blocks for line in block.splitlines()]
        for line in (*lines, *re.findall(r"`([^`]+)`", prose)):
            words = [word for word in line.replace("&&", " ").split() if not re.fullmatch(r"[A-Z_]+=.*", word)]
            if words[: len(program.split())] == program.split():
                found.append((f"{page.name}: {line}", words[len(program.split()) :]))
    return found


def test_every_parablock_command_and_flag_that_is_shown_exists() -> None:
    found = commands("parablock")
    assert len(found) > 20
    runner = CliRunner()
    for where, (command, *words) in found:
        flags = [word.partition("=")[0] for word in words if word.startswith("--")]
        if command == "bench":
            continue
        group = [words[0]] if command == "trace" else []
        result = runner.invoke(app, [command, *group, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
        assert result.exit_code == 0, where
        for flag in flags:
            assert re.search(rf"{flag}(?![\w-])", result.output), f"{where}: {flag}"


def test_every_benchmark_that_is_shown_exists(capsys: pytest.CaptureFixture[str]) -> None:
    for where, words in commands("parablock bench"):
        name = words[0] if words and not words[0].startswith("-") else ""
        if name == "NAME":
            name = "codec"
        with contextlib.suppress(SystemExit):
            assert bench_main([*filter(None, [name]), "--help"]) in (0, None), where
        shown = capsys.readouterr().out
        assert shown, where
        assert all(word in shown for word in words[1:] if word.startswith("--") and word != "--help"), where
    modules = [(where, words[0]) for where, words in commands("python -m")]
    assert len(modules) > 3
    for where, module in modules:
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), where


def test_every_make_target_that_is_shown_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    found = [(where, words[0]) for where, words in commands("make") if words]
    assert len(found) > 5
    for where, target in found:
        assert target in targets, where


def test_every_link_leads_to_a_file_and_a_heading() -> None:
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text())]
    assert len(links) > 15
    for page, link in links:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name}: {link}"


def test_every_file_of_the_project_that_is_named_exists() -> None:
    named = [
        (page.name, path)
        for page in PAGES
        for path in re.findall(r"`((?:tests|csrc|bench|docs|kernels|parablock_rt)/[\w./-]*)`", page.read_text())
    ]
    assert len(named) > 5
    assert [(page, path) for page, path in named if not (ROOT / path).exists()] == []


def test_the_tests_that_need_a_gpu_are_those_that_are_named() -> None:
    files = sorted((ROOT / "tests").glob("test_*.py"))
    marked = {f"tests/{f.name}" for f in files if re.search(r"^    pytest\.mark\.gpu,$", f.read_text(), re.MULTILINE)}
    for place, times in (("Makefile", 1), ("docs/gpu.md", 2)):  # the page has them in one command, and in a plan of two
        commands = re.findall(r"^.*pytest -m gpu (.*)$", (ROOT / place).read_text(), re.MULTILINE)
        named = sorted(file for command in commands for file in command.split() if file != "$(ARGS)")
        assert named == sorted([*marked] * times), place


def test_the_plan_for_a_quarter_of_an_hour_takes_no_longer_and_has_every_benchmark() -> None:
    text = (ROOT / "docs/gpu.md").read_text().split("### In a quarter of an hour")[1]
    first, second = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)[:2]
    limits = [re.findall(r"^[^#\n]*timeout (\d+) (?!.*&$)", plan, re.MULTILINE) for plan in (first, second)]
    seconds = [sum(map(int, each)) for each in limits]
    assert seconds == [int(each) for each in re.findall(r"(\d+) s", text.split(" do all")[0])]
    assert max(seconds) <= 600
    assert sum(seconds) <= 900 - 120
    assert sorted(re.findall(r"parablock bench ([\w-]+)", first + second)) == sorted(GPU_NAMES)


def test_a_machine_with_a_gpu_is_given_what_the_project_asks_for() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    (asked,) = re.findall(r"^dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)
    lines = (ROOT / "requirements-gpu.txt").read_text().splitlines()
    given = [line for line in lines if not line.startswith("#")]
    assert all(f'"{requirement}"' in project for requirement in given)
    there = {"torch>=2.6", "numpy>=1.26"}
    assert {name for name in re.findall(r'"(.*?)"', asked.replace("'", "")) if ";" not in name} <= {*given} | there


def own_model(folder: Path) -> None:
    """A checkpoint that is none of ours, with a tokenizer of its own."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    model, _ = models.load("tiny", dtype=torch.float32)
    model.save_pretrained(folder)
    words = {word: number for number, word in enumerate(["<eos>", *map(str, range(200)), "+", "="])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def test_three_commands_lead_to_a_report_of_one_s_own_model(tmp_path: Path) -> None:
    section = README.split("## Your model, your link, a report")[1].split("\n## ")[0]
    install, serve, join = re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)[0].strip().splitlines()
    assert install == "make install && . .venv/bin/activate"
    own_model(tmp_path / "checkpoint")
    quick = "--task additions --seq-len 24"  # the data of the demo is no part of every installation
    processes: list[subprocess.Popen[bytes]] = []

    def start(line: str, more: str, places: dict[str, str]) -> None:
        for text, place in {"path/to/checkpoint": "checkpoint", **places}.items():
            assert text in line
            line = line.replace(text, place)
        program, *words = f"{line} {quick} {more}".split()
        assert program == "parablock"
        command = [sys.executable, "-m", "parablock_rt", *words]
        processes.append(subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT))

    said = tmp_path / "said"
    with said.open("w") as output:
        try:
            start(serve, "--rounds 3 --run-dir served", {"0.0.0.0:7070": "0.0.0.0:0"})
            deadline = time.monotonic() + 2 * WAIT_S
            while (port := re.search(r"Listening on 0\.0\.0\.0:(\d+) ", said.read_text())) is None:
                assert time.monotonic() < deadline
                assert processes[0].poll() is None, said.read_text()
                time.sleep(0.05)
            start(join, "--run-dir joined", {"server.example.org:7070": f"127.0.0.1:{port[1]}"})
            assert [process.wait(2 * WAIT_S) for process in processes] == [0, 0], said.read_text()
        finally:
            for process in processes:
                process.kill()
                process.wait()
    for folder in ("served", "joined"):
        (data,) = re.findall(r'id="data">(.*?)</script>', (tmp_path / folder / "report.html").read_text(), re.DOTALL)
        (run,) = json.loads(data)["runs"]
        assert run["notes"] == []
        assert run["summary"] == json.loads((tmp_path / folder / "summary.json").read_text())
        assert re.match(r"(About .* %|Nothing) (of the communication )?was hidden", run["verdict"].replace("\xa0", " "))
        assert len(run["rounds"]) == 3
        assert run["timeline"]["start"]
    served, joined = (json.loads((tmp_path / f / "summary.json").read_text()) for f in ("served", "joined"))
    assert served["digest"] == {"server": joined["digest"], "clients": [joined["digest"]]}
