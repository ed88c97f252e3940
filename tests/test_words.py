"""Proves that a word of a recipe or of the command line means what the type of its key says, in files and in overrides, of schedules and
of plain recipes, and that an override without a value is an error."""

import re
from argparse import ArgumentError
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from test_cli import plain, run, schedule, write

from unimodal import words
from unimodal.cli.schedule import stage_configs
from unimodal.cli.train import ConfigCheck, read_schedule
from unimodal.survey.specs import read_spec, systems_folder

TEXTS = (
    *("2026-11-30", "2026_11_30", "2026-11-30 12:30:00", "007", "010", "7", "1.10", "1e-3", "1_000", "0x10", "0o17", "+1"),
    *("12:30:00", "190:20:30.15", "no", "No", "off", "on", "yes", "y", "true", "True", ".5", "1.", ".inf", "-.INF", ".nan", "="),
)  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", [str, str | None, list[str] | str, dict[str, str]])
def test_a_key_of_text_keeps_the_word(text: str, kind: Any) -> None:
    written = f"{{k: {text}}}" if kind == dict[str, str] else text
    value = words.as_type(kind, words.load(written), "key")
    assert value == ({"k": text} if kind == dict[str, str] else text)
    assert type(value) in (str, dict)


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        *[(int, text, value) for text, value in (("7", 7), ("007", 7), ("010", 10), ("-010", -10), ("+010", 10), ("0_10", 10))],
        *[(int, text, value) for text, value in (("1_000", 1000), ("0x10", 16), ("0o17", 15), ("2026_11_30", 20261130))],
        *[(float, text, value) for text, value in (("1e-3", 0.001), ("1E+2", 100.0), ("7", 7.0), ("010", 10.0), (".5", 0.5))],
        *[(float, text, value) for text, value in (("1.10", 1.1), (".inf", float("inf")), ("1_000", 1000.0), ("-1e3", -1000.0))],
        *[(bool, text, value) for text, value in (("no", False), ("off", False), ("yes", True), ("True", True), ("on", True))],
        (bool | int, "010", 10),
        (bool | int, "false", False),
        (int | float | None, "0.5", 0.5),
        (int | float | None, "~", None),
        (str | None, "null", None),
        (Literal["no", "on"], "no", "no"),
        (Literal[16, "bf16"], "16", 16),
        (tuple[float, float], "[0.9, 1e-3]", (0.9, 0.001)),
        (list[str], "[007, no, 2026-11-30]", ["007", "no", "2026-11-30"]),
        (dict[str, float], "{2026-11-30: 1e-3, 007: 1}", {"2026-11-30": 0.001, "007": 1.0}),
        (dict[int, str], "{7: 007}", {7: "007"}),
        (Any, "007", 7),
        (Any, "no", "no"),
        (str | None, "'null'", "null"),
        (int, "'010'", 10),
        (dict[str, Any], "{a: [1, 1e-3, {b: 007, c: '007'}], d: no}", {"a": [1, 0.001, {"b": 7, "c": "007"}], "d": "no"}),
    ],
)  # fmt: skip
def test_other_keys_read_the_word(kind: Any, text: str, expected: Any) -> None:
    value = words.as_type(kind, words.load(text), "key")
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        *((int, text) for text in ("12:30:00", "2026-11-30", "1e-3", "no", "7.0", "true", "seven")),
        *((float, text) for text in ("12:30:00", "no", "2026-11-30", "true")),
        (bool, "007"),
        (str, "[a]"),
    ],
)
def test_a_word_of_another_type_is_refused(kind: Any, text: str) -> None:
    with pytest.raises(ArgumentError, match='"key"'):
        words.as_type(kind, words.load(text), "key")


def test_names_are_text_and_given_once() -> None:
    content = words.load("base: &b {x: 1}\n2026-11-30: a\n007: b\nno: c\n1.10: d\nmore: {<<: *b, x: 2}")
    assert list(content) == ["base", "2026-11-30", "007", "no", "1.10", "more"] and content["more"] == {"x": 2}
    with pytest.raises(yaml.YAMLError, match="found 'a' twice; give it once"):
        words.load("a: 1\nb: 2\na: 3")


def test_what_is_printed_is_read_alike() -> None:
    content = words.load("{a: 007, b: 7, c: no, d: 2026-11-30, e: 1e-3, f: 0.5, g: '7', h: null, i: [1_000, true]}")
    printed = words.dump(content)
    for reader in (words.load, yaml.safe_load):
        assert reader(printed) == {**content, "e": content["e"]}


# The command line.


WORDS = ("2026-11-30", "2026_11_30", "007", "no", "1e-3", "null")


def table() -> dict[str, Any]:
    """A plain recipe over a table."""
    train = {"class_path": "unimodal.data.CsvTable", "init_args": {"path": "a.csv", "split": "train"}}
    return {**plain(), "data": {"train": train}}


def at(content: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        content = content[part]
    return content


@pytest.mark.parametrize(("text", "equals"), [(text, text < "1") for text in WORDS])
def test_overrides_of_a_schedule(text: str, equals: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, {**table(), "stages": {"first": {}}})
    keys = ("name", "output", "title", "about", "precision")
    if text != "null":  # elsewhere it is nothing, as in YAML
        keys += ("card.name", "stages.first.about", f"stages.{text}.about", "data.train.init_args.image")
    pairs = [(f"--{key}", text) for key in keys]
    given = [f"{key}={value}" for key, value in pairs] if equals else [one for pair in pairs for one in pair]
    status, output, error = run(capsys, "fit", "--config", file, *given, "--print_config")
    assert status == 0, error
    printed = yaml.safe_load(output)
    assert {key: str(at(printed, key)) for key in keys} == dict.fromkeys(keys, text)


@pytest.mark.parametrize("text", WORDS)
def test_words_in_the_file_of_a_schedule(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, table())
    patch = "".join(f"{key}: {text}\n" for key in ("name", "output")) + f"card: {{name: {text}}}\n"
    patch += f"stages:\n  {text}: {{about: {text}}}\ndata: {{train: {{init_args: {{split: {text}}}}}}}\n"
    (tmp_path / "patch.yaml").write_text(patch)
    status, output, error = run(capsys, "fit", "--config", file, "--config", tmp_path / "patch.yaml", "--print_config")
    if text == "null":
        assert status == 2 and "schedule: name has no value; give it one" in error
        return
    assert status == 0, error
    printed = yaml.safe_load(output)
    places = (printed["name"], printed["output"], printed["card"]["name"], printed["stages"][text]["about"])
    assert places == (text,) * 4 and str(printed["data"]["train"]["init_args"]["split"]) == text


def test_other_settings_of_a_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {
        "seed_everything": ("010", 10),
        "checkpoint_every": ("1_000", 1000),
        "final.text_to_text": ("no", False),
        "final.guidance_scale": ("1e-3", 0.001),
        "aims.t2i_r1_first": ("1e-1", 0.1),
        "card.tags": ("[007, no]", ["007", "no"]),
    }
    overrides = [f"--{key}={text}" for key, (text, _) in given.items()]
    status, output, error = run(capsys, "fit", "--config", write(tmp_path, schedule()), *overrides, "--print_config")
    assert status == 0, error
    for key, (_, expected) in given.items():
        value = at(yaml.safe_load(output), key)
        assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize("name", ["7", "007", "2026-11-30", "no"])
def test_a_stage_is_named_by_its_word(name: str, tmp_path: Path) -> None:
    stages = f"{{a: {{}}, {name}: {{mine: {{top_k: 0x10}}}}, c: {{data: {{negatives: {name}}}}}, d: {{merge: {{a: 1e-1, c: 1}}}}}}"
    (tmp_path / "stages.yaml").write_text(f"stages: {stages}\n")
    content = read_schedule([write(tmp_path, plain()), tmp_path / "stages.yaml"], [])
    assert content is not None and list(content["stages"]) == ["a", name, "c", "d"]
    assert content["stages"][name]["mine"] == {"top_k": 16} and content["stages"]["d"]["merge"] == {"a": 0.1, "c": 1.0}
    configs = {stage: config for stage, _, config in stage_configs(content)}
    assert configs["c"]["data"]["negatives"].endswith(f"/{name}/negatives.jsonl")


def test_mappings_and_lists_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "plain.yaml").write_text(words.dump(plain()))
    train = "{class_path: unimodal.data.CsvTable, init_args: {path: 2026-11-30, split: 007, captions: [no, 010]}}"
    arguments = ["--config", str(tmp_path / "plain.yaml"), "--data.train", train, "--seed_everything=false"]
    init_args = ConfigCheck(arguments, run=False).config.data.train.init_args
    assert (str(init_args.path), init_args.split, init_args.captions) == ("2026-11-30", "007", ["no", "010"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--seed_everything=2026-11-30", "schedule: seed_everything is '2026-11-30'"),
        ("--checkpoint_every=often", "schedule: checkpoint_every is 'often'"),
        ("--final.text_to_text=perhaps", "schedule: final.text_to_text is 'perhaps'"),
        ("--aims.t2i_r1_first=high", "schedule: aims is {'t2i_r1_first': 'high'}"),
        ("--data.batch_size=12:30:00", "data.batch_size"),
    ],
)
def test_settings_of_another_type(
    override: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, error = run(capsys, "fit", "--config", write(tmp_path, schedule()), override)
    assert status == 2 and message in error and len(error.splitlines()) < 8, error


@pytest.mark.parametrize("content", [schedule, table])
@pytest.mark.parametrize("given", [["--output"], ["--output="], ["--output", "--name=x"], ["--data.batch_size="]])
def test_an_override_without_a_value(
    content: Any, given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, error = run(capsys, "fit", "--config", write(tmp_path, content()), *given)
    if content is table and "=" not in given[0]:
        assert status == 2 and "output" in error  # a plain recipe has no such key
        return
    option = given[0].rstrip("=")
    assert status == 2 and error == f"unimodal fit: {option} has no value; write {option} VALUE\n"


@pytest.mark.parametrize(
    "verb",
    ["embed a.png --out=", "mine --data=", "survey --data x --out=", "data check x --split=", "doctor --config="],
)
def test_an_option_without_a_value(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, error = run(capsys, *verb.split())
    option = verb.split()[-1][:-1]
    assert status == 2 and error == f"unimodal {verb.split()[0]}: {option} has no value; write {option} VALUE\n"


@pytest.mark.parametrize("text", WORDS)
def test_words_of_a_plain_recipe(text: str, tmp_path: Path) -> None:
    (tmp_path / "plain.yaml").write_text(words.dump(table()).replace("split: train", f"split: {text}"))
    arguments = ["--config", str(tmp_path / "plain.yaml"), "--data.train.init_args.image", text]
    config = ConfigCheck([*arguments, "--trainer.gradient_clip_val=1e-3", "--seed_everything=false"], run=False).config
    init_args = config.data.train.init_args
    for value in (init_args.split, init_args.image):
        assert value == (None if text == "null" else text) and type(value) in (str, type(None))
    assert config.trainer.gradient_clip_val == 0.001


@pytest.mark.parametrize(("text", "size"), [("010", 10), ("1_000", 1000), ("0x10", 16)])
def test_numbers_of_a_plain_recipe(text: str, size: int, tmp_path: Path) -> None:
    for form in ("file", "override"):
        content = (
            words.dump(table()).replace("data:", f"data:\n  batch_size: {text}")
            if form == "file"
            else words.dump(table())
        )
        (tmp_path / "plain.yaml").write_text(content)
        given = [] if form == "file" else ["--data.batch_size", text]
        arguments = ["--config", str(tmp_path / "plain.yaml"), *given, "--seed_everything=false"]
        assert ConfigCheck(arguments, run=False).config.data.batch_size == size


def test_a_plain_recipe_is_printed_with_its_types(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = table()
    content["model"]["init_args"]["config"]["backbone"]["text"]["kwargs"] = {"a": [1, 0.5, {"b": "no", "c": None}]}
    file, given = write(tmp_path, content), ["--data.train.init_args.split=007", "--trainer.gradient_clip_val=1e-3"]
    status, output, _ = run(capsys, "fit", "--config", file, *given, "--print_config")
    printed = yaml.safe_load(output)
    assert status == 0 and printed["data"]["train"]["init_args"]["split"] == "007"
    assert printed["trainer"]["gradient_clip_val"] == 0.001 and printed["trainer"]["max_steps"] == 1
    config = printed["model"]["init_args"]["config"]
    assert config["bridge"] == content["model"]["init_args"]["config"]["bridge"]
    assert config["backbone"]["text"]["kwargs"] == {"a": [1, 0.5, {"b": "no", "c": None}]}


def test_words_of_a_system(tmp_path: Path) -> None:
    text = (systems_folder() / "clip.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(re.sub(r"^title: .*$", "title: 2026-11-30", text, flags=re.MULTILINE))
    assert read_spec(tmp_path / "mine.yaml").title == "2026-11-30"
