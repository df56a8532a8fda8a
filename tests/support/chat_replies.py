"""What a chat endpoint was sent, and its replies."""

import math

from http_server import picture


def chat(text, finish="stop", top=None):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    if top is not None:
        entries = [{"token": token, "logprob": math.log(p)} for token, p in top]
        choice["logprobs"] = {"content": [{"token": text, "logprob": -0.1, "top_logprobs": entries}]}
    return 200, {"id": "x", "object": "chat.completion", "choices": [choice]}


def images(payload):
    """The pictures of a request, in order."""
    parts = payload["messages"][-1]["content"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return [picture(url.removeprefix("data:image/png;base64,")) for url in urls]


def text_of(payload):
    return "\n".join(part["text"] for part in payload["messages"][-1]["content"] if part["type"] == "text")
