"""The benchmarks: that they run, what they write and compare. How fast anything is, is not tested here."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import codec_statement as statement
import numpy as np
import pytest
import torch
from codec_cases import DTYPES, changes, to_body, to_bytes, to_numpy, to_torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import cli, eager, kernels, links, lora, machine, namespaces, overlap, page, scale
from bench.result import Comparison, compare, comparison_table, read, unlike_settings
from parablock_rt import codec
from parablock_rt.errors import ConfigError

ROOT = Path(__file__).parent.parent
CODEC = ("codec", "--params", "4096", "--repetitions", "1", "--threads", "1")


def bench(folder: Path, *arguments: object) -> tuple[int, dict[str, Any]]:
    """Runs one benchmark; its exit code and its result."""
    name = str(arguments[0])
    code = cli.main([*map(str, arguments), "--out", str(folder)])
    return code, json.loads((folder / f"{name}.json").read_text())


def test_a_result_says_what_it_depends_on_and_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    code, result = bench(tmp_path, *CODEC)
    assert code == 0
    assert result["benchmark"] == "codec"
    assert result["machine"].keys() >= {"cpu", "cores", "instruction_set", "release", "torch", "python", "revision"}
    assert result["settings"] == {"params": 4096, "repetitions": 1, "threads": 1}
    assert {row["case"] for row in result["rows"]} >= {"encode fp32 int8", "apply bf16 int4", "fold int8"}
    assert (tmp_path / "codec.png").read_bytes().startswith(b"\x89PNG")
    assert "encode fp32 int8" in capsys.readouterr().out


def test_a_result_names_no_folder_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        sys, "argv", ["parablock", "bench", "codec", "--out", str(tmp_path / "here"), "--params", "128"]
    )
    assert machine.machine()["command"] == "parablock bench codec --out here --params 128"


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(DTYPES), st.sampled_from(["int8", "int4"]))
def test_what_torch_is_timed_with_gives_the_codecs_bytes(data: st.DataObject, dtype: str, format: str) -> None:
    """Also for NaNs, infinities, subnormals and zeros: so that equal work is compared."""
    now, ref, before = data.draw(changes(dtype, dtype))
    body, rest, _ = statement.encode(now, ref, before, format)
    residual = torch.zeros(ref.size) if before is None else to_torch(before)
    out = torch.empty(len(body), dtype=torch.uint8)
    assert to_bytes(eager.encode(to_torch(now), to_torch(ref), residual, format, out)) == body
    np.testing.assert_array_equal(to_numpy(residual), rest)
    decoded = statement.decode(body, ref.size, format)
    np.testing.assert_array_equal(to_numpy(eager.decode(to_body(body), ref.size, format)), decoded)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_what_torch_is_timed_with_adds_up_to_the_accumulators_bits(format: str) -> None:
    numel = 128 * 20
    hi, lo = (torch.zeros(numel, dtype=torch.int64) for _ in range(2))
    expected = codec.Accumulator(numel)
    for seed, weight in enumerate((0.1, 1 / 3, 1e4, 4095.7)):
        change = torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed - 5)
        body = codec.encode(change, torch.zeros(numel), format=format).body
        expected.add(body, weight, format)
        eager.accumulate(hi, lo, body, weight, format)
    assert torch.equal(hi, expected._halves[0])
    assert torch.equal(lo, expected._halves[1])


@pytest.mark.parametrize(("factor", "code"), [(1e6, 1), (1e-6, 0)])
def test_a_result_worse_than_the_threshold_ends_with_1(tmp_path: Path, factor: float, code: int) -> None:
    _, older = bench(tmp_path, *CODEC)
    for row in older["rows"]:
        row["mparams_per_s"] *= factor
    (tmp_path / "older.json").write_text(json.dumps(older))
    assert bench(tmp_path, *CODEC, "--compare", tmp_path / "older.json")[0] == code


def test_what_the_older_result_has_is_compared_the_worst_first_and_what_is_gone_is_the_worst() -> None:
    found = compare({"a": 2.0, "b": 4.0, "gone": 1.0}, {"a": 1.0, "b": 4.0, "new": 1.0})
    assert found == [Comparison("gone", 1.0, None), Comparison("a", 2.0, 1.0), Comparison("b", 4.0, 4.0)]
    assert [each.ratio for each in found] == [0.0, 0.5, 1.0]
    (names, *_) = comparison_table(found, 0.9).columns
    assert list(names.cells) == ["gone (not in the new result)", "a", "b"]
    with pytest.raises(ConfigError, match="no metric in common"):
        compare({"a": 1.0}, {"b": 1.0})


@pytest.mark.parametrize(
    ("old", "new", "ratio"), [(0.0, 0.0, 1.0), (0.0, 0.5, math.inf), (-0.2, -0.5, 0.0), (-0.5, -0.2, math.inf)]
)
def test_what_got_worse_never_looks_better_where_there_is_no_ratio(old: float, new: float, ratio: float) -> None:
    assert Comparison("a", old, new).ratio == ratio


def test_a_kernel_that_fails_now_is_below_the_threshold() -> None:
    row = {"params": 100, "case": "encode", "by": "kernel", "gb_per_s": 1000.0}
    older, newer = (
        {"rows": [row, row | {"case": "apply"}]},
        {"rows": [row | {"gb_per_s": None}, row | {"case": "apply"}]},
    )
    assert compare(kernels.metrics(older), kernels.metrics(newer))[0] == Comparison("encode 100", 1000.0, None)


def test_results_with_other_settings_do_not_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench(tmp_path / "older", *CODEC)
    assert bench(tmp_path, *CODEC, "--repetitions", "2", "--compare", tmp_path / "older", "--threshold", "0")[0] == 0
    assert bench(tmp_path, *CODEC, "--params", "2048", "--compare", tmp_path / "older", "--threshold", "0")[0] == 1
    assert "has other settings (params: 4096 instead of 2048)" in capsys.readouterr().out


def test_a_setting_that_one_release_did_not_know_does_not_stand_in_the_way() -> None:
    older, newer = {"settings": {"rates": ["1x"], "gone": 1}}, {"settings": {"rates": ("1x",), "new": 2}}
    assert unlike_settings(older, newer) == []
    assert unlike_settings({"settings": {"rates": ["10mbit"]}}, newer) == ["rates: ['10mbit'] instead of ['1x']"]


def test_a_revision_is_that_of_this_code_and_not_of_a_checkout_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site-packages" / "machine.py"
    installed.parent.mkdir()
    installed.write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "somebody else's"], check=True)
    monkeypatch.setattr(machine, "__file__", str(installed))
    assert machine.machine()["revision"] == "unknown"
    subprocess.run([*git, "add", "."], check=True)
    assert str(machine.machine()["revision"]).endswith("-dirty")


def test_a_copy_without_git_has_the_revision_that_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    monkeypatch.setenv("PARABLOCK_REVISION", "abc")
    assert machine.machine()["revision"] == "abc"


@pytest.mark.parametrize("content", ['{"benchmark": "scale", "rows": []}', "[]", "{", '{"benchmark": "codec"}'])
def test_what_is_no_older_result_is_a_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "codec.json").write_text(content)
    with pytest.raises(ConfigError, match=r"older result|expected a result of `parablock bench codec`"):
        read(tmp_path, "codec")


def test_the_installed_program_has_the_benchmarks() -> None:
    program = [sys.executable, "-m", "parablock_rt", "bench", "scale", "--help"]
    shown = subprocess.run(program, capture_output=True, text=True, timeout=300, check=True, cwd="/")
    assert "--clients" in shown.stdout
    assert "usage: parablock bench scale" in shown.stdout


def test_the_overlap_sweep_fills_every_cell_with_ideal_round_stages_and_break_even(tmp_path: Path) -> None:
    flags = "--model tiny --rounds 5 --rates 40mbit 80mbit --local-steps 1 2 --formats int8 --staleness 1 --delay 1ms"
    code, result = bench(tmp_path, "overlap", *flags.split(), "--no-interference", "--no-baselines")
    assert code == 0
    cells = [(row["rate_mbit"], row["local_steps"], row["staleness"]) for row in result["rows"]]
    assert cells == [(40, 1, 0), (40, 1, 1), (40, 2, 1), (80, 1, 0), (80, 1, 1), (80, 2, 1)]
    for row in result["rows"]:
        assert row["ideal_s"] >= row["communication_s"] * (1 - 1e-9)  # a mean of equal numbers may be rounded down
        assert row["communication_s"] > 0
        assert row["round_over_ideal"] == pytest.approx(row["round_s"] / row["ideal_s"])
        hidden = 1 - row["exposed_s"] / row["communication_s"] if row["staleness"] else 0.0
        assert row["overlap_efficiency"] == pytest.approx(hidden)
        assert row["stages"].keys() >= {"compute", "encode", "send", "fold", "wait", "receive", "apply"}
        assert row["blocks"] == 6
    assert len(overlap.metrics(result)) == 6 + 4


@pytest.mark.parametrize(("hidden", "over", "holds"), [(0.95, 1.03, ["yes", "yes"]), (0.949, 1.031, ["no", "no"])])
def test_the_sweep_s_worst_cells_say_whether_it_holds_what_is_promised(
    hidden: float, over: float, holds: list[str]
) -> None:
    common = {"rate_mbit": 1.0, "local_steps": 1, "format": "int8", "blocks": 1, "compute_s": 1.0, "round_s": 1.0}
    cells = [(1, 0.5, hidden, 1.0), (1, 2.0, 0.1, over), (1, 1.0, 1.0, 0.7), (0, 0.5, 0.0, 1.5)]
    names = ("staleness", "communication_s", "overlap_efficiency", "round_over_ideal")
    rows = [common | {"exposed_s": 0.0} | dict(zip(names, cell, strict=True)) for cell in cells]
    _, statements, *_ = overlap.tables({"rows": rows})
    assert list(statements.columns[1].cells) == holds
    assert list(statements.columns[2].cells) == [f"{hidden:.1%}", f"{over:.3f}"]


def test_a_rate_that_is_none_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match="rounds must be at least 4; found 2"):
        cli.main(["overlap", "--model", "tiny", "--rounds", "2"])


def test_scale_counts_every_byte_and_states_how_memory_and_time_grow(tmp_path: Path) -> None:
    flags = "--clients 3 1 --params 65536 --rounds 3 --repetitions 2"
    code, result = bench(tmp_path, "scale", *flags.split())
    assert code == 0
    body = 65536 + 65536 // 128 * 2
    assert [(row["clients"], row["bytes_a_round"]) for row in result["rows"]] == [(1, 2 * body), (3, 6 * body)]
    assert all(isinstance(row["clients"], int) for row in result["rows"])
    assert all(row["round_s"] > 0 and row["peak_memory_mib"] > 0 for row in result["rows"])
    assert result["growth"].keys() >= {"memory_bounded", "time_no_faster_than_bytes"}


def test_the_fan_in_has_every_round_of_every_link_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "FAN_IN", (3, 2))
    for row, count in zip(links.fan_in_case(128, rounds=8, repetitions=1), (3, 2), strict=True):
        assert (row["links"], row["rounds"]) == (count, 8)
        assert row["upload_mib"] * 2**20 == 128 * 128 + 128 * 2
        assert len(row["seconds"]) == 8
        assert min(row["seconds"]) > 0


def test_growth_is_judged_by_the_figures() -> None:
    def row(clients: int, seconds: float, memory: float) -> dict[str, Any]:
        return {"clients": clients, "bytes_a_round": 100 * clients, "round_s": seconds, "peak_memory_mib": memory}

    good = scale.growth([row(1, 1.0, 70.0), row(16, 15.9, 100.0), row(64, 63.0, 104.0)])
    assert (good["memory_bounded"], good["time_no_faster_than_bytes"]) == (True, True)
    bad = scale.growth([row(16, 1.0, 100.0), row(64, 16.0, 106.0)])
    assert (bad["memory_bounded"], bad["time_no_faster_than_bytes"]) == (False, False)
    assert bad["time_exponents"] == [pytest.approx(2.0)]


def test_a_fresh_adapter_changes_nothing_and_alone_is_trained() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    x = torch.randn(4, 6)
    before = model(x)
    lora.adapt(model, rank=2)
    assert torch.equal(model(x), before)
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"0.down": (2, 6), "0.up": (5, 2), "2.down": (2, 5), "2.up": (3, 2)}
    model(x).square().sum().backward()
    assert model[0].up.grad.abs().sum() > 0


def test_a_shaped_link_says_why_it_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces.os, "geteuid", lambda: 0)
    monkeypatch.setattr(namespaces.shutil, "which", lambda name: None)
    assert namespaces.why_not() == "ip (Debian: iproute2) is not installed"


def test_every_page_with_figures_is_up_to_date() -> None:
    pages = page.pages()
    assert {"benchmarks.md", "transport.md"} <= {path.name for path in pages}
    for path, text in pages.items():
        assert path.read_text() == text, "run `python -m bench.page`"


def test_the_page_names_what_was_not_measured(tmp_path: Path) -> None:
    assert page.page(tmp_path).count("Not measured yet") == len(cli.NAMES)
