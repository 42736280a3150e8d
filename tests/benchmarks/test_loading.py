"""The benchmark of data loading, with a few photographs."""

import pytest

from benchmarks import loading


@pytest.mark.slow
def test_every_form_is_loaded(capsys):
    assert loading.main(["--images", "32", "--workers", "1", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    for way in ("plain loop", *loading.FORMS):
        assert way in out


def test_the_same_photographs_in_every_form(tmp_path):
    named = loading.write_forms(tmp_path, 4)
    assert set(named) == set(loading.FORMS)
    for form in ("captions", "llava", "imagefolder"):
        files = sorted((tmp_path / form).glob("*.jpg"))
        assert [file.read_bytes() for file in files] == [
            file.read_bytes() for file in sorted((tmp_path / "captions").glob("*.jpg"))
        ]
        assert len(files) == 4
    assert len(list(tmp_path.glob("shard-*.tar"))) == 2
