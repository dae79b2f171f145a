"""A folder that is not whole is told from one that is, and the sentence says why."""

import json
import os

import pytest

from hf_ext.model_folder import MANIFEST, check_model_folder, manifest_problem, read_manifest, write_manifest
from hf_ext.testing import tiny_model


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_whole_folder_passes(folder):
    check_model_folder(folder)


def test_a_config_is_enough_where_no_weights_are_read(folder):
    (folder / "model.safetensors").unlink()
    check_model_folder(folder, weights=False)


def test_a_sharded_folder_passes_and_a_missing_shard_is_named(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="50KB")
    check_model_folder(tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(OSError, match=rf"{shard.name} is missing \(1 of \d+ weight files are\)"):
        check_model_folder(tmp_path)


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncate, "model.safetensors is truncated"),
        (lambda f: (f / "model.safetensors").write_bytes(b"<html>not found</html>"), "model.safetensors is truncated"),
        (lambda f: (f / "model.safetensors").unlink(), "no weight file"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text('{"model_type": '), "config.json is not readable JSON"),
        (lambda f: (f / "model.safetensors.incomplete").write_bytes(b""), "is an unfinished download"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "index.json is not readable JSON"),
    ],
)
def test_a_broken_folder_is_a_sentence(folder, harm, message):
    harm(folder)
    with pytest.raises(OSError, match=f"is not a complete model folder: .*{message}"):
        check_model_folder(folder)


def test_a_file_and_a_folder_that_is_not_there(folder):
    with pytest.raises(OSError, match="it is a file"):
        check_model_folder(folder / "config.json")
    with pytest.raises(OSError, match="it does not exist"):
        check_model_folder(folder / "nowhere")


def test_manifest_knows_its_files(folder):
    write_manifest(folder, {"file": "x"})
    assert manifest_problem(folder, thorough=True) is None
    assert read_manifest(folder)["source"] == {"file": "x"}
    assert set(read_manifest(folder)["files"]) == {path.name for path in folder.iterdir()} - {MANIFEST}


def test_manifest_sees_size_content_absence_and_itself(folder):
    write_manifest(folder, {})
    weights = folder / "model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1])
    assert "bytes instead of" in manifest_problem(folder)
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))  # the same size: the changed time asks for a look
    assert manifest_problem(folder) == "the checksum of model.safetensors is wrong"
    weights.write_bytes(original)  # touched but equal
    assert manifest_problem(folder) is None
    weights.unlink()
    assert manifest_problem(folder) == "model.safetensors is missing"
    (folder / MANIFEST).write_text("{")
    assert manifest_problem(folder) == f"{MANIFEST} is missing or unreadable"
    (folder / MANIFEST).write_text(json.dumps({"format": 0, "files": {}}))
    assert manifest_problem(folder) == f"{MANIFEST} is missing or unreadable"


def test_only_a_thorough_look_sees_a_change_that_kept_size_and_time(folder):
    write_manifest(folder, {})
    weights = folder / "model.safetensors"
    stat, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert manifest_problem(folder) is None
    assert manifest_problem(folder, thorough=True) == "the checksum of model.safetensors is wrong"
