"""Tables of others: how they are read, and how a dataset is made of them."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from data_prep import BadInput, picture_in, read_records, read_table

pyarrow = pytest.importorskip("pyarrow")


def picture(seed, size=(32, 24), kind="PNG"):
    """The file of a picture of random pixels."""
    content = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


RECORDS = [{"text": f"edit {i}", "source": picture(i)} for i in range(40)]


def write_parquet(path):
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path, row_group_size=25)


def write_arrow(path):
    table = pyarrow.Table.from_pylist(RECORDS)
    with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table, max_chunksize=25)


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("write", [write_parquet, write_arrow])
def test_the_records_of_a_table_are_read_as_they_were_written(tmp_path, write):
    path = tmp_path / write.__name__.replace("write_", "x.")
    write(path)
    assert list(read_records(path)) == RECORDS == list(read_table(tmp_path))


@pytest.mark.parametrize(
    "name, content",
    [
        ("x.jsonl", '{"a": "1", "b": "é"}\n\n{"a": "2", "b": ""}'),
        ("x.json", '{"a": "1", "b": "é"}\n{"a": "2", "b": ""}'),
        ("x.json", ' [{"a": "1", "b": "é"},\n {"a": "2", "b": ""}]'),
        ("x.csv", "\ufeffa,b\r\n1,é\r\n2,\r\n"),
    ],
)
def test_the_records_of_a_text_file_are_read(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert list(read_records(tmp_path / name)) == [{"a": "1", "b": "é"}, {"a": "2", "b": ""}]


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_the_members_of_a_tar_with_one_name_are_one_record(tmp_path):
    members = {
        "a.b/0.json": b'{"prompt": "p"}',
        "a.b/0.src.png": b"one",
        "a.b/1.src.png": b"two",
        "a.b/1.txt": "é".encode(),
    }
    write_tar(tmp_path / "x.tar", members)
    assert list(read_records(tmp_path)) == [
        {"__key__": "a.b/0", "json": {"prompt": "p"}, "src.png": b"one"},
        {"__key__": "a.b/1", "src.png": b"two", "txt": "é"},
    ]


def test_a_folders_tables_are_read_by_name_and_other_files_are_not(tmp_path):
    for name in ("b/2.jsonl", "a/1.jsonl", "a/info.json", "b/note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"name": name}))
    assert [record["name"] for record in read_records(tmp_path)] == ["a/1.jsonl", "b/2.jsonl"]


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.tar", "x.json", "x.jsonl"])
@pytest.mark.parametrize("content", [b"[text", b"\xff" * 600])
def test_a_broken_table_is_one_line_that_names_it(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=f"{name}:") as error:
        list(read_records(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_picture_comes_from_bytes_a_dict_or_a_path(tmp_path):
    (tmp_path / "x.png").write_bytes(RECORDS[0]["source"])
    cells = [
        RECORDS[0]["source"],
        {"bytes": RECORDS[0]["source"], "path": "elsewhere.png"},
        {"bytes": None, "path": "x.png"},
        "x.png",
    ]
    pictures = [picture_in(cell, tmp_path, "t: row 1") for cell in cells]
    assert len({picture.tobytes() for picture in pictures}) == 1
    assert pictures[0].size == (32, 24)


@pytest.mark.parametrize(
    "cell, message",
    [
        (b"text", "^t: row 1: not a readable picture"),
        (None, "^t: row 1: picture None is no path"),
        ({"bytes": None, "path": None}, "^t: row 1: picture None is no path"),
        ({}, "^t: row 1: picture None is no path"),
        (3.5, "^t: row 1: picture 3.5 is no path"),
        ("../x.png", "^t: row 1: picture ../x.png leaves"),
        ("/etc/hostname", "^t: row 1: picture /etc/hostname leaves"),
        ("none.png", "none.png: no such picture; t: row 1"),
    ],
)
def test_a_cell_that_holds_no_picture_is_named_by_its_place(tmp_path, cell, message):
    with pytest.raises(BadInput, match=message):
        picture_in(cell, tmp_path, "t: row 1")
