"""P(yes) by transformers alone, one conversation at a time: run with .venv-vllm's python by test_vllm_live.py.

Reads {"model": folder, "jobs": [{"frames": npy [K, F, H, W, 3], "system": …, "questions": […]}]} from standard input
and writes K probabilities for each job: of the tokens whose text is yes or Yes, against those and no or No.
"""

import json
import sys

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

asked = json.load(sys.stdin)
processor = AutoProcessor.from_pretrained(asked["model"])
model = Qwen2_5_VLForConditionalGeneration.from_pretrained(asked["model"], dtype=torch.float32).eval()
ids = processor.tokenizer.convert_tokens_to_ids(["yes", "Yes", "no", "No"])


def chances(job):
    found = []
    for take, question in zip(np.load(job["frames"]), job["questions"], strict=True):
        pictures = [Image.fromarray(frame) for frame in take]
        content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": question}]
        messages = [{"role": "system", "content": job["system"]}, {"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = processor(text=[text], images=pictures, return_tensors="pt")
        with torch.inference_mode():
            likely = model(**inputs).logits[0, -1].double().log_softmax(-1)[ids].exp()
        found.append(float(likely[:2].sum() / likely.sum()))
    return found


print(json.dumps([chances(job) for job in asked["jobs"]]))
