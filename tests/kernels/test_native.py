"""A compiled source is built again when it, or a header beside it, has changed, and only then."""

import ctypes
from pathlib import Path

import pytest

from hf_ext.kernels import native

SOURCE = '#include "answer.h"\nint answer(void) { return ANSWER; }\n'


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Builds a source whose header defines a number; returns the library's path."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    (tmp_path / "answer.c").write_text(SOURCE)

    def build(number: int) -> Path:
        (tmp_path / "answer.h").write_text(f"#define ANSWER {number}\n")
        return native._built(tmp_path / "answer.c")

    return build


def test_a_changed_header_makes_another_library(answer):
    first, second = answer(41), answer(42)
    assert first != second
    assert (ctypes.CDLL(str(first)).answer(), ctypes.CDLL(str(second)).answer()) == (41, 42)


def test_what_is_unchanged_is_not_compiled_again(answer):
    first = answer(41)
    before = first.stat().st_mtime_ns
    assert answer(41) == first
    assert first.stat().st_mtime_ns == before


def test_an_error_of_the_compiler_is_its_first_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    (tmp_path / "broken.c").write_text('#error "no answer"\n')
    with pytest.raises(OSError, match="no answer"):
        native._built(tmp_path / "broken.c")
    assert not list((tmp_path / "built").rglob("*.so"))
