"""Cache options, text files and byte counts as the commands read and write them."""

import pytest

from hf_ext import SinkWindowConfig, SirLLMConfig
from hf_ext.cli.common import human_bytes, human_count, parse_cache, read_text


def test_caches_are_names_options_or_json():
    assert parse_cache("full") is None
    assert parse_cache("sirllm") == (SirLLMConfig(),)
    assert parse_cache("sirllm:memory_size=100, decay=0.5,auto_turn=false,positions=original") == (
        SirLLMConfig(memory_size=100, decay=0.5, auto_turn=False, positions="original"),
    )
    assert parse_cache('{"type": "sink_window", "sink_size": 2}') == (SinkWindowConfig(sink_size=2),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sirlm", "'sirlm' is no kind of cache; allowed: "),
        ("sirllm:memory_size", "written name=value with commas between them, got 'memory_size'"),
        ("sirllm:memory=3", "SirLLMConfig has no option 'memory'"),
        ("sirllm:decay=2", "decay must be above 0 and at most 1, got 2"),
        ("sirllm:memory_size=many", "memory_size must be"),
        ("{", "--cache is not readable JSON"),
    ],
)
def test_wrong_caches_are_sentences(text, message):
    with pytest.raises(ValueError, match=message):
        parse_cache(text)


def test_text_files(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("Größe".encode("latin-1"))
    assert read_text(str(path), "latin-1") == "Größe"
    with pytest.raises(ValueError, match=r"text is not utf-8 text: byte 2 is 0xf6. .*--encoding latin-1"):
        read_text(str(path))
    with pytest.raises(ValueError, match="there is no text encoding 'utf-9'"):
        read_text(str(path), "utf-9")
    with pytest.raises(OSError, match="No such file"):
        read_text(str(tmp_path / "nothing"))


def test_numbers_for_people():
    assert [human_bytes(n) for n in (0, 1023, 46080, 2**30 * 2048)] == ["0 B", "1023 B", "45.0 KiB", "2048.0 GiB"]
    assert [human_count(n) for n in (812, 134515008, 7 * 10**9)] == ["812", "134.5 M", "7.0 B"]
