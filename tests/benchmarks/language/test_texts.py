"""The text: its split, its hash, and its windows."""

from __future__ import annotations

import pytest
import torch

from benchmarks.language.texts import SPLIT, Text, load


def folder_of(tmp_path, name="lib", b=b"beta = 2\n", newline=b"\n"):
    folder = tmp_path / name
    (folder / "pack").mkdir(parents=True)
    for path, content in (("a", b"alpha = 1\n"), ("pack/b", b), ("c", b"gamma = 3\n")):
        (folder / f"{path}.py").write_bytes(content.replace(b"\n", newline))
    return folder


PARTS = {"training": ["a"], "validation": ["pack/b"], "test": ["c"]}


def test_no_file_is_in_two_parts():
    names = [name for part in SPLIT.values() for name in part]
    assert len(names) == len(set(names))


def test_this_pythons_text_is_large_enough():
    text = load()
    assert len(text.parts["training"]) > 1_500_000
    assert min(len(text.parts[part]) for part in ("validation", "test")) > 80_000


def test_the_hash_is_that_of_text_split_and_names(tmp_path):
    first = load(folder_of(tmp_path), PARTS)
    assert bytes(first.parts["validation"].tolist()) == b"beta = 2\n"
    assert load(folder_of(tmp_path, "windows", newline=b"\r\n"), PARTS).digest == first.digest
    assert load(folder_of(tmp_path, "other", b=b"beta = 4\n"), PARTS).digest != first.digest
    swapped = {"training": ["a"], "validation": ["c"], "test": ["pack/b"]}
    assert load(tmp_path / "lib", swapped).digest != first.digest


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"has no d\.py"):
        load(folder_of(tmp_path), {**PARTS, "test": ["d"]})


def test_windows_are_always_the_same_and_batches_follow_the_generator():
    content = torch.arange(100, dtype=torch.uint8)
    text = Text({"training": content, "test": content}, "digest")
    windows = text.windows("test", context=9, most=4)
    assert windows.shape == (4, 10)
    assert windows.dtype == torch.int64
    assert windows[:, 0].tolist() == [0, 30, 60, 90]
    assert len(text.windows("test", context=9, most=1000)) == 11  # as many as do not overlap
    first, again = (text.batch(9, 50, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(first.diff(dim=1), torch.ones(50, 9, dtype=torch.int64))
    assert first.min() >= 0
    assert first.max() <= 99
