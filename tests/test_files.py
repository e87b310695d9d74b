"""Files: whole or not at all, bounded, and errors of one sentence that name file, line and mend."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradmm import files
from gradmm.errors import UserError, first_line, require
from gradmm.seeds import generator, stream


def test_json_and_json_lines_come_back(tmp_path):
    value = {"text": "naïve “quotes” 日本\u2028", "list": [1, 2.5, None, True]}
    assert files.read_json(files.write_json(tmp_path / "deep" / "a.json", value)) == value
    assert files.read_json_lines(files.write_json_lines(tmp_path / "a.jsonl", [value, {}, value])) == [value, {}, value]
    assert files.read_json_lines(files.write_json_lines(tmp_path / "none.jsonl", [])) == []


@settings(max_examples=30)
@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.booleans() | st.none()), max_size=4))
def test_any_rows_come_back_one_a_line(tmp_path_factory, rows):
    path = files.write_json_lines(tmp_path_factory.getbasetemp() / "rows.jsonl", rows)
    assert files.read_json_lines(path) == rows
    assert path.read_bytes().count(b"\n") == len(rows)


def test_tensors_and_their_metadata_come_back(tmp_path):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.arange(3), "none": torch.empty(0, 2)}
    path = files.write_tensors(tmp_path / "t.safetensors", tensors, {"step": "7"})
    found, metadata = files.read_tensors(path)
    assert metadata == {"step": "7"}
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_equal_values_are_equal_bytes_and_readable_by_others(tmp_path):
    one, two = (files.write_json(tmp_path / name, {"b": 1, "a": [0.1]}) for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert one.stat().st_mode & 0o777 == 0o666 & ~files.UMASK


def test_numbers_that_json_cannot_hold_are_refused_before_the_old_file_goes(tmp_path):
    path = files.write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError):
        files.write_json(path, float("nan"))
    assert files.read_json(path) == 1


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), KeyError("a bug")]
)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = files.write_text(tmp_path / "a.txt", "old")

    def half(temporary: Path):
        temporary.write_text("ne")
        raise error

    with pytest.raises(UserError if isinstance(error, OSError) else type(error)):
        files.replace_file(path, half)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("room", "name", "error"),
    [
        (os, "replace", OSError(errno.EIO, "Input/output error")),
        (files.tempfile, "mkstemp", PermissionError(errno.EACCES, "Permission denied")),
        (files, "save_file", files.SafetensorError("I/O error: No space left on device (os error 28)")),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_a_file_that_cannot_be_written_is_one_sentence_and_the_old_one_stays(tmp_path, monkeypatch, room, name, error):
    tensors = files.write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)}, {}).read_bytes()

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(room, name, fail)
    said = str(error).removeprefix("I/O error: ").split("] ")[-1].split(" (")[0]
    message = f"a.safetensors could not be written .*{said}.*: free space or choose another"
    with pytest.raises(UserError, match=message):
        files.write_tensors(tmp_path / "a.safetensors", {}, {})
    assert os.listdir(tmp_path) == ["a.safetensors"] and (tmp_path / "a.safetensors").read_bytes() == tensors


def test_a_file_where_a_folder_is_needed_is_one_sentence(tmp_path):
    files.write_text(tmp_path / "taken", "")
    with pytest.raises(UserError, match="could not be written"):
        files.write_json(tmp_path / "taken" / "a.json", 1)


def test_words_of_yaml_are_words_but_true_and_false(tmp_path):
    words = "[no, yes, on, off, No, YES, y, n]"
    (tmp_path / "a.yaml").write_text(f"labels: {words}\nlanguage: no\nflags: [true, True, FALSE, false]\nnone: null\n")
    found = files.read_yaml(tmp_path / "a.yaml")
    assert found["labels"] == words.strip("[]").split(", ") and found["language"] == "no"
    assert found["flags"] == [True, True, False, False] and found["none"] is None


@pytest.mark.parametrize("length", [0, 4, 40, -1])
def test_a_cut_tensor_file_is_refused_by_name(tmp_path, length):
    path = files.write_tensors(tmp_path / "cut.safetensors", {"a": torch.randn(30)}, {})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match="cut.safetensors is no whole safetensors file"):
        files.read_tensors(path)


def test_only_unfinished_work_may_be_removed(tmp_path):
    (tmp_path / "tickets.csv").write_text("mine")
    with pytest.raises(UserError, match=r"\): give a file that Release.save or a run wrote$"):
        files.read_tensors(tmp_path / "tickets.csv")
    with pytest.raises(UserError, match=r"\): remove it and run again$"):
        files.read_tensors(tmp_path / "tickets.csv", "remove it and run again")


def test_an_absent_tensor_file_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="absent.safetensors"):
        files.read_tensors(tmp_path / "absent.safetensors")


def test_the_size_limit_is_checked_before_reading(tmp_path):
    path = tmp_path / "long.json"
    path.write_text(json.dumps("x" * 50))
    assert files.read_json(path, limit=52) == "x" * 50
    with pytest.raises(UserError, match="long.json has 52 bytes, more than the 51 allowed: split it"):
        files.read_json(path, limit=51)
    with open(tmp_path / "sparse.yaml", "wb") as file:
        file.truncate(files.MAX_SETTINGS_BYTES + 1)
    with pytest.raises(UserError, match="1048577 bytes, more than the 1048576"):
        files.read_yaml(tmp_path / "sparse.yaml")


def test_windows_files_read_as_others(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n\r\n')
    assert files.read_json_lines(tmp_path / "a.jsonl") == [{"a": 1}, {"a": 2}]


BROKEN = {
    "a syntax error": (files.read_json_lines, b'{"a": 1}\n{"a": 2\n', "line 2 is not JSON"),
    "a blank line between": (files.read_json_lines, b"1\n\n3\n", "line 2 is not JSON"),
    "an error in indented JSON": (files.read_json, b'{\n"a": 1,\n}', "line 3 is not JSON"),
    "an empty JSON file": (files.read_json, b"", "line 1 is not JSON"),
    "a number of many digits": (files.read_json, b"1" * 5000, "line 1 is not JSON"),
    "brackets without end": (files.read_json, b"[" * 100_000, "line 1 is not JSON"),
    "latin-1": (files.read_json_lines, '"caf\xe9"'.encode("latin-1"), "is not UTF-8 text .byte 4.: save it as UTF-8"),
    "a YAML error": (files.read_yaml, b"a: 1\nb: ]\nc: 2\n", "line 2 is not YAML"),
    "YAML that makes objects": (
        files.read_yaml,
        b"a: 1\nb: !!python/object/apply:os.getcwd []\n",
        "line 2 is not YAML",
    ),
    "a date that is none": (files.read_yaml, b"a: 2020-13-45\n", "is not YAML"),
    "a control character": (files.read_yaml, b"a: \x00\n", "is not YAML"),
    "YAML without end": (files.read_yaml, b"[" * 800, "is not YAML"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named_with_its_line(tmp_path, case):
    read, content, words = BROKEN[case]
    path = tmp_path / "broken"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 400 + len(str(path))


@pytest.mark.parametrize("read", [files.read_json, files.read_json_lines, files.read_yaml])
def test_no_file_and_a_folder_are_refused_by_name(tmp_path, read):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match=f"{path.name} does not exist: give the path"):
            read(path)


def test_a_file_that_may_not_be_read_is_one_sentence(tmp_path, monkeypatch):
    path = files.write_text(tmp_path / "a", "")

    def refuse(*args, **named):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(UserError, match="a could not be read .Permission denied."):
        files.read_text(path)


def test_errors_of_others_become_one_line():
    assert first_line(ValueError("\nfirst\nsecond")) == "ValueError: first"
    assert first_line(KeyError()) == "KeyError"
    require(True, "never")
    with pytest.raises(ValueError, match="as it is"):
        require(False, "as it is")


def test_named_draws_depend_on_the_name_and_not_on_the_order():
    names = [(seed, purpose, unit) for seed in (0, 1) for purpose in ("init", "noise") for unit in (0, 1, "a")]
    forwards = [torch.randn(4, generator=generator(*name)) for name in names]
    backwards = [torch.randn(4, generator=generator(*name)) for name in reversed(names)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    assert len({stream(*name) for name in names}) == len(names)
    assert all(0 <= stream(*name) < 2**63 for name in names)


def test_tensors_are_read_into_aligned_memory(tmp_path):
    held = {"a": torch.ones(3), "b": torch.ones(64, 64)}
    for header in ("x", "xx", "xxx" * 7):  # of different lengths, so that tensors lie at different places of the file
        found, _ = files.read_tensors(files.write_tensors(tmp_path / "t.safetensors", held, {"header": header}))
        assert not [name for name, tensor in found.items() if tensor.data_ptr() % 64]


def test_a_file_is_written_where_modes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "chmod", lambda *_: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")))
    assert files.write_text(tmp_path / "a.txt", "whole").read_text() == "whole"
