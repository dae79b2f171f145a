"""``hf-ext bench cache`` end to end."""

import pytest

TEXT = "The quick brown fox jumps over the lazy dog. " * 30


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


SMALL = ("--tokens", 200, "--score", 8, "--windows", 2)


def test_prints_a_row_for_each_cache(hf_ext_command, folder, text):
    caches = ("full", "decoquant:bits=2,first_block=32", '[{"type": "snapkv", "budget": 0.5}, {"type": "decoquant"}]')
    words = [word for cache in caches for word in ("--cache", cache)]
    status, out, _ = hf_ext_command("bench", "cache", folder, "--text", text, *SMALL, *words)
    assert status == 0
    rows = [line for line in out.splitlines() if "%" in line]
    assert len(rows) == 3
    assert "100.0%" in rows[0]
    shares = [float(line.split("%")[0].split()[-1]) for line in rows]
    assert shares[0] > shares[1] and shares[0] > shares[2]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [(("--tokens", 1), "--tokens must be at least 2"), (("--windows", 90), "90 windows of 208 need more")],
)
def test_sizes_that_do_not_fit_are_refused(hf_ext_command, folder, text, words, sentence):
    status, _, error = hf_ext_command("bench", "cache", folder, "--text", text, *SMALL, *words)
    assert status == 1
    assert sentence in error
