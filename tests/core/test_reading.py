"""Text, JSON and YAML that others have written: read, or one error with the file's name, whatever is in it."""

import pytest

from pipeline.core.errors import InputError
from pipeline.core.reading import (
    check_plain,
    decode,
    parse_json,
    parse_yaml,
    read_bytes,
    read_text,
    shown,
    storable,
    text_lines,
    yaml_keys,
)

DEEP = 2000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": }', "not valid JSON .*column 7"),
        ('{"a": 1, "a": 2}', "key 'a' twice"),
        ('{"a": [{"b": 1, "b": 1}]}', "key 'b' twice"),
        ("9" * 5000, "5000 digits"),
        ("-" + "9" * 5000, "5000 digits"),
        ('{"a": 1e400}', "1e400"),
        ("1" + "0" * 400 + ".5", "beyond what a float"),
        ('{"a": 18446744073709551616}', "20 digits"),
        ("[" * DEEP + "]" * DEEP, "nested more than"),
        ("[" * 60 + "]" * 60, "nested more than"),
        ('{"a":' * DEEP + "1" + "}" * DEEP, "nested more than"),
        ('"\\ud83d"', "half a character"),
        ('{"\\udc00": 1}', "half a character"),
        ('["\\uD83D\\u0041"]', "half a character"),
        ("NaN", "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ("", "not valid JSON"),
        (b"\xff\xfe\x00", "UTF-16"),
        (b'"\xe9"', "not UTF-8"),
    ],
)
def test_json_that_is_refused(text, message):
    with pytest.raises(InputError, match=f"^file: .*{message}"):
        parse_json(text, "file", "write it again")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('"\\ud83d\\ude00"', "\U0001f600"),
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        ("18446744073709551615", 2**64 - 1),
        ("-9223372036854775808", -(2**63)),
        ('"' + "9" * 5000 + '"', "9" * 5000),
        ("[" * 40 + "]" * 40, None),
        ('{"a": 1.5e-300}', {"a": 1.5e-300}),
    ],
)
def test_json_that_is_read(text, value):
    parsed = parse_json(text, "file", "write it again")
    assert value is None or parsed == value


def test_lenient_json_reads_what_other_libraries_write():
    text = '{"model_max_length": 1000000000000000019884624838656, "sigma": Infinity}'
    assert parse_json(text, "file", "", lenient=True)["model_max_length"] > 10**30
    with pytest.raises(InputError, match="5000 digits"):
        parse_json("9" * 5000, "file", "", lenient=True)


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "aliases unfolded"),
        ("a: &a [*a]\n", "contains itself"),
        ("a: &a {b: *a}\n", "contains itself"),
        ("a: !!python/name:os.system\n", "the tag"),
        ("a: !!binary aGk=\n", "the tag"),
        ("a: !!timestamp 2026-13-45\n", "the tag"),
        ("a: !!set {x}\n", "the tag"),
        ("a: !mine 1\n", "the tag"),
        ("a: !!int x\n", "cannot be read"),
        ("a: !!float x\n", "cannot be read"),
        ("a: " + "9" * 5000, "5000 characters"),
        ("[" * DEEP + "]" * DEEP, "nested more than"),
        ("{a: " * 60 + "1" + "}" * 60, "nested more than"),
        ("? [1, 2]\n: 3\n", "plain text"),
        ("a: \ud83d\n", "half a character"),
        ('a: "\\ud83d"\n', "half a character"),
        ("a: [1", "not valid YAML"),
        ("a: *b\n", "not valid YAML"),
        ("a\x00: 1", "not valid YAML"),
        ("--- 1\n--- 2\n", "not valid YAML"),
    ],
)
def test_yaml_that_is_refused(text, message):
    with pytest.raises(InputError, match=f"^file.*{message}"):
        parse_yaml(text, "file")


@pytest.mark.parametrize("text", ["a: 2026-13-45", "a: 2026-01-02", "a: 99999-01-01T00:00:00Z"])
def test_a_date_is_text(text):
    assert parse_yaml(text, "file")[0] == {"a": text[3:]}


def test_an_alias_is_read_and_a_doubled_key_refused():
    assert parse_yaml("a: &x {b: 1e-4}\nc: *x\n", "file")[0]["c"] == {"b": 1e-4}
    _, node = parse_yaml("a:\n  b: 1\n  b: 2\n", "file")
    with pytest.raises(InputError, match="file:3: a.b is given twice"):
        yaml_keys(node, "file")


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_lines_end_as_any_system_ends_them(tmp_path, end):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + end.join([b"one", b"two", b"", b"three"]))
    assert list(text_lines(tmp_path / "a.txt")) == [(1, "one"), (2, "two"), (3, ""), (4, "three")]


def test_a_file_is_read_within_a_limit_and_only_if_regular(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"12345")
    assert read_bytes(file, 5) == b"12345"
    with pytest.raises(InputError, match="larger than"):
        read_bytes(file, 4)
    with pytest.raises(InputError, match="folder"):
        read_bytes(tmp_path, 4)
    with pytest.raises(InputError, match="no such file"):
        read_bytes(tmp_path / "none", 4)
    with pytest.raises(InputError, match="device"):
        read_text("/dev/zero")


def test_text_for_tables_and_messages():
    assert decode(b"\xef\xbb\xbfa", "x") == "a"
    assert storable("caf\udce9") == "caf\\udce9"
    assert shown(b"\x89PNG" * 9) == "36 bytes" and shown(10**6000).startswith("a number")
    with pytest.raises(ValueError, match="date"):
        import datetime

        check_plain({"when": [datetime.date(2026, 1, 1)]})
