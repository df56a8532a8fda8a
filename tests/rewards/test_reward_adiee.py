"""ADIEE on a small random LLaVA-NeXT against transformers' generation, an edit at a time; and the usual mistakes."""

import json
import re

import numpy as np
import pytest
import tiny_rewards as tiny
import torch
from PIL import Image
from reward_math import run
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    AutoImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    Qwen2Tokenizer,
)

from pipeline.core.errors import InputError, RewardError
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.scorers import adiee

TEMPLATE = (
    "{% for message in messages %}<|user|>\n{% for c in message['content'] %}{% if c['type'] == 'image' %}<image>\n"
    "{% endif %}{% endfor %}{% for c in message['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}"
    "{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
WORDS = ["<|end|>", "<|user|>", "<|assistant|>", "<image>", adiee.TOKEN]


def old_name(name):
    """A weight's name as transformers 4 saved it."""
    name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
    name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
    name = re.sub(r"^model\.vision_tower\.", "vision_tower.vision_model.", name)
    return re.sub(r"^model\.", "", name)


def save(folder, model, head, tokens, named, shards):
    """Weights under `vlm.`, as ADIEE's class saves them."""
    model.config.save_pretrained(folder)
    tokens.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=[[28, 56], [56, 56]]
    ).save_pretrained(folder)
    state = {f"vlm.{named(k)}": v.contiguous() for k, v in model.state_dict().items()}
    state |= {f"score_decoder.{k}": v for k, v in head.state_dict().items()}
    names = sorted(state)
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    places = {name: f"model-{i % shards + 1}.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        part = {name: state[name] for name in names if places[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def parts():
    """The model, the head of three classes, and the tokenizer."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Qwen2Tokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    tokens.add_tokens(WORDS, special_tokens=True)
    tokens.eos_token = "<|end|>"
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
                              image_size=28, patch_size=14)  # fmt: skip
    text = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                       num_key_value_heads=1, vocab_size=len(tokens), max_position_embeddings=512)  # fmt: skip
    config = LlavaNextConfig(vision_config=vision, text_config=text, image_grid_pinpoints=[[28, 56], [56, 56]],
                             image_token_index=tokens.convert_tokens_to_ids("<image>"))  # fmt: skip
    model = tiny.spread(LlavaNextForConditionalGeneration(config), 0, std=0.2)
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 16), nn.ReLU(), nn.Linear(16, 3))
    nn.init.normal_(head[-1].weight, std=3.0)
    return model.eval(), head, tokens


def talkative(parts, tmp, media, prompts):
    """Makes the model say the score token: its row of the output layer lies along the states it speaks from."""
    model, _, tokens = parts
    rows = torch.cat([steps(parts, tmp, m, p)[1] for m, p in zip(media, prompts, strict=True)])
    with torch.no_grad():
        row = rows.mean(0)
        model.lm_head.weight[tokens.convert_tokens_to_ids(adiee.TOKEN)] = 30 * row / row.norm()


def steps(parts, folder, frame, prompt, joined=None, question=None):
    """(ids [T], states [T, D]) of transformers' own generation for one edit."""
    model, _, tokens = parts
    processor = LlavaNextProcessor(
        image_processor=AutoImageProcessor.from_pretrained(folder, backend="pil"), tokenizer=tokens,
        chat_template=TEMPLATE, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    text = (question or adiee.QUESTION).replace("{instruction}", prompt.text)
    content = [{"type": "image"}, {"type": "text", "text": text}]
    chat = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    before = Image.open(prompt.image).convert("RGB")
    picture = (joined or beside)(before, Image.fromarray(frame))
    inputs = processor(text=chat, images=picture, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=8, num_beams=1, do_sample=False, output_hidden_states=True,
                         return_dict_in_generate=True)  # fmt: skip
    states = torch.cat([hidden[-1][:, -1] for hidden in out.hidden_states])
    return out.sequences[0, -len(states) :], states


def beside(before, after, order=1, side=512):
    picture = Image.new("RGB", (2 * side, side))
    for i, one in enumerate((before, after)[::order]):
        picture.paste(one.resize((side, side)), (i * side, 0))
    return picture


def expected(parts, folder, media, prompts, pick=-1, shift=0, **mistake):
    model, head, tokens = parts
    rows = []
    for frame, prompt in zip(media.frames[:, 0], prompts, strict=True):
        ids, states = steps(parts, folder, frame, prompt, **mistake)
        at = (ids == tokens.convert_tokens_to_ids(adiee.TOKEN)).nonzero()[pick, 0]
        rows.append(head(states[at + shift]).softmax(-1) @ torch.tensor([0.0, 5.0, 10.0]))
    return torch.stack(rows).detach().numpy()


@pytest.fixture(scope="module")
def edits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edits")
    rng = np.random.default_rng(0)
    prompts = []
    for i, (text, size) in enumerate((("make it red", (40, 30)), ("ein Hut", (20, 60)), ("猫", (64, 64)))):
        Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)).save(folder / f"{i}.png")
        prompts.append(PromptItem(index=i, text=text, image=str(folder / f"{i}.png")))
    frames = rng.integers(0, 256, (3, 1, 36, 52, 3)).astype(np.uint8)
    frames[1, 0, :, :20], frames[2] = 255, frames[2] // 3
    return Media(frames=frames, fps=1.0), prompts


@pytest.fixture(scope="module")
def checkpoint(parts, edits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adiee")
    model, head, tokens = parts
    save(folder, model, head, tokens, lambda name: name, 1)
    media, prompts = edits
    talkative(parts, folder, media.frames[:, 0], prompts)
    save(folder, model, head, tokens, lambda name: name, 1)
    return folder


def score(folder, media, prompts, **args):
    return run("adiee", media, prompts, model=str(folder), dtype="float32", **args)


def test_adiee_is_the_published_inference_and_the_usual_mistakes_are_not(parts, checkpoint, edits):
    media, prompts = edits
    right = expected(parts, checkpoint, media, prompts)
    result = score(checkpoint, media, prompts, batch=2)
    np.testing.assert_allclose(result.values, right, atol=1e-4)
    assert np.ptp(right) > 0.01
    mistakes = {
        "result first": {"joined": lambda a, b: beside(a, b, order=-1)},
        "the result alone": {"joined": lambda a, b: beside(b, b)},
        "another wording": {"question": 'Please rate how successful the edit instruction "{instruction}" has been.'},
        "the state of the token before": {"shift": -1},
        "the first of several": {"pick": 0},
    }
    for name, mistake in mistakes.items():
        assert np.abs(expected(parts, checkpoint, media, prompts, **mistake) - right).max() > 1e-3, name


@pytest.mark.parametrize("named, shards", [(old_name, 2), (lambda name: name, 3)])
def test_checkpoints_of_old_and_new_transformers_in_one_file_or_several(
    parts, checkpoint, edits, tmp_path, named, shards
):
    media, prompts = edits
    save(tmp_path, *parts, named, shards)
    np.testing.assert_allclose(
        score(tmp_path, media, prompts).values, score(checkpoint, media, prompts).values, atol=1e-5
    )


def test_the_last_score_token_of_an_answer_counts():
    said = torch.tensor([[0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]).bool()
    assert adiee.last_true(said).tolist() == [1, 2, 3]


def test_one_output_is_the_score_itself(parts, checkpoint, edits, tmp_path):
    model, head, tokens = parts
    single = nn.Sequential(*head[:4], nn.Linear(16, 1))
    save(tmp_path, model, single, tokens, lambda name: name, 1)
    media, prompts = edits
    ids, states = steps(parts, checkpoint, media.frames[0, 0], prompts[0])
    at = (ids == tokens.convert_tokens_to_ids(adiee.TOKEN)).nonzero()[-1, 0]
    first = score(tmp_path, Media(frames=media.frames[:1], fps=1.0), prompts[:1]).values
    np.testing.assert_allclose(first, single(states[at]).detach().numpy(), atol=1e-4)


def test_what_cannot_be_scored_fails(parts, checkpoint, edits, tmp_path):
    media, prompts = edits
    one = Media(frames=media.frames[:1], fps=1.0)
    with pytest.raises(RewardError, match="prompt 0 has no image"):
        score(checkpoint, one, [PromptItem(index=0, text="a")])
    with pytest.raises(RewardError, match="holds <image>, which steers"):
        score(checkpoint, one, [PromptItem(index=0, text="an <image>", image=prompts[0].image)])
    model, head, tokens = parts
    row = model.lm_head.weight[tokens.convert_tokens_to_ids(adiee.TOKEN)].clone()
    with torch.no_grad():
        model.lm_head.weight[tokens.convert_tokens_to_ids(adiee.TOKEN)] = 0
        save(tmp_path, model, head, tokens, lambda name: name, 1)
        model.lm_head.weight[tokens.convert_tokens_to_ids(adiee.TOKEN)] = row
    with pytest.raises(RewardError, match=r"has no \[SCORE\]"):
        score(tmp_path, one, prompts[:1])
    save(tmp_path, model, nn.Linear(2, 2), tokens, lambda name: name, 1)
    with pytest.raises(InputError, match="not a checkpoint of ADIEE"):
        score(tmp_path, one, prompts[:1])
