"""The CSV keeps everything; a change is told when it is one."""

import dataclasses
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks_support import CPU

from benchmarks.measure import paired_samples, ratios, spread
from benchmarks.results import Results, Row, Writer, compare, machine_notes, read
from visproj.errors import InputError


def row(implementation="visproj", samples=(100.0, 101.0, 99.0, 100.0, 102.0), **values):
    time = spread(samples)
    place = ("perceiver", implementation, "forward", "tiny", 256, 65, 512, 4, "fp32")
    return replace(
        Row(*place), time_us=time.median, time_us_p20=time.p20, time_us_p80=time.p80, **values
    )


def slowed(results, factor, implementation):
    """The same results with an implementation's times multiplied."""
    times = ("time_us", "time_us_p20", "time_us_p80")
    return Results(
        results.notes,
        [
            replace(r, **{name: factor * getattr(r, name) for name in times})
            if r.implementation == implementation
            else r
            for r in results.rows
        ],
    )


def test_round_trip(tmp_path):
    untimed = dict.fromkeys(("time_us", "time_us_p20", "time_us_p80"))
    failed = replace(
        row(), status="failed", reason="output, error 1, of 2", output_error=float("inf"), **untimed
    )
    rows = [row("fair", launches=3, peak_mib=1.5), failed]
    path = tmp_path / "results.csv"
    with Writer(path, {"device": "a: machine"}) as writer:
        writer.write(rows)
        assert len(path.read_text().splitlines()) == 4  # on the disk before the file is closed
        writer.note("stopped early", "1 of 2 groups")
    results = read(path)
    assert results.rows == rows
    assert results.notes == {"device": "a: machine", "stopped early": "1 of 2 groups"}


def damaged(column, text):
    """A file whose only row, in line 3, has another value in a column."""

    def change(lines):
        cells = lines[2].split(",")
        cells[lines[1].split(",").index(column)] = text
        return [*lines[:2], ",".join(cells)]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: ["a,b", "1,2"], "is not a benchmark result"),
        (lambda lines: [], "is not a benchmark result"),
        (
            lambda lines: [lines[1].removesuffix(",share_of_model_floor")],
            "or is one of another version",
        ),
        (lambda lines: [*lines, lines[1]], r"is damaged in line 4: invalid literal for int"),
        (lambda lines: [*lines[:2], lines[2][:60]], r"is damaged in line 3: \d+ values instead"),
        (damaged("batch", ""), "is damaged in line 3: invalid literal for int"),
        (damaged("peak_mib", "much"), "could not convert string to float: 'much'"),
        (damaged("time_us", "nan"), "line 3: time_us is nan"),
        (damaged("time_us", "-1"), "line 3: time_us is -1"),
        (damaged("time_us", ""), "status is 'ok' and time_us None"),
        (damaged("time_us", "7"), "time_us is 7.0 between 99.8 and 101.2"),
        (damaged("vs_fair", "2"), "vs_fair is 2.0 between None and None"),
        (damaged("share_of_model_floor", "inf"), "share_of_model_floor is inf"),
        (damaged("status", "fine"), "status is 'fine'"),
    ],
)
def test_damaged_file(tmp_path, change, message):
    path = tmp_path / "results.csv"
    with Writer(path, {"device": "a machine"}) as writer:
        writer.write([row()])
    assert read(path).rows == [row()]
    path.write_text("\n".join(change(path.read_text().splitlines())))
    with pytest.raises(InputError, match=message) as raised:
        read(path)
    assert str(path) in str(raised.value)


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "results.csv"
    path.write_bytes(b"\x89PNG\xff")
    with pytest.raises(InputError, match="it is not text"):
        read(path)
    with pytest.raises(FileNotFoundError, match="no file nowhere"):
        read(Path("nowhere.csv"))


def test_spread():
    found = spread([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    # Sorted 1 to 6: the percentiles lie a fifth of the way from first to last.
    assert dataclasses.astuple(found) == (3.5, 2.0, 5.0)
    assert dataclasses.astuple(spread([7.0])) == (7.0, 7.0, 7.0)
    # Pair by pair, so a machine that becomes slower does not count.
    assert dataclasses.astuple(ratios([2.0, 4.0, 8.0], [1.0, 2.0, 4.0])) == (2.0, 2.0, 2.0)


def test_runs_alternate():
    order = []
    calls = {
        name: lambda i, name=name: order.append((name, i)) or time.sleep(3e-3) for name in "AB"
    }
    samples = paired_samples(calls, CPU, seconds=0, min_rounds=3)
    # Two calls each that are not counted, then in turn; 3 ms are longer than the least sample.
    assert "".join(name for name, _ in order) == "AABB" + "AB" * 3
    assert [i for name, i in order if name == "A"] == [0, 0, 0, 1, 2]
    assert [len(values) for values in samples.values()] == [3, 3]
    assert min(samples["A"]) >= 3e-3


def test_a_slow_down_of_20_percent_is_seen():
    old = Results({}, [row("fair"), row("visproj"), row("folded")])
    (first, *others) = compare(old, slowed(old, 1.2, "visproj"))
    assert first.new.implementation == "visproj"
    assert first.change == pytest.approx(0.2)
    # Spreads: 99.8 to 101.2 before, 119.76 to 121.44 after.
    assert first.beyond == pytest.approx(119.76 / 101.2 - 1)
    assert [change.beyond for change in others] == [0, 0]
    (*_, last) = compare(slowed(old, 1.2, "visproj"), old)
    assert last.change == pytest.approx(1 / 1.2 - 1)
    assert last.beyond == pytest.approx(101.2 / 119.76 - 1)


def test_a_busier_machine_is_no_slow_down():
    def results(busy, own):
        fair, ours = [busy * 100.0] * 5, [busy * own * t for t in (99.0, 100.0, 101.0) * 3]
        ratio = ratios([busy * 100.0] * 9, ours)
        spread_of = {"vs_fair": ratio.median, "vs_fair_p20": ratio.p20, "vs_fair_p80": ratio.p80}
        return Results({}, [row("fair", fair), row("visproj", ours, **spread_of)])

    yardstick, change = compare(results(1, 0.5), results(3, 0.5))
    assert (change.time, change.change, change.beyond) == pytest.approx((2, 0, 0))
    assert (yardstick.time, yardstick.change, yardstick.beyond) == (2, None, 0)
    change, _ = compare(results(1, 0.5), results(3, 0.6))
    assert (change.time, change.change) == pytest.approx((2.6, 0.2))
    # The spreads of the ratios reach 1 % to either side at most.
    assert 0.17 < change.beyond < 0.2


def test_a_slowed_callable_is_seen():
    """50 ms against 60: a sleep takes a little longer than asked, by the same for both."""

    def results(milliseconds):
        calls = {"visproj": lambda i: time.sleep(milliseconds / 1e3)}
        return Results({}, [row(samples=paired_samples(calls, CPU, 0, 15)["visproj"])])

    (change,) = compare(results(50), results(60))
    # Waking up late on a busy machine is what the tolerance is for.
    assert change.change == pytest.approx(0.2, abs=0.08)
    assert change.beyond > 0


def test_no_change_within_the_spread():
    noise = random.Random(0)

    def run():
        return [row(f"{i}", [noise.gauss(100, 10) for _ in range(15)]) for i in range(200)]

    changes = compare(Results({}, run()), Results({}, run()))
    assert len(changes) == 200
    # Medians differ by more than 3 % in many pairs; the spreads are 10 % wide and overlap.
    assert sum(abs(change.change) > 0.03 for change in changes) > 50
    assert [change for change in changes if change.beyond] == []


def test_tiny_changes_are_not_told():
    old = Results({}, [row(samples=[100.0] * 5)])
    (change,) = compare(old, slowed(old, 1.04, "visproj"))
    assert change.beyond == 0


def test_only_rows_of_both_runs_are_compared():
    timed, failed = row(), replace(row("folded"), time_us=None, status="failed")
    assert compare(Results({}, [timed]), Results({}, [failed, row("new")])) == []


def test_notes_name_device_versions_and_commit():
    notes = machine_notes(CPU)
    assert {"device", "versions", "python", "commit"} <= set(notes)
    assert "threads" in notes["device"]
    assert "torch 2." in notes["versions"]
