"""Tables of others: how they are read, and how a dataset is made of them."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data_prep
from data_prep import BadInput, load_image, picture_file, read_records, write_json_lines

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")
ROOT = Path(__file__).parents[1]


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


def records_in(place):
    return [record for _, record in read_records(place)]


@pytest.mark.parametrize("write", [write_parquet, write_arrow])
def test_the_records_of_a_table_are_read_as_they_were_written(tmp_path, write):
    path = tmp_path / write.__name__.replace("write_", "x.")
    write(path)
    assert records_in(path) == RECORDS == records_in(tmp_path)


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
    assert records_in(tmp_path / name) == [{"a": "1", "b": "é"}, {"a": "2", "b": ""}]


def test_a_folders_tables_are_read_by_name_and_its_texts_are_not(tmp_path):
    for name, number in (("b/2", 2), ("a/1", 1)):
        (tmp_path / name).parent.mkdir()
        table = pyarrow.Table.from_pylist([{"number": number}])
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
        (tmp_path / f"{name}.jsonl").write_text("text")
    wanted = [("a/1.parquet row 1", {"number": 1}), ("b/2.parquet row 1", {"number": 2})]
    assert list(read_records(tmp_path)) == wanted


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.json", "x.jsonl"])
@pytest.mark.parametrize("content", [b"[text", b"\xff" * 600, b"[3]"])
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
    pictures = [load_image(picture_file(cell, tmp_path, "t: row 1")) for cell in cells]
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
        ("none.png", "none.png: no such file; t: row 1"),
    ],
)
def test_a_cell_that_holds_no_picture_is_named_by_its_place(tmp_path, cell, message):
    with pytest.raises(BadInput, match=message):
        load_image(picture_file(cell, tmp_path, "t: row 1"))


# ---------------------------------------------------------------- importing


def load(place, *words):
    """data_prep.py import SRC PLACE/out ..., as a user calls it; the folder.

    SRC is the only file in PLACE/src with rows of text, or the folder.
    """
    source = next((place / "src").glob("*.jsonl"), place / "src")
    data_prep.main(["import", str(source), str(place / "out"), *words])
    return place / "out"


COLUMNS = ("--prompt", "text", "--image", "source")
TEST_3 = ("--test", "3")


def rows_in(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def left_out(folder):
    return [row["fault"] for row in rows_in(folder, "left_out")]


def state(folder):
    """{path: content} of all below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(tmp_path):
    (tmp_path / "src" / "data").mkdir(parents=True)
    write_parquet(tmp_path / "src" / "data" / "train-0.parquet")
    return tmp_path


def write_rows(place, *rows):
    (place / "src").mkdir(exist_ok=True)
    write_json_lines(place / "src" / "rows.jsonl", rows)


def write_pictures(place, *names, **options):
    for number, name in enumerate(names):
        (place / "src" / name).parent.mkdir(exist_ok=True, parents=True)
        (place / "src" / name).write_bytes(picture(zlib.crc32(name.encode()) + number, **options))


def test_what_is_imported_passes_the_check(source, capsys):
    folder = load(source, *COLUMNS, *TEST_3)
    data_prep.main(["check", str(folder)])
    said = capsys.readouterr().out
    assert f"{folder}: 37 rows to train on, 3 held out, 0 left out\n" in said
    assert "no faults; 40 rows in train and test, 40 pictures" in said


def test_a_row_holds_the_instruction_the_pictures_content_and_where_it_came_from(source):
    folder = load(source, *COLUMNS, *TEST_3)
    rows = rows_in(folder, "train") + rows_in(folder, "test")
    (row,) = [row for row in rows if row["prompt"] == "edit 7"]
    content = (folder / row["image"]).read_bytes()
    assert content == RECORDS[7]["source"]
    assert row["image"] == f"pictures/{hashlib.sha256(content).hexdigest()}.png"
    assert row["id"] == "data-train-0.parquet-row-8" and list(row) == ["id", "prompt", "image"]


def test_columns_are_taken_by_name_or_by_path(tmp_path):
    nested = {"media": [{"uri": "a.png"}, {"uri": "b.png"}], "meta": {"n": 17, "wanted": "r"}}
    plain = {"text": "p", "edit.kind": "add", "right": ["c.png"], "region": "d.png"}
    write_rows(tmp_path, nested | plain, {"text": "q", "media": [{"uri": "e.png"}]})
    write_pictures(tmp_path, "a.png", "b.png", "c.png", "d.png", "e.png")
    words = "--prompt text --image media.0.uri --target right --mask region --task edit.kind"
    words += " --id meta.n --requirement meta.wanted --test 1"
    folder = load(tmp_path, *words.split())
    rows = {row["prompt"]: row for row in rows_in(folder, "train") + rows_in(folder, "test")}
    row = rows["p"]
    assert row["id"] == "17" and row["task"] == "add" and row["requirement"] == "r"
    for key, name in (("image", "a.png"), ("target", "c.png"), ("mask", "d.png")):
        wanted = (tmp_path / "src" / name).read_bytes()
        assert (folder / row[key]).read_bytes() == wanted


def test_a_column_without_a_name_is_taken_for_no_setting(tmp_path):
    write_pictures(tmp_path, "a.png", "b.png")
    table = ",prompt,image\r\n0,one,a.png\r\n1,two,b.png\r\n"  # as pandas writes it
    (tmp_path / "src" / "rows.csv").write_text(table)
    words = [str(tmp_path / "src" / "rows.csv"), str(tmp_path / "out"), "--test", "1"]
    data_prep.main(["import", *words])
    assert "target" not in rows_in(tmp_path / "out", "train")[0]


def test_several_source_pictures_stay_a_list(tmp_path):
    several = {"prompt": "p", "image": ["a.png", "b.png"]}
    write_rows(tmp_path, several, {"prompt": "q", "image": ["c.png"]})
    write_pictures(tmp_path, "a.png", "b.png", "c.png")
    folder = load(tmp_path, "--test", "1")
    rows = {row["prompt"]: row for row in rows_in(folder, "train") + rows_in(folder, "test")}
    assert len(rows["p"]["image"]) == 2 and isinstance(rows["q"]["image"], str)


@pytest.mark.parametrize("cell", ["struct", "list", "bytes", "path"])
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_every_form_of_a_picture_in_a_table_is_imported(tmp_path, cell, kind):
    """As the hub has them, and as `save_to_disk` leaves them: with other files beside."""
    src = tmp_path / "src"
    src.mkdir()
    records = []
    for i in range(3):
        (src / f"{i}.png").write_bytes(picture(i))
        forms = {"struct": {"bytes": picture(i), "path": None}, "bytes": picture(i)}
        forms |= {"path": {"bytes": None, "path": f"{i}.png"}, "list": [forms["struct"]]}
        records.append({"prompt": "p", "image": forms[cell]})
    table = pyarrow.Table.from_pylist(records)
    if kind == "parquet":
        pyarrow.parquet.write_table(table, src / "train-00000-of-00001.parquet")
    else:
        with pyarrow.ipc.new_stream(src / "data-00000-of-00001.arrow", table.schema) as stream:
            stream.write_table(table)
    (src / "dataset_info.json").write_text('{"features": {}}')
    (src / "state.json").write_text('{"_data_files": []}')
    folder = load(tmp_path, "--test", "1")
    assert not left_out(folder)
    stored = {path.read_bytes() for path in (folder / "pictures").iterdir()}
    assert stored == {picture(i) for i in range(3)}


def test_a_mask_that_is_white_where_all_must_stay_is_inverted(tmp_path):
    """CoCoEdit's scorer measures what stays inside the white part of its masks."""
    write_pictures(tmp_path, "a.png", "b.png")
    mask = Image.new("L", (32, 24), 255)
    mask.paste(0, (0, 0, 8, 24))
    mask.save(tmp_path / "src" / "m.png")
    other = {"prompt": "q", "image": "b.png", "mask": "m.png"}
    write_rows(tmp_path, {"prompt": "p", "image": "a.png", "mask": "m.png"}, other)
    folder = load(tmp_path, "--format", "cocoedit", "--test", "1")
    (row,) = rows_in(folder, "train")
    seen = np.asarray(load_image(folder / row["mask"]))
    assert (seen[:, :8] == 255).all() and (seen[:, 8:] == 0).all() and "kept" not in row


def test_paths_may_begin_in_another_folder(tmp_path):
    write_rows(tmp_path, {"prompt": "p", "image": "a.png"}, {"prompt": "q", "image": "b.png"})
    write_pictures(tmp_path, "../else/a.png", "../else/b.png")
    folder = load(tmp_path, "--pictures", str(tmp_path / "else"), "--test", "1")
    assert len(rows_in(folder, "train")) == 1


def test_rows_that_are_unfit_are_left_out_and_listed_by_file_and_row(tmp_path):
    write_pictures(tmp_path, "a.png", "b.png", "c.png")
    write_pictures(tmp_path, "small.png", size=(15, 40))
    write_pictures(tmp_path, "other.png", size=(40, 40))
    (tmp_path / "src" / "text.png").write_text("text")
    good = {"prompt": "p", "image": "a.png"}
    write_rows(
        tmp_path,
        good,
        good | {"prompt": " "},
        {"image": "a.png"},
        good | {"prompt": 3},
        {"prompt": "p"},
        {"prompt": "p", "image": []},
        {"prompt": "p", "image": "none.png"},
        {"prompt": "p", "image": "text.png"},
        {"prompt": "p", "image": "small.png"},
        {"prompt": "p", "image": "../src/a.png"},
        good,
        good | {"prompt": "q", "mask": "other.png"},
        good | {"prompt": "q", "target": "small.png"},
        good | {"prompt": "q", "image": ["b.png", "none.png"]},
        {"prompt": "p", "image": "c.png"},
    )
    folder = load(tmp_path, "--mask", "mask", "--target", "target", "--test", "1")
    wanted = [
        "2: the row has no `prompt`",
        "3: the row has no `prompt`",
        "4: `prompt` is 3, not text",
        "5: the row has no `image`",
        "6: the row has no `image`",
        "7, image names it",
        "8, image: not a readable picture",
        "9, image: not a readable picture (15 x 40 pixels, below 16)",
        "10, image: picture ../src/a.png leaves",
        "11: repeats the id or the content of rows.jsonl row 1",
        "12: `mask` has not the size",
        "13, target: not a readable picture (15 x 40 pixels, below 16)",
        "14, image names it",
    ]
    assert len(left_out(folder)) == len(wanted)
    assert " object at 0x" not in str(left_out(folder))
    for fault, words in zip(left_out(folder), wanted, strict=True):
        assert f"rows.jsonl row {words}" in fault
    prompts = rows_in(folder, "train") + rows_in(folder, "test")
    assert [row["prompt"] for row in prompts] == ["p", "p"]


def test_the_same_id_twice_is_left_out(tmp_path):
    write_pictures(tmp_path, "a.png", "b.png", "c.png")
    rows = [{"prompt": "p", "image": f"{name}.png", "n": name == "c"} for name in "abc"]
    write_rows(tmp_path, *rows)
    folder = load(tmp_path, "--id", "n", "--test", "1")
    assert len(left_out(folder)) == 1 and "row 2: repeats the id" in left_out(folder)[0]


def test_no_picture_stands_in_both_splits(tmp_path):
    """Sessions of three turns, each turn's target being the next one's source, and one pair."""
    rows = []
    for session in range(12):
        names = [f"{session}-{turn}.png" for turn in range(4)]
        write_pictures(tmp_path, *names)
        for turn in (1, 0, 2):
            row = {"prompt": f"{turn}", "image": names[turn], "target": names[turn + 1]}
            rows.append(row)
    write_pictures(tmp_path, "pair.png")
    rows.append({"prompt": "both", "image": ["pair.png", "3-0.png"]})
    write_rows(tmp_path, *rows)
    folder = load(tmp_path, "--target", "target", "--test", "9")
    seen = {}
    for split in ("train", "test"):
        seen[split] = set()
        for row in rows_in(folder, split):
            image = row["image"] if isinstance(row["image"], list) else [row["image"]]
            seen[split].update(image, [row.get("target", image[0])])
    assert not seen["train"] & seen["test"]
    assert len(rows_in(folder, "test")) == 9
    shared = left_out(folder)
    assert all("shares a picture with a row that is held out" in fault for fault in shared)
    assert 9 + len(rows_in(folder, "train")) + len(shared) == len(rows)


def test_the_held_out_rows_are_drawn_by_their_pictures_wherever_they_stand(source):
    """The first by the hashes of their contents: others than the first of the table."""
    drawn = [row["image"] for row in rows_in(load(source, *COLUMNS, *TEST_3), "test")]
    hashes = [hashlib.sha256(record["source"]).hexdigest() for record in RECORDS]
    assert drawn == [f"pictures/{content}.png" for content in sorted(hashes)[:3]]


def test_only_so_many_rows_are_taken(source):
    folder = load(source, *COLUMNS, *TEST_3, "--rows", "10")
    rows = rows_in(folder, "train") + rows_in(folder, "test")
    assert {row["prompt"] for row in rows} == {f"edit {i}" for i in range(10)}


def test_a_second_start_changes_nothing(source, capsys):
    folder = load(source, *COLUMNS, *TEST_3)
    before = state(folder)
    load(source, *COLUMNS, *TEST_3)
    assert state(folder) == before
    assert "was imported before" in capsys.readouterr().out


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import data_prep
left = [{after}]
look = data_prep.{name}
def count(*args):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return look(*args)
data_prep.{name} = count
data_prep.main({words!r})
"""


def test_an_import_that_is_killed_again_and_again_ends_with_the_same_folder(source, tmp_path):
    (tmp_path / "whole").mkdir()
    shutil.copytree(source / "src", tmp_path / "whole" / "src")
    wanted = state(load(tmp_path / "whole", *COLUMNS, *TEST_3))
    words = ["import", "src", "out", *COLUMNS, *TEST_3]
    for name, after in (("_to_disk", 0), ("_to_disk", 12), ("write_json_lines", 2)):
        code = KILLED.format(root=str(ROOT), name=name, after=after, words=words)
        ended = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True)
        assert ended.returncode == -signal.SIGKILL
        assert not (source / "out" / "train.jsonl").exists()
    command = [sys.executable, str(ROOT / "data_prep.py"), *words]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    wanted = {path.relative_to(tmp_path / "whole"): content for path, content in wanted.items()}
    found = {path.relative_to(source): content for path, content in state(source / "out").items()}
    for settings in (found, wanted):
        del settings[Path("out/import.json")]  # holds the paths as they were given
    assert found == wanted


def test_pictures_that_are_there_are_not_decoded_again(source, monkeypatch):
    folder = load(source, *COLUMNS, *TEST_3)
    before = state(folder)
    (folder / "train.jsonl").unlink()
    monkeypatch.setattr(data_prep, "load_image", lambda *a: pytest.fail("decoded"))
    load(source, *COLUMNS, *TEST_3)
    assert state(folder) == before


def test_a_full_disk_is_no_fault_of_a_row(source, monkeypatch):
    write_bytes = Path.write_bytes

    def refuse(path, content):
        if "pictures" in path.parts:
            raise OSError(28, "No space left on device")
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(BadInput, match="^[^:]*/pictures/[^:]*: cannot be written .*No space"):
        load(source, *COLUMNS, *TEST_3)


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(source):
    (source / "out").mkdir()
    (source / "out" / "mine.txt").write_text("mine")
    with pytest.raises(BadInput, match="out: holds something else, .*; name a new one"):
        load(source, *COLUMNS, *TEST_3)
    (source / "out" / ".part-mine").write_text("mine")
    with pytest.raises(BadInput, match="out: holds something else"):
        load(source, *COLUMNS, *TEST_3)
    assert {path.name for path in state(source / "out")} == {".lock", ".part-mine", "mine.txt"}


def test_a_start_with_wrong_columns_is_no_hindrance_to_the_right_ones(source):
    with pytest.raises(BadInput, match="0 good rows"):
        load(source, "--prompt", "tekst", "--image", "source")
    assert len(rows_in(load(source, *COLUMNS, *TEST_3), "train")) == 37


def test_a_folder_of_another_import_is_refused(source):
    folder = load(source, *COLUMNS, *TEST_3)
    before = state(folder)
    with pytest.raises(
        BadInput, match="holds something else, or other settings' import; name a new one"
    ):
        load(source, *COLUMNS, "--test", "4")
    assert state(folder) == before


@pytest.mark.parametrize(
    "words, message",
    [
        (["--prompt", "tekst"], "0 good rows, none.*row 1: the row has no `prompt`"),
        ([*COLUMNS, "--test", "40"], "40 good rows, none of them left to train on; see --test"),
        (["--format", "mine"], "--format: invalid choice: 'mine'.*omniedit"),
        (["--rows", "-1"], "--rows -1: give a number at least 0"),
    ],
)
def test_an_import_that_gives_no_dataset_is_one_line(source, words, message):
    with pytest.raises(BadInput, match=message) as error:
        load(source, *words)
    assert "\n" not in str(error.value)
    assert not (source / "out" / "train.jsonl").exists()


@pytest.mark.parametrize("words", [[], ["src"], ["--dataset", "out"]])
def test_a_source_or_a_folder_that_is_not_named_is_one_line(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="arguments are required: --(source|dataset)"):
        data_prep.main(["import", *words])
    assert not os.listdir(tmp_path)


def test_a_picture_that_cannot_be_read_is_left_out(tmp_path, monkeypatch):
    write_rows(tmp_path, *({"prompt": "p", "image": f"{i}.png"} for i in range(3)))
    write_pictures(tmp_path, "0.png", "1.png", "2.png")
    read_bytes = Path.read_bytes

    def refuse(path):
        if path.name == "1.png":
            raise PermissionError(13, "Permission denied")  # root, who runs CI, may read anything
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    (fault,) = left_out(load(tmp_path, "--test", "1"))
    assert "1.png: cannot be read ([Errno 13] Permission denied); rows.jsonl row 2, image" in fault


def test_a_source_without_tables_is_one_line(tmp_path):
    (tmp_path / "src").mkdir()
    for name in ("src", "nowhere"):
        wanted = f"{name}: 0 good rows.*that it is a table or a folder with parquet"
        with pytest.raises(BadInput, match=wanted) as error:
            data_prep.main(["import", str(tmp_path / name), str(tmp_path / "out")])
        assert "\n" not in str(error.value)


# A record of each public set, as its card or its reader shows it.
PUBLIC = {
    "released": {"prompt": "p", "image": "{}", "requirement": "r"},
    "cocoedit": {"prompt": "p", "image": "{}", "mask": "{}"},
    "editscore-rl": {"instruction": "p", "input_images": ["{}"], "task_type": "add"},
    "gpt-image-edit": {"instruction": "p", "input": "{}", "output": "{}", "task": "add"},
    "imgedit": {"prompt": "p", "input_images": ["{}"], "output_images": ["{}"]},
    "magicbrush": {"instruction": "p", "source_img": "{}", "target_img": "{}", "img_id": "1"},
    "omniedit": {"edited_prompt_list": ["p"], "src_img": "{}", "edited_img": "{}", "task": "add"},
    "pico-banana": {
        "text": "p",
        "local_input_image": "{}",
        "output_image": "{}",
        "edit_type": "add",
    },
    "unirl": {"prompt": "p", "media": [{"modality": "image", "role": "condition", "uri": "{}"}]},
}


DRAWN = {"released": set(), "cocoedit": {"mask"}, "editscore-rl": set(), "unirl": set()}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_sets_columns_go_by_its_name(tmp_path, name):
    text = json.dumps(PUBLIC[name])
    write_rows(tmp_path, *(json.loads(text.replace("{}", f"{i}.png")) for i in range(3)))
    write_pictures(tmp_path, "0.png", "1.png", "2.png")
    assert data_prep.FORMATS.keys() == {"", *PUBLIC}
    folder = load(tmp_path, "--format", name, "--test", "1")
    row = rows_in(folder, "train")[0]
    assert row["prompt"] == "p" and not left_out(folder)
    texts = {"requirement": "r", "task": "add"}
    assert all(row.get(key, value) == value for key, value in texts.items())
    assert {"target", "mask"} & row.keys() == DRAWN.get(name, {"target"})
