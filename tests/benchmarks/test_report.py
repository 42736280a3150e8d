"""One CSV, a report and plots drawn from it, and what interrupts them."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks_support import FixedCeilings, add, use_small_set

from benchmarks import cases, report, suite
from benchmarks.results import Row, read

ROOT = Path(__file__).parent.parent.parent


def run(folder, *arguments):
    return report.main(
        ["--set", "smoke", "--device", "cpu", "--seconds", "0", "--out", str(folder), *arguments]
    )


def test_csv_report_and_plots(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    use_small_set(monkeypatch, draws=True)
    assert run(tmp_path) == 0
    names = {path.name for path in tmp_path.iterdir()}
    kinds = ("speed_up_over_fair", "share_of_floor", "memory")
    pictures = {"time_by_batch.png", *(f"{kind}_linear_layer_norm.png" for kind in kinds)}
    assert names == {"results.csv", "report.md", *pictures}
    results = read(tmp_path / "results.csv")
    # Three batches; fair, liger and visproj; three modes.
    assert len(results.rows) == 27
    assert {row.status for row in results.rows} == {"ok", "left out"}
    assert results.notes["best memory"] == "256 MiB 10.0 GB/s"
    text = (tmp_path / "report.md").read_text()
    for note in ("device", "versions", "commit", "best memory", "best matmul"):
        assert f"- {note}: " in text
    for picture in pictures:
        assert f"({picture})" in text
    assert "| linear_layer_norm | liger | fp32 | Liger's kernels need a GPU |" in text
    assert "9 failed" not in capsys.readouterr().out

    # The same report and plots from the CSV alone.
    again = tmp_path / "again"
    assert run(again, "--from-csv", str(tmp_path / "results.csv")) == 0
    assert (again / "report.md").read_text() == text
    assert {path.name for path in again.iterdir()} == names


def test_whatever_is_not_measured_is_labelled(monkeypatch, tmp_path):
    use_small_set(monkeypatch, 1)
    run(tmp_path)
    heads = next(
        line
        for line in (tmp_path / "report.md").read_text().splitlines()
        if line.startswith("| shape |")
    )
    heads = [head.strip() for head in heads.strip("|").split("|")]
    labelled = [head for head in heads if head.endswith("(model)")]
    counted = [field.name for field in dataclasses.fields(Row) if "model" in field.name]
    # Smallest traffic and the floor itself are in the CSV only.
    assert len(labelled) == len(counted) - 2 == 3
    for word in ("GFLOP", "floor"):
        assert all(head in labelled for head in heads if word in head)


def test_a_failure_is_reported_without_a_time(monkeypatch, tmp_path):
    use_small_set(monkeypatch, 1)
    build = cases.TASKS["linear_layer_norm"].reference

    class Wrong(cases.nn.Sequential):
        def forward(self, x):
            return 1.01 * super().forward(x)

    add(monkeypatch, "linear_layer_norm", "wrong", lambda shape: Wrong(*build(shape)))
    assert run(tmp_path) == 1
    text = (tmp_path / "report.md").read_text()
    failed, measured = text.split("## Failed: no time")[1].split("## Measured")
    assert failed.count("| wrong | tiny-D128-B1-fp32 | ") == 3
    assert "output error 1" in failed
    assert "wrong" not in measured


def test_compare(monkeypatch, tmp_path, capsys):
    use_small_set(monkeypatch, 1)
    run(tmp_path)
    path = tmp_path / "results.csv"
    results = read(path)
    old = tmp_path / "old.csv"
    with report.Writer(old, results.notes) as writer:
        for row in results.rows:
            if row.implementation == "visproj":
                # In the old run the ratio was better than the best of the new one by 20 %.
                names = ("vs_fair", "vs_fair_p20", "vs_fair_p80")
                row = dataclasses.replace(row, **dict.fromkeys(names, 1.2 * row.vs_fair_p80))
            writer.write([row])
    capsys.readouterr()
    assert run(tmp_path / "new", "--from-csv", str(path), "--compare", str(old)) == 0
    out = capsys.readouterr().out
    told = [line for line in out.splitlines() if line.startswith("| linear_layer_norm")]
    assert [line.split(" | ")[1] for line in told] == ["visproj"] * 3
    assert all("| +20.0% |" in line for line in told)
    assert "own times differ by +0.0% (+0.0% to +0.0%)" in out
    assert "## Changes" in (tmp_path / "new" / "report.md").read_text()
    run(tmp_path / "same", "--from-csv", str(path), "--compare", str(path))
    assert "No row changed by more than its spread." in capsys.readouterr().out


def test_ctrl_c_keeps_what_was_measured(monkeypatch, tmp_path, capsys):
    use_small_set(monkeypatch)
    honest = suite.measured

    def interrupted(group, *arguments, **options):
        for number, rows in enumerate(honest(group, *arguments, **options)):
            if group.shape.batch == 2 and number == 1:
                raise KeyboardInterrupt
            yield rows

    monkeypatch.setattr(report.suite, "measured", interrupted)
    assert run(tmp_path) == 0
    results = read(tmp_path / "results.csv")
    # All three modes of the first group and one of the second.
    assert [row.batch for row in results.rows] == [1] * 9 + [2] * 3
    assert results.notes["stopped early"] == "1 of 3 groups"
    assert "stopped early: 1 of 3 groups" in (tmp_path / "report.md").read_text()
    assert "what was measured is kept" in capsys.readouterr().out


def test_a_group_that_cannot_run_does_not_stop_the_others(monkeypatch, tmp_path):
    use_small_set(monkeypatch)
    honest = suite.prepare

    def out_of_memory(group, device):
        if group.shape.batch == 1:
            raise MemoryError("no room for the oracle")
        return honest(group, device)

    monkeypatch.setattr(suite, "prepare", out_of_memory)
    run(tmp_path)
    results = read(tmp_path / "results.csv")
    assert [row.batch for row in results.rows] == [2] * 9 + [3] * 9
    name = "linear_layer_norm tiny-D128-B1-fp32 ended early"
    assert results.notes[name] == "MemoryError: no room for the oracle"


def test_time_limit(monkeypatch, tmp_path):
    use_small_set(monkeypatch)
    run(tmp_path, "--minutes", "1e-9")
    results = read(tmp_path / "results.csv")
    assert results.rows == []
    assert results.notes["stopped early"] == "0 of 3 groups"
    assert "Nothing was timed." in (tmp_path / "report.md").read_text()


def test_ctrl_c_while_ceilings_are_measured(monkeypatch, tmp_path):
    use_small_set(monkeypatch)

    def interrupted(self, dtypes):
        raise KeyboardInterrupt

    monkeypatch.setattr(FixedCeilings, "measure", interrupted)
    assert run(tmp_path) == 0
    assert read(tmp_path / "results.csv").notes["stopped early"] == "0 of 3 groups"


def test_a_share_above_100_percent_is_no_bound(monkeypatch, tmp_path):
    use_small_set(monkeypatch, 1)
    run(tmp_path)
    path = tmp_path / "results.csv"
    results = read(path)
    timed = [row for row in results.rows if row.time_us]
    with report.Writer(path, results.notes) as writer:
        for row in results.rows:
            share = row.time_us and (1.5 if row == timed[0] else 0.5)
            writer.write([dataclasses.replace(row, share_of_model_floor=share)])
    run(tmp_path / "again", "--from-csv", str(path))
    text = (tmp_path / "again" / "report.md").read_text()
    assert f"1 of {len(timed)} rows are faster than their floor (marked *)" in text
    assert text.count("| 150%* |") == 1
    assert text.count("| 50% |") == len(timed) - 1


def test_no_rows_in_common(monkeypatch, tmp_path, capsys):
    use_small_set(monkeypatch, 1)
    run(tmp_path)
    with report.Writer(tmp_path / "old.csv", {}) as writer:
        writer.write([])
    capsys.readouterr()
    path = str(tmp_path / "results.csv")
    run(tmp_path / "new", "--from-csv", path, "--compare", str(tmp_path / "old.csv"))
    out = capsys.readouterr().out
    assert "Compared with commit unknown on unknown, another device than" in out
    assert "0 rows were timed in both runs." in out
    assert "No row changed" not in out


def test_tables_keep_their_columns():
    assert report.table(("a",), [("x | y",)]).splitlines()[-1] == "| x \\| y |"


def test_without_rich_and_matplotlib(monkeypatch, tmp_path, capsys):
    use_small_set(monkeypatch, 1, draws=True)
    for name in ("matplotlib", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run(tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "report.md"}
    out = capsys.readouterr().out
    assert "1/1 linear_layer_norm tiny-D128-B1-fp32" in out
    assert "no plots: " in out


def test_measuring_needs_no_optional_package():
    """What a bare machine with a GPU must import."""
    code = (
        "import sys\n"
        "for name in ('typer', 'rich', 'matplotlib', 'transformers', 'hypothesis'):\n"
        "    sys.modules[name] = None\n"
        "import benchmarks.report, benchmarks.plots"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--all"], "unknown option --all"),
        (["--out"], "--out needs a value"),
        (["--tests", "nowhere"], "no tests at nowhere"),
        (["--set", "all"], "argument --set: invalid choice: 'all'"),
    ],
)
def test_script_refuses_bad_options(arguments, message, tmp_path):
    """Before it installs, tests or writes anything."""
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu.sh", "--out", out, *arguments],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not out.exists()


@pytest.mark.slow
def test_smoke_set(tmp_path):
    """The whole smoke set, compiled peers included."""
    assert run(tmp_path, "--seconds", "0.3") == 0
    rows = read(tmp_path / "results.csv").rows
    assert {row.task for row in rows if row.vs_fair} == set(cases.TASKS)
    assert {row.implementation for row in rows if row.time_us} >= {"upstream", "fair", "folded"}
