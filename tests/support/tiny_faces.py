"""A face detector and a face embedder small enough to know by heart, as ONNX files that OpenCV reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np

# What a face is here: a red square of 8 x 8 pixels on the detector's grid. Its box and landmarks lie around it.
BOX = 48.0
LANDMARKS = np.array([[-1.5, -1.0], [1.5, -1.2], [0.1, 0.2], [-1.1, 1.6], [1.2, 1.5]])  # in cells of 8 pixels


def field(number: int, value) -> bytes:
    """One protobuf field: an int, a str, or bytes (also of an inner message)."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def tensor(name: str, values: np.ndarray) -> bytes:
    kind = {np.dtype(np.float32): 1, np.dtype(np.int64): 7}[values.dtype]
    dims = b"".join(field(1, size) for size in values.shape)
    return dims + field(2, kind) + field(8, name) + field(9, values.tobytes())


def node(kind: str, inputs: list[str], output: str, **ints: list[int]) -> bytes:
    made = b"".join(field(1, name) for name in inputs) + field(2, output) + field(4, kind)
    for name, values in ints.items():
        made += field(5, field(1, name) + b"".join(field(8, v) for v in values) + field(20, 7))
    return made


def value(name: str, shape: list[int | str]) -> bytes:
    dims = b"".join(field(1, field(1, s) if isinstance(s, int) else field(2, s)) for s in shape)
    return field(1, name) + field(2, field(1, field(1, 1) + field(2, dims)))


def save(path: Path, nodes: list[bytes], weights: dict[str, np.ndarray], inputs: list[bytes], outputs: list[bytes]):
    graph = b"".join(field(1, n) for n in nodes) + field(2, "g")
    graph += b"".join(field(5, tensor(name, v)) for name, v in weights.items())
    graph += b"".join(field(11, v) for v in inputs) + b"".join(field(12, v) for v in outputs)
    path.write_bytes(field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 13)))


def detector(path: Path) -> Path:
    """YuNet's interface: per stride a class, an object, a box (4) and landmarks (10). Only stride 8 finds anything."""
    nodes, weights, outputs = [], {}, []
    parts = {"cls": 1, "obj": 1, "bbox": 4, "kps": 10}
    for stride in (8, 16, 32):
        for part, size in parts.items():
            name = f"{part}_{stride}"
            w, b = np.zeros((size, 3, stride, stride), np.float32), np.zeros(size, np.float32)
            if part in ("cls", "obj"):
                b[:] = -20.0
                if stride == 8:  # the mean of red - green - blue; OpenCV hands over BGR from 0 to 255
                    w[0, 2], w[0, :2] = 0.2 / 64, -0.2 / 64
            elif part == "bbox":
                b[:] = (0.5, 0.5, np.log(BOX / 8), np.log(BOX / 8))
                w[2:, 0] = 0.02 / stride**2  # the more blue, the larger the face
            else:
                b[:] = (LANDMARKS + 0.5).reshape(-1)
            weights |= {f"{name}_w": w, f"{name}_b": b, f"{name}_s": np.array([1, -1, size], np.int64)}
            nodes.append(node("Conv", ["input", f"{name}_w", f"{name}_b"], f"{name}_c", strides=[stride, stride]))
            last = f"{name}_c"
            if part in ("cls", "obj"):
                nodes.append(node("Sigmoid", [last], f"{name}_g"))
                last = f"{name}_g"
            nodes.append(node("Transpose", [last], f"{name}_t", perm=[0, 2, 3, 1]))
            nodes.append(node("Reshape", [f"{name}_t", f"{name}_s"], name))
            outputs.append(value(name, [1, "n", size]))
    save(path, nodes, weights, [value("input", [1, 3, "h", "w"])], outputs)
    return path


def embedder(path: Path, seed: int = 0) -> tuple[Path, np.ndarray, np.ndarray]:
    """Convolution of 28 x 28 blocks, ReLU, flat: [1, 3, 112, 112] -> [1, 128]. Returns its weights as well."""
    rng = np.random.default_rng(seed)
    w = (rng.normal(size=(8, 3, 28, 28)) / 28).astype(np.float32)
    b = rng.normal(size=8).astype(np.float32)
    nodes = [
        node("Conv", ["data", "w", "b"], "c", strides=[28, 28]),
        node("Relu", ["c"], "r"),
        node("Reshape", ["r", "s"], "fc1"),
    ]
    weights = {"w": w, "b": b, "s": np.array([1, 128], np.int64)}
    save(path, nodes, weights, [value("data", [1, 3, 112, 112])], [value("fc1", [1, 128])])
    return path, w, b
