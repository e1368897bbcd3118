"""Rows and pictures, and the toy world: its split, its oracle, its tokens, and the building of its models."""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

import data_prep
from data_prep import (
    BadInput,
    ToySettings,
    apply_change,
    build_toy,
    graded_corruptions,
    instructions,
    is_test_scene,
    load_image,
    oracle,
    oracle_scores,
    parse_settings,
    read_rows,
    render,
    run_script,
    scenes_of,
    seeded,
    spearman,
    spoil,
    to_pil,
    toy_examples,
)

ROOT = Path(__file__).parents[1]

# ---------------------------------------------------------------- rows and pictures


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    return tmp_path


def write(folder, *rows, name="train.jsonl"):
    (folder / name).write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    )


def test_a_row_keeps_what_it_holds_and_gets_absolute_paths(folder):
    write(
        folder,
        {"prompt": "p", "image": "a.png", "target": "a.png", "extra": 3},
        {"prompt": "q", "image": ["a.png"] * 2},
    )
    first, second = read_rows(folder, "train")
    assert (
        first["images"] == [str(folder / "a.png")]
        and first["target"] == str(folder / "a.png")
        and first["extra"] == 3
    )
    assert len(second["images"]) == 2 and first["id"] != second["id"]


def test_the_released_file_names_are_read_too(folder):
    write(folder, {"prompt": "p", "image": "a.png"}, name="train_metadata.jsonl")
    assert len(read_rows(folder, "train")) == 1


@pytest.mark.parametrize(
    "row, message",
    [
        ("{", "train.jsonl:2: not JSON"),
        ("[]", "train.jsonl:2: not an object"),
        ({"image": "a.png"}, "train.jsonl:2: the row has no `prompt`"),
        ({"prompt": " ", "image": "a.png"}, "train.jsonl:2: the row has no `prompt`"),
        ({"prompt": "p"}, "train.jsonl:2: the row has no `image`"),
        ({"prompt": "p", "image": 3}, "train.jsonl:2: the row has no `image`"),
        ({"prompt": "p", "image": "../a.png"}, "leaves the dataset folder"),
        ({"prompt": "p", "image": "/etc/passwd"}, "leaves the dataset folder"),
        ({"prompt": "p", "image": "a\0.png"}, "is no path"),
        ({"prompt": "p", "image": "b.png", "target": 3}, "`target` is 3, not text"),
        ({"prompts": "p", "image": "b.png"}, "unknown key `prompts`; write `prompt`"),
        (
            {"prompt": "p", "image": "b.png", "requirment": "r"},
            "unknown key `requirment`; write `requirement`",
        ),
        ({"prompt": "p", "image": "a.png"}, "the row again that train.jsonl:1 has"),
        (
            {"prompt": "p", "image": "b.png", "id": "train-1"},
            "the id 'train-1' again that train.jsonl:1 has",
        ),
        ("[" * 100000, "not JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(folder, row, message):
    (folder / "link.png").symlink_to("/etc/hostname")
    write(folder, {"prompt": "p", "image": "a.png"}, row, {"prompt": "q", "image": "a.png"})
    with pytest.raises(BadInput, match=message) as error:
        read_rows(folder, "train")
    assert "\n" not in str(error.value)
    faults = []
    assert [row["prompt"] for row in read_rows(folder, "train", faults)] == ["p", "q"]
    assert len(faults) == 1 and faults[0] == str(error.value)


def test_a_line_that_is_not_utf_8_is_one_bad_row(folder):
    (folder / "train.jsonl").write_bytes(
        b'{"prompt": "\xff", "image": "a.png"}\n{"prompt": "a\xe2\x80\xa8b", "image": "a.png"}'
    )
    faults = []
    assert [row["prompt"] for row in read_rows(folder, "train", faults)] == ["a\u2028b"]
    assert len(faults) == 1 and "train.jsonl:1: not JSON" in faults[0]


def test_a_folder_without_rows_is_refused(folder):
    with pytest.raises(BadInput, match="holds neither train.jsonl"):
        read_rows(folder, "train")
    write(folder, "")
    with pytest.raises(BadInput, match="holds no rows"):
        read_rows(folder, "train")


def test_pictures_of_every_mode_come_upright_in_rgb(folder):
    def saved(image, name, **options):
        image.save(folder / name, **options)
        return load_image(folder / name)

    for mode in ("L", "P", "RGB", "1", "LA", "RGBA"):
        assert saved(Image.new(mode, (8, 4)), "x.png").mode == "RGB"
    cyan = np.asarray(saved(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "x.jpg", quality=95)).mean(
        (0, 1)
    )
    assert cyan[0] < 60 and cyan[1] > 150 and cyan[2] > 150
    turned = Image.new("RGB", (8, 4))
    exif = turned.getexif()
    exif[274] = 6
    assert saved(turned, "turned.jpg", exif=exif).size == (4, 8)


def test_sixteen_bits_are_scaled_and_not_cut(folder):
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    for name in ("x.png", "x.tiff"):
        Image.fromarray(ramp).save(folder / name)
        seen = np.asarray(load_image(folder / name))[..., 0]
        assert np.abs(seen - ramp / 257).max() <= 0.5
    Image.fromarray(ramp.astype(np.float32)).save(folder / "f.tiff")
    with pytest.raises(BadInput, match="floats of no known range"):
        load_image(folder / "f.tiff")


def test_transparent_parts_are_white_and_not_what_lies_behind(folder):
    hidden = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    hidden.save(folder / "x.png")
    assert load_image(folder / "x.png").getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (8, 8))
    palette.save(folder / "p.png", transparency=0)
    assert load_image(folder / "p.png").getpixel((0, 0)) == (255, 255, 255)


def test_a_bomb_is_refused_by_its_header_before_it_is_decoded(folder, monkeypatch):
    def png(width, height):
        chunk = lambda kind, data: (
            len(data).to_bytes(4, "big")
            + kind
            + data  # noqa: E731
            + zlib.crc32(kind + data).to_bytes(4, "big")
        )
        head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((8, 2, 0, 0, 0))
        return (
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", head)
            + chunk(b"IDAT", zlib.compress(bytes(99)))
            + chunk(b"IEND", b"")
        )

    monkeypatch.setattr(Image.Image, "convert", lambda *a: pytest.fail("decoded"))
    monkeypatch.setattr(PngImageFile, "load", lambda *a: pytest.fail("decoded"))
    (folder / "bomb.png").write_bytes(png(9000, 9000))
    with pytest.raises(BadInput, match="bomb.png: 9000 x 9000 pixels, above"):
        load_image(folder / "bomb.png")
    (folder / "bomb.png").write_bytes(png(2**30, 2**30))
    with pytest.raises(BadInput, match="bomb.png: not a readable picture"):
        load_image(folder / "bomb.png")


@pytest.mark.parametrize("content", [b"text", "cut"])
def test_a_broken_picture_among_many_is_found_and_named(folder, content, capsys):
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    for i in range(5):
        Image.fromarray(noise).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes(
        (folder / "3.png").read_bytes()[:300] if content == "cut" else content
    )
    write(folder, *({"prompt": "p", "image": f"{i}.png"} for i in range(5)))
    write(folder, {"prompt": "p", "image": "0.png"}, name="test.jsonl")
    with pytest.raises(BadInput, match="1 faults, one a line above; 5 good rows"):
        data_prep.main(["check", str(folder)])
    assert "3.png: not a readable picture" in capsys.readouterr().out


# ---------------------------------------------------------------- the check


def draw(path, seed, size=(96, 64), **options):
    """A picture of smooth random colours, another for every seed."""
    path.parent.mkdir(exist_ok=True, parents=True)
    rough = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC).save(path, **options)


def faulty(folder):
    """A dataset with one fault of each kind in nine rows, the ninth being good."""
    for i in range(9):
        draw(folder / f"{i}.png", i)
    (folder / "1.png").write_bytes(b"text")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:300])
    (folder / "3.png").unlink()
    Image.new("RGB", (64, 8)).save(folder / "4.png")
    lines = [{"prompt": "p", "image": f"{i}.png"} for i in range(9)]
    lines[5]["image"], lines[6]["prompt"], lines[7]["image"] = "../x.png", "", "8.png"
    lines[8]["image"] = "8.png"
    write(folder, *lines)


def test_check_lists_all_faults_together_and_training_can_skip_them(tmp_path, capsys):
    faulty(tmp_path)
    with pytest.raises(BadInput, match="7 faults, one a line above; 2 good rows in train"):
        data_prep.main(["check", str(tmp_path)])
    said = capsys.readouterr().out.splitlines()
    wanted = [
        "leaves the dataset",
        "has no `prompt`",
        "the row again",
        "1.png: not a readable",
        "2.png: not a readable",
        "3.png: no such picture",
        "4.png: 64 x 8 pixels, below 16",
    ]
    assert len(said) == 7 and all(mark in line for mark, line in zip(wanted, said))
    faults = []
    write(tmp_path, {"prompt": "p", "image": "0.png"}, name="test.jsonl")
    rows = data_prep.load_rows(tmp_path, skip=True)["train"]
    assert [Path(row["images"][0]).name for row in rows] == ["0.png", "2.png", "8.png"]


def test_check_says_when_nothing_is_wrong_and_notes_rows_that_are_alike(tmp_path, capsys):
    for name in ("a", "b"):
        draw(tmp_path / f"{name}.png", 0)
    write(tmp_path, *({"prompt": "p", "image": f"{name}.png"} for name in "ab"))
    write(tmp_path, {"prompt": "q", "image": "a.png"}, name="test.jsonl")
    data_prep.main(["check", str(tmp_path)])
    assert capsys.readouterr().out == (
        "note: row train-2 has the prompt and the very pictures of row train-1\n"
        f"{tmp_path}: no faults; 3 good rows in train and test, 2 pictures\n"
    )


def test_check_finds_exact_resized_and_recompressed_benchmark_pictures(tmp_path, capsys):
    data, bench = tmp_path / "data", tmp_path / "bench"
    for i in range(4):
        draw(bench / "singleturn" / f"{i}.png", i)
    original = load_image(bench / "singleturn" / "0.png")
    for i in range(10, 14):
        draw(data / f"{i}.png", i)
    original.save(data / "same.bmp")
    original.save(data / "recompressed.jpg", quality=40)
    original.resize((50, 31)).save(data / "resized.png")
    names = sorted(path.name for path in data.iterdir())
    write(data, *({"prompt": "p", "image": name} for name in names))
    with pytest.raises(BadInput, match="3 faults"):
        data_prep.main(["check", str(data), "--against", str(bench)])
    said = capsys.readouterr().out
    assert "same.bmp: an exact copy of singleturn/0.png" in said
    assert "resized.png: a near copy of singleturn/0.png" in said
    assert "recompressed.jpg: a near copy of singleturn/0.png" in said
    (data / "train.jsonl").write_text(
        "\n".join(json.dumps({"prompt": "p", "image": f"{i}.png"}) for i in range(10, 14))
    )
    data_prep.main(["check", str(data), "--against", str(bench)])
    assert f"nothing of {bench}" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="holds no pictures"):
        data_prep.main(["check", str(data), "--against", str(tmp_path / "empty")])


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_pictures_inside_a_parquet_or_arrow_benchmark_are_compared_too(tmp_path, capsys, kind):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    data, bench = tmp_path / "data", tmp_path / "bench"
    draw(data / "0.png", 0)
    write(data, {"prompt": "p", "image": "0.png"})
    bench.mkdir()
    table = pyarrow.table(
        {"key": ["k"], "input_image": [{"bytes": (data / "0.png").read_bytes(), "path": None}]}
    )
    if kind == "parquet":
        parquet.write_table(table, bench / "0.parquet")
    else:
        with pyarrow.ipc.new_stream(str(bench / "data-0.arrow"), table.schema) as stream:
            stream.write_table(table)
    with pytest.raises(BadInput, match="1 fault"):
        data_prep.main(["check", str(data), "--against", str(bench)])
    assert "an exact copy of row 0, input_image" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "no command"),
        (["cheque"], "cheque: say what to do"),
        (["check"], "no dataset is named"),
        (["check", "nowhere"], "nowhere: holds neither train.jsonl"),
        (["check", ".", "--gainst", "x"], "unrecognized"),
    ],
)
def test_a_wrong_command_is_one_line(words, message):
    with pytest.raises(BadInput, match=message) as error:
        data_prep.main(words)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- settings and seeds


def test_an_unknown_key_and_an_abbreviation_are_refused():
    for word in ("--nonsense", "--test_row"):
        with pytest.raises(BadInput, match=f"unrecognized arguments: {word} 3; --help"):
            parse_settings(ToySettings, [word, "3"])
    assert parse_settings(ToySettings, ["--test_rows", "3"], seed=7) == ToySettings(
        test_rows=3, seed=7
    )


def test_a_users_mistake_is_one_line_and_exit_code_2(capsys):
    def main():
        raise BadInput("x.png: broken; mend it")

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: x.png: broken; mend it\n"


def test_a_seed_is_a_hash_of_its_key_and_nothing_else():
    assert seeded(1, "a").initial_seed() == 2461651067226055738  # on every machine
    assert (
        len({seeded(*key).initial_seed() for key in ((1, "a"), (1, "b"), (2, "a"), (1, "a", 0))})
        == 4
    )


def test_spearman_is_the_correlation_of_mean_ranks():
    a = torch.rand(50, generator=seeded("ranks"))
    assert spearman(a, a.exp()) == pytest.approx(1) and spearman(a, -a) == pytest.approx(-1)
    tied = spearman(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert tied == pytest.approx(0.9486833)


# ---------------------------------------------------------------- the toy world


def test_test_scenes_and_instructions_do_not_occur_in_training():
    held_out = instructions()[1]
    for source, target, _, text in toy_examples(3000, "train", 0):
        assert not is_test_scene(source) and not is_test_scene(target) and text not in held_out
    for source, _, _, text in toy_examples(300, "test", 0):
        assert is_test_scene(source) and text in held_out


def test_the_five_tasks_take_equal_parts_and_every_edit_changes_the_scene():
    examples = toy_examples(500, "train", 0)
    assert {task: sum(e[2] == task for e in examples) for task in data_prep.TASKS} == dict.fromkeys(
        data_prep.TASKS, 100
    )
    assert all(source != target for source, target, _, _ in examples)


def test_an_instruction_that_does_not_fit_the_scene_is_none():
    texts = instructions()[0]
    red_circle = data_prep.OBJECTS.index(("red", "circle"))
    assert apply_change((0, red_circle, 0, 0, 0), *texts["make the red circle blue"]) is not None
    assert apply_change((0, 0, 0, 0, 0), *texts["make the red circle blue"]) is None
    assert (
        apply_change((0, red_circle, 0, 0, 0), *texts["remove the red circle at the top right"])
        is None
    )
    assert (
        apply_change((0, red_circle, 0, 0, 0), *texts["change the black background to white"])
        is None
    )


@pytest.fixture(scope="module")
def world():
    examples = toy_examples(200, "test", 0)
    return examples, *scenes_of(examples)


def test_the_oracle_gives_one_to_the_target_and_nothing_to_the_untouched_source(world):
    _, sources, targets = world
    score, success = oracle_scores(render(targets), sources, targets)
    assert score.min() > 0.99 and success.all()
    score, success = oracle_scores(render(sources), sources, targets)
    assert score.max() < 0.01 and not success.any()


def test_an_edit_that_ruins_something_else_scores_between(world):
    _, sources, targets = world
    ruined = targets.clone()
    for scene, source, target in zip(ruined, sources, targets):
        cell = next(i for i in range(1, 5) if source[i] == target[i])
        scene[cell] = 0 if scene[cell] else 7
    score, success = oracle_scores(render(ruined), sources, targets)
    assert not success.any() and (score > 0.3).all() and (score < 0.95).all()


def test_a_grey_smear_is_no_success(world):
    _, sources, targets = world
    score, success = oracle_scores(0.4 * render(targets) + 0.3, sources, targets)
    assert not success.any()


def test_spoiled_scenes_are_mostly_wrong(world):
    examples, sources, targets = world
    import random

    rng = random.Random(0)
    _, success = oracle_scores(
        render(torch.tensor([spoil(e, rng) for e in examples])), sources, targets
    )
    assert success.float().mean() < 0.2


def test_corruptions_have_every_quality(world):
    examples, sources, targets = world
    score, _ = oracle_scores(graded_corruptions(examples, 0, 0), sources, targets)
    assert (score < 0.1).float().mean() > 0.2 and (score > 0.9).float().mean() > 0.2
    assert ((score > 0.1) & (score < 0.9)).float().mean() > 0.1


def test_no_word_is_unknown_and_the_longest_instruction_fits():
    pipe, judge = data_prep.new_editor(), data_prep.new_judge_tokenizer()
    for text in instructions()[0]:
        ids = pipe.tokenizer_2(text).input_ids
        assert len(ids) <= data_prep.TEXT_TOKENS and pipe.tokenizer_2.unk_token_id not in ids
        assert len(pipe.tokenizer(text).input_ids) == len(text.split()) + 2
        assert judge.unk_token_id not in judge(text).input_ids


def test_fit_trains_vectors_matrices_and_convolutions():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 1)
    )
    before = {name: p.clone() for name, p in model.named_parameters()}
    x = torch.randn(16, 1, 8, 8, generator=seeded("fit"))
    losses = []

    def loss(step):
        losses.append((model(x) - 1).square().mean())
        return losses[-1]

    data_prep.fit("test", list(model.named_parameters()), loss, 60, lr=0.05)
    assert losses[-1] < 0.1 * losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


# ---------------------------------------------------------------- building it


def tiny(out, **changes):
    values = dict(
        out=str(out),
        vae_steps=2,
        editor_steps=2,
        judge_steps=2,
        pool=200,
        train_rows=5,
        test_rows=5,
        check=False,
    )
    return ToySettings(**(values | changes))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "toy"
    build_toy(tiny(folder))
    return folder


def test_both_models_load_as_from_the_hub(toy):
    from diffusers import DiffusionPipeline
    from transformers import AutoModelForImageTextToText

    assert type(DiffusionPipeline.from_pretrained(toy / "editor")).__name__ == "FluxKontextPipeline"
    assert (
        type(AutoModelForImageTextToText.from_pretrained(toy / "judge")).__name__
        == "Qwen2_5_VLForConditionalGeneration"
    )


def test_written_rows_are_scored_by_the_oracle_and_others_are_not(toy):
    rows = read_rows(toy, "test")
    for row in rows:
        assert oracle(row, load_image(row["target"])) == (pytest.approx(1, abs=0.01), True)
        assert oracle(row, load_image(row["images"][0])) == (pytest.approx(0, abs=0.01), False)
    assert oracle({"prompt": "p"}, Image.new("RGB", (32, 32))) is None


def test_two_machines_make_the_same_rows_and_another_seed_others(toy, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        data_prep.write_rows(tmp_path / name, tiny("", seed=seed))
    rows = {
        path: (path / "train.jsonl").read_text()
        for path in (toy, tmp_path / "same", tmp_path / "other")
    }
    assert rows[toy] == rows[tmp_path / "same"] != rows[tmp_path / "other"]
    picture = "pictures/train-0000-source.png"
    assert load_image(toy / picture).tobytes() == load_image(tmp_path / "same" / picture).tobytes()


def test_the_same_settings_rebuild_nothing_and_others_do(toy, monkeypatch):
    monkeypatch.setattr(data_prep, "write_rows", lambda *a: pytest.fail("built again"))
    build_toy(tiny(toy))
    with pytest.raises(pytest.fail.Exception, match="built again"):
        build_toy(tiny(toy, editor_steps=3))
    assert (toy / "toy.json").exists()  # what was there stays until the new one is whole


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(BadInput, match="holds no toy"):
        build_toy(tiny(tmp_path))
    assert (tmp_path / "mine.txt").exists()


def test_a_toy_that_is_too_bad_to_learn_from_stops_the_build(toy):
    from diffusers import FluxKontextPipeline

    pipe = FluxKontextPipeline.from_pretrained(toy / "editor")
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(RuntimeError, match="is not in 25-60 %"):
        data_prep.check_toy(pipe, toy / "judge", tiny(toy, check=True))


def test_pictures_survive_being_written(world, tmp_path):
    picture = render(world[1][:1])[0]
    to_pil(picture).save(tmp_path / "x.png")
    back = (
        torch.from_numpy(np.asarray(load_image(tmp_path / "x.png")).copy()).permute(2, 0, 1) / 255
    )
    assert (back - picture).abs().max() < 1 / 255


def test_the_toys_editor_is_the_same_at_every_build():
    def build():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pipe = data_prep.new_editor()
        return (
            pipe.tokenizer.get_vocab(),
            pipe.tokenizer.backend_tokenizer.to_str(),
            pipe.transformer.state_dict(),
        )

    first, *others = [build() for _ in range(3)]
    for vocabulary, tokenizer, weights in others:
        assert (vocabulary, tokenizer) == first[:2] and all(
            torch.equal(first[2][key], weights[key]) for key in weights
        )


def test_importing_does_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import data_prep"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ,
    )
    assert done.returncode == 0 and done.stdout == "" and not list(tmp_path.iterdir())
