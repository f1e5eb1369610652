"""YAML that anybody may have written: bounded, each mistake in one sentence with its line, pipes as good as files."""

import os

import pytest

from radargate_pl.cli import main
from radargate_pl.config_places import ConfigError
from radargate_pl.config_sources import find_config, setting_tree
from radargate_pl.config_yaml import MAX_BYTES, parse_yaml, read_yaml

TENS = ", ".join(["*a{}"] * 10)
LAUGHS = "a: &a0 [x, x]\n" + "".join(f"b{i}: &a{i} [{TENS.replace('{}', str(i - 1))}]\n" for i in range(1, 12))
MERGES = "a: &a0 {k: 1}\n" + "".join(f"b{i}: &a{i} {{<<: [{TENS.replace('{}', str(i - 1))}]}}\n" for i in range(1, 12))
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 150))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LAUGHS, "more than 100000 values"),
        (MERGES, "more than 100000 values"),
        (CHAIN, "more than 100 levels"),
        ("a: &a [*a]", "my.yaml:1: the alias stands inside its own anchor"),
        ("a: &a {b: {c: *a}}", "my.yaml:1: the alias stands inside its own anchor"),
        ("b: 1\na: &a {<<: *a}", "my.yaml:2: '<<' takes a mapping outside of itself"),
        ("a: {<<: 5}", "'<<' takes a mapping"),
        ("a: " + "[" * 3000 + "]" * 3000, "my.yaml:1: more than 100 levels"),
        ("\n".join(" " * depth + "a:" for depth in range(300)), "my.yaml:100: more than 100 levels"),
        ("a: 1\n[a, b]: x", "my.yaml:2: expected a name as the key, found a list"),
        ("? {a: b}\n: x", "my.yaml:1: expected a name as the key"),
        ("a: !!int 'x'", "my.yaml:1: 'x': is no int"),
        ("a: !!bool 'x'", "my.yaml:1: 'x': is no bool"),
        ("a: !!timestamp x", "the tag '!!timestamp' is not known"),
        ("a: !!set {b, c}", "the tag '!!set' is not known"),
        ("a: !!str {b: c}", "the tag '!!str' does not fit"),
        ("a: !env HOME", "the tag '!env' is not known"),
        ("a: !!python/object/apply:os.system ['ls']", "the tag '!!python/object/apply:os.system' is not known"),
        ("a: " + "1" * 6000, "the number has 6000 digits"),
        ("a:\n  ? " + "1" * 6000 + "\n  : x", "my.yaml:2: '1111"),
        ("no: x", "my.yaml:1: the key no means true or false in YAML; as a name write it in quotes: 'no'"),
        ("a: {on: x}", "the key on means true or false"),
        ("~: x", "my.yaml:1: the key ~ means nothing in YAML"),
        ("1.5: x", "the key 1.5 means a number"),
        ("a: 1e400", "my.yaml:1: '1e400': too large for a number"),
        ("a: 1\nb: \x01", "in line 2"),
        ("a: 1\n---\nb: 2", "my.yaml:2:1: not valid YAML: expected a single document"),
        ("a: &a {x: 1, x: 2}\nb: {<<: *a}", "my.yaml:1: the key 'x' is given twice, first in line 1"),
    ],
)
def test_what_no_configuration_can_hold(text, expected):
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "my.yaml")
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 300
    assert len(caught.value.mistakes) == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: &a {x: 1, y: 3}\nb: {<<: *a, x: 2}", {"a": {"x": 1, "y": 3}, "b": {"x": 2, "y": 3}}),
        ("a: &a {x: 1}\nb: &b {x: 2, z: 0}\nc: {<<: [*a, *b]}", {"c": {"x": 1, "z": 0}}),
        ("a: {0: 4, 8: 2}", {"a": {0: 4, 8: 2}}),
        ("a: 1:00:00:00\nb: 1:30.5", {"a": "1:00:00:00", "b": "1:30.5"}),
        ("a: 1e-3\nb: 2026-01-01\nc: .inf", {"a": 1e-3, "b": "2026-01-01", "c": float("inf")}),
        ('{\n\t"a": 1,\n\t"b": "x\\ty"\n}', {"a": 1, "b": "x\ty"}),
        ("'no': 1\n'1': 2", {"no": 1, "1": 2}),
    ],
)
def test_what_it_can(text, value):
    found = parse_yaml(text, "my.yaml").plain()
    assert {key: found[key] for key in value} == value


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_byte_order_marks_and_line_ends(tmp_path, codec):
    text = "model:\r\n  a: ö\r\n"
    mark = "\ufeff" if codec in ("utf-16-le", "utf-16-be") else ""
    (tmp_path / "my.yaml").write_bytes((mark + text).encode(codec))
    assert read_yaml(tmp_path / "my.yaml", "my.yaml").plain() == {"model": {"a": "ö"}}


def test_bytes_and_sizes(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_bytes(b"a: 1\nb: \xe9\n")
    with pytest.raises(ConfigError, match=r"my.yaml: cannot be read: 'utf-8' codec .* \(line 2\). Save it as UTF-8."):
        read_yaml(path, "my.yaml")
    with path.open("wb") as file:
        file.truncate(100 * MAX_BYTES)
    with pytest.raises(ConfigError, match=r"my.yaml: is larger than 2097152 bytes"):
        read_yaml(path, "my.yaml")
    path.write_text("# nothing\n")
    assert read_yaml(path, "my.yaml").plain() == {}


def test_a_pipe_is_a_file_and_a_folder_is_none(tmp_path):
    reading, writing = os.pipe()
    os.write(writing, b"trainer: {max_steps: 3}\n")
    os.close(writing)
    name = f"/dev/fd/{reading}"
    assert read_yaml(find_config(name), name).plain() == {"trainer": {"max_steps": 3}}
    os.close(reading)
    (tmp_path / "a.yaml").touch()
    with pytest.raises(ConfigError, match=r"is a folder; give a file: .*a.yaml\."):
        find_config(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{no: x}", "command line: --data.tasks: the key no means true or false"),
        ("{a: &a [*a]}", "command line: --data.tasks: the alias stands inside its own anchor"),
        ("[" * 3000, "command line: --data.tasks: more than 100 levels"),
        ("{a: 1, a: 2}", "command line: --data.tasks: the key 'a' is given twice"),
    ],
)
def test_typed_on_the_command_line(text, expected):
    with pytest.raises(ConfigError) as caught:
        setting_tree("data.tasks", text)
    assert str(caught.value).startswith(expected)
    assert setting_tree("a", "[INST] {source}").plain() == {"a": "[INST] {source}"}


def test_names_that_are_numbers_and_variables(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = """\
trainer:
  default_root_dir: runs/${SLURM_JOB_ID}
data:
  init_args:
    tasks: {1: data/a.jsonl}
    prompt: "{source} costs ${PRICE}"
"""
    (tmp_path / "my.yaml").write_text(text)
    words = ["fit", "--config", "configs/debug.yaml", "--config", "my.yaml", "--data.tasks", "{2: b}"]
    assert main(words) == 2
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "radargate: 3 mistakes in the configuration:",
        "my.yaml:2: trainer.default_root_dir: ${SLURM_JOB_ID} is not filled in here; give the value on the command "
        'line in double quotes, where the shell does it: --trainer.default_root_dir "runs/${SLURM_JOB_ID}"',
        "my.yaml:5: data.init_args.tasks: the key 1 is a number; as a name write it in quotes: '1'",
        "command line: --data.tasks: the key 2 is a number; as a name write it in quotes: '2'",
    ]
    (tmp_path / "steps.yaml").write_text(
        "trainer: {callbacks: [{class_path: GradientAccumulationScheduler, init_args: {scheduling: {0: 2}}}]}"
    )
    assert main([*words[:3], "--config", "steps.yaml", "--print_config"]) == 0
