"""Prompt sets and the cursor."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import CheckpointError, InputError
from pipeline.core.prompts import PromptCursor, check_prompt_lengths, load_prompts


def write(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_txt_keeps_lines_verbatim(tmp_path):
    items = load_prompts(write(tmp_path, "p.txt", "# a red cross\n\n  two spaces \r\nДва круга\n"))
    assert [p.text for p in items] == ["# a red cross", "  two spaces ", "Два круга"]
    assert [p.index for p in items] == [0, 1, 2]


def test_jsonl_and_parquet_agree(tmp_path):
    write(tmp_path, "cat.png", b"x")
    rows = [
        {"prompt": "a", "negative": "b", "image": "cat.png", "metadata": {"n": 1}},
        {"prompt": "c", "negative": None, "image": None, "metadata": {"k": "v"}},
    ]
    from_json = load_prompts(write(tmp_path, "p.jsonl", "\n".join(json.dumps(r) for r in rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    from_parquet = load_prompts(tmp_path / "p.parquet")
    pq.write_table(
        pa.Table.from_pylist([{**r, "metadata": json.dumps(r["metadata"])} for r in rows]), tmp_path / "q.parquet"
    )
    assert from_json == from_parquet == load_prompts(tmp_path / "q.parquet")
    assert from_json[0].image == str(tmp_path / "cat.png") and from_json[0].metadata == {"n": 1}


@pytest.mark.parametrize(
    "name, data, parts",
    [
        ("p.csv", "a", [".csv"]),
        ("p.txt", "", ["holds no prompts"]),
        ("p.txt", "\n \n", ["holds no prompts"]),
        ("p.txt", b"fine\n\xff\xfe\n", ["line 2", "UTF-8"]),
        ("p.txt", "ok\n" + "x" * 10_000, ["line 2", "10,000 characters", "4,000", "shorten"]),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": }\n', ["line 2", "not valid JSON"]),
        ("p.jsonl", '"a"\n', ["line 1", "not a JSON object"]),
        ("p.jsonl", '{"text": "a"}\n', ["line 1", "'text'"]),
        ("p.jsonl", '{"negative": "a"}\n', ["line 1", "'prompt' is missing"]),
        ("p.jsonl", '\n{"prompt": "  "}\n', ["line 2", "empty"]),
        ("p.jsonl", '{"prompt": 3}\n', ["line 1", "must be text"]),
        ("p.jsonl", '{"prompt": "a", "negativ": "b"}\n', ["line 1", "did you mean negative?"]),
        ("p.jsonl", '{"prompt": "a", "image": "no.png"}\n', ["line 1", "no.png", "not there"]),
        ("p.jsonl", '{"prompt": "a", "metadata": 3}\n', ["line 1", "metadata"]),
        ("p.parquet", b"PAR1 nonsense", ["cannot be read as parquet"]),
    ],
)
def test_wrong_files_name_file_and_line(tmp_path, name, data, parts):
    with pytest.raises(InputError) as caught:
        load_prompts(write(tmp_path, name, data))
    for part in [name, *parts]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_suggests_the_neighbour(tmp_path):
    write(tmp_path, "train.txt", "a")
    with pytest.raises(InputError, match=r"trian.txt: no such prompts file; did you mean train.txt\?"):
        load_prompts(tmp_path / "trian.txt")


def test_parquet_without_prompt_column(tmp_path):
    pq.write_table(pa.table({"caption": ["a"]}), tmp_path / "p.parquet")
    with pytest.raises(InputError, match="no column 'prompt'.*caption"):
        load_prompts(tmp_path / "p.parquet")


def checkpoint(tmp_path, folders):
    from tokenizers import Tokenizer, models, pre_tokenizers

    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    for name, settings in folders.items():
        folder = tmp_path / name
        folder.mkdir()
        tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.enable_truncation(3)
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(tmp_path)


def test_prompts_that_would_be_cut_are_refused(tmp_path):
    folder = checkpoint(tmp_path, {"tokenizer": {"model_max_length": 8}})
    path = write(tmp_path, "p.txt", "a a\n\n" + "a " * 9)
    prompts = load_prompts(path)
    check_prompt_lengths(prompts[:1], folder, {})
    with pytest.raises(InputError, match="p.txt, line 3: .*9 tokens.*reads 8"):
        check_prompt_lengths(prompts, folder, {}, path)
    with pytest.raises(InputError, match="reads 1"):
        check_prompt_lengths(prompts[:1], folder, {"max_sequence_length": 1})


def test_one_encoder_that_reads_it_all_is_enough(tmp_path):
    folder = checkpoint(
        tmp_path,
        {
            "tokenizer": {"model_max_length": 8, "tokenizer_class": "CLIPTokenizer"},
            "tokenizer_2": {"model_max_length": 512, "tokenizer_class": "T5TokenizerFast"},
        },
    )
    prompts = load_prompts(write(tmp_path, "p.txt", "a " * 9))
    check_prompt_lengths(prompts, folder, {"max_sequence_length": 16})
    with pytest.raises(InputError, match="9 tokens"):
        check_prompt_lengths(prompts, folder, {"max_sequence_length": 8})


def test_cursor_visits_everything_once_an_epoch_and_resumes_exactly(tmp_path):
    prompts = load_prompts(write(tmp_path, "p.txt", "\n".join(f"prompt {i}" for i in range(7))))
    cursor = PromptCursor(prompts, seed=3)
    seen = [cursor.next().index for _ in range(10)]
    state = json.loads(json.dumps(cursor.state()))
    rest = [cursor.next().index for _ in range(20)]
    assert sorted(seen[:7]) == list(range(7)) and sorted((seen + rest)[7:14]) == list(range(7))
    assert seen[:7] != (seen + rest)[7:14]  # a new order each epoch
    other = PromptCursor(prompts, seed=3)
    other.load_state(state)
    assert [other.next().index for _ in range(20)] == rest
    expected = np.random.Generator(np.random.PCG64(np.random.SeedSequence([3, 0]))).permutation(7)
    assert seen[:7] == expected.tolist()


def test_a_cursor_refuses_the_state_of_other_prompts_or_of_another_seed(tmp_path):
    prompts = load_prompts(write(tmp_path, "p.txt", "a\nb\nc"))
    cursor = PromptCursor(prompts, seed=0)
    assert sorted(cursor.next().text for _ in range(3)) == ["a", "b", "c"]
    with pytest.raises(CheckpointError, match="prompts changed"):
        PromptCursor(prompts[:2], seed=0).load_state(cursor.state())
    with pytest.raises(CheckpointError, match="seed"):
        PromptCursor(prompts, seed=1).load_state(cursor.state())
