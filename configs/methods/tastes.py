"""The tastes of two users, for the recipe ppd: one likes bright pictures, the other one dark ones."""

SIGNS = {"bright": 1.0, "dark": -1.0}


def taste(frames, prompt, metadata):
    """Frames uint8 [1, H, W, 3] -> from -1 to 1: the mean brightness, as the user of the prompt likes it."""
    return SIGNS[metadata["likes"]] * (float(frames.mean()) / 127.5 - 1.0)
